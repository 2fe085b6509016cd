"""Searches against what their own parts say, and what nothing can meet."""

import re

import pytest

from cmx_jax.analysis.cost.constants import machine
from cmx_jax.analysis.plan.search import counted, search
from cmx_jax.analysis.predict import candidates
from cmx_jax.analysis.predict.candidates import Load, transfer_ms
from cmx_jax.errors import CmxError
from cmx_jax.model.families import preset

R1 = preset("deepseek-r1")
LOAD = Load(prompt=2048, output=257, slo_ttft_ms=2000, slo_tpot_ms=60)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {("ascend", "decode"): (320,), ("ascend", "prefill"): (32,)}
    monkeypatch.setattr(candidates, "RANKS", ranks)
    monkeypatch.setattr(candidates, "BATCHES", {"decode": (16, 96, 4096), "prefill": (2,)})
    monkeypatch.setattr(candidates, "DRAFTS", {"decode": (0, 1), "prefill": (0, 1)})


def test_the_most_requests_are_those_of_the_smaller_pool() -> None:
    found = search(R1, LOAD)
    best = found["deployments"][0]
    pools = {name: best[f"{name}_instances"] * best[name]["requests_per_s"] for name in ("prefill", "decode")}
    assert best["requests_per_s"] == pytest.approx(min(pools.values()))
    used = sum(best[f"{name}_instances"] * best[name]["npus"] for name in pools)
    assert best["npus"] == used <= 384
    assert best["decode"]["tpot_ms"] <= 60
    assert best["prefill"]["ttft_ms"] <= 2000
    rates = [m["requests_per_s"] for m in found["deployments"]]
    assert rates == sorted(rates, reverse=True)
    one = best["decode"]
    assert one["requests_per_s"] == pytest.approx(one["tokens_per_s"] * 160 / 256)
    front = [(x["tpot_ms"], x["tokens_per_s"]) for x in found["pareto"]]
    assert front == sorted(front)
    assert [rate for _, rate in front] == sorted(rate for _, rate in front)


def test_every_candidate_is_predicted_unfit_or_behind_one_that_is_too_slow() -> None:
    found = search(R1, LOAD)
    assert found["candidates"] == 2 * 2 * 3 + 2 * 2  # microbatches, drafts, batches; of both pools
    assert sum(found["unfit"].values()) == 4  # 4,096 sequences, for each number of streams and drafts
    assert found["predicted"] == found["candidates"] - 4
    slow = search(R1, Load(**(vars(LOAD) | {"slo_tpot_ms": 25})))
    assert slow["predicted"] < found["predicted"]
    kept = [x for x in slow["decode"] if x["tpot_ms"] <= 25]
    assert kept == [x for x in found["decode"] if x["tpot_ms"] <= 25]


def test_pools_agree_whether_the_mtp_layer_runs() -> None:
    made = search(R1, LOAD)["deployments"]
    assert {(m["prefill"]["drafts"], m["decode"]["drafts"]) for m in made} == {(0, 0), (1, 1)}


def test_a_rate_takes_the_fewest_npus() -> None:
    most = search(R1, LOAD)["deployments"][0]
    rate = most["requests_per_s"] / 2
    found = search(R1, LOAD, rate=rate)["deployments"][0]
    assert found["npus"] < most["npus"]
    assert found["requests_per_s"] >= rate
    fewer = {name: found[f"{name}_instances"] - 1 for name in ("prefill", "decode")}
    assert all(n * found[name]["requests_per_s"] < rate for name, n in fewer.items())
    again = counted(
        found["prefill"], found["prefill_instances"], found["decode"], found["decode_instances"], LOAD
    )
    assert again == found
    said = (
        f"384 NPUs of cloudmatrix384 cannot serve 1e+06 requests/s, expected at most {2 * rate:.2f}, or more"
    )
    with pytest.raises(CmxError, match=re.escape(said)):
        search(R1, LOAD, rate=1e6)


def test_a_prompt_s_rows_travel_in_their_time() -> None:
    """61 layers of 512 + 64 numbers in BF16, by 25 GB/s of a die: 11.5 ms for 4,096 tokens."""
    found = transfer_ms(R1, machine("cloudmatrix384"), 4096, False)
    assert found == pytest.approx(61 * 576 * 2 * 4096 / 25e6)
    more = transfer_ms(R1, machine("cloudmatrix384"), 4096, True)
    assert more == pytest.approx(found * 62 / 61)  # the MTP layer's


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"slo_tpot_ms": 1}, "nothing meets 1 ms a token: the fastest takes"),
        ({"slo_ttft_ms": 1}, "nothing meets 1 ms to the first token: the fastest takes"),
    ],
)
def test_what_nothing_meets_is_said_with_what_would(fields: dict[str, float], said: str) -> None:
    with pytest.raises(CmxError, match=said):
        search(R1, Load(**(vars(LOAD) | fields)))


def test_nonsense() -> None:
    for fields in ({"prompt": 0}, {"output": 1}, {"slo_tpot_ms": -1}, {"slo_ttft_ms": float("nan")}):
        with pytest.raises(CmxError, match="expected"):
            Load(**(vars(LOAD) | fields))
    for given in ({"npus": 0}, {"rate": -1.0}, {"rate": float("inf")}):
        with pytest.raises(CmxError, match="expected more than 0"):
            search(R1, LOAD, **given)
    with pytest.raises(CmxError, match="8 NPUs of cloudmatrix384 hold no prefill instance"):
        search(R1, LOAD, npus=8)
    with pytest.raises(CmxError, match="160 NPUs of cloudmatrix384 do not hold both"):
        search(R1, LOAD, npus=160)
    with pytest.raises(CmxError, match="hardware 'abacus'"):
        search(R1, LOAD, hardware="abacus")
