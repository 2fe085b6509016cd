"""Keys of context blocks (section 4.4.2): what a block's rows depend on, and nothing else.

A key is a hash of the block's tokens and of the key before it, so equal keys mean equal prefixes: blocks are
shared by whoever has the same prefix, and a lookup never needs the tokens. The chain starts at a hash of all
that changes a row's bytes. No seed of the process takes part: keys are the same after a restart and on other
machines.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from cmx_jax.errors import CmxError

SCHEME = 1  # of these keys; another one finds none of the blocks that are stored
BLOCK = 128  # tokens; the paper has 128 to 512


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All that a cached row depends on beside its tokens.

    Attributes:
      model: the model's weights, by a digest or an id that changes with them.
      page: shape of one page, `[L, W, C]`.
      dtype: of the activations that rows are computed in.
      kv_cache_dtype: of the rows.
      block: tokens of a block.
      tenant: a salt; tenants with different ones never share a block.
    """

    model: str
    page: tuple[int, ...]
    dtype: str
    kv_cache_dtype: str
    block: int = BLOCK
    tenant: str = ""

    def of(self, block: int) -> "Fingerprint":
        """The same of other blocks."""
        return replace(self, block=block)


def root(fingerprint: Fingerprint) -> bytes:
    """The key that stands before a prompt's first block: 32 bytes."""
    text = json.dumps({"scheme": SCHEME, **asdict(fingerprint)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def chain(root: bytes, tokens: Sequence[int] | np.ndarray, block: int = BLOCK) -> list[bytes]:
    """Keys of full blocks: `key[i] = sha256(key[i - 1] || tokens of block i as little-endian int32)`.

    `key[-1]` is the root. What is left behind the last full block has no key.

    Raises:
      CmxError: `block` is not above zero, or a token is no int32.
    """
    if block < 1:
        raise CmxError(f"blocks of {block} tokens, expected 1 or more")
    numbers = np.asarray(tokens)
    int32 = np.iinfo(np.int32)
    if numbers.size and (
        numbers.ndim != 1
        or numbers.dtype.kind not in "iu"
        or numbers.min() < int32.min
        or numbers.max() > int32.max
    ):
        raise CmxError(f"tokens {str(tokens)[:80]}, expected a list of integers of 32 bits")
    data, step = numbers.astype("<i4").tobytes(), 4 * block
    keys, key = [], root
    for end in range(step, len(data) + 1, step):
        key = hashlib.sha256(key + data[end - step : end]).digest()
        keys.append(key)
    return keys
