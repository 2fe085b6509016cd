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
def test_the_layout(key: bytes, payload: bytes) -> None:
    head = b"CMXB" + struct.pack("<HQ", 1, len(payload)) + key
    block = seal(key, payload)
    assert block == head + hashlib.sha256(head + payload).digest() + payload
    assert len(block) == len(payload) + OVERHEAD
    assert unseal(key, block) == payload


@pytest.mark.parametrize("at", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("bit", [0, 7])
def test_a_changed_bit_in_any_part(at: int, bit: int) -> None:
    block = bytearray(seal(KEY, b"payload"))
    block[at] ^= 1 << bit
    assert unseal(KEY, bytes(block)) is None


@given(st.binary(max_size=50), st.data())
def test_a_changed_byte_anywhere(payload: bytes, data: st.DataObject) -> None:
    block = bytearray(seal(KEY, payload))
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    assert unseal(KEY, bytes(block)) is None


@given(st.binary(max_size=50), st.data())
def test_pieces_and_leftovers(payload: bytes, data: st.DataObject) -> None:
    block = seal(KEY, payload)
    assert unseal(KEY, block[: data.draw(st.integers(0, len(block) - 1))]) is None
    assert unseal(KEY, block + data.draw(st.binary(min_size=1))) is None


def test_a_block_of_another_key_or_version() -> None:
    assert unseal(OTHER, seal(KEY, b"payload")) is None
    head = b"CMXB" + struct.pack("<HQ", 2, 7) + KEY
    assert unseal(KEY, head + hashlib.sha256(head + b"payload").digest() + b"payload") is None
