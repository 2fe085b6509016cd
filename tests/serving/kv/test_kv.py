"""Tickets, leases and what carries pages; the other process is a real one."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.errors import CmxError
from cmx_jax.quant.rows import Int8Rows
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.kv import (
    JaxTransport,
    LeasedPages,
    Local,
    Ticket,
    TransferError,
    checksums,
    fetch,
    transfer_locally,
)

OURS = Fingerprint(model="m", page=(2, 8, 5), dtype="float32", kv_cache_dtype="float32")


def pages(seed: int = 0, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 2, 8, 5)).astype(np.float32)


def tree(value: object) -> object:
    return jax.tree.structure(value)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def over_jax() -> JaxTransport:
    return JaxTransport()


@pytest.fixture(params=["local", "jax"])
def outbox(request: pytest.FixtureRequest) -> LeasedPages:
    transport = Local() if request.param == "local" else request.getfixturevalue("over_jax")
    return LeasedPages(transport, OURS, lease_s=10, clock=Clock())


def test_transfer_locally_frees_pages(outbox: LeasedPages) -> None:
    """Pages arrive unchanged and are freed."""
    for sent in (pages(), Int8Rows(pages(1).astype(np.int8), pages(2)[..., :2])):
        received = transfer_locally(outbox, sent)
        chex.assert_trees_all_equal(received, sent)
    assert outbox.waiting == 0
    assert outbox.counts == {"offered": 2, "acknowledged": 2}


def test_ticket_json_round_trip(outbox: LeasedPages) -> None:
    """A ticket is unchanged by a round trip through JSON."""
    ticket = outbox.offer(pages())
    assert Ticket.from_dict(json.loads(json.dumps(ticket.as_dict()))) == ticket
    assert 0 < ticket.transfer_id < 2**63
    assert outbox.withdraw(ticket.transfer_id)
    for broken in (
        {},
        [],
        {**ticket.as_dict(), "arrays": 3},
        {**ticket.as_dict(), "fingerprint": {"page": [1]}},
    ):
        with pytest.raises(CmxError, match="are not a ticket"):
            Ticket.from_dict(broken)


def test_fetch_fingerprint_mismatch(outbox: LeasedPages) -> None:
    """Pages of another layout are refused, with both values in the message."""
    ticket = outbox.offer(pages())
    theirs = replace(OURS, page=(2, 16, 5), kv_cache_dtype="int8")
    with pytest.raises(TransferError) as caught:
        fetch(ticket, outbox.transport, theirs, tree(pages()))
    assert "page is (2, 16, 5) here and (2, 8, 5) there" in str(caught.value)
    assert "kv_cache_dtype is 'int8' here and 'float32' there" in str(caught.value)
    other = replace(ticket, backend="carrier pigeon")
    with pytest.raises(TransferError, match="offered over 'carrier pigeon'"):
        fetch(other, outbox.transport, OURS, tree(pages()))
    assert outbox.withdraw(ticket.transfer_id)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2), st.integers(0, 2 * 8 * 5 * 4 - 1), st.integers(0, 7))
def test_fetch_flipped_bit(page: int, byte: int, bit: int) -> None:
    """Every flipped bit is noticed."""
    sent, box = pages(), LeasedPages(Local(), OURS)
    ticket = box.offer(sent.copy())
    sent.view(np.uint8).reshape(3, -1)[page, byte] ^= 1 << bit
    assert sum(a != b for a, b in zip(checksums(sent), ticket.checksums, strict=True)) == 1
    box.transport.publish(ticket.transfer_id, [sent])
    with pytest.raises(TransferError, match="came damaged"):
        fetch(ticket, box.transport, OURS, tree(sent))


def test_lease_expiry_and_renewal(outbox: LeasedPages) -> None:
    """A lease ends unless it is renewed."""
    clock = outbox._clock
    first, second = outbox.offer(pages(1)), outbox.offer(pages(2))
    clock.now = 8
    assert outbox.renew(second.transfer_id)
    clock.now = 12
    assert outbox.sweep() == [first.transfer_id]
    assert not outbox.renew(first.transfer_id)
    assert not outbox.acknowledge(first.transfer_id)
    with pytest.raises(TransferError):
        fetch(first, outbox.transport, OURS, tree(pages()), timeout_s=0.5)
    received = fetch(second, outbox.transport, OURS, tree(pages()))
    np.testing.assert_array_equal(received, pages(2))
    assert outbox.acknowledge(second.transfer_id)
    assert outbox.counts == {"offered": 2, "expired": 1, "acknowledged": 1}
    assert not outbox.waiting


def test_watchdog_frees_expired_pages() -> None:
    """The watchdog frees pages that are not fetched."""
    box = LeasedPages(Local(), OURS, lease_s=0.05)
    box.watch(0.02)
    freed = threading.Event()
    withdraw = box.transport.withdraw

    def noted(transfer_id: int) -> None:
        withdraw(transfer_id)
        freed.set()

    box.transport.withdraw = noted
    box.offer(pages())
    assert freed.wait(5)
    assert box.counts["expired"] == 1
    box.close()


def test_lease_invalid() -> None:
    """A lease is above zero."""
    with pytest.raises(CmxError, match="a lease of 0 seconds"):
        LeasedPages(Local(), OURS, lease_s=0)


CHILD = """
import json, sys
import numpy as np
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.kv import JaxTransport, LeasedPages
ours = Fingerprint(model="m", page=(2, 8, 5), dtype="float32", kv_cache_dtype="float32")
box = LeasedPages(JaxTransport(), ours)
pages = np.random.default_rng(0).standard_normal((3, 2, 8, 5)).astype(np.float32)
print(json.dumps([box.offer(pages).as_dict(), box.offer(pages).as_dict()]), flush=True)
sys.stdin.readline()
"""


def test_fetch_from_another_process(over_jax: JaxTransport, tmp_path: Path) -> None:
    """Pages can be fetched from another process until it dies."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        first, second = (Ticket.from_dict(document) for document in json.loads(child.stdout.readline()))
        np.testing.assert_array_equal(fetch(first, over_jax, OURS, tree(pages())), pages())
        with pytest.raises(TransferError, match=r"no pages within 0\.5 s"):
            fetch(first, over_jax, OURS, tree(pages()), timeout_s=0.5)  # it was fetched: the pull would hang
    finally:
        child.kill()
        child.communicate()
    with pytest.raises(TransferError):
        fetch(second, over_jax, OURS, tree(pages()), timeout_s=2)
