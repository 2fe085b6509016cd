"""INT8 products as they are served, against float32's and bfloat16's, on this machine in one run.

    python scripts/bench_int8.py [--size 2048] [--repeats 15] [--json]

`M` rows of activations meet a matrix of `size x size`. INT8 begins with rounding them and ends with
multiplying by both scales. The three take turns, so that what else the machine does falls on all; medians.
The last line is the product in the program: INT8 times INT8, summed as INT32.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmx_jax.quant import QTensor, einsum
from cmx_jax.quant.int8_weights import channel_scale, quantize

ROWS = (1, 8, 64, 512)


@jax.jit
def product(x: Any, w: Any) -> Any:
    return einsum("md,dq->mq", x, w)


def operands(rows: int, size: int) -> dict[str, tuple[Any, Any]]:
    """Activations and weights of each way."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, size), (size, size)))
    scale = channel_scale(w)
    rounded = QTensor(jnp.asarray(quantize(w, scale[None])), jnp.asarray(scale[None], jnp.bfloat16))
    return {
        "float32": (jnp.asarray(x), jnp.asarray(w)),
        "bfloat16": (jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)),
        "int8": (jnp.asarray(x), rounded),
    }


def timed(way: tuple[Any, Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(product(*way))
    return time.perf_counter() - start


def measure(rows: int, size: int, repeats: int) -> dict[str, Any]:
    """Median seconds of each way, and what INT8 takes of the others' time."""
    ways = operands(rows, size)
    turns = [{name: timed(way) for name, way in ways.items()} for _ in range(repeats + 1)][1:]  # 0: compiles
    seconds = {name: float(np.median([turn[name] for turn in turns])) for name in ways}
    ratios = {f"int8/{name}": seconds["int8"] / seconds[name] for name in ("float32", "bfloat16")}
    return {"rows": rows, "seconds": seconds, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    program = product.lower(*operands(8, 16)["int8"]).as_text()
    [shown] = [line.strip() for line in program.splitlines() if "dot_general" in line]
    table = [measure(rows, args.size, args.repeats) for rows in ROWS]
    if args.json:
        print(json.dumps({"size": args.size, "product": shown, "rows": table}, indent=2))
        return
    print(f"{'rows':>5} {'INT8 in ms':>11} {'of float32':>11} {'of bfloat16':>11}")
    for row in table:
        print(f"{row['rows']:>5} {row['seconds']['int8'] * 1e3:>11.3f}", end="")
        print(f" {row['int8/float32']:>10.2f}x {row['int8/bfloat16']:>10.2f}x")
    print(shown)


if __name__ == "__main__":
    main()
