"""What a model says of each token of a given text: the log-probabilities that `echo` reports."""

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

SCORE_LENGTH = 64  # scored sequences are padded to so many tokens, doubled as often as needed
LOGITS = 2**24  # numbers that the logits of a batch have at most, if the ranks have one sequence each: 64 MiB


def prompt_logprobs(
    instance: Instance, prompts: Sequence[Sequence[int]], top: int
) -> list[list[TokenLogprob | None]]:
    """Log-probability of each token behind those before it, and of the likeliest ones there.

    Args:
      instance: whose weights and cache type count.
      prompts: token ids of the vocabulary, none empty.
      top: how many of the likeliest.

    Returns:
      an entry for each token; the first one's is None: nothing stands before it.

    Raises:
      CmxError: a prompt exceeds the model's context.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits = device_logits(instance, tokens, lengths)
    padded = np.zeros(logits.shape[:2], np.int32)
    padded[: len(prompts), : tokens.shape[1]] = tokens
    said = jax.device_get(_of_next(logits, padded))
    return [[None, *_tokens(said, row, length - 1, top)] for row, length in enumerate(lengths.tolist())]


def device_logits(
    instance: Instance, tokens: Integer[np.ndarray, "B T"], lengths: Integer[np.ndarray, " B"]
) -> Float[jax.Array, "rows span O"]:
    """Float32 logits of every position, left on the devices, for sequences of unequal length.

    Nothing is computed of the experts behind a sequence's length; logits there mean nothing.

    Args:
      instance: whose weights and cache type count.
      tokens: of the vocabulary.
      lengths: of the sequences.

    Returns:
      More rows and positions than were given: few shapes, few programs.

    Raises:
      CmxError: there are more tokens than the context holds.
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
def _of_next(logits: Float[Array, "B T O"], tokens: Int[Array, "B T"]) -> Logprobs:
    """At each position, of the token behind it (of the first one behind the last)."""
    return logprobs_of(logits, jnp.roll(tokens, -1, axis=1))


def _tokens(said: Logprobs, row: int, count: int, top: int) -> list[TokenLogprob]:
    chosen, best, which = (a[row, :count] for a in (said.chosen, said.top[..., :top], said.tokens[..., :top]))
    pairs = zip(chosen.tolist(), which.tolist(), best.tolist(), strict=True)
    return [TokenLogprob(c, list(zip(w, b, strict=True))) for c, w, b in pairs]


def batch_rows(instance: Instance, length: int) -> int:
    """Sequences of a batch: as many as `LOGITS` has room for, at least one for each rank."""
    rows = instance.layout.data_ranks
    while 2 * rows * length * instance.config.vocab_size <= LOGITS:
        rows *= 2
    return rows


def batches(instance: Instance, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of sequences that are padded to the same length, as many at a time as their logits may take."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(bucket(length, SCORE_LENGTH), []).append(row)
    for length, rows in sorted(by_length.items(), reverse=True):
        most = batch_rows(instance, length)
        yield from (rows[start : start + most] for start in range(0, len(rows), most))
