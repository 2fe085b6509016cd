"""Requests that are cancelled, preempted, refused, late, or moved to other instances.

Every served request has the tokens of the dense reference, and nothing is held in the end.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.dense import greedy, logits
from support import BASE, instance

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import Overloaded, Request, SamplingParams, State
from cmx_jax.serving.scheduling.waiting import QueueLimits, Waiting

pytestmark = pytest.mark.slow

TOKENS = 20


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    return [list(greedy(BASE, prompt, TOKENS)) for prompt in prompts]


@pytest.fixture(scope="module")
def split(base: Model) -> Engine:
    prefill = [
        instance(base, f"prefill-{i}", 2, sequences=1, pages=8, max_num_batched_tokens=8) for i in range(2)
    ]
    return Engine(prefill, instance(base, "decode", 2, sequences=2, pages=8))


@pytest.fixture(scope="module")
def tight(base: Model) -> Engine:
    """Rows for four sequences on each of two ranks, pages for about half of what they grow to."""
    combined = instance(base, "both", 2, sequences=4, pages=9, max_num_batched_tokens=8)
    return Engine([combined], combined)


def params(**options: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": TOKENS, "ignore_eos": True} | options))


def nothing_held(engine: Engine) -> bool:
    return not engine.busy and not any(
        i.allocator.load or i.allocator.prefilling or any(i.allocator.rows) for i in engine.instances
    )


def test_preempted_requests_lose_no_token(tight, prompts, expected) -> None:
    requests = [tight.submit(prompt, params()) for prompt in prompts]
    tight.run()
    assert sum(r.preemptions for r in requests) > 0
    assert [r.tokens for r in requests] == expected
    assert nothing_held(tight)


def test_seeded_text_is_independent_of_preemption(tight, split, prompts) -> None:
    texts = []
    for engine in (tight, split):
        requests = [engine.submit(p, params(temperature=0.9, seed=3)) for p in prompts[:5]]
        engine.run()
        texts.append([r.tokens for r in requests])
    assert texts[0] == texts[1]


def test_preemption_takes_the_less_urgent_request(tight, prompts, expected) -> None:
    """The first is submitted last, with the smallest number."""
    less_urgent = [tight.submit(prompt, params(), priority=1) for prompt in prompts[1:]]
    urgent = tight.submit(prompts[0], params(), priority=0)
    tight.run()
    assert urgent.preemptions == 0
    assert urgent.first_token < max(r.first_token for r in less_urgent)
    assert [urgent.tokens, *[r.tokens for r in less_urgent]] == expected


@pytest.mark.parametrize("engine_fixture", ["split", "tight"])
@pytest.mark.parametrize("stage", [State.WAITING, State.PREFILL, State.TRANSFER, State.DECODE])
def test_cancelled_request_frees_its_pages(engine_fixture, stage, request, prompts, expected) -> None:
    """Every second one is cancelled when it is first seen in a state; prompts run in chunks."""
    engine = request.getfixturevalue(engine_fixture)
    requests = [engine.submit(prompt, params()) for prompt in prompts]
    cancelled = set()

    def look() -> None:
        for r in requests[::2]:
            if r.state is stage and r not in cancelled:
                engine.cancel(r)
                cancelled.add(r)

    look()
    while engine.busy:
        engine.step()
        look()
    if engine_fixture == "split" or stage is not State.TRANSFER:
        assert cancelled
    for r, tokens in zip(requests, expected, strict=True):
        if r in cancelled:
            assert (r.finish_reason, r.state) == ("abort", State.FINISHED)
            assert r.tokens == tokens[: len(r.tokens)]
        else:
            assert r.tokens == tokens
    engine.cancel(requests[1])  # it is finished: that stays
    assert requests[1].finish_reason == "length"
    assert nothing_held(engine)


def test_full_queue_refuses_with_a_retry_time(base, prompts) -> None:
    combined = instance(base, "both", 1, sequences=1, pages=8)
    engine = Engine([combined], combined, limits=QueueLimits(max_num_queued_reqs=2))
    for _ in range(2):
        engine.submit(prompts[0], params())
    with pytest.raises(Overloaded, match=r"queue is full \(max_num_queued_reqs 2\)") as caught:
        engine.submit(prompts[0], params())
    assert caught.value.retry_after_s >= 1
    engine.run()
    engine = Engine([combined], combined, limits=QueueLimits(max_num_queued_tokens=40))
    engine.submit([1] * 30, params())
    with pytest.raises(Overloaded, match="max_num_queued_tokens 40"):
        engine.submit([1] * 11, params())
    engine.submit([1] * 10, params())
    engine.run()
    assert nothing_held(engine)


def test_request_that_waits_too_long_fails(base, prompts) -> None:
    combined = instance(base, "both", 1, sequences=1, pages=8)
    engine = Engine([combined], combined, limits=QueueLimits(queue_ttl_s=5.0))
    now = 0.0
    engine.scheduler.clock = lambda: now
    first, second = engine.submit(prompts[0], params()), engine.submit(prompts[1], params())
    engine.step()
    now = 6.0
    assert engine.step() == [second]
    assert (second.finish_reason, second.tokens) == ("error", [])
    assert "waited longer than 5 s" in second.error
    engine.run()
    assert first.finish_reason == "length"
    assert nothing_held(engine)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs is 0"),
        ({"max_num_queued_tokens": -1}, "max_num_queued_tokens is -1"),
        ({"queue_ttl_s": 0}, "queue_ttl_s is 0"),
    ],
)
def test_limits_below_one_are_refused(split, limits, message) -> None:
    with pytest.raises(CmxError, match=message):
        Engine(split.prefill, split.decoders, limits=QueueLimits(**limits))


@pytest.mark.parametrize("engine_fixture", ["split", "tight"])
def test_logprobs_are_those_of_the_dense_reference(engine_fixture, request, prompts, expected) -> None:
    """Through prefill, decode and preemption; a request that asks for none gets none."""
    engine = request.getfixturevalue(engine_fixture)
    requests = [engine.submit(p, params(logprobs=4 if i % 2 else None)) for i, p in enumerate(prompts[:5])]
    engine.run()
    for r, prompt, tokens in zip(requests, prompts[:5], expected[:5], strict=True):
        assert r.tokens == tokens
        if r.params.logprobs is None:
            assert not r.logprobs
            continue
        rows = logits(BASE, [*prompt, *tokens])[len(prompt) - 1 : -1].astype(np.float64)
        chosen = [x.logprob for x in r.logprobs]
        logprobs = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(chosen, logprobs[range(TOKENS), tokens], atol=1e-4)
        for x, row in zip(r.logprobs, logprobs, strict=True):
            assert [token for token, _ in x.top] == np.argsort(-row, kind="stable")[:4].tolist()
            np.testing.assert_allclose([p for _, p in x.top], np.sort(row)[::-1][:4], atol=1e-4)


def test_stop_tokens_end_a_text(split, prompts, expected) -> None:
    stop = expected[1][3]
    stopped = split.submit(prompts[1], params(stop_token_ids=(stop,)))
    split.run()
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == expected[1][: expected[1].index(stop) + 1]


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_instances_change_while_serving(base, prompts, expected, grace_s) -> None:
    """Changes one prefill and two decode instances to two and one while requests run."""

    def make(prefill: int, decode: int) -> tuple[list, list]:
        kinds = ("prefill", prefill, {"sequences": 1}), ("decode", decode, {"sequences": 2})
        return tuple(
            [instance(base, f"{kind}-{i}", 2, pages=16, **room) for i in range(count)]
            for kind, count, room in kinds
        )

    engine = Engine(*make(1, 2))
    requests: list[Request] = []
    for n, prompt in enumerate(prompts):
        requests.append(engine.submit(prompt, params()))
        engine.step()
        if n == 3:
            engine.recarve(*make(2, 1), grace_s=grace_s)
    engine.run()
    assert (len(engine.prefill), len(engine.decoders)) == (2, 1)
    assert [r.tokens for r in requests] == expected
    assert any(r.preemptions for r in requests) == (grace_s == 0)
    assert nothing_held(engine)


def test_instances_with_other_pages_are_refused(split, base) -> None:
    layout = expert_parallel(2, base.config.n_routed_experts)
    wide = base.instance("wide", layout, make_runner("lanes", layout.axes), Capacity(pages=8))
    with pytest.raises(CmxError, match="wide has pages of"):
        split.recarve([wide], [wide])
    with pytest.raises(CmxError, match="at least one prefill and one decode"):
        split.recarve([], split.decoders)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["push", "front", "pop", "remove"]), st.integers(-1, 2)), max_size=60)
)
def test_queue_equals_sorted_list(moves: list[tuple[str, int]]) -> None:
    queue, model = Waiting(), []
    for n, (move, priority) in enumerate(moves):
        request = Request([1] * (n + 1), SamplingParams(), priority=priority)
        if move in ("push", "front"):
            queue.push(request, front=move == "front")
            same = [i for i, r in enumerate(model) if r.priority == priority]
            smaller = sum(r.priority < priority for r in model)
            model.insert(smaller if move == "front" else smaller + len(same), request)
        elif model and move == "pop":
            assert queue.pop() is model.pop(0)
        elif model:
            queue.remove(model.pop(n % len(model)))
        assert list(queue) == model
        assert (len(queue), queue.tokens) == (len(model), sum(len(r.prefill_tokens) for r in model))
        assert bool(queue) == bool(model)
        if model:
            assert queue.first() is model[0]


def test_request_that_cannot_be_prefilled_again_gets_all_pages_at_once(base, prompts, expected) -> None:
    """A prefill cache that holds prompts only: no request with a longer answer grows, or is preempted."""
    prefill = instance(base, "prefill", 1, sequences=1, pages=5)
    engine = Engine([prefill], instance(base, "decode", 1, sequences=4, pages=12))
    requests = [
        engine.submit(prompt, params(max_tokens=20 if i % 2 else 4)) for i, prompt in enumerate(prompts)
    ]
    engine.run()
    for r, tokens in zip(requests, expected, strict=True):
        assert r.tokens == tokens[: r.params.max_tokens]
        assert not (r.preemptions and r.max_kv_tokens > 40)
    assert nothing_held(engine)
