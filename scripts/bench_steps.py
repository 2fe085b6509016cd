"""Decode and prefill on one process against the floor of this machine, measured in one run.

    python scripts/bench_steps.py [--json]

A 67M-parameter DeepSeek-V3 shape (width 256, 6 layers, 256 experts of 64, top-8) with random float32
weights. The floor of a decode step is reading every weight that it touches once, at the bandwidth that a
large NumPy sum reaches here.
"""

import argparse
import json
import time
from typing import Any

import jax
import numpy as np

from cmx_jax.mesh import enable_compilation_cache, expert_parallel, make_runner
from cmx_jax.model.families import parse_config
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.weights import weight_tree
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.programs import Programs
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import SamplingParams

CONFIG = parse_config(
    {
        "model_type": "deepseek_v3",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "kv_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 1024,
        "num_nextn_predict_layers": 0,
    }
)


def instance(batch: int) -> Instance:
    """The model with random weights on one lane, with room for `batch` sequences."""
    rng = np.random.default_rng(0)

    def make(leaf: Leaf) -> np.ndarray:
        if leaf.kind == "slots":
            return np.broadcast_to(np.arange(leaf.shape[-1], dtype=np.int32), leaf.shape)
        return (rng.standard_normal(leaf.shape) * 0.05).astype(leaf_dtype(leaf, np.float32))

    layout = expert_parallel(1, CONFIG.n_routed_experts)
    weights = weight_tree(CONFIG, layout.slots, make)
    capacity = Capacity(sequences=batch, pages=batch * 64)
    return Instance(Programs("bench", CONFIG, layout, make_runner("lanes", layout.axes), weights, capacity))


def bandwidth() -> float:
    """Bytes per second of reading a large array."""
    array = np.ones(64 << 20, np.float32)
    array.sum()
    start = time.perf_counter()
    array.sum()
    return array.nbytes / (time.perf_counter() - start)


def decode(batch: int, steps: int, speed: float) -> dict[str, Any]:
    """Median step time at 64 to 64 + `steps` cached tokens, and the floor."""
    one = instance(batch)
    engine = Engine([one], one)
    rng = np.random.default_rng(1)
    for _ in range(batch):
        prompt = rng.integers(0, CONFIG.vocab_size, 64).tolist()
        engine.submit(prompt, SamplingParams(max_tokens=steps + 8, ignore_eos=True))
    while engine.waiting:
        engine.step()
    engine.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    leaves = jax.tree.leaves(one.programs.weights)
    experts = jax.tree.leaves(one.programs.weights.moe.ffn.experts)
    expert_bytes = sum(leaf.nbytes for leaf in experts)
    touched = sum(leaf.nbytes for leaf in leaves) - expert_bytes - one.programs.weights.embed.nbytes
    floor = (touched + expert_bytes * expected_experts(batch) / CONFIG.n_routed_experts) / speed
    step = float(np.median(times))
    return {"batch": batch, "step_ms": step * 1e3, "floor_ms": floor * 1e3, "ratio": step / floor}


def expected_experts(batch: int) -> float:
    """Distinct experts that `batch` tokens touch when they choose at random."""
    count = CONFIG.n_routed_experts
    return count * (1 - (1 - CONFIG.num_experts_per_tok / count) ** batch)


def prefill(length: int, repeats: int = 3) -> dict[str, Any]:
    """Tokens per second of one prompt; the best of a few."""
    one = instance(1)
    rates = []
    for seed in range(repeats + 1):
        engine = Engine([one], one)
        prompt = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()
        engine.submit(prompt, SamplingParams(max_tokens=1))
        start = time.perf_counter()
        engine.run()
        rates.append(length / (time.perf_counter() - start))
    return {"prompt": length, "tokens_per_s": max(rates[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    enable_compilation_cache()
    speed = bandwidth()
    result = {
        "gb_per_s": speed / 1e9,
        "decode": [decode(batch, args.steps, speed) for batch in (1, 8, 32)],
        "prefill": [prefill(length) for length in (128, 512)],
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"reading memory: {result['gb_per_s']:.1f} GB/s")
    for row in result["decode"]:
        print("decode  batch {batch:>3}: {step_ms:6.1f} ms a step, {ratio:4.1f} x the floor".format(**row))
    for row in result["prefill"]:
        print("prefill {prompt:>4} tokens: {tokens_per_s:7.0f} tokens/s".format(**row))


if __name__ == "__main__":
    main()
