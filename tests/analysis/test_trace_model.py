"""Collectives of steps, compared with closed forms of the model's fields; full-size ones with baselines."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from model.small import config

from cmx_jax.analysis.trace.trace_model import trace_model
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.mesh import Layout, expert_parallel
from cmx_jax.mesh.named_layouts import named_layout
from cmx_jax.mesh.trace import SOURCES, Trace
from cmx_jax.model.families import preset

R1 = preset("deepseek-r1")
WIDTH, TOP_K, MOE, LAYERS, HEADS, VALUE = 7168, 8, 58, 61, 128, 128
QUERY, ROW = 1536, 512 + 64
INT8 = WIDTH + 4 + 2  # a token, its scale, its slot


def traced(name: str, **fields: int) -> Trace:
    named = named_layout(name)
    layout = named.make(R1.n_routed_experts)
    sizes = {"batch": named.batch, "context": 4096, "ranks_per_npu": named.ranks_per_npu} | fields
    return trace_model(R1, layout, named.step, **sizes)


def test_collectives_of_decode_on_320_dies() -> None:
    result = traced("ep320", drafts=1)
    tokens = 96 // 2 * 2  # of a die: half an NPU's sequences, the newest token and a draft of each
    box = 320 * tokens  # a die has one slot: a peer gets each token at most once
    expected = []
    for times in (MOE, 1):
        for size, message in ((1, INT8), (2, WIDTH)):
            sent = times * box * message * size
            useful = times * tokens * (TOP_K + 1) * message * size  # the shared expert lies in slots
            expected.append(("all_to_all", times, useful, sent * 319 / 320))
    rows = [(r["op"], r["count"], r["payload_bytes"], r["wire_bytes"]) for r in result.collectives]
    assert rows == expected
    assert {r["plane"] for r in result.collectives} == {"nodes"}


def test_collectives_of_prefill_on_32_dies() -> None:
    result = traced("ep32")
    batch, share = 2 * 32 // 2, 4096 // 32  # sequences of all dies, a die's tokens of each
    by_scope: dict[str, float] = {}
    for r in result.collectives:
        by_scope[r["scope"]] = by_scope.get(r["scope"], 0) + r["wire_bytes"]
    # NPU by NPU within a node of 8, then node by node of 4: together all 31 other shares
    latents = LAYERS * batch * share * (QUERY + ROW) * 2 * 31
    assert by_scope["GatherLatents"] == latents
    assert by_scope["HeadsToTokens"] == LAYERS * batch * 4096 * HEADS // 32 * VALUE * 2 * 31 / 32


def test_products_of_a_decode_step() -> None:
    result = traced("ep320")
    tokens, context = 48, 4096
    attention = WIDTH * QUERY + QUERY * HEADS * 192 + WIDTH * ROW + HEADS * VALUE * WIDTH
    absorbed = HEADS * 512 * (128 + VALUE)
    cached = HEADS * context * 2 * ROW  # scores, and the sum over whole rows
    experts = MOE * (TOP_K + 1) * 3 * WIDTH * 2048
    dense = 3 * 3 * WIDTH * 18432
    head = WIDTH * 129280
    per_token = LAYERS * (attention + absorbed + cached) + experts + dense + head
    assert result.flops["bfloat16"] == 2 * tokens * per_token
    router, combine = WIDTH * 256, (TOP_K + 1) * WIDTH
    assert result.flops["float32"] == 2 * tokens * MOE * (router + combine)


def test_wrong_batches_contexts_and_layouts_are_refused() -> None:
    with pytest.raises(CmxError, match=r"batch is 3, expected a positive multiple of an NPU's 2 ranks"):
        traced("ep320", batch=3)
    with pytest.raises(CmxError, match=r"context is 200000, expected 1 to the model's 163840"):
        traced("ep320", context=200000)
    with pytest.raises(CmxError, match=r"layout 'pp8', expected ep, tp, .* and a number of ranks, or one of"):
        named_layout("pp8")


def wire(result: Trace) -> dict[tuple[str, str], float]:
    """Wire bytes by operation and scope, of what moves more than the number of rounds."""
    sums: dict[tuple[str, str], float] = {}
    for r in result.collectives:
        if r["shape"]:
            key = r["op"], r["scope"].rsplit("/", 1)[-1]
            sums[key] = sums.get(key, 0) + r["wire_bytes"]
    return sums


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("exchange", ["flat", "hierarchical", "allgather"])
@pytest.mark.slow
def test_decode_of_a_small_model_moves_the_same_in_every_source(source: str, exchange: str) -> None:
    c = config()
    layout = expert_parallel(16, c.n_routed_experts, exchange=exchange, wire="int8", mailbox_rows=0)
    tokens, wide, moe = 3, c.hidden_size, c.num_moe_layers
    result = trace_model(c, layout, "decode", batch=tokens, context=128, dtype="float32", source=source)
    message, rows = wide + 4 + 2, layout.rows(tokens, c.num_experts_per_tok)
    if exchange == "allgather":
        gathered = tokens * (message + c.num_experts_per_tok * (4 + 4)) * 15
        expected = {
            ("all_gather", "Dispatch"): moe * gathered,
            ("reduce_scatter", "Combine"): moe * 16 * tokens * wide * 4 * 15 / 16,
        }
    else:
        tiers = [16] if exchange == "flat" else [2, 8]  # each byte moves once a tier
        out = moe * 16 * rows * sum((n - 1) / n for n in tiers)
        back = 4 if source == "hlo" else 2  # CPU sends BF16 as F32
        expected = {("all_to_all", "Dispatch"): out * message, ("all_to_all", "Combine"): out * wide * back}
    assert wire(result) == pytest.approx(expected, rel=1e-12)
    if source == "hlo":
        assert result.memory["peak"] > result.memory["arguments"] > 0
        assert any("bfloat16 as float32" in note for note in result.notes) == (exchange != "allgather")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.slow
def test_prefill_of_shared_sequences_moves_the_same_in_every_source(source: str) -> None:
    c = config()
    a, ranks, context = c.attention, 3, 63
    layout = expert_parallel(ranks, c.n_routed_experts, wire="float32", share_sequences=True)
    result = trace_model(c, layout, "prefill", batch=2, context=context, dtype="float32", source=source)
    sequences, share, layers = 2 * ranks, context // ranks, c.num_hidden_layers
    moved = wire(result)
    latents = layers * sequences * share * (a.q_lora_rank + a.kv_lora_rank + a.qk_rope_head_dim) * 4
    assert moved["all_gather", "GatherLatents"] == latents * (ranks - 1)
    heads = layers * sequences * context * c.num_attention_heads // ranks * a.v_head_dim * 4
    assert moved["all_to_all", "HeadsToTokens"] == heads * (ranks - 1) / ranks


BASELINES = Path(__file__).parents[1] / "baselines"


@pytest.mark.parametrize("path", sorted(BASELINES.glob("*.json")), ids=lambda path: path.stem)
def test_full_size_steps_equal_their_baselines(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After an intended change, renew a baseline by `cmx trace ... --save` with the same flags."""
    flags = {name: json.loads(path.read_text())[name] for name in ("layout", "step", "batch", "context")}
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["trace", "deepseek-r1", *options, "--check", str(path)]) == 0, capsys.readouterr().out


def test_check_with_changed_collective_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["trace", "tiny", "--layout", "ep4", "--batch", "2"]
    assert main([*command, "--save", str(tmp_path / "base.json")]) == 0
    saved = json.loads((tmp_path / "base.json").read_text())
    first = saved["collectives"][0]
    first["scope"] = "another name is no change"
    check = [*command, "--check", str(tmp_path / "base.json")]
    (tmp_path / "base.json").write_text(json.dumps(saved))
    assert main(check) == 0
    first["shape"] = [1, *first["shape"]]
    (tmp_path / "base.json").write_text(json.dumps(saved))
    capsys.readouterr()
    assert main(check) == 1
    text = capsys.readouterr().out
    assert f"of {first['dtype']}{first['shape']}: only in baseline" in text
    assert "only in now" in text
    assert main([*check, "--batch", "3"]) == 2
    assert "of another program: batch 2 (now 3)" in capsys.readouterr().err


def test_dump_has_texts_and_schedule(tmp_path: Path) -> None:
    c = config()
    layout: Layout = expert_parallel(4, c.n_routed_experts)
    options: Any = {"batch": 2, "context": 64, "dtype": "float32", "dump": tmp_path / "new"}
    result = trace_model(c, layout, "decode", **options, source="stablehlo")
    assert "stablehlo.all_to_all" in (tmp_path / "new" / "stablehlo.mlir").read_text()
    assert "all_to_all[" in (tmp_path / "new" / "jaxpr.txt").read_text()
    events = json.loads((tmp_path / "new" / "schedule.perfetto.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(result.contents.collectives) + len(result.contents.products)
    moved = [event for event in slices if event["name"].startswith("all_to_all")]
    assert len(moved) == sum(r["op"] == "all_to_all" for r in result.collectives)
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(slices))
