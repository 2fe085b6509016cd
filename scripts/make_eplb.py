"""Write DeepSeek's own placements, which tests/mesh/test_eplb.py compares with, to tests/goldens/eplb.npz.

Needs torch and DeepSeek's eplb.py (github.com/deepseek-ai/EPLB), which is not part of this project:

    python scripts/make_eplb.py --eplb PATH/TO/eplb.py

Its sort is made stable: otherwise the order of equal loads is up to the build of torch. For each case the
file holds NAME_weight [L, E], NAME_sizes (slots, groups, nodes, ranks) and the three results.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

OUT = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "eplb.npz"
CASES = {  # layers, experts, slots, groups, nodes, ranks
    "readme": (2, 12, 16, 4, 2, 8),
    "prefill_144": (3, 256, 288, 8, 18, 144),
    "decode_320": (1, 256, 320, 8, 20, 160),
    "prefill_32": (2, 256, 320, 8, 4, 32),
    "two_nodes": (4, 64, 72, 8, 2, 8),
    "no_replicas": (2, 16, 16, 4, 2, 4),
    "three_each": (1, 8, 24, 1, 1, 4),
    "one_node": (2, 128, 160, 1, 1, 32),
    "four_nodes": (3, 32, 64, 4, 4, 16),
}


def loads(kind: str, layers: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Loads of each layer's experts."""
    if kind == "uniform":
        return rng.integers(0, 1000, (layers, experts))
    if kind == "float":
        return rng.random((layers, experts)).astype(np.float32)
    order = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    return (1e6 / (1 + order) ** 1.1).astype(np.int64)


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--eplb", type=Path, required=True)
    args = parser.parse_args()
    sort = torch.Tensor.sort
    torch.Tensor.sort = lambda x, dim, descending: sort(x, dim=dim, descending=descending, stable=True)
    spec = importlib.util.spec_from_file_location("eplb", args.eplb)
    eplb: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eplb)
    rng, golden = np.random.default_rng(0), {}
    for name, (layers, experts, *sizes) in CASES.items():
        for kind in ("uniform", "zipf", "float"):
            weight = loads(kind, layers, experts, rng)
            results = eplb.rebalance_experts(torch.tensor(weight), *sizes)
            key = f"{name}_{kind}"
            golden |= {f"{key}_weight": weight, f"{key}_sizes": np.array(sizes)}
            for what, result in zip(("phy2log", "log2phy", "logcnt"), results, strict=True):
                golden[f"{key}_{what}"] = result.numpy().astype(np.int16)
    np.savez_compressed(OUT, **golden)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
