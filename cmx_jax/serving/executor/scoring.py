"""Log-probabilities of the tokens of a text, as `echo` reports them."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from cmx_jax.errors import CmxError
from cmx_jax.model.sampling import Logprobs, logprobs_of
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.programs import Op
from cmx_jax.serving.scheduling.packing import bucket
from cmx_jax.serving.scheduling.request import TokenLogprob

SCORE_LENGTH = 64  # scored sequences are padded to this many tokens, doubled as often as needed
LOGITS = 2**24  # largest number of logits of a batch, unless each rank has one sequence: 64 MiB


def prompt_logprobs(
    instance: Instance, prompts: Sequence[Sequence[int]], top: int
) -> list[list[TokenLogprob | None]]:
    """Returns the log-probability of each token after the tokens before it, and of the likeliest ones there.

    Args:
      instance: Instance whose weights and cache type are used.
      prompts: Token ids of the vocabulary; no prompt is empty.
      top: Number of likeliest tokens.

    Returns:
      An entry for each token of each prompt; None for the first token, which has none before it.

    Raises:
      CmxError: A prompt exceeds the model's context.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits = device_logits(instance, tokens, lengths)
    padded = np.zeros(logits.shape[:2], np.int32)
    padded[: len(prompts), : tokens.shape[1]] = tokens
    logprobs = jax.device_get(_next_logprobs(logits, padded))
    return [
        [None, *_token_logprobs(logprobs, row, length - 1, top)]
        for row, length in enumerate(lengths.tolist())
    ]


def device_logits(
    instance: Instance, tokens: Integer[np.ndarray, "B T"], lengths: Integer[np.ndarray, " B"]
) -> Float[jax.Array, "rows span O"]:
    """Returns the float32 logits of every position, left on the devices, for sequences of unequal length.

    Experts compute nothing after the end of a sequence, and the logits there are meaningless.

    Args:
      instance: Instance whose weights and cache type are used.
      tokens: Token ids of the vocabulary, padded to one length.
      lengths: Number of tokens of each sequence.

    Returns:
      Logits of at least the `B` rows and `T` positions, rounded up: few shapes, few programs.

    Raises:
      CmxError: The tokens exceed the model's context.
    """
    (batch, length), context = tokens.shape, instance.config.max_position_embeddings
    if length > context:
        raise CmxError(f"{length} tokens exceed the context of {context}")
    shape = bucket(batch, instance.layout.data_ranks), bucket(length, SCORE_LENGTH)
    padded, counts = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    padded[:batch, :length], counts[:batch] = tokens, lengths
    logits: jax.Array = instance.programs.run(Op.SCORE, (padded, counts))
    return logits


@jax.jit
def _next_logprobs(logits: Float[Array, "B T O"], tokens: Int[Array, "B T"]) -> Logprobs:
    """Log-probability of the next token at each position; at the last one, of the first token."""
    return logprobs_of(logits, jnp.roll(tokens, -1, axis=1))


def _token_logprobs(logprobs: Logprobs, row: int, count: int, top: int) -> list[TokenLogprob]:
    chosen = logprobs.chosen[row, :count].tolist()
    ids, values = logprobs.tokens[row, :count, :top].tolist(), logprobs.top[row, :count, :top].tolist()
    likeliest = [list(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
    return [TokenLogprob(c, pairs) for c, pairs in zip(chosen, likeliest, strict=True)]


def batch_rows(instance: Instance, length: int) -> int:
    """Returns the number of sequences per batch that `LOGITS` has room for, at least one per rank."""
    rows = instance.layout.data_ranks
    while 2 * rows * length * instance.config.vocab_size <= LOGITS:
        rows *= 2
    return rows


def batches(instance: Instance, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields batches of indices of sequences that are padded to the same length."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(bucket(length, SCORE_LENGTH), []).append(row)
    for length, rows in sorted(by_length.items(), reverse=True):
        size = batch_rows(instance, length)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
