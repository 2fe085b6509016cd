"""Keys of context blocks (section 4.4.2): they depend on all that a block's rows depend on, and nothing else.

A key is a hash of the block's tokens and of the key before it, so equal keys mean equal prefixes: requests
with the same prefix share its blocks, and a lookup never needs the tokens. The chain starts at a hash of
everything that changes a row's bytes. No random seed of the process is involved: keys are the same after a
restart and on other machines.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from cmx_jax.errors import CmxError

SCHEME = 1  # version of the key scheme; with another version no stored block is found
BLOCK = 128  # tokens; the paper has 128 to 512


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that a cached row depends on besides its tokens.

    Attributes:
      model: Digest of the model's weights, or an id that changes with them.
      page: Shape of one page, `[L, W, C]`.
      dtype: Dtype of the activations from which rows are computed.
      kv_cache_dtype: Dtype of the rows.
      block: Number of tokens per block.
      tenant: Salt; tenants with different salts never share a block.
    """

    model: str
    page: tuple[int, ...]
    dtype: str
    kv_cache_dtype: str
    block: int = BLOCK
    tenant: str = ""

    def of(self, block: int) -> "Fingerprint":
        """Returns a copy with another block size."""
        return replace(self, block=block)


def root(fingerprint: Fingerprint) -> bytes:
    """Returns the 32-byte key that precedes the key of a prompt's first block."""
    text = json.dumps({"scheme": SCHEME, **asdict(fingerprint)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def chain(root: bytes, tokens: Sequence[int] | np.ndarray, block: int = BLOCK) -> list[bytes]:
    """Returns the keys of full blocks.

    `key[i] = sha256(key[i - 1] || tokens of block i as little-endian int32)`;
    `key[-1]` is the root. Tokens after the last full block have no key.

    Raises:
      CmxError: `block` is less than 1, or a token is not an int32.
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
