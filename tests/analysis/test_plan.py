"""Plans: the best deployments of a search, under Poisson arrivals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cmx_jax.analysis.plan import plan as planner
from cmx_jax.analysis.plan.plan import ATTAINMENT, RATE_STEPS, Trial, plan
from cmx_jax.analysis.plan.plan_search import search
from cmx_jax.analysis.predict import candidates
from cmx_jax.analysis.predict.plan_request import PlanRequest, Workload
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.model.families import preset

pytestmark = pytest.mark.slow

R1 = preset("deepseek-r1")
LOAD = Workload(prompt=1024, output=17, slo_ttft_ms=600, slo_tpot_ms=40)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {("ascend", "decode"): (64,), ("ascend", "prefill"): (32,)}
    monkeypatch.setattr(candidates, "RANKS", ranks)
    monkeypatch.setattr(candidates, "BATCHES", {"decode": (8, 16), "prefill": (1,)})
    monkeypatch.setattr(candidates, "DRAFTS", {"decode": (0,), "prefill": (0,)})
    monkeypatch.setattr(candidates, "MICROBATCHES", (1,))
    monkeypatch.setattr(planner, "MEASURED", 500)


def trial(workload: Workload = LOAD, *, npus: int = 64, rate: float | None = None) -> Trial:
    """A trial with `npus` NPUs, of the best deployment on 64."""
    request = PlanRequest(R1, workload, npus=64, rate=rate)
    return Trial(replace(request, npus=npus), search(request).deployments[0])


def test_plan_keeps_the_slo_at_its_rate() -> None:
    result = plan(PlanRequest(R1, LOAD, npus=64))
    kept = result.deployments
    assert kept
    rates = [m.simulated.rate for m in kept]
    assert rates == sorted(rates, reverse=True)
    for m in kept:
        s, steady = m.simulated, m.deployment.requests_per_s
        assert s.slo_attainment >= ATTAINMENT
        assert steady / 2 <= s.rate <= steady * (1 + 1e-9)
        assert s.requests > 400
        assert s.median_ttft_ms <= s.p99_ttft_ms
        assert s.median_tpot_ms <= LOAD.slo_tpot_ms
    assert result.as_dict()["load"] == {**vars(LOAD), "rate": None}


def test_rate_is_the_largest_of_the_steps() -> None:
    one = trial()
    result = one.largest_rate()
    assert result is not None
    steady, rate = one.deployment.requests_per_s, result.simulated.rate
    step = round(rate / steady * RATE_STEPS)
    assert rate == pytest.approx(steady * step / RATE_STEPS)
    if step < RATE_STEPS:
        assert one.serve(one.deployment, steady * (step + 1) / RATE_STEPS).slo_attainment < ATTAINMENT


def test_queues_miss_what_steady_load_would_meet() -> None:
    """More than a pool's steady rate: whatever the step times are, the queue grows without end."""
    one = trial()
    inside, beyond = (one.serve(one.deployment, one.deployment.requests_per_s * f) for f in (0.5, 1.3))
    assert inside.slo_attainment > 0.95
    assert beyond.slo_attainment < 0.2
    assert beyond.p99_ttft_ms > 2 * inside.p99_ttft_ms


def test_rate_that_steady_load_just_meets_takes_another_instance() -> None:
    tight = Workload(1024, 17, slo_ttft_ms=330, slo_tpot_ms=40)
    one = trial(tight, npus=384, rate=60.0)
    steady = one.deployment
    rate = steady.requests_per_s  # not a request less than the pools can
    assert one.serve(steady, rate).slo_attainment < ATTAINMENT
    result = one.enlarged(rate)
    assert result is not None
    assert result.simulated.rate == rate
    assert result.simulated.slo_attainment >= ATTAINMENT
    assert result.deployment.npus > steady.npus
    assert result.deployment.prefill_instances > steady.prefill_instances
    assert trial(tight, npus=steady.npus, rate=60.0).enlarged(rate) is None


def test_rate_that_no_deployment_serves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "ATTAINMENT", 1.01)
    with pytest.raises(CmxError, match="no deployment of 64 NPUs serves half the steady rate with 101% of"):
        plan(PlanRequest(R1, LOAD, npus=64))


def test_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "1024", "--output", "17", "--slo-ttft-ms", "600", "--slo-tpot-ms", "40"]
    assert main(["plan", *flags, "--json", "--rate", "100", "--plots", str(tmp_path / "made")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["deployments"][0]["simulated"]["rate"] == 100
    assert document["predicted"] <= document["candidates"] == 3
    assert (tmp_path / "made" / "plan.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "made" / "plan.svg").read_text()
    assert all(f"batch {x['batch']}" in drawn for x in document["pareto"])
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
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
