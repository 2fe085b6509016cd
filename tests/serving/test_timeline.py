"""A request's states stand without gaps from its arrival to its end; steps lie on their instance's track."""

import json

import pytest
from support import instance

from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.engine.timeline import REQUESTS, Timeline, together
from cmx_jax.serving.scheduling.request import SamplingParams


@pytest.fixture(scope="module")
def engine(base) -> Engine:
    return Engine(
        [instance(base, "prefill", 2, sequences=1, pages=8)],
        instance(base, "decode", 2, sequences=2, pages=8),
    )


def of_request(events: list[dict], request: int) -> list[dict]:
    return [e for e in events if e["pid"] == REQUESTS and e["tid"] == request and e["ph"] != "M"]


def test_request_states_follow_each_other(engine, prompts) -> None:
    requests = [engine.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in prompts]
    engine.step()
    engine.cancel(requests[-1])
    engine.run()
    events = engine.timeline.events()
    for r in requests:
        *states, end = of_request(events, r.id)
        assert end["name"] == f"finished: {r.finish_reason}"
        for before, after in zip(states, [*states[1:], end], strict=True):
            assert before["ts"] + before["dur"] == pytest.approx(after["ts"], abs=1)
        names = [e["name"] for e in states]
        if r is requests[-1]:
            assert names == ["waiting"]
        else:
            assert names == ["waiting", "prefill", "transfer", "decode"] * (1 + r.preemptions)
        assert sum(e["dur"] for e in states) == pytest.approx(
            (r.finished - r.arrived) * 1e6, rel=0.1, abs=2e3
        )


def test_steps_and_moves_are_on_instances_tracks(engine, prompts) -> None:
    before, steps = len(engine.timeline.events()), engine.steps
    engine.submit(prompts[1], SamplingParams(max_tokens=5, ignore_eos=True))
    engine.run()
    events = engine.timeline.events()
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(names.values()) == {"engine: requests", "engine: prefill", "engine: decode"}
    new = [
        e for e in events if e["ph"] == "X" and names[e["pid"]] == "engine: decode" and e["name"] == "decode"
    ]
    assert len(new) >= engine.steps - steps
    arrows = [e for e in events if e["ph"] in "sf" and e["cat"] == "kv"]
    by_id: dict[int, str] = {}
    for e in arrows:
        by_id[e["id"]] = by_id.get(e["id"], "") + e["ph"]
    assert set(by_id.values()) == {"sf"}
    assert len(events) > before


def test_several_processes_make_one_document(engine) -> None:
    events = engine.timeline.events()
    document = json.loads(json.dumps(together([events, events])))
    assert len(document["traceEvents"]) == 2 * len(events)
    assert len({e["pid"] for e in document["traceEvents"]}) == 2 * len({e["pid"] for e in events})


def test_old_events_are_forgotten() -> None:
    timeline = Timeline(events=10)
    for _ in range(40):
        with timeline.step("a", "decode"):
            pass
    assert sum(e["ph"] == "X" for e in timeline.events()) == 10
