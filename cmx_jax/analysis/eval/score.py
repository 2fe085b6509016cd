"""What a model thinks of given continuations: many sequences in few programs of equal shapes.

A continuation of which every token is the likeliest one behind the true tokens before it is just what greedy
decoding writes: by induction, decoding stands behind the same tokens. So no item needs to be decoded.
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
    """Of a continuation.

    Attributes:
      logprob: natural logarithm of its probability.
      tokens: how many it has.
      greedy: whether greedy decoding writes it.
    """

    logprob: float
    tokens: int
    greedy: bool

    @property
    def mean(self) -> float:
        """Log-probability a token, in nats."""
        return self.logprob / self.tokens


def first_token(model: Model) -> int:
    """What a text stands behind: the token its tokenizer puts there, else the end of the text before.

    Raises:
      CmxError: there is neither, or no tokenizer.
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
    """The likelihood of each continuation behind its context.

    Args:
      llm: the model.
      pairs: token ids of context and continuation, neither empty.
      progress: is told how far it is.

    Raises:
      CmxError: one of them is empty, or both together are longer than the model's context.
    """
    context = llm.model.config.max_position_embeddings
    for before, behind in pairs:
        if not (before and behind):
            raise CmxError("a context or continuation is empty, expected at least a token in both")
        if len(before) + len(behind) - 1 > context:
            raise CmxError(
                f"{len(before)} tokens and {len(behind)} behind them exceed the context of {context}"
            )
    found: dict[int, Likelihood] = {}
    for rows in batches(llm.instance, [len(before) + len(behind) - 1 for before, behind in pairs]):
        progress(f"scored {len(found)} of {len(pairs)} sequences")
        found |= zip(rows, _scored(llm, [pairs[row] for row in rows]), strict=True)
    return [found[row] for row in range(len(pairs))]


def _scored(llm: LLM, pairs: list[tuple[Tokens, Tokens]]) -> Iterator[Likelihood]:
    lengths = np.asarray([len(before) + len(behind) - 1 for before, behind in pairs], np.int32)
    tokens, targets = (np.full((len(pairs), lengths.max()), fill, np.int32) for fill in (0, NO_TARGET))
    for row, (before, behind) in enumerate(pairs):
        whole = [*before, *behind]
        tokens[row, : lengths[row]] = whole[:-1]
        targets[row, len(before) - 1 : lengths[row]] = behind
    logits = llm.device_logits(tokens, lengths)
    logprobs, greedy = jax.device_get(_of_targets(logits, padded(targets, logits.shape[:2])))
    for row, (_, behind) in enumerate(pairs):
        yield Likelihood(float(logprobs[row]), len(behind), bool(greedy[row]))


NO_TARGET = -1


def padded(targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Targets `[B, T]` in the shape of device logits; there are none behind them."""
    behind = [(0, whole - part) for part, whole in zip(targets.shape, shape, strict=True)]
    return np.pad(targets, behind, constant_values=NO_TARGET)


@jax.jit
def _of_targets(
    logits: Float[Array, "B T O"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Sum of the targets' log-probabilities in each row, and whether all are the likeliest token."""
    there = targets != NO_TARGET
    likeliest = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(target_logprobs(logits, targets), axis=1), jnp.all(likeliest | ~there, axis=1)


def target_logprobs(logits: Float[Array, "B T O"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Log-probability of each target, 0 where there is none."""
    there = targets != NO_TARGET
    index = jnp.where(there, targets, 0)[:, :, None]
    of_target = jnp.take_along_axis(logits, index, axis=-1)[:, :, 0]
    return jnp.where(there, of_target - jax.nn.logsumexp(logits, axis=-1), jnp.zeros((), logits.dtype))


@dataclass(frozen=True)
class Answers:
    """What became of some items: which were answered rightly, and the tokens that were run for them."""

    right: Bool[np.ndarray, " items"]
    tokens: int


def answered(llm: LLM, items: Sequence[Item], progress: Progress = lambda _: None) -> Answers:
    """Which items a model answers rightly.

    One choice: greedy decoding writes it. Several: the right one has the highest mean log-probability a
    token, the first of equals.

    Raises:
      CmxError: the model has no tokenizer, or an item exceeds its context.
    """
    model, pairs = llm.model, []
    start = first_token(model)
    for item in items:
        prompt = [start, *model.encode(item.prompt, special=False)]
        pairs += [(prompt, model.encode(choice, special=False)) for choice in item.choices]
    scores = iter(likelihoods(llm, pairs, progress))
    right = np.zeros(len(items), bool)
    for i, item in enumerate(items):
        of_choices = [next(scores) for _ in item.choices]
        one = len(of_choices) == 1
        right[i] = (
            of_choices[0].greedy if one else int(np.argmax([s.mean for s in of_choices])) == item.answer
        )
    return Answers(right, sum(len(prompt) + len(choice) - 1 for prompt, choice in pairs))
