"""What the engine's host work adds to steps, and what the caching pool saves, each as a ratio in one run.

    python scripts/bench_engine.py [--sequences 64] [--tokens 60] [--json]

* *overhead*: of decode turns with all sequences running, the time in which no program ran, over the time of
  programs (the step). Between two steps the engine takes tokens, gives pages, builds the next batch.
* *pool*: prompts that share a beginning, one behind the other, with the caching pool and without: tokens that
  prefill ran, and time to first token. Programs are compiled before.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import cmx_jax
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.ems import MPServer, Pool
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.kv.prefix_cache import ContextCache
from cmx_jax.serving.scheduling.request import SamplingParams


def overhead(sequences: int, tokens: int) -> dict[str, float]:
    """Of turns in which every sequence decodes; the better of two runs."""
    llm = cmx_jax.from_pretrained("tiny", max_num_seqs=sequences, max_model_len=256, num_speculative_tokens=1)
    engine, rng, runs = llm.engine, np.random.default_rng(0), []
    for _ in range(3):  # the first one compiles
        for _ in range(sequences):
            prompt = rng.integers(3, 2000, rng.integers(8, 60)).tolist()
            engine.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))
        while engine.waiting or any(i.allocator.prefilling for i in engine.prefill):
            engine.step()
        engine.reset_counters()
        turns = 0
        while not any(r is None for r in engine.decode.allocator.rows[:sequences]):
            engine.step()
            turns += 1
        runs.append((engine.busy_s / engine.step_s - 1, engine.step_s / turns))
        engine.run()
    best, step = min(runs[1:])
    return {"sequences": sequences, "step_ms": step * 1e3, "overhead": best}


def reuse(llm: LLM, shared: int, own: int, requests: int) -> list[dict[str, Any]]:
    """The same prompts with the pool and without."""
    rng = np.random.default_rng(1)
    beginning = rng.integers(3, 2000, shared).tolist()
    prompts = [beginning + rng.integers(3, 2000, own).tolist() for _ in range(requests)]
    rows = []
    for pooled in (False, True, False, True):  # the first two compile
        with tempfile.TemporaryDirectory() as folder:
            pool = Pool({"here": MPServer(Path(folder), dram=1 << 27, disk=1 << 28)})
            context = ContextCache(
                pool, llm.instance.programs.fingerprint("tiny"), llm.instance.programs.cache.pages
            )
            engine = Engine([llm.instance], llm.instance, context=context if pooled else None)
            before, times = llm.instance.computed_tokens, []
            for prompt in prompts:
                request = engine.submit(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
                engine.run()
                times.append(request.ttft_s)
                context.settle()
                pool.flush()
            pool.close()
        ran = llm.instance.computed_tokens - before
        rows.append({"pool": pooled, "prefill_tokens": ran, "ttft_ms": median(times[1:]) * 1e3})
    return rows[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=60, help="that each sequence gets")
    parser.add_argument("--shared", type=int, default=384, help="tokens that prompts share")
    parser.add_argument("--own", type=int, default=64, help="tokens behind them")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    llm = cmx_jax.from_pretrained("tiny", num_speculative_tokens=1)
    found = {
        "overhead": overhead(args.sequences, args.tokens),
        "reuse": reuse(llm, args.shared, args.own, args.requests),
    }
    if args.json:
        print(json.dumps(found, indent=2))
        return
    one, (off, on) = found["overhead"], found["reuse"]
    print(
        f"{one['sequences']} sequences: a step takes {one['step_ms']:.1f} ms, the host {one['overhead']:.1%}"
    )
    print(f"{args.requests} prompts of {args.shared} shared and {args.own} own tokens")
    for row in (off, on):
        name = "with the pool" if row["pool"] else "without"
        print(f"{name:14}{row['prefill_tokens']:>8} tokens run, first token {row['ttft_ms']:.1f} ms (median)")
    tokens, times = on["prefill_tokens"] / off["prefill_tokens"], on["ttft_ms"] / off["ttft_ms"]
    print(f"{'ratio':14}{tokens:>8.2f}           , first token {times:.2f}")


if __name__ == "__main__":
    main()
