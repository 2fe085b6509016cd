"""Layouts that share matrices among ranks, or leave the splitting to the compiler: their tokens and logits
equal those of one rank. And the traffic of their steps."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support import BASE, serve

import cmx_jax
from cmx_jax.analysis.trace.abstract_steps import trace_step
from cmx_jax.analysis.trace.trace_model import trace_model
from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import host_devices
from cmx_jax.mesh.layout import Layout, expert_parallel, tensor_parallel
from cmx_jax.mesh.named_layouts import LAYOUTS, named_layout
from cmx_jax.mesh.runners import make_runner
from cmx_jax.mesh.trace import Trace, read_hlo
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import preset
from cmx_jax.model.gshard import gspmd_masked
from cmx_jax.model.leaf import Leaf
from cmx_jax.model.sharding import laid_out, leaf_spec
from cmx_jax.model.weights import Experts, MoE, Weights, int8_fields
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.programs import Programs
from cmx_jax.serving.scheduling.allocator import Capacity
from model.small import config, random_weights

pytestmark = pytest.mark.slow

R1 = preset("deepseek-r1")
C = config(num_attention_heads=4, num_key_value_heads=4, intermediate_size=24, num_hidden_layers=2)
EXPERTS = C.n_routed_experts
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41], [3] * 9, [1]]
TOKENS = np.arange(24, dtype=np.int32).reshape(4, 6)

GRID = {"axes": (("dp", 2), ("tp", 2)), "data": ("dp",), "tensor": ("tp",), "slots": EXPERTS}
CASES = {
    "tp2": ("lanes", tensor_parallel(2, EXPERTS, microbatches=2)),
    "tp-ep4": ("devices", tensor_parallel(4, EXPERTS, whole_experts=True)),
    "auto4": ("devices", expert_parallel(4, EXPERTS, auto=True, mailbox_rows=0)),
    "two by two": ("devices", Layout(**GRID, experts=("dp",))),
    "two by two, whole experts": ("lanes", Layout(**GRID, experts=("dp", "tp"), exchange="allgather")),
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    small = jax.tree.map(lambda a: a * a.dtype.type(0.3) if a.dtype == np.float32 else a, random_weights(C))
    return small


def served(weights: Weights, layout: Layout, runner: str) -> tuple[list[list[int]], np.ndarray]:
    """Tokens of four prompts, with drafts and experts that move, and the logits of four rows."""
    room = Capacity(page_width=8, sequences=4 // layout.data_ranks, pages=16)
    programs = Programs("one", C, layout, make_runner(runner, layout.axes), weights, room, "float32", 1)
    one = Instance(programs)
    tokens = serve(Engine([one], one, eplb_interval=3), PROMPTS, 8)
    given = programs.runner.put((TOKENS, np.full(4, 6, np.int32)), (layout.data_spec,) * 2)
    return tokens, np.asarray(programs.steps.score(programs.weights, *given))


@pytest.fixture(scope="module")
def alone(weights) -> tuple[list[list[int]], np.ndarray]:
    return served(weights, expert_parallel(1, EXPERTS), "lanes")


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_one_rank(case, weights, alone) -> None:
    runner, layout = CASES[case]
    tokens, scores = served(weights, layout, runner)
    assert tokens == alone[0]
    np.testing.assert_allclose(scores, alone[1], atol=1e-5 * np.abs(alone[1]).max(), rtol=0)


def test_named_layout_gives_golden_logits() -> None:
    golden = np.load(BASE / "golden.npz")
    llm = cmx_jax.from_pretrained(BASE, layout="auto2", max_num_seqs=2)
    np.testing.assert_allclose(llm.logits(golden["tokens_40"]), golden["logits_40"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tp16", "tp-ep16"])
@pytest.mark.parametrize("int8", [False, True])
def test_ranks_have_matching_parts_of_weights_and_scales(name: str, int8: bool) -> None:
    c = dataclasses.replace(R1, int8=int8_fields(R1)) if int8 else R1
    layout = named_layout(name).make(c.n_routed_experts)
    local: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}

    def record(leaf: Leaf) -> None:
        spec = [(axes,) if isinstance(axes, str) else axes or () for axes in leaf_spec(c, leaf, layout)]
        spec += [()] * (len(leaf.shape) - len(spec))
        shape = tuple(n // layout.size(axes) for n, axes in zip(leaf.shape, spec, strict=True))
        local.setdefault((leaf.stack, leaf.path), {})[leaf.kind] = shape

    laid_out(c, layout, record, True)
    for shapes in local.values():
        if "scale" in shapes:
            q, scale = shapes["int8"], shapes["scale"]
            assert all(s in (1, n) for n, s in zip(q, scale, strict=True))
            assert math.prod(scale) > layout.ranks  # one scale for each channel
    numbers = "int8" if int8 else "matrix"
    assert local["moe", "attn.o"][numbers] == (58, 128 // 16, 128, 7168)
    assert local["moe", "attn.kv_a"][numbers] == (58, 7168, 576)
    assert local["moe", "ffn.shared.down"][numbers] == (58, 2048 // 16, 7168)
    slots, width = (16, 2048) if "ep" in name else (256, 128)
    assert local["moe", "ffn.experts.gate_up"][numbers] == (slots, 58, 7168, 2, width)
    assert local["", "head"]["matrix"] == (7168, 129280 // 16)


def expert_flops(trace: Trace) -> int:
    """FLOPs of the experts' matrix products."""
    inside = [types for scope, types in trace.scopes.items() if "MLP" in scope.split("/")]
    return sum(entry["flops"] for types in inside for entry in types.values())


@pytest.mark.parametrize("name", ["tp16", "tp-ep16"])
@pytest.mark.parametrize(("step", "rows", "logits"), [("decode", 2, 3), ("prefill", 512, 2)])
def test_tensor_parallel_traffic_is_two_sums_a_layer_and_the_logits(
    name: str, step: str, rows: int, logits: int
) -> None:
    """The MTP layer is included; `rows` and `logits` are numbers per sequence. Every rank has all 128
    sequences."""
    layout, tokens = named_layout(name).make(256), 128 * rows
    trace = trace_model(R1, layout, step, batch=8, context=512, drafts=1)
    by_op: dict[str, list[float]] = {}
    for r in trace.collectives:
        assert r["axes"] == ["tp"]
        by_op.setdefault(r["op"], []).append(r["wire_bytes"])
    hidden = tokens * 7168 * 2
    assert sum(by_op["all_reduce"]) == 2 * (61 + 1) * hidden * 2 * 15 / 16
    assert sum(by_op["all_gather"]) == 129280 // 16 * 4 * 15 * 128 * logits
    assert by_op.keys() == {"all_reduce", "all_gather"}
    assert expert_flops(trace) == (58 + 1) * 2 * tokens * 8 * 3 * 7168 * 2048 // 16


def test_deepseek_layouts_are_as_published() -> None:
    for name, ranks, nodes, slots in (("h800-ep144", 144, 18, 2), ("h800-ep32", 32, 4, 9)):
        layout = LAYOUTS[name].make(256)
        assert (layout.ranks, layout.axes[0], layout.slots_per_rank) == (ranks, ("node", nodes), slots)
        assert (layout.data_ranks, layout.shared_slots) == (ranks, 0)
    named = LAYOUTS["h800-ep144"]
    trace = trace_model(
        R1, named.make(256), named.step, batch=named.batch, context=4096, machine=named.machine
    )
    assert [r["plane"] for r in trace.collectives] == ["node", "RDMA", "node", "RDMA"]
    assert trace.collectives[0]["payload_bytes"] == 58 * 128 * 8 * (7168 + 4 + 2)


def test_allgather_layout_differs_from_the_paper_only_in_the_exchange() -> None:
    ours, theirs = (LAYOUTS[name] for name in ("ag-rs", "ep320"))
    assert dataclasses.replace(ours.make(256), exchange="flat") == theirs.make(256)
    assert (ours.batch, ours.ranks_per_npu) == (theirs.batch, theirs.ranks_per_npu)


def test_compiler_inserts_the_exchange_of_an_auto_layout() -> None:
    layout = named_layout("auto4").make(EXPERTS)
    mesh = Mesh(np.array(host_devices(4)[:4]), ("ep",))
    traced = trace_step(C, layout, "decode", sequences=2, context=256, dtype="float32", mesh=mesh)
    program = read_hlo(traced.lower().compile().as_text(), layout.axes)
    sent = [c for c in program.collectives if c.op == "all_to_all"]
    box = EXPERTS * 2 * C.hidden_size * 4  # each slot has a place for each of a rank's two tokens
    assert [(c.operand_bytes, c.count) for c in sent] == [(box, C.num_moe_layers)] * 2
    pool = 2 * 2 * 128 * C.row_dim * 4 * C.num_hidden_layers  # bytes of a rank's pages
    assert max(c.operand_bytes for c in program.collectives) < pool


def test_auto_layout_of_a_full_size_model_computes_every_place() -> None:
    named = LAYOUTS["auto"]
    trace = trace_model(R1, named.make(256), named.step, batch=named.batch, context=4096, ranks_per_npu=2)
    assert not trace.collectives
    assert "compiler" in trace.notes[-1]
    assert expert_flops(trace) == 58 * 2 * 256 * (256 * 6) * 3 * 7168 * 2048


def test_tokens_beyond_a_slots_places_are_dropped() -> None:
    layout = expert_parallel(2, 4, auto=True)
    rng = np.random.default_rng(0)
    normal: Any = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, experts = normal(6, 8), Experts(normal(4, 1, 8, 2, 3), normal(4, 1, 3, 8))
    table = MoE(None, None, jnp.arange(4), jnp.arange(5), experts, None)
    chosen, ones = jnp.asarray([[2], [2], [2], [-1], [1], [2]]), jnp.ones((6, 1), jnp.float32)
    arguments = (x, chosen, ones, table, experts, jnp.int32(0))
    complete, all_sent = jax.jit(gspmd_masked(layout, 3))(*arguments)
    partial, kept = jax.jit(gspmd_masked(layout, 2))(*arguments)
    assert (int(all_sent.sent), int(all_sent.received), int(kept.received)) == (5, 5, 4)
    assert np.abs(np.asarray(complete)).max(axis=1).all() == (chosen >= 0).all()
    np.testing.assert_array_equal(partial[jnp.array([0, 1, 4, 5])], complete[jnp.array([0, 1, 4, 5])])
    assert not np.asarray(partial[2]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": ("dp",)}, "axis 'dp' carries data and tensor, expected one of them"),
        ({"sequence": ("tp",)}, "heads are split over sequence and tensor, expected one of them"),
        (
            {"experts": ("dp", "tp")},
            "exchange 'flat' where ranks have the tokens of all experts, expected 'allg",
        ),
        ({"auto": True}, "auto splits a whole program over one set of axes"),
    ],
)
def test_contradictory_layout_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CmxError, match=message):
        dataclasses.replace(CASES["two by two"][1], **change)


def test_indivisible_heads_and_widths_are_refused() -> None:
    def make(c: ModelConfig, ranks: int) -> None:
        laid_out(c, tensor_parallel(ranks, c.n_routed_experts), lambda leaf: leaf, True)

    with pytest.raises(CmxError, match="128 heads cannot be shared by 3 ranks"):
        make(R1, 3)
    with pytest.raises(
        CmxError, match=r"ffn\.gate_up: a width of 21 cannot be shared by 4 ranks, expected a div"
    ):
        make(dataclasses.replace(C, intermediate_size=21), 4)
    with pytest.raises(CmxError, match="64 heads cannot be shared by 4 ranks, expected latent attention"):
        make(preset("qwen3-235b-a22b"), 4)
