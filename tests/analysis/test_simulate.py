"""The simulator against queueing theory, direct recursions over the same draws, and the engine on lanes."""

import heapq
import itertools
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import instance

from cmx_jax.analysis.simulate import (
    Arrival,
    InstancePool,
    Linear,
    SimulatedDeployment,
    StepTimes,
    events,
    mooncake,
    simulate,
    summary,
    synthetic,
)
from cmx_jax.analysis.simulate.supernodes import ROUTERS
from cmx_jax.analysis.simulate.workload import BLOCK
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.packing import Piece
from cmx_jax.serving.scheduling.request import Request, SamplingParams, State

HUGE = 1 << 20  # tokens
MS_A_TOKEN = Linear(prefill_ms_per_1k=1000, decode_ms=1)
ONE_PAGE = Capacity(sequences=1, pages=1, page_width=HUGE, max_num_batched_tokens=HUGE)


def served(arrivals: list[Arrival], servers: int) -> np.ndarray:
    """When each request leaves `servers` first-come-first-served servers that take 1 ms a prompt token."""
    free, left = [0.0] * servers, []
    for arrival in arrivals:
        left.append(max(arrival.time, heapq.heappop(free)) + arrival.prompt / 1e3)
        heapq.heappush(free, left[-1])
    return np.array(left)


def erlang_c(servers: int, load: float) -> float:
    """The probability of waiting in M/M/c at `load` = arrival rate / service rate."""
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize(("servers", "prompt", "load"), [(1, "1000", 0.7), (3, "exponential:1000", 2.4)])
def test_prefill_instances_serve_in_order(servers, prompt, load) -> None:
    """Each takes one prompt at a time: every request leaves when the recursion says."""
    arrivals = list(synthetic(rate=load, prompt=prompt, output="1", requests=2000))
    pool = InstancePool(instances=servers, capacity=ONE_PAGE)
    outcome = simulate(
        arrivals, SimulatedDeployment(prefill=pool, decode=InstancePool(capacity=ONE_PAGE)), MS_A_TOKEN
    )
    np.testing.assert_allclose(np.sort(outcome.columns["finished"]), np.sort(served(arrivals, servers)))


DECODE = "--prefill-ms-per-1k 0 --decode-ms 1 --decode-ranks 2 --max-num-seqs 2 --block-size 16384"


@pytest.mark.parametrize(
    ("traffic", "machine", "servers", "load", "sojourn"),
    [  # a second of service each; the closed form's mean time from arrival to the end, seconds
        ("--rate 0.5 --prompt 1000 --output 1", "", 1, 0.5, 1 + 0.5 / (2 * (1 - 0.5))),  # M/D/1
        ("--rate 1.8 --prompt exponential:1000 --output 1", "", 3, 1.8, 1 + erlang_c(3, 1.8) / (3 - 1.8)),
        ("--rate 2.5 --prompt 1 --output exponential:1000", DECODE, 4, 2.5, 1 + erlang_c(4, 2.5) / (4 - 2.5)),
    ],
    ids=["M/D/1", "M/M/3", "M/M/4: rows of decode"],
)
@pytest.mark.slow
def test_queues_have_the_times_of_the_closed_forms(traffic, machine, servers, load, sojourn) -> None:
    """By the command, without type checks: so many requests take their time. Servers are prefill instances
    with room for one prompt, or rows of a decode batch whose steps take the same however many run."""
    one_page = f"--prefill-ms-per-1k 1000 --decode-ms 1 --block-size {HUGE} --prefill-instances {servers}"
    flags = f"--prefill-kv-tokens {HUGE} --decode-kv-tokens {HUGE} --max-num-batched-tokens {HUGE}"
    command = [
        sys.executable,
        "-m",
        "cmx_jax.cli",
        "simulate",
        "--json",
        "--requests",
        "40000",
        *traffic.split(),
    ]
    done = subprocess.run(
        [*command, *flags.split(), *(machine or one_page).split()], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["mean_e2el_ms"] == pytest.approx(sojourn * 1e3, rel=0.02)
    busy = result["mean_decode_batch"] if machine else result["prefill_utilization"] * servers
    assert busy == pytest.approx(load, rel=0.02)


def held(node: Any) -> int:
    instances = set(node.scheduler.instances)
    left = sum(
        i.allocator.load + len(i.allocator.places) + len(i.allocator.prefilling) + i.running + len(i.ready)
        for i in instances
    )
    return left + len(node.scheduler.waiting) + len(node.scheduler.transfers) + node.outstanding


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 90), st.integers(1, 30), st.integers(0, 3)), min_size=1
    ),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
    st.booleans(),
    st.floats(0, 2),
    st.sampled_from(sorted(ROUTERS)),
    st.integers(1, 3),
)
def test_requests_finish_once_and_leave_nothing(
    rows, prefill, decode, both, one_host, acceptance, router, supernodes
) -> None:
    arrivals = [Arrival(t, prompt, output, (block,)) for t, prompt, output, block in sorted(rows)]

    def pool(instances: int, ranks: int, sequences: int) -> InstancePool:
        room = Capacity(sequences=sequences, pages=15, page_width=8, max_num_batched_tokens=32)
        return InstancePool(instances=instances, ranks=ranks, sharing=2, capacity=room)

    given_ = {"acceptance": acceptance, "prefix_blocks": 2, "one_host": one_host}
    deployment = SimulatedDeployment(prefill=pool(*prefill), decode=None if both else pool(*decode), **given_)
    times = Linear(prefill_ms=1, prefill_ms_per_1k=99, decode_ms=7, decode_ms_per_1m=9, transfer_ms_per_1k=50)
    outcome = simulate(arrivals, deployment, times, supernodes=supernodes, router=router)
    c = outcome.columns
    assert sorted(zip(c["arrived"], c["prompt"], c["output"], strict=True)) == sorted(a[:3] for a in arrivals)
    assert not any(map(held, outcome.nodes))
    assert (c["arrived"] <= c["started"]).all()
    assert (c["started"] < c["first_token"]).all()
    steps = np.ceil((c["output"] - 1) / (1 + acceptance))
    assert (c["finished"] - c["first_token"] >= steps * 7e-3 - 1e-9).all()


def test_workload_depends_on_seed_only() -> None:
    def columns(seed: int) -> np.ndarray:
        drawn = synthetic(
            rate=50,
            prompt="lognormal:200,0.8",
            output="uniform:1,40",
            burstiness=0.5,
            seed=seed,
            requests=500,
        )
        room = Capacity(sequences=8, pages=256)
        deployment = SimulatedDeployment(
            prefill=InstancePool(capacity=room), decode=InstancePool(ranks=4, capacity=room)
        )
        return np.array([*simulate(drawn, deployment, MS_A_TOKEN).columns.values()])

    np.testing.assert_array_equal(columns(1), columns(1))
    assert not np.array_equal(columns(1), columns(2))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_intervals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    given_ = {"prompt": "3", "output": "uniform:2,4", "seed": 5}
    drawn = list(synthetic(rate=20, burstiness=burstiness, duration=1000, **given_))
    intervals = np.diff([0.0, *(a.time for a in drawn)])
    assert intervals.mean() == pytest.approx(1 / 20, rel=0.03)
    assert intervals.var() / intervals.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.06)
    assert drawn[-1].time <= 1000
    assert set(np.unique([a.output for a in drawn])) == {2, 3, 4}


def test_merged_steps_take_as_long_as_single_steps(monkeypatch) -> None:
    """Step times grow with the context: the middle of a jump stands for all of it."""
    drawn = list(synthetic(rate=3, prompt="500", output="uniform:50,400", requests=300))
    room = Capacity(sequences=16, pages=999)
    deployment = SimulatedDeployment(
        prefill=InstancePool(capacity=room), decode=InstancePool(ranks=2, capacity=room)
    )
    times = Linear(prefill_ms_per_1k=20, decode_ms=5, decode_ms_per_sequence=1, decode_ms_per_1m=1000)
    together = summary(simulate(drawn, deployment, times)).as_dict()
    monkeypatch.setattr(events, "JUMP", 1)
    single = summary(simulate(drawn, deployment, times)).as_dict()
    for name in ("mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms"):
        assert together[name] == pytest.approx(single[name], rel=0.002)


def test_prefix_reuse_is_what_a_direct_count_says() -> None:
    """Requests one after another: each finds its longest prefix among the blocks used last."""
    rng = np.random.default_rng(0)
    arrivals, expected, used = [], 0, []  # used: blocks, the one used last at the end
    for n in range(300):
        document, blocks = int(rng.integers(6)), int(rng.integers(1, 6))
        ids = tuple(document * 10 + i for i in range(blocks))
        prompt = blocks * BLOCK - int(rng.integers(BLOCK))
        arrivals.append(Arrival(100.0 * n, prompt, 1, ids))
        found = len(list(itertools.takewhile(used.__contains__, ids))) * BLOCK
        expected += min(found, prompt - 1) // 128 * 128
        used = [block for block in used if block not in ids] + list(reversed(ids))
        used = used[-12:]
    room = Capacity(pages=64, page_width=128, max_num_batched_tokens=1024)
    pool = InstancePool(capacity=room)
    outcome = simulate(arrivals, SimulatedDeployment(prefill=pool, decode=pool, prefix_blocks=12), MS_A_TOKEN)
    assert outcome.columns["cached"].sum() == expected > 0
    c = outcome.columns
    np.testing.assert_allclose(c["first_token"] - c["arrived"], (c["prompt"] - c["cached"]) / 1e3)


# The engine on lanes, each of whose steps lets a clock pass on.


@dataclass
class Clock:
    now: float = 0.0


def clocked(one: Instance, clock: Clock, times: StepTimes | None, took: Any, patch: Any) -> None:
    """Steps of an instance let the clock pass on: by `times`, or by what they took just now."""
    starts_prefill, ends_prefill = one.start_prefill, one.end_prefill
    start, end = one.start_decode, one.end_decode

    def passed(kind: str, began: float, seconds: float | None) -> None:
        took[kind].append(time.perf_counter() - began if seconds is None else seconds)
        clock.now += took[kind][-1]

    def start_prefill() -> None:
        one.prefill_began = time.perf_counter(), times and times.prefill(one.allocator.next_pieces())
        starts_prefill()

    def end_prefill() -> list[Request]:
        result = ends_prefill()
        passed("prefill", *one.prefill_began)
        return result

    def start_decode() -> None:
        running = [
            (one.allocator.places[r].rank, r)
            for r in one.allocator.rows
            if r is not None and r.state is State.DECODE
        ]
        busiest = np.bincount([rank for rank, _ in running]).max().item()
        context = np.mean([len(r.prompt) + len(r.tokens) for _, r in running]).item()
        one.began = time.perf_counter(), times and times.decode(busiest, context)
        start()

    def end_decode() -> dict[Request, list[int]]:
        result = end()
        passed("decode", *one.began)
        return result

    patch.setattr(one, "start_prefill", start_prefill)
    patch.setattr(one, "end_prefill", end_prefill)
    patch.setattr(Instance, "prefill_ready", True)  # whichever the real step is
    patch.setattr(one, "start_decode", start_decode)
    patch.setattr(one, "end_decode", end_decode)


def engine_serves(engine: Engine, clock: Clock, arrivals: list[Arrival]) -> list[Request]:
    engine.scheduler.clock = lambda: clock.now
    pending, requests = deque(arrivals), []
    while pending or engine.busy:
        if not engine.busy:
            clock.now = max(clock.now, pending[0].time)
        while pending and pending[0].time <= clock.now:
            arrival = pending.popleft()
            params = SamplingParams(max_tokens=arrival.output, ignore_eos=True)
            requests.append(engine.submit([7] * arrival.prompt, params))
            requests[-1].arrived = arrival.time
        engine.step()
    return requests


class Replayed:
    """The seconds that were measured, step by step."""

    def __init__(self, took: dict[str, list[float]]):
        self.took: dict[str, Iterator[float]] = {kind: iter(seconds) for kind, seconds in took.items()}

    def prefill(self, pieces: list[list[Piece]]) -> float:
        return next(self.took["prefill"])

    def decode(self, sequences: int, context: float) -> float:
        return next(self.took["decode"])

    def transfer(self, tokens: int) -> float:
        return 0.0

    fetch = transfer


@pytest.fixture(scope="module")
def instances(base) -> dict[str, list[Instance]]:
    """Prefill instances and, last, the one that decodes."""
    both = instance(base, "both", 4, sequences=2, pages=16)
    split = [instance(base, f"prefill-{i}", 2, sequences=1, pages=8) for i in range(2)]
    return {"one": [both, both], "three": [*split, instance(base, "decode", 4, sequences=1, pages=8)]}


@pytest.mark.parametrize(("started", "measured"), [("one", True), ("one", False), ("three", False)])
@pytest.mark.slow
def test_engine_on_lanes_takes_simulated_time(started, measured, instances, monkeypatch) -> None:
    """The same trace; step times measured in that run, or given. Both wait, pack and join alike."""
    *prefill, decode = instances[started]
    both = decode in prefill
    linear = Linear(prefill_ms=2, prefill_ms_per_1k=200, decode_ms=3, decode_ms_per_sequence=0.5)
    drawn = list(synthetic(rate=90, prompt="uniform:1,24", output="uniform:1,12", seed=3, requests=60))
    clock, took = Clock(), {"prefill": [], "decode": []}
    for one in dict.fromkeys([*prefill, decode]):
        clocked(one, clock, None if measured else linear, took, monkeypatch)
    requests = engine_serves(Engine(prefill, decode), clock, drawn)

    if measured:
        monkeypatch.setattr(events, "JUMP", 1)
    pool = InstancePool(
        instances=len(prefill), ranks=prefill[0].allocator.ranks, capacity=prefill[0].capacity
    )
    decoders = None if both else InstancePool(ranks=decode.allocator.ranks, capacity=decode.capacity)
    deployment = SimulatedDeployment(prefill=pool, decode=decoders, one_host=True)
    result = summary(simulate(drawn, deployment, Replayed(took) if measured else linear)).as_dict()
    tpots = [r.tpot_s for r in requests if len(r.tokens) > 1]
    assert result["mean_ttft_ms"] == pytest.approx(np.mean([r.ttft_s for r in requests]) * 1e3, rel=1e-6)
    assert result["mean_tpot_ms"] == pytest.approx(np.mean(tpots) * 1e3, rel=1e-6)
    assert result["mean_queue_ms"] > 0


# The command.

FLAGS = ["--prefill-ms-per-1k", "10", "--decode-ms", "20", "--json"]


def test_command_simulates_trace(tmp_path, capsys) -> None:
    rows = [
        {"timestamp": 1000 * n, "input_length": 1024, "output_length": 3, "hash_ids": [0, 1]}
        for n in range(4)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--prefix-tokens", "99999", "--slo-ttft-ms", "5", "--slo-tpot-ms", "25"]
    assert main(["simulate", "--trace", str(path), *flags, *FLAGS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (4, 4096, 12)
    assert result["prefix_hit_rate"] == 3 * (1024 - 128) / 4096
    assert result["mean_tpot_ms"] == pytest.approx(20)
    assert result["slo_attainment"] == 0.75  # the first has to run its whole prompt
    assert main(["simulate", "--trace", str(path), *FLAGS[:-1]]) == 0
    assert "4 requests in 3.1 s on 256 NPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected --trace FILE or --rate R, one of them"),
        (["--rate", "-1"], "rate is -1, expected above zero"),
        (["--rate", "nan"], "rate is nan, expected above zero"),
        (["--rate", "1", "--burstiness", "0"], "burstiness is 0, expected above zero"),
        (["--rate", "1", "--prompt", "-5"], "a length is '-5', expected tokens such as 4096"),
        (["--rate", "1", "--output", "zipf:2"], "a length is 'zipf:2', expected tokens"),
        (["--rate", "1", "--duration", "-3"], "duration is -3, expected above zero"),
        (["--rate", "1", "--requests", "0"], "requests is 0, expected above zero"),
        (["--rate", "1", "--prompt", "300000"], "exceed a rank's cache of 2048 pages of 128 tokens"),
        (["--rate", "1", "--prefill-instances", "0"], "instances is 0, expected at least 1"),
        (["--rate", "1", "--prefill-instances", "20"], "are 480, expected at most the supernode's 384"),
        (["--rate", "1", "--block-size", "0"], "block_size is 0, expected at least 1"),
        (["--rate", "1", "--router", "best"], "router 'best' is unknown, expected one of"),
        (["--rate", "1", "--supernodes", "0"], "supernodes is 0, expected at least 1"),
        (["--rate", "1", "--mtp-acceptance", "-1"], "acceptance is -1"),
        (["--rate", "1", "--decode-ms", "-2"], "decode_ms is -2, expected zero or more"),
        (["--rate", "1", "--requests", "2", "--slo-tpot-ms", "-1"], "slo_tpot_ms is -1, expected above zero"),
        (["--trace", "/nowhere"], "--trace /nowhere: No such file"),
    ],
)
def test_nonsense_is_one_line(flags, message, capsys) -> None:
    assert main(["simulate", *FLAGS, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"timestamp": 0}', '{"timestamp": -1, "input_length": 1, "output_length": 1}']
)
def test_invalid_trace_line_is_named(line, tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n' + line)
    with pytest.raises(CmxError, match="line 2: expected an object with timestamp"):
        mooncake(path)
