"""Draws the supernode with the pools that `cmx demo` uses, as docs/supernode.svg.

python scripts/draw_supernode.py [--out FILE]
"""

import argparse
from pathlib import Path

from cmx_jax.mesh import carve
from cmx_jax.serving.deploy.recipe import Recipe

RECIPE = Recipe()

CELL, GAP, NODES_PER_ROW = 11, 3, 12
COLOURS = {"decode": "#0072b2", "prefill": "#e69f00", "spare": "#c0c0c0"}  # distinct for colour-blind readers
LEGEND = {
    "decode": f"decode: an instance of {RECIPE.decode_npus} NPUs, 320 dies",
    "prefill": f"prefill: {RECIPE.prefill_instances} instances of {RECIPE.prefill_npus} NPUs",
}


def draw() -> str:
    """Returns the drawing: 48 nodes of eight NPUs, each NPU in the colour of its pool."""
    pools = carve(prefill=RECIPE.prefill_instances)
    node_npus = pools.supernode.npus_per_node
    pool_of = ["spare"] * pools.supernode.npus
    for part in (*pools.decode, *pools.prefill):
        pool_of[part.start : part.stop] = [part.role] * part.npus
    columns = node_npus // 2
    node_width, node_height = columns * CELL + GAP, 2 * CELL + GAP
    pitch_x, pitch_y = node_width + 3 * GAP, node_height + 3 * GAP
    rows = pools.supernode.npus // node_npus // NODES_PER_ROW
    width, height = NODES_PER_ROW * pitch_x + 10, rows * pitch_y + 40
    shapes = []
    for npu, pool in enumerate(pool_of):
        node, place = divmod(npu, node_npus)
        x = 8 + node % NODES_PER_ROW * pitch_x + place % columns * CELL
        y = 8 + node // NODES_PER_ROW * pitch_y + place // columns * CELL
        side = CELL - 2
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" rx="2" fill="{COLOURS[pool]}">'
            f"<title>NPU {npu}, node {node}: {pool}</title></rect>"
        )
    for i, (pool, text) in enumerate(LEGEND.items()):
        x, y = 8 + i * (width // 2), height - 14
        shapes.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" rx="2" fill="{COLOURS[pool]}"/>')
        shapes.append(
            f'<text x="{x + 15}" y="{y}" font-family="sans-serif" font-size="11" fill="#808080">{text}</text>'
        )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
    label = 'aria-label="48 nodes of eight NPUs: decode and prefill pools">'
    return "\n".join([head + label, *shapes, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "docs" / "supernode.svg"
    parser.add_argument("--out", type=Path, default=default, help="file to write")
    args = parser.parse_args()
    args.out.write_text(draw())
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
