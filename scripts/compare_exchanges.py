"""Every way to spread the model that ships, held against a dense NumPy model, side by side.

    python scripts/compare_exchanges.py                     # a covering choice for devices 16
    python scripts/compare_exchanges.py --all --tokens-only \
        --on devices:16 devices:160 lanes:320 lanes:384 lanes:768

A way is an exchange, the type on the wire, a placement (experts once each; or 32 copies of the shared
expert and redundant replicas, rebalanced while serving), microbatches, MTP drafts or none. The covering
choice has every pair of values of any two of them. For each: whether the greedy tokens are the reference's
(float32 wires must give them), how often the next token agrees when the text is given, the largest
difference of a logit, rounds, bytes, acceptance, and the time of a step. `--tokens-only` leaves out what
takes programs and runs of its own: agreement, logits and times.
"""

import argparse
import itertools
import json
import pydoc_data.topics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import cmx_jax
from cmx_jax.mesh import request_devices
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import locate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference.dense import greedy, logits

PROMPTS = ("The json module", "A dictionary is", "Return a list of", "Open a file")
CHOICES: dict[str, tuple[Any, ...]] = {
    "exchange": ("flat", "hierarchical", "allgather"),
    "wire": ("float32", "bfloat16", "int8"),
    "placement": ("even", "replicas"),
    "microbatches": (1, 2),
    "drafts": (0, 1),
}
EXPERTS, SHARED = 256, 32


def ways(everything: bool) -> list[dict[str, Any]]:
    """All combinations, or few that have every pair of values of any two choices."""
    combinations = [
        dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
    ]
    if everything:
        return combinations

    def pairs(way: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(way.items(), 2))

    left, chosen = set().union(*map(pairs, combinations)), []
    while left:
        chosen.append(max(combinations, key=lambda way: len(pairs(way) & left)))
        left -= pairs(chosen[-1])
    return chosen


def slots(placement: str, ranks: int) -> dict[str, int]:
    """Fields of the layout: 256 + 32 + 32 slots where ranks divide 320, else the next multiple of ranks."""
    if placement == "even":
        return {}
    total = -(-(EXPERTS + 2 * SHARED) // ranks) * ranks
    return {
        "shared_slots": SHARED,
        "redundant_slots": total - EXPERTS - SHARED,
        "eplb_interval": 4,
    }


def reference(tokens: int) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """The prompts, their greedy continuations, and the logits of the first text."""
    model = cmx_jax.from_pretrained("tiny", ranks=1).model
    prompts = [model.encode(prompt) for prompt in PROMPTS]
    texts = [list(greedy(locate("tiny"), prompt, tokens)) for prompt in prompts]
    return prompts, texts, logits(locate("tiny"), np.asarray(prompts[0] + texts[0]))


def measure(way: dict[str, Any], kind: str, ranks: int, known: Any, tokens_only: bool) -> dict[str, Any]:
    """One way on one machine."""
    prompts, texts, scores = known
    rows = max(len(prompts), way["microbatches"])
    llm = cmx_jax.from_pretrained(
        "tiny",
        runner=kind,
        ranks=ranks,
        exchange=way["exchange"],
        wire=way["wire"],
        microbatches=way["microbatches"],
        num_speculative_tokens=way["drafts"],
        max_num_seqs=rows,
        max_model_len=64,
        **slots(way["placement"], ranks),
    )
    began = time.perf_counter()
    found = [c.tokens for c in llm.generate(prompts, max_new_tokens=len(texts[0]), ignore_eos=True)]
    first = time.perf_counter() - began
    seen = llm.instance.exchange_bytes()
    row = {
        "on": f"{kind}:{ranks}",
        **way,
        "tokens_equal": found == texts,
        "rounds_most": seen["rounds_most"],
        "dispatch_bytes": seen["dispatch_bytes"],
        "acceptance": seen.get("acceptance"),
        "moved": sum(move.moved for move in llm.moves),
        "balance": [round(move.after, 3) for move in llm.moves],
        "first_s": round(first, 1),
    }
    if tokens_only:
        return row
    given = llm.logits(np.asarray([prompts[0] + texts[0]], np.int32))[0]
    return row | {
        "agreement": float((given.argmax(-1) == scores.argmax(-1)).mean()),
        "logit_error": float(np.abs(given - scores).max()),
        "step_ms": round(1e3 * again(llm, prompts), 1),
    }


def line(row: dict[str, Any]) -> str:
    """One way as one line."""
    way = "{on:<12} {exchange:<13} {wire:<9} {placement:<9} mb {microbatches} mtp {drafts}: "
    did = "{tokens_equal!s:<5} rounds {rounds_most} {dispatch_bytes:>7.0f} B first {first_s:>5} s"
    text = (way + did).format(**row)
    if "agreement" in row:
        text += ", agree {agreement:.3f} error {logit_error:.1e} {step_ms:>6.1f} ms a step".format(**row)
    return text


def wires(text: str, tokens: int = 256) -> list[dict[str, Any]]:
    """What each wire does to the next tokens of a given text, on 8 lanes.

    Top-1 agreement with float32, and the mean Kullback-Leibler divergence from it in nats.
    """
    found: list[dict[str, Any]] = []
    exact = None
    for wire in CHOICES["wire"]:
        llm = cmx_jax.from_pretrained("tiny", wire=wire)
        ids = llm.model.encode(text)[: 8 * tokens]
        rows = np.asarray(ids[: len(ids) // tokens * tokens], np.int32).reshape(-1, tokens)
        scores = llm.logits(rows).astype(np.float64)
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        exact = logs if exact is None else exact
        found.append(
            {
                "wire": wire,
                "tokens": rows.size,
                "agreement": float((logs.argmax(-1) == exact.argmax(-1)).mean()),
                "divergence": float((np.exp(exact) * (exact - logs)).sum(-1).mean()),
            }
        )
    return found


def again(llm: LLM, prompts: list[list[int]]) -> float:
    """Median seconds between tokens, everything being compiled."""
    return float(np.median([c.tpot_s for c in llm.generate(prompts, max_new_tokens=8, ignore_eos=True)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--on", nargs="+", default=["devices:16"], help="devices:N or lanes:N")
    parser.add_argument("--all", action="store_true", help="all combinations instead of a covering choice")
    parser.add_argument("--tokens", type=int, default=16, help="greedy tokens of each of four prompts")
    parser.add_argument("--tokens-only", action="store_true", help="no logits, no times")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    machines = [(kind, int(ranks)) for kind, _, ranks in (on.partition(":") for on in args.on)]
    request_devices(max([ranks for kind, ranks in machines if kind == "devices"], default=1))
    known, rows = reference(args.tokens), []
    for (kind, ranks), way in itertools.product(machines, ways(args.all)):
        row = measure(way, kind, ranks, known, args.tokens_only)
        rows.append(row)
        print(line(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    by_wire = wires(" ".join(pydoc_data.topics.topics[name] for name in ("with", "import", "lambda")))
    wrong = [row for row in rows if row["wire"] == "float32" and not row["tokens_equal"]]
    if args.json:
        print(json.dumps({"ways": rows, "wires": by_wire}, indent=1))
    else:
        for wire in CHOICES["wire"]:
            of = [row for row in rows if row["wire"] == wire]
            equal = sum(row["tokens_equal"] for row in of)
            print(f"{wire}: {equal} of {len(of)} give the reference's tokens")
            if not args.tokens_only:
                agreement = np.mean([row["agreement"] for row in of])
                error = max(row["logit_error"] for row in of)
                print(f"  next-token agreement {agreement:.4f}, largest error of a logit {error:.2g}")
        for row in by_wire:
            print(
                "{wire} on {tokens} tokens of given text: next-token agreement {agreement:.4f}, divergence "
                "{divergence:.2g} nats".format(**row)
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
