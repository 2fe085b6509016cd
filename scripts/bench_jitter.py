"""The time of decode steps with prefill running beside them and without, in one run of the demo's deployment.

    python scripts/bench_jitter.py [--prefill-instances 2] [--prompts 24] [--json]

A sequence decodes all the time. Every few turns a new prompt arrives, so that some decode steps run while
prefill instances are at work. On a CPU all instances share the cores, and XLA:CPU runs one collective program
at a time: what is seen here is the order of work, not the hardware of separate NPUs.
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np

from cmx_jax.serving.deploy.deployment import pools
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.scheduling.request import SamplingParams


def measure(recipe: Recipe, prompts: int, every: int) -> dict[str, Any]:
    """The document that `--json` prints."""
    deployment = pools("tiny", recipe)
    engine, rng = deployment.engine, np.random.default_rng(0)

    def submit(length: int, tokens: int) -> None:
        prompt = rng.integers(3, deployment.model.config.vocab_size, length).tolist()
        engine.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))

    for tokens in (2, 2):  # compiles
        for _ in engine.prefill:
            submit(64, tokens)
        engine.run()
    engine.reset_counters()
    submit(8, 240)
    turns: dict[bool, list[float]] = {False: [], True: []}
    left = prompts
    while left or engine.prefills.running or engine.waiting:
        if left and engine.steps % every == 0 and engine.steps:
            submit(64, 2)
            left -= 1
        before, steps, began = engine.overlapped_steps, engine.steps, time.perf_counter()
        engine.step()
        if engine.steps > steps:
            turns[engine.overlapped_steps > before].append(time.perf_counter() - began)
    rows = {}
    for beside, times in turns.items():
        row = {"turns": len(times)} | {f"p{q}_ms": float(np.percentile(times, q)) * 1e3 for q in (50, 90, 99)}
        rows["beside_prefill" if beside else "alone"] = row
    ratio = rows["beside_prefill"]["p50_ms"] / rows["alone"]["p50_ms"]
    return {"prefill_instances": recipe.prefill_instances, **rows, "ratio_p50": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefill-instances", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24, help="prompts of 64 tokens that arrive meanwhile")
    parser.add_argument("--every", type=int, default=2, help="decode steps between two arrivals")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(replace(Recipe(), prefill_instances=args.prefill_instances), args.prompts, args.every)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name in ("alone", "beside_prefill"):
        row = result[name]
        print(f"{name:<15} {row['turns']:>4} turns, p50 {row['p50_ms']:7.1f} ms, p90 {row['p90_ms']:7.1f} ms")
    print(f"ratio of medians {result['ratio_p50']:.2f}")


if __name__ == "__main__":
    main()
