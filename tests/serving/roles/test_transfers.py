"""Failures between two workers, with real transfers: every request ends with its own tokens, or with an error
that gives the reason, and no page is left."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from reference.dense import greedy
from serving.ems.stores import eventually
from serving.roles.workers import SECRET, Running, routed, running, tokens
from support import BASE, instance

from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.kv import TransferError
from cmx_jax.serving.roles.members import Members
from cmx_jax.serving.roles.peer import Peer, PeerError
from cmx_jax.serving.roles.router import Router

pytestmark = pytest.mark.slow

TOKENS = 12


@pytest.fixture(scope="module")
def workers(base: Model) -> Iterator[tuple[Running, Running]]:
    prefill = instance(base, "prefill", 2, sequences=2, pages=32)
    decode = instance(base, "decode", 2, sequences=3, pages=32)
    with (
        running("prefill", prefill, base, lease_s=1.0) as sender,
        running("decode", decode, base) as receiver,
    ):
        yield sender, receiver


@pytest.fixture
def members(workers) -> Members:
    return before(workers)


def before(workers: tuple[Running, Running]) -> Members:
    sender, receiver = workers
    return Members([sender.url], [receiver.url], SECRET, patience_s=5)


@pytest.fixture(autouse=True)
def _nothing_is_left(workers) -> Iterator[None]:
    yield
    for worker in workers:
        worker.idle()


@pytest.fixture(scope="module")
def expected(prompts) -> list[list[int]]:
    return [list(greedy(BASE, prompt, TOKENS)) for prompt in prompts]


async def all_of(router: Router, prompts: list[list[int]]) -> list[list[int] | BaseException]:
    answers = (tokens(router, prompt, max_tokens=TOKENS) for prompt in prompts)
    return await asyncio.gather(*answers, return_exceptions=True)


def test_transfers_many_requests(workers, members, prompts, expected) -> None:
    """Many requests are transferred at the same time."""
    assert routed(members, lambda router: all_of(router, prompts)) == expected
    assert workers[0].engine.outbox.counts["expired"] == 0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_transfer_damaged_pages(policy, workers, members, prompts, expected, monkeypatch) -> None:
    """Damaged pages are computed again, or the request fails."""
    transport = workers[1].engine.outbox.transport
    pull, pulled = transport.pull, []

    def damaging(*arguments):
        arrays = [np.array(array) for array in pull(*arguments)]
        pulled.append(arguments)
        if len(pulled) in (1, 4):
            arrays[0].reshape(-1).view(np.uint8)[5] ^= 8
        return arrays

    monkeypatch.setattr(transport, "pull", damaging)

    async def act(router: Router) -> tuple[list[list[int] | BaseException], int]:
        return await all_of(router, prompts), router.retried

    results, retried = routed(members, act, policy=policy)
    failed = [result for result in results if isinstance(result, BaseException)]
    assert (len(failed), retried) == ((0, 2) if policy == "recompute" else (2, 0))
    for error in failed:
        assert isinstance(error, TransferError)
        assert "the pages came damaged" in str(error)
    for result, tokens_ in zip(results, expected, strict=True):
        assert result in failed or result == tokens_
    assert not any(m.error for m in members.all)  # neither worker is to blame


def test_transfer_lost_acknowledgement(workers, prompts, expected, monkeypatch) -> None:
    """The lease frees pages whose acknowledgement was lost."""
    sender, _ = workers
    kv, expired = Peer.kv, sender.engine.outbox.counts["expired"]

    async def losing(self: Peer, transfer_id: int, action: str) -> bool:
        if action == "acknowledge":
            raise PeerError("lost")
        return await kv(self, transfer_id, action)

    monkeypatch.setattr(Peer, "kv", losing)
    for count in (expired + 4, expired + 8):  # the watchdog lives on
        results = routed(before(workers), lambda router: all_of(router, prompts[:4]))
        assert results == expected[:4]
        eventually(lambda count=count: sender.engine.outbox.counts["expired"] == count)


def test_transfer_expired_lease(workers, members, prompts, expected, monkeypatch) -> None:
    """Pages whose lease ended are computed again."""
    sender, _ = workers
    renew, late = sender.engine.outbox.renew, []

    def too_late(transfer_id: int) -> bool:
        if not late:
            late.append(transfer_id)
            sender.engine.outbox.withdraw(transfer_id)
        return renew(transfer_id)

    monkeypatch.setattr(sender.engine.outbox, "renew", too_late)
    assert routed(members, lambda router: all_of(router, prompts[:3])) == expected[:3]
    assert len(late) == 1


def test_decode_preemption(base, workers, prompts) -> None:
    """A small cache: sequences that grow take each other's pages, and lose no token."""
    sender, _ = workers
    long = [prompts[3], prompts[6], prompts[7]]  # 32, 21 and 12 tokens
    small = instance(base, "small", 1, sequences=3, pages=10)
    with running("decode", small, base) as receiver:
        members = Members([sender.url], [receiver.url], SECRET)

        async def act(router: Router) -> tuple[list[list[int]], int]:
            answers = (tokens(router, prompt, max_tokens=30) for prompt in long)
            return await asyncio.gather(*answers), router.retried

        results, retried = routed(members, act, policy="fail")  # nothing is lost, so nothing fails
        receiver.idle()
    assert results == [list(greedy(BASE, prompt, 30)) for prompt in long]
    assert retried > 0
