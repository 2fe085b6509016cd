"""Collectives and FLOPs of HLO text, compared with what each program does by its definition.

Texts are from the installed CPU compiler, from the TPU compiler as `scripts/make_hlo.py` stored them, and
written by hand for forms that neither writes.
"""

import contextlib
import itertools
import math
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from cmx_jax.errors import CmxError
from cmx_jax.mesh.trace.hlo.collectives import COLLECTIVES
from cmx_jax.mesh.trace.hlo.loops import trips
from cmx_jax.mesh.trace.hlo.parser import arrays, numpy_dtype
from cmx_jax.mesh.trace.hlo.reader import Program, read_hlo
from cmx_jax.mesh.trace.jaxpr import read_jaxpr
from cmx_jax.mesh.trace.ops.collective import OPS, Collective
from cmx_jax.mesh.trace.ops.scope import scopes
from mesh.hlo_programs import AXES, compiled, traced

STORED = Path(__file__).parent / "hlo"


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))


@cache
def text_of(name: str, target: str) -> str:
    return (STORED / f"tpu_{name}.txt").read_text() if target == "tpu" else compiled(name, mesh())


def program_of(name: str, target: str) -> Program:
    return read_hlo(text_of(name, target), AXES)


def facts(collective: Collective) -> tuple:
    c = collective
    return c.op, "".join(c.axes), c.group_size, c.operand_bytes, c.count, c.scope, c.share


def all_facts(program: Program) -> list[tuple]:
    return sorted(map(facts, program.collectives), key=repr)


on_both_targets = pytest.mark.parametrize("target", ["cpu", "tpu"])


# programs


@on_both_targets
def test_exchange_in_loop(target: str) -> None:
    program = program_of("exchange", target)
    # a TPU rounds the rows before its product, and its compiler rounds them before they travel
    dtype, width = {"cpu": ("float32", 4), "tpu": ("bfloat16", 2)}[target]
    assert all_facts(program) == [("all_to_all", "b", 4, 8 * 64 * 256 * width, 7, "Moe/Dispatch", 1.0)]
    assert program.flops == {dtype: 7 * 2 * (8 * 64) * 256 * 256}
    assert program.devices == 8
    assert not program.notes


@on_both_targets
def test_collectives_one_of_each(target: str) -> None:
    n = 64 * 128 * 4
    program = program_of("mixed", target)
    assert all_facts(program) == sorted(
        [
            ("all_gather", "b", 4, n, 1, "Gather", 1.0),
            ("all_reduce", "a", 2, n, 1, "Reduce", 1.0),
            ("all_reduce", "ab", 8, 2 * n, 1, "Reduce", 1.0),  # two in one
            ("permute", "b", 4, n, 1, "Line", 0.75),
            ("permute", "b", 4, n, 1, "Ring", 1.0),
            ("reduce_scatter", "b", 4, 4 * n, 1, "Scatter", 1.0),
        ],
        key=repr,
    )
    line = next(c for c in program.collectives if c.scope == "Line")
    assert line.wire_bytes == 0.75 * n
    assert line.groups == ((0, 1, 2, 3), (4, 5, 6, 7))


@on_both_targets
def test_loops_in_loops_and_branches(target: str) -> None:
    n = 64 * 128 * 4
    program = program_of("nested", target)
    assert all_facts(program) == [
        ("all_gather", "b", 4, n, None, "", 1.0),  # in one branch only
        ("all_reduce", "a", 2, n, 5 * 3, "", 1.0),  # in both branches
        ("all_reduce", "b", 4, n, None, "", 1.0),  # while data want it
    ]
    assert {(c.op, c.axes): c.known for c in program.collectives} == {
        ("all_gather", ("b",)): 5,
        ("all_reduce", ("a",)): 5 * 3,
        ("all_reduce", ("b",)): 1,
    }
    assert [note.split(" ")[0] for note in program.notes] == ["branches", "loop"]


def test_asynchronous_gathers_are_counted_once() -> None:
    text = text_of("layers", "tpu")
    assert text.count(" all-gather(") > 3
    assert "all-to-all-start(" in text
    program = read_hlo(text, AXES)
    x = 1024 * 2048 * 2
    assert all_facts(program) == sorted(
        [
            ("all_gather", "b", 4, 512 * 8192 * 2, 6, "Up", 1.0),
            ("all_gather", "b", 4, 2048 * 2048 * 2, 6, "Down", 1.0),
            ("reduce_scatter", "a", 2, x, 6, "Sum", 1.0),
            ("all_gather", "a", 2, x // 2, 6, "Sum", 1.0),
            ("all_to_all", "b", 4, x, 6, "Swap", 1.0),
        ],
        key=repr,
    )
    assert program.flops == {"bfloat16": 6 * 2 * (2 * 1024 * 2048 * 8192)}
    assert not program.notes
    (swap,) = (c for c in program.collectives if c.op == "all_to_all")
    assert (swap.awaited_at or 0) > swap.position


@pytest.mark.parametrize("name", ["layers", "nested"])
def test_programs_without_combined_collectives_equal_their_jaxpr(name: str) -> None:
    hlo, jaxpr = program_of(name, "tpu"), read_jaxpr(traced(name, mesh()).jaxpr)
    seen = [sorted((*facts(c), c.known) for c in source.collectives if c.count) for source in (hlo, jaxpr)]
    assert seen[0] == seen[1]
    assert hlo.flops == ({"bfloat16": sum(p.flops * p.known for p in jaxpr.products)} if hlo.flops else {})


@on_both_targets
def test_sum_inserted_by_compiler(target: str) -> None:
    program = program_of("mlp", target)
    assert all_facts(program) == [("all_reduce", "b", 4, 128 * 512 * 4, 1, "", 1.0)]
    assert program.flops == {"float32": 2 * 2 * 128 * 512 * 256}


def test_sum_with_kept_parts_is_reduce_scatter() -> None:
    text = text_of("projection", "tpu")
    assert " all-reduce(" in text
    assert " reduce-scatter(" not in text
    assert all_facts(read_hlo(text, AXES)) == [("reduce_scatter", "b", 4, 512 * 2048 * 2, 1, "Project", 1.0)]


@on_both_targets
def test_products(target: str) -> None:
    scores, codes = 2 * 16 * 128 * 256 * 64, 2 * 128 * 128 * 512
    # beyond the edge there is nothing to multiply: 3 rows of the kernel see 16, 15 and 15 rows of the image
    image = 2 * 2 * 32 * 64 * (3 * 16 - 2) * (3 * 24 - 2)
    if target == "tpu":  # cuts each image into 8 pieces of 4 columns, which is more than asked for
        image = 2 * 2 * 32 * 64 * (3 * 16 - 2) * (8 * 3 * 4)
    assert program_of("products", target).flops == {"float32": scores + image, "int8": codes}


# texts by hand

ADD = "add {\n x = f32[] parameter(0)\n y = f32[] parameter(1)\n ROOT s = f32[] add(x, y)\n}\n\n"


def module(body: str, before: str = "", header: str = ", num_partitions=8") -> str:
    return f"HloModule by_hand, is_scheduled=true{header}\n\n{ADD}{before}ENTRY main {{\n{body}\n}}\n"


def only(text: str, axes: tuple = AXES) -> Collective:
    (collective,) = read_hlo(text, axes).collectives
    return collective


GROUPS = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}"
PARAMETER = "%p = f32[16,8]{1,0:T(8,128)} parameter(0)\n"


@pytest.mark.parametrize(
    ("op", "line", "size"),
    [
        (
            "all_gather",
            "%s = (f32[16,8]{1,0}, f32[64,8]{1,0}) all-gather-start(f32[16,8]{1,0} %p), "
            f"{GROUPS}, dimensions={{0}}, use_global_device_ids=true\n"
            "ROOT %d = f32[64,8]{1,0} all-gather-done((f32[16,8]{1,0}, f32[64,8]{1,0}) %s)",
            512,
        ),
        (
            "all_reduce",
            f"%s = f32[16,8] all-reduce-start(%p), {GROUPS}, use_global_device_ids=true, to_apply=add\n"
            "ROOT %d = f32[16,8]{1,0} all-reduce-done(%s)",
            512,
        ),
        (
            "reduce_scatter",
            "%s = ((f32[16,8]{1,0}), f32[4,8]{1,0}) reduce-scatter-start(%p), dimensions={0}, "
            f"{GROUPS}, use_global_device_ids=true, to_apply=%add\n"
            "ROOT %d = f32[4,8]{1,0} reduce-scatter-done(%s)",
            512,
        ),
        ("broadcast", f"ROOT b = f32[16,8] collective-broadcast(p), {GROUPS}", 512),
        (
            "ragged_all_to_all",
            "%o = f32[99,8] parameter(1)\n%n = s64[4] parameter(2)\n"
            f"ROOT %r = f32[99,8] ragged-all-to-all(%p, %o, %n, %n, %n, /*index=5*/%n), {GROUPS}",
            512,
        ),
        (
            "all_to_all",
            f"ROOT %t = (f32[16,8], f32[16,8]) all-to-all(%p, %p), dimensions={{0}}, {GROUPS}",
            1024,
        ),
        (
            "permute",
            "%i = s32[] constant(0)\n"
            "ROOT %c = f32[16,8] collective-permute(%p, %p, %i, %i), slice_sizes={{2,8},{1,8}},\n"
            "  channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
            96,
        ),
    ],
)
def test_operands_and_starts(op: str, line: str, size: int) -> None:
    collective = only(module(PARAMETER + line))
    assert facts(collective) == (op, "b", 4, size, 1, "", 1.0)


def test_asynchronous_computations() -> None:
    before = (
        "%wrapped (p.1: f32[16,8]) -> f32[16,8] {\n  %p.1 = f32[16,8]{1,0} parameter(0)\n"
        f"  ROOT %t = f32[16,8]{{1,0}} all-to-all(%p.1), {GROUPS}, dimensions={{0}}, "
        'metadata={op_name="jit(f)/Dispatch/all_to_all"}\n}, execution_thread="parallel"\n\n'
    )
    body = (
        f"{PARAMETER}%s = ((f32[16,8]{{1,0}}), f32[16,8]{{1,0}}, u32[]) async-start(%p), calls=%wrapped\n"
        "%u = ((f32[16,8]{1,0}), f32[16,8]{1,0}, u32[]) async-update(%s), calls=%wrapped\n"
        "ROOT %d = f32[16,8]{1,0} async-done(%u), calls=%wrapped"
    )
    collective = only(module(body, before))
    assert facts(collective) == ("all_to_all", "b", 4, 512, 1, "Dispatch", 1.0)
    assert (collective.position, collective.awaited_at) == (0, 1)


def test_arrays_of_several_types_and_shapes() -> None:
    body = (
        "%p = bf16[16,8] parameter(0)\n%q = bf16[3] parameter(1)\n%r = f32[<=5,2] parameter(2)\n"
        f"ROOT %a = (bf16[16,8], bf16[3], f32[<=5,2]) all-reduce(%p, %q, %r), {GROUPS}, to_apply=%add"
    )
    shapes = [(c.dtype, c.shape) for c in read_hlo(module(body)).collectives]
    assert shapes == [("bfloat16", (131,)), ("float32", (5, 2))]


def test_computation_with_several_callers_counts_for_each() -> None:
    before = (
        f"%f {{\n{PARAMETER}ROOT %r = f32[16,8] all-reduce(%p), {GROUPS}, use_global_device_ids=true\n}}\n"
    )
    body = (
        f"{PARAMETER}%c = pred[] parameter(1)\n%a = f32[16,8] call(%p), to_apply=%f\n"
        "%b = f32[16,8] fusion(%a), kind=kCustom, calls=%f\n"
        "ROOT %d = f32[16,8] conditional(%c, %b, %b), true_computation=%f, false_computation=%f"
    )
    assert only(module(body, before)).count == 3


def test_data_dependent_products() -> None:
    product = "%r = f32[16,16] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    before = f"%f {{\n{PARAMETER}{product}\n}}\n%g {{\n{PARAMETER}ROOT %n = f32[16,16] rng()\n}}\n"
    body = (
        f"{PARAMETER}%c = s32[] parameter(1)\n"
        "ROOT %d = f32[16,16] conditional(%c, %p, %p, %p), branch_computations={%f, %SECOND, %f}"
    )
    same = read_hlo(module(body.replace("SECOND", "f"), before))
    assert (same.flops, same.flops_once, same.notes) == ({"float32": 2 * 16 * 8 * 16}, {}, [])
    differ = read_hlo(module(body.replace("SECOND", "g"), before))
    assert (differ.flops, differ.flops_once) == ({}, {"float32": 2 * (2 * 16 * 8 * 16)})
    assert differ.notes == ["branches of d: data decide which products run"]


def test_custom_calls_are_named() -> None:
    body = (
        f'{PARAMETER}%s = f32[16,8] custom-call(%p), custom_call_target="Sharding", sharding={{replicated}}\n'
        '%g = f32[16,8] custom-call(%s), custom_call_target="__cublas$gemm"\n'
        "%t = token[] after-all()\nROOT %n = (f32[16,8], u32[], token[]) send(%g, %t), channel_id=2"
    )
    program = read_hlo(module(body))
    assert not program.collectives
    assert [note.split(":")[0] for note in program.notes] == ["1 x custom call __cublas$gemm", "1 x send"]


LOOP = """
body {{
  s = (s32[], f32[16,8], s32[]) parameter(0)
  i = s32[] get-tuple-element(s), index=0
  x = f32[16,8] get-tuple-element(s), index=1
  n = s32[] get-tuple-element(s), index=2
  d = s32[] constant({step})
  j = s32[] add(d, i)
  y = f32[16,8] all-reduce(x), {groups}, to_apply=add
  ROOT t = (s32[], f32[16,8], s32[]) tuple(j, y, n)
}}

condition {{
  s = (s32[], f32[16,8], s32[]) parameter(0)
  i = s32[] get-tuple-element(s), index=0
  n = s32[] get-tuple-element(s), index=2
  ROOT c = pred[] compare({compared}), direction={direction}
}}

"""


def loop(start: int, step: int, end: str, direction: str, compared: str = "i, n") -> str:
    body = (
        f"p = f32[16,8] parameter(0)\na = s32[] constant({start})\ne = s32[] {end}\n"
        "t = (s32[], f32[16,8], s32[]) tuple(a, p, e)\n"
        "ROOT w = (s32[], f32[16,8], s32[]) while(t), condition=condition, body=body"
    )
    return module(body, LOOP.format(step=step, groups=GROUPS, direction=direction, compared=compared))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (loop(0, 1, "constant(58)", "LT"), 58),
        (loop(3, 4, "constant(10)", "LE"), 2),
        (loop(0, 1, "constant(58)", "GT", "n, i"), 58),
        (loop(9, -3, "constant(0)", "GT"), 3),
        (loop(9, -3, "constant(0)", "NE"), 3),
        (loop(5, 1, "constant(5)", "LT"), 0),
        (loop(0, 1, "parameter(1)", "LT"), None),
        (loop(0, 0, "constant(5)", "LT"), None),
        (loop(0, 1, "constant(5)", "LT", "n, n"), None),
    ],
)
def test_trip_counts_by_counter_and_limit(text: str, count: int | None) -> None:
    program = read_hlo(text)
    assert [c.count for c in program.collectives] == [count]
    assert bool(program.notes) == (count is None)


def test_trip_count_in_the_backend_config() -> None:
    text = loop(0, 1, "parameter(1)", "LT")
    for config in ('{"known_trip_count":{"n":"58"}}', '"{\\"known_trip_count\\":{\\"n\\":\\"58\\"}}"'):
        assert only(text.replace("body=body", f"body=body, backend_config={config}")).count == 58


@given(
    start=st.integers(-6, 6),
    step=st.integers(-3, 3),
    end=st.integers(-6, 6),
    direction=st.sampled_from(["LT", "LE", "GT", "GE", "EQ", "NE"]),
)
def test_trips_are_those_of_the_loop(start: int, step: int, end: int, direction: str) -> None:
    goes_on = {
        "LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__,
        "GE": int.__ge__, "EQ": int.__eq__, "NE": int.__ne__,
    }[direction]  # fmt: skip
    i, count = start, 0
    while goes_on(i, end) and count < 50:
        i, count = i + step, count + 1
    assert trips(start, step, end, direction) == (count if count < 50 else None)


# groups


def reduced(groups: str, header: str, attributes: str = "channel_id=1, use_global_device_ids=true") -> str:
    line = f"ROOT %r = f32[16,8] all-reduce(%p), {attributes}, {groups}, to_apply=%add"
    return module(PARAMETER + line, header=header)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[tuple[tuple[str, int], ...], list[int]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    chosen = [axis for axis in range(len(sizes)) if draw(st.booleans())]
    return tuple(zip("abcd", sizes, strict=False)), chosen


@settings(deadline=None)
@given(meshes(), st.sampled_from(["listed", "iota", "mesh"]), st.randoms())
def test_groups_of_any_axes_of_any_mesh(case: tuple, form: str, random: object) -> None:
    axes, chosen = case
    sizes = [size for _, size in axes]
    places = list(itertools.product(*map(range, sizes)))
    by_rest: dict[tuple, list[int]] = {}
    for number, place in enumerate(places):
        rest = tuple(index for axis, index in enumerate(place) if axis not in chosen)
        by_rest.setdefault(rest, []).append(number)
    groups = list(by_rest.values())
    if form == "listed":
        random.shuffle(groups)  # type: ignore[attr-defined]
        text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    elif form == "iota":
        order = [axis for axis in range(len(sizes)) if axis not in chosen] + chosen
        shape, turned = ",".join(map(str, sizes)), ",".join(map(str, order))
        text = f"[{len(groups)},{len(groups[0])}]<=[{shape}]T({turned})"
    else:
        named = ",".join(f"'{name}'={size}" for name, size in axes)
        text = f"mesh[{named}] {{" + ",".join(f"'{axes[axis][0]}'" for axis in chosen) + "}"
    collective = only(reduced(f"replica_groups={text}", f", num_partitions={len(places)}"), axes)
    assert collective.axes == tuple(axes[axis][0] for axis in chosen if sizes[axis] > 1)
    assert collective.group_size == len(groups[0]) == math.prod(sizes[axis] for axis in chosen)
    assert sorted(map(sorted, collective.groups or ())) == sorted(groups)


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={}", ("a", "b"), 8),
        ("replica_groups=[2,4]<=[8]", ("b",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("a",), 2),
        ("replica_groups=[4,2]<=[8]", (), 2),  # half of b
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("b",), 4),
        ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", (), 2),
        ("replica_groups={{0,1},{2,3,4,5,6,7}}", (), 6),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", ("b",), 4),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", ("a",), 2),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", (), 2),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", (), 4),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=(0,4,1,5,2,6,3,7) {'y'}", ("a",), 2),
    ],
)
def test_forms_of_groups(groups: str, axes: tuple, size: int) -> None:
    collective = only(reduced(groups, ", num_partitions=8"))
    assert (collective.axes, collective.group_size) == (axes, size)


@pytest.mark.parametrize(
    ("attributes", "groups", "axes"),
    [  # 2 replicas (a) of 4 partitions (b)
        ("channel_id=1, use_global_device_ids=true", "{{0,1,2,3},{4,5,6,7}}", ("b",)),
        ("channel_id=1", "{{0},{1}}", ("b",)),  # of replicas, each with all of its partitions
        ("channel_id=1", "{{0,1}}", ("a", "b")),
        ("control-predecessors={}", "{{0,1}}", ("a",)),
        ("control-predecessors={}", "{}", ("a",)),
    ],
)
def test_kinds_of_ids_in_groups(attributes: str, groups: str, axes: tuple) -> None:
    header = ", replica_count=2, num_partitions=4"
    assert only(reduced(f"replica_groups={groups}", header, attributes)).axes == axes
    line = "ROOT %t = f32[16,8] all-to-all(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
    assert only(module(PARAMETER + line, header=header)).axes == ("b",)  # of partitions


def test_mesh_of_another_size() -> None:
    program = read_hlo(text_of("mlp", "tpu"), (("a", 2), ("b", 2)))
    assert [(c.axes, c.group_size) for c in program.collectives] == [((), 4)]
    assert program.notes == ["for 8 devices, but the mesh has 4: axes are unknown"]


def test_groups_without_a_mesh_or_number_of_devices() -> None:
    ring = "ROOT %c = f32[16,8] collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,0},{2,2}}"
    collective = only(module(PARAMETER + ring, header=""), ())
    assert (collective.axes, collective.group_size, collective.share) == ((), 2, 2 / 3)


# names


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(f)/jit(main)/while/body/Dispatch/all_to_all", "Dispatch"),
        ("jit(f)/shard_map/while/body/closed_call/Moe/Dispatch/all_to_all", "Moe/Dispatch"),
        ("pjit(f)/transpose(jvp(Moe))/checkpoint/rematted_computation/Combine/psum", "Moe/Combine"),
        ("jit(f)/jvp()/cond/branch_1_fun/psum", ""),
        ("jit(<lambda>)/vmap(Attention)/custom_vjp_call/dot_general", "Attention"),
        ("(reduce_sum:reduce_sum:Gate/reduce_sum)", "Gate"),
        ("(psum_invariant:transpose(jvp(Moe))/Combine/psum_invariant)", "Moe/Combine"),
        ("jit(f)/Gate/mul;jit(f)/Dispatch/add", "Gate"),
        ("psum", ""),
        ("", ""),
    ],
)
def test_scopes(op_name: str, scope: str) -> None:
    assert scopes(op_name) == scope


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[("pred", "bool"), ("s8", "int8"), ("u32", "uint32"), ("s4", "int4"), ("bf16", "bfloat16")],
        *[("f64", "float64"), ("c64", "complex64"), ("f8e4m3fn", "float8_e4m3fn"), ("f8e5m2", "float8_e5m2")],
        *[("f8e4m3b11fnuz", "float8_e4m3b11fnuz"), ("f4e2m1fn", "float4_e2m1fn")],
    ],
)
def test_types(name: str, dtype: str) -> None:
    assert numpy_dtype(name) == dtype


def test_shapes() -> None:
    text = "(bf16[2,<=3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/(s8[]{:T(512)}, token[]), pred[4]{0})"
    assert arrays(text) == [("bfloat16", (2, 3)), ("int8", ()), ("bool", (4,))]


def test_ops_have_names() -> None:
    assert {*COLLECTIVES.values(), "remote_copy"} == set(OPS)  # HLO has the kernel, not its copies


# what is no HLO


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found nothing"),
        ('{"collectives": []}', "found JSON"),
        ("module @jit_f attributes {mhlo.num_partitions = 8 : i32} {\n}", r"found StableHLO \(MLIR\)"),
        ("Traceback (most recent call last):\n  File", r"found 'Traceback"),
        ("HloModule m\n", "none of 0 computations is ENTRY"),
        (module(PARAMETER)[:-3], "computation main has no end"),
        (module("ROOT %d = f32[16,8] dot(%p, %p), lhs_contracting_dims={1}"), "p of d is not in main"),
        (module(f"{PARAMETER}ROOT %d = f32[16,8] call(%p), to_apply=%gone"), "gone is called but missing"),
        (
            module(f"{PARAMETER}ROOT %d = f32[16] dot(%p, %p), lhs_contracting_dims={{2}}"),
            "'d = f32",
        ),
        (module("%p = q7[2] parameter(0)\nROOT %r = q7[2] all-reduce(%p)"), "unknown type q7"),
    ],
)
def test_wrong_texts_are_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(CmxError, match=expected) as error:
        read_hlo(text)
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(st.data())
def test_damaged_text_raises_only_cmx_errors(data: st.DataObject) -> None:
    text = text_of(data.draw(st.sampled_from(["nested", "products", "layers"])), "tpu")
    start = data.draw(st.integers(0, len(text) - 1))
    lost, instead = data.draw(st.integers(0, 30)), data.draw(st.sampled_from(["", "(", "}", "%", "0", ","]))
    with contextlib.suppress(CmxError):
        read_hlo(text[:start] + instead + text[start + lost :], AXES)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.99])
def test_truncated_text_is_refused(share: float) -> None:
    text = text_of("layers", "tpu")
    with pytest.raises(CmxError, match=r"cut short|lost"):
        read_hlo(text[: int(share * len(text))])
