"""Layouts of your own, swept in Python: how wide should expert parallelism be, and how should tokens travel?

    python scripts/compare_layouts.py                          # DeepSeek-R1, decode on 32 to 320 dies
    python scripts/compare_layouts.py --exchange flat hierarchical allgather --batch 32
    python scripts/compare_layouts.py --plot sweep.png         # pip install 'cmx_jax[plots]'

Of one rank in one step: bytes that leave it, the memory that it needs, and what of that experts take. The
slots are those of the paper's decode instance: 256 experts, 32 replicas, 32 copies of the shared expert.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from cmx_jax.analysis.compare.comparison import Comparison
from cmx_jax.analysis.compare.layouts import compare
from cmx_jax.analysis.plotting import COLOURS, image, need_matplotlib
from cmx_jax.errors import CmxError
from cmx_jax.mesh import expert_parallel
from cmx_jax.mesh.named_layouts import NamedLayout


def layouts(ranks: list[int], exchanges: list[str]) -> dict[str, NamedLayout]:
    """A layout for each number of dies and each exchange; a `NamedLayout` makes it of a model's experts."""
    spare = {"redundant_slots": 32, "shared_slots": 32, "wire": "int8", "mailbox_rows": 0}
    return {
        f"{exchange}{n}": NamedLayout(
            partial(expert_parallel, n, exchange=exchange, **spare), "decode", 2, 96, f"{n} dies, {exchange}"
        )
        for exchange in exchanges
        for n in ranks
    }


def rows(result: Comparison, ranks: list[int], exchanges: list[str]) -> list[dict[str, Any]]:
    """Picks the numbers of the sweep from the comparison."""
    layout_rows = iter(result.layouts)
    return [
        {
            "exchange": exchange,
            "ranks": n,
            "sent_gb": sum(row.wire_by_place().values()) / 1e9,
            "memory_gb": sum(row.memory.values()) / 1e9,
            "experts_gb": row.memory["experts"] / 1e9,
        }
        for exchange in exchanges
        for n, row in zip(ranks, layout_rows, strict=False)
    ]


def plot(table: list[dict[str, Any]], file: Path) -> None:
    """Two curves a way of travel, over the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("sent_gb", "memory_gb"), strict=True):
        for colour, exchange in zip(COLOURS, dict.fromkeys(row["exchange"] for row in table), strict=False):
            points = [(row["ranks"], row[name]) for row in table if row["exchange"] == exchange]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=exchange)
        axes.set(xlabel="dies", ylabel=f"GB {name.removesuffix('_gb')} of a rank", ylim=0)
    axes.legend()
    file.write_bytes(image(figure, file.suffix[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="deepseek-r1", help="a preset")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[32, 64, 160, 320], help="dies: 320's divisors"
    )
    parser.add_argument("--exchange", nargs="+", default=["flat", "allgather"])
    parser.add_argument("--batch", type=int, help="sequences of an NPU (default 96)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png or .svg")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        if args.plot:
            need_matplotlib()
        result = compare(args.model, layouts(args.ranks, args.exchange), batch=args.batch)
    except CmxError as error:
        print(f"compare_layouts: error: {error}", file=sys.stderr)
        return 2
    table = rows(result, args.ranks, args.exchange)
    if args.plot:
        plot(table, args.plot)
    if args.json:
        print(json.dumps(table, indent=1))
        return 0
    print(f"{'exchange':<14}{'dies':>5}{'sent GB':>10}{'memory GB':>11}{'of it experts':>15}")
    for row in table:
        print("{exchange:<14}{ranks:>5}{sent_gb:>10.2f}{memory_gb:>11.2f}{experts_gb:>15.2f}".format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
