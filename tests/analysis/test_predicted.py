"""Step times from predictions, against direct predictions and closed forms, and through the command."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.predict.predict import predict
from cmx_jax.analysis.simulate import Arrival, Predicted, StepTimes
from cmx_jax.analysis.simulate.predicted import bracket, interpolate
from cmx_jax.analysis.simulate.virtual import SimRequest
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.named_layouts import named_layout
from cmx_jax.model.families import preset
from cmx_jax.serving.scheduling.packing import Piece

pytestmark = pytest.mark.slow

R1 = preset("deepseek-r1")


def layout(name: str) -> Layout:
    return replace(named_layout(name).make(R1.n_routed_experts), microbatches=2)


PREFILL, DECODE = layout("ep32"), layout("ep320")


@pytest.fixture(scope="module")
def times() -> Predicted:
    return Predicted(R1, "cloudmatrix384", PREFILL, DECODE, drafts=1)


def prompts(*lengths: tuple[int, int]) -> list[list[Piece]]:
    """One row of pieces `[start, stop)`."""
    return [[Piece(SimRequest.of(Arrival(0.0, stop, 1)), start, stop) for start, stop in lengths]]


def direct(layout: Layout, step: str, batch: int, context: int) -> float:
    prediction = predict(R1, "cloudmatrix384", layout, step, batch=batch, context=context, drafts=1)
    return prediction.step_ms / 1e3


def test_decode_between_grid_points(times: Predicted) -> None:
    for sequences, context in [(10, 3000), (44, 900)]:
        expected = direct(DECODE, "decode", 2 * sequences, context)
        assert times.decode(sequences, context) == pytest.approx(expected, rel=0.03)


def test_prefill_between_grid_points(times: Predicted) -> None:
    for batch, length in [(1, 4096), (3, 1600)]:
        found = times.prefill(prompts(*[(0, length)] * (16 * batch)))
        assert found == pytest.approx(direct(PREFILL, "prefill", batch, length), rel=0.02)


def test_later_chunks_take_longer_by_their_attention(times: Predicted) -> None:
    """Of the same number of tokens, those of a later chunk see more."""
    fresh, later = times.prefill(prompts((0, 8192))), times.prefill(prompts((8192, 16384)))
    pairs = 8192**2
    each = (times.prefill(prompts((0, 8192))) - times.prefill(prompts(*[(0, 1024)] * 8))) / (8192 * 7168 / 2)
    assert later - fresh == pytest.approx(each * pairs, rel=1e-6)
    assert later > fresh


def test_decode_of_fewer_sequences_than_microbatches(times: Predicted) -> None:
    assert times.decode(1, 4096) == times.decode(2, 4096) == direct(DECODE, "decode", 4, 4096)


def test_transfer_and_fetch_match_bandwidths(times: Predicted) -> None:
    assert isinstance(times, StepTimes)
    row = 62 * 576 * 2  # 61 layers and the MTP layer's latent and rotated key, BF16
    assert times.transfer(4096) == pytest.approx(4096 * row / 25e9)
    assert times.fetch(4096) == pytest.approx(4096 * row / 147e9 + 1.7e-6)


def test_acceptance_and_pools() -> None:
    two = Predicted(R1, "cloudmatrix384", PREFILL, DECODE, drafts=2)
    assert two.acceptance(0.7) == pytest.approx(0.7 + 0.49)
    with pytest.raises(CmxError, match=r"mtp_acceptance is 1\.5, expected 0 to 1"):
        two.acceptance(1.5)
    pool = two.pool("decode", 1, sequences=48)
    assert (pool.npus, pool.ranks, pool.sharing) == (160, 320, 1)
    used = predict(R1, "cloudmatrix384", DECODE, "decode", batch=96, context=4096, drafts=2).memory_gb
    left = machine("cloudmatrix384")["hbm_gb"] - used.weights - used.mailboxes
    assert pool.capacity.pages * 128 * used.cache / (48 * 4096) == pytest.approx(left, rel=0.01)
    shared = two.pool("prefill", 6, budget=16 * 16384)
    assert (shared.npus, shared.ranks, shared.sharing) == (16, 1, 32)
    with pytest.raises(CmxError, match=r"at most \d+ fit"):
        two.pool("decode", 1, sequences=4800)


@given(st.floats(0, 1e6), st.integers(1, 300), st.integers(1, 4), st.none() | st.integers(1, 10**6))
def test_grid_points_enclose_their_value(x: float, unit: int, parts: int, most: int | None) -> None:
    low, high = bracket(x, unit, parts, most)
    assert 0 < low <= high
    if most is None:
        assert low <= max(x, unit) < high
        assert high - low <= max(low, unit)
    else:
        assert high <= max(most, 1)
    if low < high:
        assert interpolate(max(x, low), (low, high), lambda n: 3.0 * n + 2) == pytest.approx(
            3 * max(x, low) + 2
        )


def test_gpus_have_no_memory_pool() -> None:
    gpus = Predicted(R1, "h800", layout("h800-ep32"), layout("h800-ep144"))
    with pytest.raises(CmxError, match="h800 has no memory pool"):
        gpus.fetch(512)


def test_command_predicts_a_lone_request(times: Predicted, capsys: Any) -> None:
    flags = ["--predict", "deepseek-r1", "--rate", "0.01", "--requests", "1", "--output", "18", "--json"]
    assert main(["simulate", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean_ttft_ms"] == pytest.approx(1e3 * times.prefill(prompts((0, 4096))), rel=1e-6)
    steps = [times.decode(1, 4097 + 1.7 * (n + 0.5)) for n in range(10)]  # 17 tokens, 1.7 a step
    expected = 1e3 * (sum(steps) + times.transfer(4096)) / 17
    assert found["mean_tpot_ms"] == pytest.approx(expected, rel=1e-3)
    assert found["npus"] == 6 * 16 + 160


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decode-ms", "3"], "--decode-ms is given, but --predict determines it"),
        (["--decode-npus", "3"], "--decode-npus is given, but --predict determines it"),
        (["--hardware", "abacus"], "hardware 'abacus', expected one of"),
        (["--hardware", "h800"], "layout ep32 has 2 rank(s) an NPU, expected 1 on h800, as of h800-ep144"),
        (["--decode-layout", "ep77"], "layout ep77 has 1 rank(s) an NPU, expected 2 on cloudmatrix384"),
        (["--num-speculative-tokens", "-1"], "drafts is -1, expected 0 or more"),
        (["--mtp-acceptance", "2"], "mtp_acceptance is 2, expected 0 to 1"),
        (["--max-num-seqs", "49"], "batch is 98, expected a positive multiple of 4"),
        (["--max-num-batched-tokens", "-5"], "max_num_batched_tokens is -5, expected at least 1"),
        (["--microbatches", "0"], "microbatches is 0, expected 1 or more"),
        (["--prefill-instances", "20"], "are 480, expected at most the supernode's 384"),
        (["--prefill-kv-tokens", "1"], "capacity.pages is 0, expected at least 1"),
        (["--predict", "nobody"], "model 'nobody' is neither"),
    ],
)
def test_nonsense_is_one_line(flags: list[str], message: str, capsys: Any) -> None:
    assert main(["simulate", "--rate", "1", "--requests", "2", "--predict", "deepseek-r1", *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_flags_of_predictions_need_a_model(capsys: Any) -> None:
    assert main(["simulate", "--rate", "1", "--microbatches", "2", "--decode-ms", "3"]) == 2
    assert "--microbatches is given without --predict MODEL" in capsys.readouterr().err
    assert main(["simulate", "--rate", "1", "--decode-ms", "3"]) == 2
    assert "--prefill-ms-per-1k is not given, expected it, or --predict MODEL" in capsys.readouterr().err
