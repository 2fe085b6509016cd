"""What a step's collectives move, from Python: a model's decode step under several exchanges, then any
function.

python scripts/trace_step.py                          # DeepSeek-R1 on 320 dies, from its jaxpr
python scripts/trace_step.py --model tiny --layout ep16 --context 256 --source hlo
"""

import argparse
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from cmx_jax.analysis.trace.trace_model import trace_model
from cmx_jax.errors import CmxError
from cmx_jax.mesh.named_layouts import named_layout
from cmx_jax.mesh.trace import SOURCES, Trace, render, trace
from cmx_jax.serving.deploy.model import config_of


def by_scope(found: Trace) -> dict[str, float]:
    """Wire bytes of a rank by the innermost scope."""
    sums: dict[str, float] = {}
    for row in found.collectives:
        name = row["scope"].rsplit("/", 1)[-1] or row["op"]
        sums[name] = sums.get(name, 0) + row["wire_bytes"]
    return sums


def exchanges(args: argparse.Namespace) -> None:
    """One line for each way to send tokens to their experts."""
    c, found = config_of(args.model), named_layout(args.layout)
    layout = found.make(c.n_routed_experts)
    print(f"{args.model} decode, {found.about}: wire MB of a rank and step")
    for exchange, wire in (("flat", "int8"), ("flat", "bfloat16"), ("allgather", "int8")):
        result = trace_model(
            c,
            replace(layout, exchange=exchange, wire=wire),
            "decode",
            batch=found.batch,
            context=args.context,
            ranks_per_npu=found.ranks_per_npu,
            source=args.source,
        )
        sums = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in by_scope(result).items())
        print(f"  {exchange:<10} {wire:<9} {sums} (traced in {result.seconds['trace']:.2f} s)")


def ring() -> None:
    """Not a model's step: ring attention, keys and values passed on around eight ranks."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def turn(carry: tuple, _: None) -> tuple:
            (k, v), out = carry
            out = out + jax.nn.softmax(q @ k.T) @ v
            passed = jax.lax.ppermute((k, v), "ring", [(i, (i + 1) % 8) for i in range(8)])
            return (passed, out), None

        with jax.named_scope("Ring"):
            (_, out), _ = jax.lax.scan(turn, ((k, v), jnp.zeros_like(q)), None, length=8)
        return out

    x = jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16)
    mesh = AbstractMesh((8,), ("ring",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=P("ring"), out_specs=P("ring"))
    print(f"\nring attention\n{render(trace(mapped, x, x, x))}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="deepseek-r1", help="a preset, a directory, or tiny")
    parser.add_argument("--layout", default="ep320", help="a ready layout for decode")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--source", choices=SOURCES, default="jaxpr")
    args = parser.parse_args()
    try:
        exchanges(args)
    except CmxError as error:
        print(f"trace_step: error: {error}", file=sys.stderr)
        return 2
    ring()
    return 0


if __name__ == "__main__":
    sys.exit(main())
