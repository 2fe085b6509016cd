"""A block is what was sealed, or nothing."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmx_jax.serving.ems.store import OVERHEAD, seal, unseal

KEY, OTHER = bytes(range(32)), bytes(32)
PARTS = {"magic": 0, "version": 4, "length": 6, "key": 14, "digest": 46, "payload": 78}


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=300))
def test_seal_layout(key: bytes, payload: bytes) -> None:
    """A block has the documented layout."""
    head = b"CMXB" + struct.pack("<HQ", 1, len(payload)) + key
    block = seal(key, payload)
    assert block == head + hashlib.sha256(head + payload).digest() + payload
    assert len(block) == len(payload) + OVERHEAD
    assert unseal(key, block) == payload


@pytest.mark.parametrize("offset", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("bit", [0, 7])
def test_unseal_changed_bit(offset: int, bit: int) -> None:
    """A changed bit in any field of a block is noticed."""
    block = bytearray(seal(KEY, b"payload"))
    block[offset] ^= 1 << bit
    assert unseal(KEY, bytes(block)) is None


@given(st.binary(max_size=50), st.data())
def test_unseal_changed_byte(payload: bytes, data: st.DataObject) -> None:
    """A changed byte anywhere in a block is noticed."""
    block = bytearray(seal(KEY, payload))
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    assert unseal(KEY, bytes(block)) is None


@given(st.binary(max_size=50), st.data())
def test_unseal_wrong_length(payload: bytes, data: st.DataObject) -> None:
    """A block that is too short or too long is refused."""
    block = seal(KEY, payload)
    assert unseal(KEY, block[: data.draw(st.integers(0, len(block) - 1))]) is None
    assert unseal(KEY, block + data.draw(st.binary(min_size=1))) is None


def test_unseal_another_key_or_version() -> None:
    """A block of another key or version is refused."""
    assert unseal(OTHER, seal(KEY, b"payload")) is None
    head = b"CMXB" + struct.pack("<HQ", 2, 7) + KEY
    assert unseal(KEY, head + hashlib.sha256(head + b"payload").digest() + b"payload") is None
