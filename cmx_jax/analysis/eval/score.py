"""Likelihoods of given continuations: many sequences in few programs of equal shapes.

If each token of a continuation is the likeliest one after the true tokens before it, greedy decoding writes
exactly this continuation: by induction, decoding has the same tokens before it. So no item is decoded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cmx_jax.analysis.eval.skills import Item
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.executor.scoring import batches

Tokens = Sequence[int]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of a continuation.

    Attributes:
      logprob: Natural logarithm of its probability.
      tokens: Number of its tokens.
      greedy: Flag; greedy decoding writes it.
    """

    logprob: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        """Log-probability per token, in nats."""
        return self.logprob / self.tokens


def first_token(model: Model) -> int:
    """The token that precedes a text: the one that the tokenizer adds, else the end-of-text token.

    Raises:
      CmxError: The model has neither, or no tokenizer.
    """
    first = [*model.encode(""), *model.config.eos_token_ids]
    if not first:
        raise CmxError(
            f"{model.directory}: neither its tokenizer begins a text with a token nor its config names an "
            "eos_token_id, expected one of them"
        )
    return first[0]


def likelihoods(
    llm: LLM, pairs: Sequence[tuple[Tokens, Tokens]], progress: Progress = lambda _: None
) -> list[Likelihood]:
    """Computes the likelihood of each continuation after its context.

    Args:
      llm: The model.
      pairs: Token ids of context and continuation, neither of them empty.
      progress: Callback for messages about the progress.

    Raises:
      CmxError: A context or continuation is empty, or both together exceed the model's context.
    """
    context = llm.model.config.max_position_embeddings
    for prefix, continuation in pairs:
        if not (prefix and continuation):
            raise CmxError("a context or continuation is empty, expected at least a token in both")
        if len(prefix) + len(continuation) - 1 > context:
            raise CmxError(
                f"{len(prefix)} tokens and {len(continuation)} after them exceed the context of {context}"
            )
    scores: dict[int, Likelihood] = {}
    for rows in batches(
        llm.instance, [len(prefix) + len(continuation) - 1 for prefix, continuation in pairs]
    ):
        progress(f"scored {len(scores)} of {len(pairs)} sequences")
        scores |= zip(rows, _score_batch(llm, [pairs[row] for row in rows]), strict=True)
    return [scores[row] for row in range(len(pairs))]


def _score_batch(llm: LLM, pairs: list[tuple[Tokens, Tokens]]) -> Iterator[Likelihood]:
    lengths = np.asarray([len(prefix) + len(continuation) - 1 for prefix, continuation in pairs], np.int32)
    tokens, targets = (np.full((len(pairs), lengths.max()), fill, np.int32) for fill in (0, NO_TARGET))
    for row, (prefix, continuation) in enumerate(pairs):
        tokens[row, : lengths[row]] = [*prefix, *continuation][:-1]
        targets[row, len(prefix) - 1 : lengths[row]] = continuation
    logits = llm.device_logits(tokens, lengths)
    logprobs, greedy = jax.device_get(_score_targets(logits, padded(targets, logits.shape[:2])))
    for row, (_, continuation) in enumerate(pairs):
        yield Likelihood(float(logprobs[row]), len(continuation), bool(greedy[row]))


NO_TARGET = -1


def padded(targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Targets `[B, T]`, filled up with `NO_TARGET` to the first dimensions of device logits."""
    widths = [(0, size - length) for length, size in zip(targets.shape, shape, strict=True)]
    return np.pad(targets, widths, constant_values=NO_TARGET)


@jax.jit
def _score_targets(
    logits: Float[Array, "B T O"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Sum of the targets' log-probabilities in each row, and whether all are the likeliest token."""
    exists = targets != NO_TARGET
    likeliest = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(target_logprobs(logits, targets), axis=1), jnp.all(likeliest | ~exists, axis=1)


def target_logprobs(logits: Float[Array, "B T O"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Log-probability of each target, 0 where there is no target."""
    exists = targets != NO_TARGET
    index = jnp.where(exists, targets, 0)[:, :, None]
    target_logits = jnp.take_along_axis(logits, index, axis=-1)[:, :, 0]
    return jnp.where(exists, target_logits - jax.nn.logsumexp(logits, axis=-1), jnp.zeros((), logits.dtype))


@dataclass(frozen=True)
class Answers:
    """Answers to some items.

    Attributes:
      right: Mask of the correctly answered items.
      tokens: Number of tokens that were run.
    """

    right: Bool[np.ndarray, " items"]
    tokens: int


def answered(llm: LLM, items: Sequence[Item], progress: Progress = lambda _: None) -> Answers:
    """Determines the items that a model answers correctly.

    An item with one choice is correct if greedy decoding writes it. Otherwise the answer is the choice with
    the highest mean log-probability per token, the first one of equals.

    Raises:
      CmxError: The model has no tokenizer, or an item exceeds its context.
    """
    model, pairs = llm.model, []
    start = first_token(model)
    for item in items:
        prompt = [start, *model.encode(item.prompt, special=False)]
        pairs += [(prompt, model.encode(choice, special=False)) for choice in item.choices]
    scores = iter(likelihoods(llm, pairs, progress))
    right = np.zeros(len(items), bool)
    for i, item in enumerate(items):
        choices = [next(scores) for _ in item.choices]
        best = int(np.argmax([choice.mean for choice in choices]))
        right[i] = choices[0].greedy if len(choices) == 1 else best == item.answer
    return Answers(right, sum(len(prompt) + len(choice) - 1 for prompt, choice in pairs))
