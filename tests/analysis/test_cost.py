"""Constants against the operator-level figures they are fitted to; operators; streams; the busiest rank."""

import math
import re

import numpy as np
import pytest

from cmx_jax.analysis.cost.constants import MACHINES, machine
from cmx_jax.analysis.cost.imbalance import busiest, power_law
from cmx_jax.analysis.cost.measured import operator_rows
from cmx_jax.analysis.cost.operator_times import (
    Share,
    attention,
    collective,
    exchange,
    matmul,
    matmul_us,
    vector,
)
from cmx_jax.analysis.cost.overlap import Task, critical_path
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import expert_parallel

DIE = machine("cloudmatrix384")


def test_operator_rows_match_measurements() -> None:
    rows = operator_rows()
    errors: dict[str, list[float]] = {}
    for row in rows:
        assert row.role == "calibrated"
        assert row.error == row.predicted / row.published - 1
        errors.setdefault(row.table, []).append(abs(row.error))
    assert {table: len(sizes) for table, sizes in errors.items()} == {
        "7": 24,
        "10": 6,
        "8": 2,
        "9": 2,
        "DeepGEMM": 6,
        "FA3": 1,
    }
    assert all(np.mean(sizes) < 0.03 for sizes in errors.values())
    assert max(map(max, errors.values())) < 0.07


def test_constants_have_sources_below_whole_systems() -> None:
    operators = re.compile(r"Table (7|8|9|10)\b|section 7\.[45]|DeepGEMM|FlashAttention-3")
    whole = re.compile(r"Table [3-6]\b|section (7\.[123]|5\.[123])|TPOT|throughput|tokens/s", re.IGNORECASE)
    for model in MACHINES.values():
        for name, constant in model.constants.items():
            assert all((constant.source, constant.unit, constant.value > 0)), name
            assert not whole.search(constant.source), (model.name, name)
            if constant.origin == "fitted":
                assert operators.search(constant.source), (model.name, name)


def test_scaled_constant_changes_no_other_machine() -> None:
    faster = DIE.scaled("hbm_gb_s", 2)
    assert faster["hbm_gb_s"] == 2 * DIE["hbm_gb_s"] == 3200
    assert faster.scaled("hbm_gb_s", 2)["hbm_gb_s"] == 6400
    with pytest.raises(CmxError, match="hardware 'tpu', expected one of cloudmatrix384, h800, h100"):
        machine("tpu")


def test_matmul_is_never_faster_than_peak_or_memory() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups, m, k, n = (int(x) for x in np.exp(rng.uniform(0, [3, 9, 9, 9])).round())
        for dtype, peak in (("int8", DIE["int8_tops"]), ("bfloat16", DIE["bf16_tflops"])):
            moved = groups * (m * k + k * n + 2 * m * n)
            least = max(2 * groups * m * k * n / peak / 1e6, moved / DIE["hbm_gb_s"] / 1e3)
            whole = matmul(DIE, dtype, (groups, m, k, n), moved)
            assert whole.us > least + DIE["matmul_launch_us"]
            half = matmul(DIE, dtype, (groups, m, k, n), moved, Share(0.5, 0.5))
            assert whole.us <= half.us <= 2 * whole.us + 2 * matmul_us(DIE, dtype, (1, 128, k, 152), 1 / 24)


def test_operator_bounds() -> None:
    assert matmul(DIE, "int8", (1, 48, 16384, 7168), 16384 * 7168).bound == "memory"  # decode reads weights
    assert matmul(DIE, "int8", (1, 8192, 16384, 7168), 16384 * 7168).bound == "compute"
    assert attention(DIE, 1e12, 1e6).bound == "compute"
    assert attention(DIE, 1e6, 1e10).bound == "memory"
    assert vector(DIE, 8).bound == "launch"
    assert collective(DIE, 1e9).bound == "network"


def test_exchange_is_latency_and_messages() -> None:
    empty = exchange(DIE, "dispatch", 0, 7680, 320)
    assert empty.us == DIE["exchange_launch_us"] + 2 * DIE["network_us"]
    one, two = (exchange(DIE, "combine", n, 14336, 320).us - empty.us for n in (100, 200))
    assert two == pytest.approx(2 * one)
    assert one > 100 * 318 / 320 * 14336 / DIE["network_gb_s"] / 1e3
    few = exchange(DIE, "combine", 100, 14336, 320, 1 / 3)  # the network does not slow with fewer cores
    assert few.wire == exchange(DIE, "combine", 100, 14336, 320).wire
    assert few.us > one + empty.us
    groups = [exchange(DIE, "dispatch", 1152, 7680, ranks).us for ranks in (2, 8, 16, 32, 320)]
    assert groups == sorted(groups)


def _task(name: str, engines: str, us: float) -> Task:
    return Task(name, tuple(engines), us, "compute")


def test_critical_path_of_two_streams_on_two_engines() -> None:
    for a, b in ((3.0, 2.0), (2.0, 3.0), (2.0, 2.0)):
        layers = [_task("attend", "a", a), _task("experts", "m", b)] * 5
        path = critical_path([layers, layers])
        assert math.isclose(sum(t.us for t in path), 10 * max(a, b) + min(a, b))
        assert math.isclose(sum(t.us for t in critical_path([layers])), 5 * (a + b))


def test_critical_path_bounds() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        streams = [
            [_task(str(i), rng.choice(["a", "b", "ab", "c"]), float(rng.uniform(0, 3))) for i in range(20)]
            for _ in range(int(rng.integers(1, 4)))
        ]
        us = sum(t.us for t in critical_path(streams))
        every = [t for stream in streams for t in stream]
        assert us >= max(sum(t.us for t in stream) for stream in streams) - 1e-9
        assert all(us >= sum(t.us for t in every if e in t.resources) - 1e-9 for e in "abc")
        assert us <= sum(t.us for t in every) + 1e-9
    assert critical_path([[]]) == []


EP320 = expert_parallel(320, 256, redundant_slots=32, shared_slots=32)
EVEN = tuple(power_law(256, 0))


def test_busiest_rank_with_even_experts_on_320_dies() -> None:
    # a token's 9 messages go to 320 slots; an expert in one slot gets 8 / 256 of them, the mean is 9 / 320
    assert busiest(EP320, EVEN, 8, 1, 10_000_000) == pytest.approx(320 * 8 / 256 / 9, rel=1e-3)
    loads = [busiest(EP320, EVEN, 8, 1, tokens) for tokens in (8, 48, 512)]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] > 1.3


def test_busiest_rank_matches_random_draws() -> None:
    layout, rng = expert_parallel(64, 256), np.random.default_rng(2)
    largest = [rng.multinomial(64 * 30 * 8, EVEN).reshape(64, 4).sum(1).max() / 240 for _ in range(300)]
    assert busiest(layout, EVEN, 8, 0, 30) == pytest.approx(np.median(largest), rel=0.02)


def test_eplb_balances_skewed_experts() -> None:
    layout = expert_parallel(32, 256, redundant_slots=32)
    skewed = tuple(power_law(256, 0.7))
    assert sum(skewed) == pytest.approx(1)
    blind, placed = (busiest(layout, skewed, 8, 0, 8192, eplb) for eplb in (False, True))
    assert blind > 1.5
    assert placed < 1.05
    steeper = [busiest(layout, tuple(power_law(256, x)), 8, 0, 8192, False) for x in (0, 0.3, 0.6, 1.0)]
    assert steeper == sorted(steeper)
    with pytest.raises(CmxError, match=r"exponent -1 of the experts' load, expected 0 \(even\) to 10"):
        power_law(256, -1)
