"""Full-size steps' collectives against closed forms of the model's fields."""

import pytest

from cmx_jax.errors import CmxError
from cmx_jax.mesh.trace.table import Trace
from cmx_jax.model.families import preset
from cmx_jax.model.trace import ready, trace_model

R1 = preset("deepseek-r1")
WIDTH, TOP_K, MOE, LAYERS, HEADS, VALUE = 7168, 8, 58, 61, 128, 128
QUERY, ROW = 1536, 512 + 64
INT8 = WIDTH + 4 + 2  # a token, its scale, its slot


def traced(name: str, **fields: int) -> Trace:
    found = ready(name)
    layout = found.make(R1.n_routed_experts)
    given = {"batch": found.batch, "context": 4096, "ranks_per_npu": found.ranks_per_npu} | fields
    return trace_model(R1, layout, found.step, **given)


def test_decode_on_320_dies_moves_what_the_fields_say() -> None:
    found = traced("ep320", drafts=1)
    tokens = 96 // 2 * 2  # of a die: half an NPU's sequences, the newest token and a draft of each
    box = 320 * tokens  # a die has one slot: a peer gets each token at most once
    expected = []
    for times in (MOE, 1):
        for size, message in ((1, INT8), (2, WIDTH)):
            whole = times * box * message * size
            useful = times * tokens * (TOP_K + 1) * message * size  # the shared expert lies in slots
            expected.append(("all_to_all", times, useful, whole * 319 / 320))
    rows = [(r["op"], r["count"], r["payload_bytes"], r["wire_bytes"]) for r in found.collectives]
    assert rows == expected
    assert {r["plane"] for r in found.collectives} == {"nodes"}


def test_prefill_on_32_dies_gathers_latents_and_turns_heads_to_tokens() -> None:
    found = traced("ep32")
    batch, share = 2 * 32 // 2, 4096 // 32  # sequences of all dies, a die's tokens of each
    by_scope: dict[str, float] = {}
    for r in found.collectives:
        by_scope[r["scope"]] = by_scope.get(r["scope"], 0) + r["wire_bytes"]
    # NPU by NPU within a node of 8, then node by node of 4: together all 31 other shares
    latents = LAYERS * batch * share * (QUERY + ROW) * 2 * 31
    assert by_scope["GatherLatents"] == latents
    assert by_scope["HeadsToTokens"] == LAYERS * batch * 4096 * HEADS // 32 * VALUE * 2 * 31 / 32


def test_products_of_a_decode_step_are_those_of_the_parameters_and_the_cache() -> None:
    found = traced("ep320")
    tokens, context = 48, 4096
    attention = WIDTH * QUERY + QUERY * HEADS * 192 + WIDTH * ROW + HEADS * VALUE * WIDTH
    absorbed = HEADS * 512 * (128 + VALUE)
    cached = HEADS * context * 2 * ROW  # scores, and the sum over whole rows
    experts = MOE * (TOP_K + 1) * 3 * WIDTH * 2048
    dense = 3 * 3 * WIDTH * 18432
    head = WIDTH * 129280
    each = LAYERS * (attention + absorbed + cached) + experts + dense + head
    assert found.flops["bfloat16"] == 2 * tokens * each
    router, combine = WIDTH * 256, (TOP_K + 1) * WIDTH
    assert found.flops["float32"] == 2 * tokens * MOE * (router + combine)


def test_a_batch_that_does_not_divide_and_a_context_beyond_the_model_are_refused() -> None:
    with pytest.raises(CmxError, match=r"batch is 3, expected a positive multiple of an NPU's 2 ranks"):
        traced("ep320", batch=3)
    with pytest.raises(CmxError, match=r"context is 200000, expected 1 to the model's 163840"):
        traced("ep320", context=200000)
    with pytest.raises(CmxError, match=r"layout 'tp8', expected ep and a number of ranks"):
        ready("tp8")
