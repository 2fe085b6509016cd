"""Held-out text: perplexity, and the distance of a second model's predictions from the first's.

A text is cut into windows that do not overlap; each token except a window's first is predicted from the
tokens before it in its window. Windows run in batches, and only sums per window of the logits are kept.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cmx_jax.analysis.eval.corpus import documents, fingerprint, split
from cmx_jax.analysis.eval.results import TextChange, TextLoss, TextResult
from cmx_jax.analysis.eval.score import NO_TARGET, Progress, first_token, padded, target_logprobs
from cmx_jax.analysis.eval.statistics import of_sample
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.executor.scoring import batch_rows

WINDOW = 256  # tokens; the model's context if that is shorter


@dataclass(frozen=True)
class Text:
    """Named documents."""

    name: str
    documents: Sequence[str]


def read_text(path: str | Path | None) -> Text:
    """Reads a UTF-8 file as one document, or the held-out part of the running Python's documentation.

    Args:
      path: UTF-8 file; None: Python's documentation.

    Raises:
      CmxError: The file does not exist, is not UTF-8, or is empty.
    """
    if path is None:
        return Text(f"held-out documentation of Python {platform.python_version()}", split(documents())[1])
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CmxError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CmxError(f"{path}: cannot be read ({reason})") from None
    if not text.strip():
        raise CmxError(f"{path}: empty, expected text")
    return Text(str(path), [text])


def windows(model: Model, text: Text, length: int) -> Int[np.ndarray, "N length"]:
    """Token ids of a text in windows of `length` tokens.

    Each document follows the token that begins a text. A rest that does not fill a window is left out.

    Raises:
      CmxError: `length` is not within 2 to the model's context, or the text is shorter than a window.
    """
    context = model.config.max_position_embeddings
    if not 2 <= length <= context:
        raise CmxError(f"window is {length}, expected 2 to the model's context of {context}")
    start = first_token(model)
    ids = [token for document in text.documents for token in (start, *model.encode(document, special=False))]
    if len(ids) < length:
        raise CmxError(f"{text.name}: {len(ids)} tokens, expected at least a window of {length}")
    return np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)


def evaluate_text(
    llm: LLM,
    other: LLM | None,
    text: Text,
    window: int | None = None,
    progress: Progress = lambda _: None,
) -> TextResult:
    """Computes the perplexity of a text, and compares a second model's predictions with the first's.

    Args:
      llm: The model.
      other: Second model with the same tokenizer; None: no comparison.
      text: The text.
      window: Tokens per window; None: 256, or the model's context if that is shorter.
      progress: Callback for messages about the progress.

    Raises:
      CmxError: The text or the window cannot be used.
    """
    length = min(WINDOW, llm.model.config.max_position_embeddings) if window is None else window
    rows = windows(llm.model, text, length)
    step = batch_rows(llm.instance, length)
    sums = []
    for start in range(0, len(rows), step):
        progress(f"read {start} of {len(rows)} windows of text")
        sums.append(_sums(llm, other, rows[start : start + step]))
    loss, other_loss, divergence, agreement = np.concatenate(sums, axis=1) / (length - 1)
    change = None
    if other is not None:
        rise = of_sample(other_loss - loss)
        change = TextChange(
            loss=of_sample(other_loss),
            perplexity=math.exp(other_loss.mean()),
            loss_rise=rise,
            loss_rises=rise.low > 0,
            kl_divergence=of_sample(divergence),
            top1_agreement=float(agreement.mean()),
        )
    return TextResult(
        text=text.name,
        sha256=fingerprint(list(text.documents)),
        window=length,
        windows=len(rows),
        tokens_predicted=len(rows) * (length - 1),
        model=TextLoss(of_sample(loss), math.exp(loss.mean())),
        against=change,
    )


def _sums(llm: LLM, other: LLM | None, rows: np.ndarray) -> Float[np.ndarray, "4 B"]:
    """Sums for each window: both models' losses, the divergence, and the number of equal likeliest tokens."""
    lengths = np.full(len(rows), rows.shape[1] - 1, np.int32)
    logits = llm.device_logits(rows[:, :-1], lengths)
    other_logits = logits if other is None else other.device_logits(rows[:, :-1], lengths)
    sums = jax.device_get(_compare(logits, other_logits, padded(rows[:, 1:], logits.shape[:2])))
    return np.stack(sums).astype(np.float64)[:, : len(rows)]


@jax.jit
def _compare(
    logits: Float[Array, "B T O"], other_logits: Float[Array, "B T O"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], ...]:
    """Sums over each row's targets.

    Returns:
      Loss of the first model, loss of the second, Kullback-Leibler divergence of the second from the first,
      number of positions at which both have the same likeliest token.
    """
    p, q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other_logits, axis=-1)
    mask = (targets != NO_TARGET).astype(p.dtype)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(p.dtype)
    losses = (-target_logprobs(values, targets).sum(axis=1) for values in (logits, other_logits))
    return *losses, jnp.sum(divergence * mask, axis=1), jnp.sum(same * mask, axis=1)
