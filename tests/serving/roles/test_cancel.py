"""Clients that leave a worker or a router at any moment: nothing of their requests is kept."""

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest
from reference.dense import greedy
from serving.ems.stores import eventually
from serving.roles.workers import SECRET, Running, routed, running, tokens
from support import BASE, instance

from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.kv import new_id
from cmx_jax.serving.roles.members import Members
from cmx_jax.serving.roles.messages import DecodeRequest, Params, PrefillRequest
from cmx_jax.serving.roles.peer import Peer
from cmx_jax.serving.roles.router import Router
from cmx_jax.serving.scheduling.request import SamplingParams

PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def workers(base: Model) -> Iterator[tuple[Running, Running]]:
    prefill = instance(base, "prefill", 1, sequences=2, pages=32)
    decode = instance(base, "decode", 1, sequences=3, pages=32)
    with running("prefill", prefill, base) as sender, running("decode", decode, base) as receiver:
        yield sender, receiver


@pytest.fixture(autouse=True)
def _nothing_is_left(workers) -> Iterator[None]:
    yield
    for worker in workers:
        worker.idle()


def post(worker: Running, route: str, body: PrefillRequest | DecodeRequest, timeout: float) -> None:
    """Asks, and leaves after `timeout` seconds."""
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{worker.url}/internal/{route}", content=body.model_dump_json(), headers=headers, timeout=timeout
        )


def held(worker: Running, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes the engine's next step wait for an event after its work."""
    step, go = worker.engine.step, threading.Event()

    def stepped() -> object:
        result = step()
        assert go.wait(20)
        return result

    monkeypatch.setattr(worker.engine, "step", stepped)
    return go


def prompt_of(prompts: list[list[int]]) -> PrefillRequest:
    return PrefillRequest(prompt=prompts[1], params=Params.from_sampling(PARAMS), transfer_id=new_id())


def test_disconnect_before_ticket(workers, prompts, monkeypatch) -> None:
    """Its pages are withdrawn: the lease of 30 s is not what frees them."""
    sender, _ = workers
    go, offered = held(sender, monkeypatch), sender.engine.outbox.counts["withdrawn"]
    post(sender, "prefill", prompt_of(prompts), 0.5)  # the step is over, and has not been told
    go.set()
    eventually(lambda: sender.engine.outbox.counts["withdrawn"] == offered + 1)


def decode_of(sender: Running, prompts: list[list[int]]) -> DecodeRequest:
    async def prefilled() -> DecodeRequest:
        peer = Peer(sender.url, SECRET)
        body = prompt_of(prompts)
        answer = await peer.prefill(body)
        await peer.close()
        return DecodeRequest(
            prompt=body.prompt,
            params=body.params,
            first=answer.token,
            drafts=answer.drafts,
            control=sender.url,
            kv_transfer_params=answer.kv_transfer_params,
        )

    return asyncio.run(prefilled())


def test_disconnect_during_transfer(workers, prompts, monkeypatch) -> None:
    """A client leaves while pages are transferred."""
    sender, receiver = workers
    body, transport = decode_of(sender, prompts), receiver.engine.outbox.transport
    pull, go, pulled = transport.pull, threading.Event(), threading.Event()

    def slow(*arguments):
        assert go.wait(20)
        result = pull(*arguments)
        pulled.set()
        return result

    monkeypatch.setattr(transport, "pull", slow)
    post(receiver, "decode", body, 0.5)
    assert sender.engine.outbox.waiting == 1
    assert sender.engine.outbox.withdraw(body.kv_transfer_params["transfer_id"])  # as the router does
    go.set()
    assert not pulled.wait(0.5)  # there is nothing any more


def test_disconnect_before_first_line(workers, prompts, monkeypatch) -> None:
    """A client leaves before the first line of the answer."""
    sender, receiver = workers
    go = held(receiver, monkeypatch)
    body = decode_of(sender, prompts)
    post(receiver, "decode", body, 0.5)
    eventually(lambda: not sender.engine.outbox.waiting)
    go.set()


def test_disconnect_during_decode(workers, prompts) -> None:
    """A client leaves in the middle of the answer."""
    sender, receiver = workers

    async def leaves() -> int:
        peer, lines = Peer(receiver.url, SECRET), 0
        decoded = peer.decode(decode)
        async for _ in decoded:
            lines += 1
            if lines == 3:
                break
        await decoded.aclose()
        await peer.close()
        return lines

    decode = decode_of(sender, prompts)
    assert asyncio.run(leaves()) == 3
    receiver.idle()
    assert receiver.engine.steps < PARAMS.max_tokens


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.3], ids=str)
@pytest.mark.slow
def test_disconnect_from_router(after, workers, prompts) -> None:
    sender, receiver = workers
    members = Members([sender.url], [receiver.url], SECRET)

    async def act(router: Router) -> list[int]:
        staying = asyncio.create_task(tokens(router, prompts[4], max_tokens=12))
        generations = [await router.generate([(prompt, PARAMS)]) for prompt in prompts]
        await asyncio.sleep(after)
        for generation in generations:
            generation.close()
        return await staying

    assert routed(members, act) == list(greedy(BASE, prompts[4], 12))
