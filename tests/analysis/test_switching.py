"""Table 2 in closed form, beside what is published."""

import pytest

from cmx_jax.analysis.calc.switching import METRICS, model_bytes, render, switching
from cmx_jax.errors import CmxError
from cmx_jax.model.families import preset


def test_table_2_for_671_gb() -> None:
    """Seconds are not compared with the published ones: a load's 320 s are more than its transfer."""
    result = switching(671e9)
    load, warm = 671 / 2.5, 671 / 147
    tiers = result.tiers
    assert tiers["no cache"].cold_start_s == tiers["local DRAM"].cold_start_s == pytest.approx(8 * load)
    assert tiers["EMS"].cold_start_s == pytest.approx(load)
    assert tiers["EMS"].switch_s == tiers["EMS"].warm_start_s == pytest.approx(warm, abs=1e-5)
    assert tiers["local DRAM"].switch_s == pytest.approx(warm / 8 + load * 7 / 8, abs=1e-5)
    for name, published in result.published.items():
        assert published.hit_rate == tiers[name].hit_rate
        assert published.dram_models == tiers[name].dram_models
    assert "not published" in render(result)
    assert all(title in render(result) for title in METRICS.values())


def test_metric_that_a_tier_lacks_is_left_out_of_the_document() -> None:
    document = switching(671e9).as_dict()
    for table in (document["tiers"], document["published"]):
        assert "warm_start_s" not in table["no cache"]
        assert set(table["EMS"]) == set(table["local DRAM"]) == set(METRICS)


def test_more_dies_read_faster_and_no_hit_is_above_one() -> None:
    tier = switching(100e9, models=2, local_models=5, dies=32).tiers["local DRAM"]
    assert tier.hit_rate == 1
    assert tier.switch_s == pytest.approx(100 / 147 / 32, rel=1e-3)


def test_bytes_are_those_of_the_weights() -> None:
    c = preset("deepseek-r1")
    assert model_bytes(c, "bfloat16") == pytest.approx(2 * 671.03e9, rel=1e-3)
    assert model_bytes(c, "int8") == pytest.approx(671e9, rel=0.01)  # embedding, head, norms stay
    with pytest.raises(CmxError, match="weights are 'int4', expected int8 or bfloat16"):
        model_bytes(c, "int4")


@pytest.mark.parametrize(
    "options", [{"obs_gb_s": 0}, {"instances": -1}, {"models": 0}, {"obs_gb_s": float("nan")}]
)
def test_switching_with_nonsense(options: dict[str, float]) -> None:
    with pytest.raises(CmxError, match="expected more than 0"):
        switching(1e9, **options)
