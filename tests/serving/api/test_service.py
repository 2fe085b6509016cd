"""The service without HTTP: what an event loop sees of an engine on its thread."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from cmx_jax.errors import CmxError
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.scheduling.request import Request, SamplingParams
from cmx_jax.serving.service.frontend import Unavailable
from cmx_jax.serving.service.generation import Chunk, Generation, Interrupted
from cmx_jax.serving.service.service import Service

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def with_service(engine: Engine, test: Callable[[Service], Awaitable[None]]) -> None:
    async def run() -> None:
        service = Service(engine)
        await service.start()
        try:
            await asyncio.wait_for(test(service), 60)
        finally:
            assert await asyncio.to_thread(service.stop)

    asyncio.run(run())
    assert not engine.busy


def test_chunks_are_the_tokens_in_order(deployment, llm) -> None:
    prompts = [llm.model.encode(p) for p in ("The json module", "A class is")]
    expected = [c.tokens for c in llm.generate(prompts, max_new_tokens=12, ignore_eos=True)]

    async def test(service: Service) -> None:
        got, firsts, steps = [[], []], [], 0
        async for chunk in await service.generate([(p, PARAMS) for p in prompts]):
            got[chunk.index] += chunk.tokens
            firsts += [chunk.index] * chunk.first
            assert chunk.age_s >= chunk.gap_s > 0
            steps += 1
        assert got == expected
        assert sorted(firsts) == [0, 1]
        assert steps < sum(map(len, got))  # drafts were right: some steps gave several tokens
        assert service.busy_s > 0

    with_service(deployment.engine, test)


def test_calls_run_between_steps_on_one_thread(deployment) -> None:
    async def test(service: Service) -> None:
        generation = await service.generate([([1], PARAMS)])
        names = {await service.call(lambda: threading.current_thread().name) for _ in range(3)}
        assert names == {"engine"}
        with pytest.raises(CmxError, match="the prompt is empty"):
            await service.generate([([1], PARAMS), ([], PARAMS)])
        assert len(service.live) == 1  # all or none
        assert [c.finish_reason async for c in generation][-1] == "length"

    with_service(deployment.engine, test)


@pytest.mark.parametrize("begun", [False, True])
def test_client_that_leaves_while_submitting_leaves_nothing(deployment, monkeypatch, begun) -> None:
    """The call waits for the engine's thread, or is just being made."""
    engine, blocked, go = deployment.engine, threading.Event(), threading.Event()
    submit = engine.submit

    def slowly(*args: object, **kwargs: object) -> Request:
        blocked.set()
        assert go.wait(30)
        return submit(*args, **kwargs)

    async def test(service: Service) -> None:
        other = asyncio.ensure_future(asyncio.sleep(0))
        if begun:
            monkeypatch.setattr(engine, "submit", slowly)
        else:
            other = asyncio.ensure_future(service.call(lambda: (blocked.set(), go.wait(30))))
        task = asyncio.ensure_future(service.generate([([1], SamplingParams(max_tokens=500))]))
        await asyncio.to_thread(blocked.wait, 30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go.set()
        await other
        await service.call(lambda: None)
        assert not engine.busy
        await service.call(lambda: None)  # after the turn in which it was cancelled
        assert not service.live

    with_service(engine, test)


def test_a_service_that_stopped_says_so(deployment) -> None:
    async def run() -> None:
        service = Service(deployment.engine)
        await service.start()
        assert await asyncio.to_thread(service.stop)
        with pytest.raises(Unavailable, match="the server has stopped"):
            await service.generate([([1], PARAMS)])

    asyncio.run(run())


def test_drain_ends_what_does_not_finish_in_time(deployment) -> None:
    async def test(service: Service) -> None:
        generation = await service.generate([([1], SamplingParams(max_tokens=500, ignore_eos=True))])
        await anext(generation)
        await service.drain(0.01)
        with pytest.raises(Interrupted, match="shutting down"):
            async for _ in generation:
                pass
        generation.close()
        await service.call(lambda: None)
        with pytest.raises(Unavailable, match="shutting down"):
            await service.generate([([1], PARAMS)])

    with_service(deployment.engine, test)


def chunk(index: int, tokens: list[int], reason: str | None = None) -> Chunk:
    return Chunk(index, Request([1], PARAMS), tokens, [], reason, None, False, 0.0, 0.0)


def test_what_comes_behind_a_stop_is_dropped() -> None:
    async def run() -> None:
        cancelled = []
        generation = Generation(2, lambda _, indices, reason: cancelled.append((indices, reason)))
        for of in (
            chunk(0, [1]),
            chunk(0, [2]),
            chunk(1, [3]),
            chunk(0, [], "stop"),
            chunk(1, [4], "length"),
        ):
            generation.put(of)
        assert (await anext(generation)).tokens == [1]
        generation.stop(0)
        generation.stop(0)
        assert [c.tokens async for c in generation] == [[3], [4]]
        generation.close()
        assert cancelled == [({0}, "stop")]

    asyncio.run(run())
