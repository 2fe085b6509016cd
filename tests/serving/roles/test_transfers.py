"""What goes wrong between two workers, with real transfers: every request ends with its own tokens, or with
an error that says why, and nothing is kept."""

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
    asked = (tokens(router, prompt, max_tokens=TOKENS) for prompt in prompts)
    return await asyncio.gather(*asked, return_exceptions=True)


def test_requests_come_and_go_together(workers, members, prompts, expected) -> None:
    assert routed(members, lambda router: all_of(router, prompts)) == expected
    assert workers[0].engine.outbox.counts["expired"] == 0


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_damaged_pages_are_computed_again_or_the_request_fails(
    policy, workers, members, prompts, expected, monkeypatch
) -> None:
    transport = workers[1].engine.outbox.transport
    pull, pulled = transport.pull, []

    def damaging(*given):
        arrays = [np.array(array) for array in pull(*given)]
        pulled.append(given)
        if len(pulled) in (1, 4):
            arrays[0].reshape(-1).view(np.uint8)[5] ^= 8
        return arrays

    monkeypatch.setattr(transport, "pull", damaging)

    async def act(router: Router) -> tuple[list[list[int] | BaseException], int]:
        return await all_of(router, prompts), router.retried

    found, retried = routed(members, act, policy=policy)
    failed = [of for of in found if isinstance(of, BaseException)]
    assert (len(failed), retried) == ((0, 2) if policy == "recompute" else (2, 0))
    for error in failed:
        assert isinstance(error, TransferError)
        assert "the pages came damaged" in str(error)
    for of, tokens_ in zip(found, expected, strict=True):
        assert of in failed or of == tokens_
    assert not any(m.error for m in members.all)  # neither worker is to blame


def test_an_acknowledgement_that_is_lost_is_made_up_for_by_the_lease(
    workers, prompts, expected, monkeypatch
) -> None:
    sender, _ = workers
    kv, expired = Peer.kv, sender.engine.outbox.counts["expired"]

    async def losing(self: Peer, transfer_id: int, what: str) -> bool:
        if what == "acknowledge":
            raise PeerError("lost")
        return await kv(self, transfer_id, what)

    monkeypatch.setattr(Peer, "kv", losing)
    for count in (expired + 4, expired + 8):  # the watchdog lives on
        found = routed(before(workers), lambda router: all_of(router, prompts[:4]))
        assert found == expected[:4]
        eventually(lambda count=count: sender.engine.outbox.counts["expired"] == count)


def test_pages_whose_lease_ended_are_computed_again(workers, members, prompts, expected, monkeypatch) -> None:
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


def test_who_finds_no_room_where_it_decodes_goes_on_elsewhere(base, workers, prompts) -> None:
    """A small cache: sequences that grow take each other's pages, and lose no token."""
    sender, _ = workers
    long = [prompts[3], prompts[6], prompts[7]]  # 32, 21 and 12 tokens
    small = instance(base, "small", 1, sequences=3, pages=10)
    with running("decode", small, base) as receiver:
        members = Members([sender.url], [receiver.url], SECRET)

        async def act(router: Router) -> tuple[list[list[int]], int]:
            asked = (tokens(router, prompt, max_tokens=30) for prompt in long)
            return await asyncio.gather(*asked), router.retried

        found, retried = routed(members, act, policy="fail")  # nothing is lost, so nothing fails
        receiver.idle()
    assert found == [list(greedy(BASE, prompt, 30)) for prompt in long]
    assert retried > 0
