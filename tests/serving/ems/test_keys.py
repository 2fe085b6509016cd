"""Keys are the hashes that they are said to be, and nothing of a process is in them."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmx_jax.errors import CmxError
from cmx_jax.serving.ems import Fingerprint, chain, root

FIRST = Fingerprint(model="deepseek-r1@1", page=(61, 128, 576), dtype="bfloat16", kv_cache_dtype="int8")
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)


@given(TOKENS, st.integers(1, 9))
def test_chain_hashes(tokens: list[int], block: int) -> None:
    """A key is the hash of the previous key and of the block's tokens."""
    expected, last = [], bytes(32)
    for start in range(0, len(tokens) - block + 1, block):
        last = hashlib.sha256(last + struct.pack(f"<{block}i", *tokens[start : start + block])).digest()
        expected.append(last)
    assert chain(bytes(32), tokens, block) == expected
    assert chain(bytes(32), np.array(tokens, np.int64), block) == expected


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_chain_common_prefix(first: list[int], second: list[int], block: int) -> None:
    """Keys are equal as far as the prefixes are."""
    pairs = zip(chain(bytes(32), first, block), chain(bytes(32), second, block), strict=False)
    for i, (a, b) in enumerate(pairs, 1):
        assert (a == b) == (first[: i * block] == second[: i * block])


@given(TOKENS, TOKENS)
def test_chain_longer_prompt(tokens: list[int], suffix: list[int]) -> None:
    """More tokens only append keys."""
    keys = chain(bytes(32), tokens, 4)
    assert chain(bytes(32), tokens + suffix, 4)[: len(keys)] == keys


@pytest.mark.parametrize("change", [
    {"model": "deepseek-r1@2"}, {"page": (61, 64, 576)}, {"dtype": "float32"}, {"kv_cache_dtype": "bfloat16"},
    {"block": 256}, {"tenant": "b"},
])  # fmt: skip
def test_root_depends_on_every_field(change: dict) -> None:
    """Everything that changes rows changes the root."""
    assert root(replace(FIRST, **change)) != root(FIRST)


def test_root_hash() -> None:
    """The root is a hash of canonical JSON."""
    text = json.dumps(
        {"block": 128, "dtype": "bfloat16", "kv_cache_dtype": "int8", "model": "deepseek-r1@1"}
        | {"page": [61, 128, 576], "scheme": 1, "tenant": ""},
        separators=(",", ":"),
    )
    assert root(FIRST) == hashlib.sha256(text.encode()).digest()


def test_chain_in_another_process() -> None:
    """Another process computes the same keys."""
    code = (
        "from cmx_jax.serving.ems import *; "
        f"print(chain(root({FIRST!r}), range(500))[-1].hex())"
    )  # fmt: skip
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        assert done.stdout.strip() == chain(root(FIRST), list(range(500)))[-1].hex()


def test_import_without_jax() -> None:
    """Importing the pool does not import JAX."""
    code = "import sys, cmx_jax.serving.ems; print({'jax', 'valkey', 'mooncake'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("tokens", [[2**31], [-(2**31) - 1], [0.5], [[1, 2]], ["a"]])
def test_chain_invalid_tokens(tokens: list) -> None:
    """Values that are not tokens are refused."""
    with pytest.raises(CmxError, match="expected a list of integers of 32 bits"):
        chain(bytes(32), np.asarray(tokens))


def test_chain_invalid_block() -> None:
    """A block of less than one token is refused."""
    with pytest.raises(CmxError, match="blocks of 0 tokens"):
        chain(bytes(32), [1], 0)
