"""Plans: the best deployments of a search, under Poisson arrivals."""

import json
from pathlib import Path
from typing import Any

import pytest

from cmx_jax.analysis.plan import plan as planner
from cmx_jax.analysis.plan.plan import ATTAINMENT, STEPS, Trial, plan
from cmx_jax.analysis.plan.search import search
from cmx_jax.analysis.predict import candidates
from cmx_jax.analysis.predict.candidates import Load
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.model.families import preset

R1 = preset("deepseek-r1")
LOAD = Load(prompt=1024, output=17, slo_ttft_ms=600, slo_tpot_ms=40)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {("ascend", "decode"): (64,), ("ascend", "prefill"): (32,)}
    monkeypatch.setattr(candidates, "RANKS", ranks)
    monkeypatch.setattr(candidates, "BATCHES", {"decode": (8, 16), "prefill": (1,)})
    monkeypatch.setattr(candidates, "DRAFTS", {"decode": (0,), "prefill": (0,)})
    monkeypatch.setattr(candidates, "MICROBATCHES", (1,))
    monkeypatch.setattr(planner, "MEASURED", 500)


def trial(load: Load = LOAD, **given: Any) -> Trial:
    return Trial(R1, load, search(R1, load, npus=64, **given)["deployments"][0], "cloudmatrix384", 0.7)


def test_what_is_kept_keeps_the_slo_at_its_rate() -> None:
    found = plan(R1, LOAD, npus=64)
    kept = found["deployments"]
    assert kept
    rates = [m["simulated"]["rate"] for m in kept]
    assert rates == sorted(rates, reverse=True)
    for m in kept:
        s = m["simulated"]
        assert s["slo_attainment"] >= ATTAINMENT
        assert m["requests_per_s"] / 2 <= s["rate"] <= m["requests_per_s"] * (1 + 1e-9)
        assert s["requests"] > 400
        assert s["median_ttft_ms"] <= s["p99_ttft_ms"]
        assert s["median_tpot_ms"] <= LOAD.slo_tpot_ms
    assert found["load"] == {**vars(LOAD), "rate": None}


def test_the_rate_is_the_largest_of_the_steps() -> None:
    one = trial()
    found = one.most()
    assert found is not None
    steady, rate = one.deployment["requests_per_s"], found["simulated"]["rate"]
    step = round(rate / steady * STEPS)
    assert rate == pytest.approx(steady * step / STEPS)
    if step < STEPS:
        assert one.serve(one.deployment, steady * (step + 1) / STEPS)["slo_attainment"] < ATTAINMENT


def test_queues_miss_what_steady_load_would_meet() -> None:
    """More than a pool's steady rate: whatever the step times are, the queue grows without end."""
    one = trial()
    inside, beyond = (one.serve(one.deployment, one.deployment["requests_per_s"] * f) for f in (0.5, 1.3))
    assert inside["slo_attainment"] > 0.95
    assert beyond["slo_attainment"] < 0.2
    assert beyond["p99_ttft_ms"] > 2 * inside["p99_ttft_ms"]


def test_a_rate_that_steady_load_just_meets_takes_an_instance_more() -> None:
    tight = Load(1024, 17, slo_ttft_ms=330, slo_tpot_ms=40)
    one = trial(tight, rate=60.0)
    rate = one.deployment["requests_per_s"]  # not a request less than the pools can
    assert one.serve(one.deployment, rate)["slo_attainment"] < ATTAINMENT
    found = one.at_least(rate, 384)
    assert found is not None
    assert found["simulated"]["rate"] == rate
    assert found["simulated"]["slo_attainment"] >= ATTAINMENT
    assert found["npus"] > one.deployment["npus"]
    assert found["prefill_instances"] > one.deployment["prefill_instances"]
    assert one.at_least(rate, one.deployment["npus"]) is None


def test_what_no_deployment_serves_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "ATTAINMENT", 1.01)
    with pytest.raises(CmxError, match="no deployment of 64 NPUs serves half the steady rate with 101% of"):
        plan(R1, LOAD, npus=64)


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "1024", "--output", "17", "--slo-ttft-ms", "600", "--slo-tpot-ms", "40"]
    assert main(["plan", *flags, "--json", "--rate", "100", "--plots", str(tmp_path / "made")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["deployments"][0]["simulated"]["rate"] == 100
    assert found["predicted"] <= found["candidates"] == 3
    assert (tmp_path / "made" / "plan.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "made" / "plan.svg").read_text()
    assert all(f"batch {x['batch']}" in drawn for x in found["pareto"])
    assert "SLO, 40 ms" in drawn


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--npus", "0"], "npus is 0 and rate None, expected more than 0"),
        (["--rate", "-1"], "rate -1.0, expected more than 0"),
        (["--rate", "1e9"], "cannot serve 1e+09 requests/s, expected at most"),
        (["--slo-tpot-ms", "1"], "nothing meets 1 ms a token: the fastest takes"),
        (["--prompt", "0"], "prompt is 0, expected more than 0"),
        (["--mtp-acceptance", "7"], "mtp_acceptance is 7.0, expected 0 to 1"),
        (["--plots", "/nowhere/at/all"], "/nowhere/at is not a directory: make it first"),
    ],
)
def test_nonsense_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["--prompt", "1024", "--output", "17", "--slo-ttft-ms", "600", "--slo-tpot-ms", "40"]
    assert main(["plan", *usual, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
