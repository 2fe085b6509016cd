"""Programs of other people, after public bug reports: closed forms, one name in all sources, no silence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.trace import Trace, trace
from cmx_jax.mesh.trace.hlo.reader import read_hlo
from cmx_jax.mesh.trace.stablehlo import read_stablehlo
from cmx_jax.testing import assert_collectives

SOURCES = ("jaxpr", "stablehlo", "hlo")
PARTS = ((0, 2, 4, 6), (1, 3, 5, 7))


def mesh_of(**sizes: int) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:count])


X8 = {"x": 8}


def mapped(fn: Callable[..., Any], sizes: dict[str, int], ins: Any, outs: Any, **options: Any) -> Any:
    return jax.shard_map(fn, mesh=mesh_of(**sizes), in_specs=ins, out_specs=outs, check_vma=False, **options)


def array(*shape: int, dtype: str = "float32", sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def rows(t: Trace) -> list[tuple[Any, ...]]:
    return [(r["op"], ",".join(r["axes"]), r["payload_bytes"], r["wire_bytes"]) for r in t.collectives]


def test_broadcast_of_one_rank() -> None:
    fn = mapped(lambda x: lax.pbroadcast(x, "x", 0), X8, P("x"), P("x"))
    assert rows(trace(fn, array(1024))) == [("broadcast", "x", 512, 448)]


@pytest.mark.parametrize("source", SOURCES)
def test_parts_of_an_axis_have_its_name(source: str) -> None:
    def scatter(x: jax.Array) -> jax.Array:
        return lax.psum_scatter(x, "x", scatter_dimension=0, axis_index_groups=PARTS, tiled=True)

    fn = mapped(scatter, X8, P(None, "x"), P("x"))
    t = trace(fn, array(8, 512), source=source)
    assert rows(t) == [("reduce_scatter", "x", 2048, 1536)]
    assert t.collectives[0]["group_size"] == 4
    assert t.notes == []
    assert_collectives(fn, (array(8, 512),), {("reduce_scatter", "x"): 1}, source=source)


@pytest.mark.parametrize("source", SOURCES)
def test_axes_in_another_order(source: str) -> None:
    def gather(x: jax.Array) -> jax.Array:
        return lax.psum(lax.all_gather(x, ("y", "x"), tiled=True), "y")

    t = trace(mapped(gather, {"x": 2, "y": 4}, P(("y", "x")), P()), array(64), source=source)
    assert rows(t) == [("all_gather", "y,x", 32, 224), ("all_reduce", "y", 256, 384)]
    assert t.notes == []


@pytest.mark.parametrize("source", SOURCES)
def test_axes_of_one_rank(source: str) -> None:
    """Compilers drop what a rank would send to itself, which is no difference."""

    def gather(x: jax.Array) -> jax.Array:
        return lax.psum(lax.all_gather(x, ("x", "one"), tiled=True), "one")

    t = trace(mapped(gather, {"x": 4, "one": 1}, P(("x", "one")), P()), array(64), source=source)
    assert [r for r in rows(t) if r[3]] == [("all_gather", "x,one", 64, 192)]
    assert t.notes == []


@pytest.mark.parametrize("source", SOURCES)
def test_two_meshes_over_the_same_devices(source: str) -> None:
    devices = np.array(jax.devices()[:8])
    experts = Mesh(devices, ("ep",))
    dense = Mesh(devices.reshape(2, 4), ("dp", "tp"))

    def both(x: jax.Array) -> jax.Array:
        swap = jax.shard_map(
            lambda v: lax.all_to_all(v, "ep", 0, 0, tiled=True),
            mesh=experts,
            in_specs=P("ep"),
            out_specs=P("ep"),
            check_vma=False,
        )
        total = jax.shard_map(
            lambda v: lax.psum(lax.psum(v, "tp"), "dp"),
            mesh=dense,
            in_specs=P(("dp", "tp")),
            out_specs=P(),
            check_vma=False,
        )
        return total(swap(x))

    t = trace(both, array(64, 16), source=source)
    assert rows(t) == [
        ("all_to_all", "ep", 512, 448),
        ("all_reduce", "tp", 512, 768),
        ("all_reduce", "dp", 512, 512),
    ]
    assert {r["plane"] for r in t.collectives} == {"node"}
    assert t.notes == []


@pytest.mark.parametrize("source", SOURCES)
def test_axis_left_to_the_compiler(source: str) -> None:
    """A `shard_map` over x only: over y the compiler splits, which only HLO shows, and the others say so."""
    mesh = mesh_of(x=2, y=4)

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum(x @ w, "x")

    fn = jax.shard_map(
        layer, mesh=mesh, in_specs=(P("x"), P()), out_specs=P(), axis_names={"x"}, check_vma=False
    )
    x = array(8, 64, sharding=NamedSharding(mesh, P("x", "y")))
    w = array(64, 16, sharding=NamedSharding(mesh, P("y")))
    t = trace(fn, x, w, source=source)
    assert t.memory["arguments"] == 4 * (4 * 16 + 16 * 16)
    assert ("all_reduce", "x", 256, 256) in rows(t)
    if source == "hlo":
        assert t.flops == {"float32": 2 * 4 * 16 * 16}
        assert ("all_reduce", "y", 256, 384) in rows(t)
    else:
        assert [note for note in t.notes if "1 x dot_general over y" in note]


def test_typed_keys_are_stored_as_integers() -> None:
    keys = jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype)
    fn = mapped(lambda k: lax.all_gather(k, "x"), X8, P("x"), P())
    [row] = trace(fn, keys).collectives
    assert (row["dtype"], row["shape"], row["payload_bytes"], row["wire_bytes"]) == ("uint32", [1, 2], 8, 56)
    with pytest.raises(CmxError, match="cannot be compiled for cpu"):
        trace(fn, keys, source="stablehlo")


def test_kernel_counts_its_grid() -> None:
    def kernel(a: Any, b: Any, out: Any) -> None:
        out[...] = a[...] @ b[...]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        call = pl.pallas_call(
            kernel,
            grid=(4, 4),
            out_shape=jax.ShapeDtypeStruct((512, 512), jnp.float32),
            in_specs=[
                pl.BlockSpec((128, 256), lambda i, j: (i, 0)),
                pl.BlockSpec((256, 128), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, j)),
            interpret=True,
        )
        return lax.psum(call(a, b), "x")

    fn, arguments = mapped(product, X8, (P("x"), P("x")), P()), (array(4096, 256), array(2048, 512))
    for source in ("jaxpr", "hlo"):
        t = trace(fn, *arguments, source=source)
        assert t.flops == {"float32": 2 * 512 * 512 * 256}
        assert rows(t) == [("all_reduce", "x", 2**20, 2**20 * 2 * 7 / 8)]
    t = trace(fn, *arguments, source="stablehlo")
    assert "some products: in a loop or branch that data decide; counted once" in t.notes


def test_kernel_counts_its_remote_copies() -> None:
    def kernel(source: Any, target: Any, sent: Any, received: Any) -> None:
        copy = pltpu.make_async_remote_copy(
            src_ref=source.at[0:2],
            dst_ref=target.at[0:2],
            send_sem=sent,
            recv_sem=received,
            device_id=(1 - lax.axis_index("x"),),
        )
        copy.start()
        copy.wait()

    def send(x: jax.Array) -> jax.Array:
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((4, 4), jnp.float32),
            in_specs=[anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
        )(x)

    t = trace(mapped(send, {"x": 2}, P("x"), P("x")), array(8, 4))
    assert rows(t) == [("remote_copy", "x", 2 * 4 * 4, 2 * 4 * 4)]


@pytest.mark.parametrize("source", SOURCES)
def test_function_of_a_lambda(source: str) -> None:
    inner = jax.jit(lambda v: lax.psum(v, "x"))
    fn = mapped(lambda v: inner(inner(v)), X8, P("x"), P())
    assert rows(trace(fn, array(64), source=source)) == [("all_reduce", "x", 32, 56)] * 2


def test_unknown_primitive_that_names_an_axis_is_a_note() -> None:
    from jax.extend.core import Primitive

    unknown = Primitive("exchange")
    unknown.def_abstract_eval(lambda x, *, axis_name: x)
    fn = mapped(lambda x: unknown.bind(x, axis_name="x"), X8, P("x"), P("x"))
    t = trace(fn, array(64))
    assert t.collectives == []
    [note] = t.notes
    assert note.startswith("1 x exchange over x (test_trace_programs.py:")
    assert note.endswith("unknown, what it moves is not counted")


def test_casts_of_varying_types_move_nothing() -> None:
    fn = jax.shard_map(
        lambda x: lax.pcast(x.sum(), "x", to="varying")[None] + jnp.float32(lax.axis_index("x")),
        mesh=mesh_of(x=8),
        in_specs=P(),
        out_specs=P("x"),
    )
    t = trace(fn, array(64))
    assert (t.collectives, t.notes) == ([], [])


def hlo(line: str, devices: int) -> str:
    return f"HloModule m, num_partitions={devices}\n\nENTRY %main (x: f32[256]) -> f32[256] {{\n{line}\n}}\n"


def test_types_below_a_byte_are_packed() -> None:
    text = hlo(
        "  %x = s4[256]{0:E(4)} parameter(0)\n  ROOT %g = s4[2048]{0:E(4)} all-gather(%x), channel_id=1, "
        "replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true",
        8,
    )
    [gather] = read_hlo(text).collectives
    assert (gather.operand_bytes, gather.wire_bytes) == (128, 896)


@pytest.mark.parametrize(
    ("line", "wire"),
    [
        ("collective-broadcast(%x), channel_id=1, replica_groups={{2,0}}", 1024 / 2 * 2 / 4),
        # groups of 3 and 1: three ranks send 2 x 2/3 of their operand, one sends nothing
        (
            "all-reduce(%x), channel_id=1, replica_groups={{0,1,2},{3}}, use_global_device_ids=true, "
            "to_apply=%x",
            1024 * (3 * 2 * 2 / 3) / 4,
        ),
    ],
)
def test_wire_bytes_are_the_mean_over_all_ranks(line: str, wire: float) -> None:
    text = hlo(f"  %x = f32[256]{{0}} parameter(0)\n  ROOT %r = f32[256]{{0}} {line}", 4)
    [collective] = read_hlo(text).collectives
    assert collective.wire_bytes == pytest.approx(wire)


def test_unknown_instruction_with_groups_is_a_note() -> None:
    line = "  %x = f32[256]{0} parameter(0)\n  ROOT %r = f32[256]{0} all-shuffle(%x), replica_groups={{0,1}}"
    program = read_hlo(hlo(line, 2))
    assert program.notes == ["1 x all-shuffle: what it computes and sends is not counted"]


def test_unknown_custom_call_of_stablehlo_is_a_note() -> None:
    text = (
        "module @m { func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> { %r = stablehlo.custom_call "
        "@NvshmemAllReduce(%x) : (tensor<4xf32>) -> tensor<4xf32> return %r : tensor<4xf32> } }"
    )
    [note] = read_stablehlo(text).notes
    assert note == "1 x custom call NvshmemAllReduce: what it computes and sends is not counted"
