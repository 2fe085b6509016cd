"""Plans against what their own parts say, and what nothing can meet."""

import pytest

from cmx_jax.errors import CmxError
from cmx_jax.model import plan as planner
from cmx_jax.model.families import preset
from cmx_jax.model.plan import Load, plan

R1 = preset("deepseek-r1")
LOAD = Load(prompt=2048, output=257, slo_ttft_ms=2000, slo_tpot_ms=60)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "RANKS", {("ascend", "decode"): (320,), ("ascend", "prefill"): (32,)})
    monkeypatch.setattr(planner, "BATCHES", {"decode": (16, 96, 2048), "prefill": (2,)})


def test_the_most_requests_are_those_of_the_smaller_pool() -> None:
    found = plan(R1, LOAD)
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
    assert sum(found["unfit"].values()) == 4  # 2,048 sequences, for each number of streams and drafts
    front = [(x["tpot_ms"], x["tokens_per_s"]) for x in found["pareto"]]
    assert front == sorted(front)
    assert [rate for _, rate in front] == sorted(rate for _, rate in front)


def test_a_rate_takes_the_fewest_npus() -> None:
    most = plan(R1, LOAD)["deployments"][0]
    rate = most["requests_per_s"] / 2
    found = plan(R1, LOAD, rate=rate)["deployments"][0]
    assert found["npus"] < most["npus"]
    assert found["requests_per_s"] >= rate
    fewer = {name: found[f"{name}_instances"] - 1 for name in ("prefill", "decode")}
    assert all(n * found[name]["requests_per_s"] < rate for name, n in fewer.items())
    with pytest.raises(CmxError, match="384 NPUs of cloudmatrix384 cannot serve 1e\\+06 requests/s"):
        plan(R1, LOAD, rate=1e6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"slo_tpot_ms": 1}, "nothing meets 1 ms a token: the fastest takes"),
        ({"slo_ttft_ms": 1}, "nothing meets 1 ms to the first token: the fastest takes"),
    ],
)
def test_what_nothing_meets_is_said_with_what_would(fields: dict[str, float], said: str) -> None:
    with pytest.raises(CmxError, match=said):
        plan(R1, Load(**(vars(LOAD) | fields)))


def test_nonsense() -> None:
    for fields in ({"prompt": 0}, {"output": 1}, {"slo_tpot_ms": -1}):
        with pytest.raises(CmxError, match="expected"):
            Load(**(vars(LOAD) | fields))
    with pytest.raises(CmxError, match="8 NPUs of cloudmatrix384 hold no decode instance"):
        plan(R1, LOAD, npus=8)
    with pytest.raises(CmxError, match="hardware 'abacus'"):
        plan(R1, LOAD, hardware="abacus")
