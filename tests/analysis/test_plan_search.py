"""Searches against the rates of their own instances, and requests that nothing can meet."""

import re
from dataclasses import replace
from typing import Any

import pytest

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.plan.plan_search import SearchResult, combine, search
from cmx_jax.analysis.predict import candidates
from cmx_jax.analysis.predict.candidates import transfer_ms
from cmx_jax.analysis.predict.plan_request import PlanRequest, Workload
from cmx_jax.errors import CmxError
from cmx_jax.model.families import preset

pytestmark = pytest.mark.slow

R1 = preset("deepseek-r1")
LOAD = Workload(prompt=2048, output=257, slo_ttft_ms=2000, slo_tpot_ms=60)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {("ascend", "decode"): (320,), ("ascend", "prefill"): (32,)}
    monkeypatch.setattr(candidates, "RANKS", ranks)
    monkeypatch.setattr(candidates, "BATCHES", {"decode": (16, 96, 4096), "prefill": (2,)})
    monkeypatch.setattr(candidates, "DRAFTS", {"decode": (0, 1), "prefill": (0, 1)})


def searched(workload: Workload = LOAD, **fields: Any) -> SearchResult:
    return search(PlanRequest(R1, workload, **fields))


def test_best_deployment_serves_the_rate_of_its_slower_pool() -> None:
    result = searched()
    best = result.deployments[0]
    pools = [
        (best.prefill_instances, best.prefill),
        (best.decode_instances, best.decode),
    ]
    assert best.requests_per_s == pytest.approx(min(n * x.requests_per_s for n, x in pools))
    assert best.npus == sum(n * x.npus for n, x in pools) <= 384
    assert best.decode.latency_ms <= 60
    assert best.prefill.latency_ms <= 2000
    rates = [m.requests_per_s for m in result.deployments]
    assert rates == sorted(rates, reverse=True)
    one = best.decode
    assert one.requests_per_s == pytest.approx(one.tokens_per_s * 160 / 256)
    front = [(x.latency_ms, x.tokens_per_s) for x in result.pareto]
    assert front == sorted(front)
    assert [rate for _, rate in front] == sorted(rate for _, rate in front)


def test_candidates_are_counted() -> None:
    """Every candidate is predicted, does not fit, or is larger than one that is too slow."""
    result = searched()
    assert result.candidates == 2 * 2 * 3 + 2 * 2  # microbatches, drafts, batches; of both pools
    assert sum(result.unfit.values()) == 4  # 4,096 sequences, for each number of streams and drafts
    assert result.predicted == result.candidates - 4
    slow = searched(replace(LOAD, slo_tpot_ms=25))
    assert slow.predicted < result.predicted
    kept = [x for x in slow.decode if x.latency_ms <= 25]
    assert kept == [x for x in result.decode if x.latency_ms <= 25]


def test_pools_agree_whether_the_mtp_layer_runs() -> None:
    deployments = searched().deployments
    assert {(m.prefill.drafts, m.decode.drafts) for m in deployments} == {(0, 0), (1, 1)}


def test_rate_takes_the_fewest_npus() -> None:
    largest = searched().deployments[0]
    rate = largest.requests_per_s / 2
    best = searched(rate=rate).deployments[0]
    assert best.npus < largest.npus
    assert best.requests_per_s >= rate
    assert (best.prefill_instances - 1) * best.prefill.requests_per_s < rate
    assert (best.decode_instances - 1) * best.decode.requests_per_s < rate
    assert best == combine(best.prefill, best.prefill_instances, best.decode, best.decode_instances, LOAD)
    message = (
        f"384 NPUs of cloudmatrix384 cannot serve 1e+06 requests/s, expected at most {2 * rate:.2f}, or more"
    )
    with pytest.raises(CmxError, match=re.escape(message)):
        searched(rate=1e6)


def test_transfer_time_of_a_prompt() -> None:
    """61 layers of 512 + 64 numbers in BF16, by 25 GB/s of a die: 11.5 ms for 4,096 tokens."""
    ms = transfer_ms(R1, machine("cloudmatrix384"), 4096, False)
    assert ms == pytest.approx(61 * 576 * 2 * 4096 / 25e6)
    with_mtp = transfer_ms(R1, machine("cloudmatrix384"), 4096, True)
    assert with_mtp == pytest.approx(ms * 62 / 61)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slo_tpot_ms": 1}, "nothing meets 1 ms a token: the fastest takes"),
        ({"slo_ttft_ms": 1}, "nothing meets 1 ms to the first token: the fastest takes"),
    ],
)
def test_slo_that_nothing_meets_names_the_fastest(fields: dict[str, float], message: str) -> None:
    with pytest.raises(CmxError, match=message):
        searched(Workload(**(vars(LOAD) | fields)))


def test_nonsense() -> None:
    for fields in ({"prompt": 0}, {"output": 1}, {"slo_tpot_ms": -1}, {"slo_ttft_ms": float("nan")}):
        with pytest.raises(CmxError, match="expected"):
            Workload(**(vars(LOAD) | fields))
    for limits in ({"npus": 0}, {"rate": -1.0}, {"rate": float("inf")}):
        with pytest.raises(CmxError, match="expected more than 0"):
            searched(**limits)
    with pytest.raises(CmxError, match="8 NPUs of cloudmatrix384 hold no prefill instance"):
        searched(npus=8)
    with pytest.raises(CmxError, match="160 NPUs of cloudmatrix384 do not hold both"):
        searched(npus=160)
    with pytest.raises(CmxError, match="hardware 'abacus'"):
        searched(hardware="abacus")
