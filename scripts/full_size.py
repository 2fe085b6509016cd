"""Compiles a full-size model's step without weights, and says how long that takes and what a device holds.

    python scripts/full_size.py                                       # DeepSeek-R1, decode, 160 CPU devices
    python scripts/full_size.py --step prefill                        # 32 devices, a prompt of 4,096 each
    python scripts/full_size.py --target v5p:4x4x10 --exchange ragged # the TPU compiler, no TPU needed

`--target` is `cpu` or the name of a TPU topology, such as v5p:4x4x10 (160 chips), v5p:8x8x6 (384) or
tpu7x:4x8x12 (768 cores); topologies need `pip install 'cmx_jax[tpu-aot]'`. A program lies on the first
`--ranks` devices. Mailboxes have the paper's worst-case size in decode, and twice the mean load in prefill;
`--mailbox-rows` gives another (0: the worst case).

With 160 decode ranks a rank is one of the paper's NPUs, which are two dies each; with 320 it is a die.
"""

import argparse
import json
import operator
import re
import sys
import time
from dataclasses import replace
from typing import Any

import jax

from cmx_jax.analysis.trace.abstract_steps import trace_step
from cmx_jax.analysis.trace.memory import by_layout, page_bytes
from cmx_jax.errors import CmxError
from cmx_jax.mesh import expert_parallel
from cmx_jax.mesh.exchange import EXCHANGES, WIRES
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.targets import compiler_options, target_devices
from cmx_jax.model.cache import KV_CACHE_DTYPES
from cmx_jax.model.families import preset
from cmx_jax.model.weights import int8_fields

RANKS = {"decode": 160, "prefill": 32}
GB, MIB = 1e9, 2.0**20
PAPER = {  # bytes a die with weights in INT8 (sections 4.2.1 and 9); of decode EP320, of prefill EP32
    "decode": {
        "experts": 2.55 * GB,
        "attention": 11.4 * GB,
        "dense FFN": 1.19 * GB,
        "embedding, head": 3.7 * GB,
        "cache": 13.8 * GB,
        "dispatch buffer": 225 * MIB,
        "combine buffer": 420 * MIB,
    },
    "prefill": {"experts": 25.5 * GB},
}
NOTE = """\
Weights in BF16 are twice the paper's INT8, but for embedding and head; with --quant int8 only what absorbed
attention is made of stays in BF16. The paper's are of DeepSeek-R1 on a die of 64 GB: of 320 in decode, with
one expert, 96 tokens a step and 48 sequences of 4,096 tokens; of 32 in prefill, with ten experts."""
CPU_NOTE = (
    "XLA:CPU keeps float32 copies of BF16 weights and of the cache: its temporaries are no accelerator's."
)


COLLECTIVES = r"(?:all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
WORK = ("fusion", "while", "convolution", "dot", "custom-call", "sort")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z-]*)\((.*)")


def overlap(scheduled: str) -> dict[str, int]:
    """What a compiled program does while messages travel: its collectives that are started and awaited,
    how many of these have work in between, and how many have work of another stream (microbatch).

    Args:
      scheduled: the program's text, in which operations stand in the order in which they run.
    """
    under_way: dict[str, tuple[set[str], set[str], set[str]]] = {}
    found = []
    for line in scheduled.splitlines():
        if not (match := OPERATION.match(line)):
            continue
        name, operation, rest = match.groups()
        streams = set(re.findall(r"/(Stream\d+)/", rest))
        if re.fullmatch(f"{COLLECTIVES}-start", operation):
            under_way[name] = streams, set(), set()
            found.append(under_way[name])
        elif re.fullmatch(f"{COLLECTIVES}-done", operation):
            del under_way[re.match(r"[^%]*%([\w.-]+)", rest).group(1)]
        elif operation in WORK:
            for _, work, of in under_way.values():
                work.add(name)
                of |= streams
    return {
        "async_collectives": len(found),
        "with_work_between": sum(bool(work) for _, work, _ in found),
        "with_work_of_another_stream": sum(bool(own and of - own) for own, _, of in found),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    c, prefill = preset(args.model), args.step == "prefill"
    c = replace(c, int8=int8_fields(c)) if args.quant == "int8" else c
    ranks = args.ranks or RANKS[args.step]
    batch = args.batch or (1 if prefill else 96)
    rows = 0 if args.mailbox_rows is None and not prefill else args.mailbox_rows
    layout = expert_parallel(
        ranks,
        c.n_routed_experts,
        exchange=args.exchange,
        wire=args.wire,
        mailbox_rows=rows,
        microbatches=args.microbatches,
        redundant_slots=args.redundant_slots,
        shared_slots=args.shared_slots,
        share_sequences=args.share_sequences,
    )
    mesh = auto_mesh(layout.axes, target_devices(args.target, ranks))
    times = [time.perf_counter()]
    step = trace_step(
        c,
        layout,
        args.step,
        sequences=batch,
        context=args.context,
        length=args.context,
        drafts=args.num_speculative_tokens,
        kv_cache_dtype=args.kv_cache_dtype,
        mesh=mesh,
        in_order=True,
    )
    times.append(time.perf_counter())
    lowered = step.lower()
    times.append(time.perf_counter())
    try:
        compiled = lowered.compile(compiler_options=compiler_options(args.target))
    except jax.errors.JaxRuntimeError as error:
        raise CmxError(f"{args.target} does not compile it: {str(error).splitlines()[0]}") from None
    times.append(time.perf_counter())
    memory = compiled.memory_analysis()
    return {
        "model": args.model,
        "step": args.step,
        "target": args.target,
        "ranks": ranks,
        "sequences": batch,
        "context": args.context,
        "exchange": args.exchange,
        "wire": args.wire,
        "kv_cache_dtype": args.kv_cache_dtype,
        "cache_row_bytes": page_bytes(c, 1, args.kv_cache_dtype) // c.num_hidden_layers,
        "seconds": dict(zip(("trace", "lower", "compile"), map(operator.sub, times[1:], times), strict=True)),
        "by_layout": by_layout(
            c, layout, batch, args.context, prefill, args.num_speculative_tokens, args.kv_cache_dtype
        ),
        "by_compiler": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "overlap": overlap(compiled.as_text()),
        "paper_a_die": PAPER[args.step],
        "note": f"{NOTE}\n{CPU_NOTE}" if args.target == "cpu" else NOTE,
    }


def report(r: dict[str, Any]) -> None:
    print("{model} {step} for {target}: {ranks} ranks, {sequences} x {context} tokens each".format(**r))
    print("exchange {exchange}, wire {wire}".format(**r))
    print("cache {kv_cache_dtype}: {cache_row_bytes} bytes a token and layer".format(**r))
    print("trace {trace:.1f} s, lower {lower:.1f} s, compile {compile:.1f} s".format(**r["seconds"]))
    print(
        "{async_collectives} asynchronous collectives, {with_work_between} with work in between, "
        "{with_work_of_another_stream} with work of another stream".format(**r["overlap"])
    )
    print(f"\n{'GB of one rank':34}{'here':>8}{'paper, a die':>15}")
    rows = {**r["by_layout"], **{f"{name} (compiler)": size for name, size in r["by_compiler"].items()}}
    for name, size in rows.items():
        paper = r["paper_a_die"].get(name)
        print(f"{name:34}{size / GB:8.2f}{'' if paper is None else f'{paper / GB:15.2f}'}")
    print(f"{'sum (compiler)':34}{sum(r['by_compiler'].values()) / GB:8.2f}\n\n{r['note']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="deepseek-r1", help="a preset")
    parser.add_argument("--step", choices=sorted(RANKS), default="decode")
    parser.add_argument("--target", default="cpu", help="cpu, or a TPU topology")
    parser.add_argument("--ranks", type=int, help="160 for decode, 32 for prefill")
    parser.add_argument("--batch", type=int, help="sequences a rank: 96 for decode, 1 for prefill")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence")
    parser.add_argument("--exchange", choices=sorted(EXCHANGES), default="flat")
    parser.add_argument("--wire", choices=WIRES, default="int8")
    parser.add_argument("--quant", choices=("none", "int8"), default="none", help="weights: BF16, or W8A8")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="auto is BF16")
    parser.add_argument("--mailbox-rows", type=int, help="rows of one peer's mailbox")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--num-speculative-tokens", type=int, default=1, help="MTP drafts, 1 in the paper")
    parser.add_argument("--redundant-slots", type=int, default=0, help="32 in the paper")
    parser.add_argument("--shared-slots", type=int, default=0, help="32 in the paper's decode")
    parser.add_argument("--share-sequences", action="store_true", help="SP-TP-SP prefill")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it is the compiling that is timed
    try:
        result = measure(args)
    except CmxError as error:
        print(f"full_size: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
