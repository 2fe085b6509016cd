"""Held-out text: perplexity, and how far a second model's predictions are from the first's.

A text is cut into windows that do not overlap; each token but a window's first is predicted from those of the
window before it. A batch of windows at a time is run, and of its logits only sums for each window are kept.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cmx_jax.analysis.eval.corpus import documents, fingerprint, split
from cmx_jax.analysis.eval.score import NO_TARGET, Progress, first_token, padded, target_logprobs
from cmx_jax.analysis.eval.statistics import of_sample
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.executor.scoring import batch_rows

WINDOW = 256  # tokens, or the model's context if that is shorter


@dataclass(frozen=True)
class Text:
    """Documents, and what to call them."""

    name: str
    documents: Sequence[str]


def read_text(path: str | Path | None) -> Text:
    """A UTF-8 file as one document; without one, what is held out of the running Python's documentation.

    Raises:
      CmxError: there is no such file, it is not UTF-8, or it is empty.
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
    """Token ids, each document behind the token that begins a text; what does not fill a window is left out.

    Raises:
      CmxError: `length` is not 2 to the model's context, or the text is shorter.
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
) -> dict[str, Any]:
    """Perplexity of a text, and of a second model's predictions what changed, as `report.render` reads it.

    Losses and divergences are in nats a token; intervals are at 95 %, from the scatter over windows.

    Raises:
      CmxError: the text or window cannot be used.
    """
    length = min(WINDOW, llm.model.config.max_position_embeddings) if window is None else window
    rows = windows(llm.model, text, length)
    step = batch_rows(llm.instance, length)
    sums = []
    for start in range(0, len(rows), step):
        progress(f"read {start} of {len(rows)} windows of text")
        sums.append(_sums(llm, other, rows[start : start + step]))
    loss, other_loss, divergence, agreement = np.concatenate(sums, axis=1) / (length - 1)
    result: dict[str, Any] = {
        "text": text.name,
        "sha256": fingerprint(list(text.documents)),
        "window": length,
        "windows": len(rows),
        "tokens_predicted": len(rows) * (length - 1),
        "model": {"loss": of_sample(loss), "perplexity": math.exp(loss.mean())},
    }
    if other is not None:
        rise = of_sample(other_loss - loss)
        result["against"] = {
            "loss": of_sample(other_loss),
            "perplexity": math.exp(other_loss.mean()),
            "loss_rise": rise,
            "loss_rises": rise.low > 0,
            "kl_divergence": of_sample(divergence),
            "top1_agreement": float(agreement.mean()),
        }
    return result


def _sums(llm: LLM, other: LLM | None, rows: np.ndarray) -> Float[np.ndarray, "4 B"]:
    """Of each window: both models' losses, the divergence, and how often the likeliest tokens agree."""
    lengths = np.full(len(rows), rows.shape[1] - 1, np.int32)
    logits = llm.device_logits(rows[:, :-1], lengths)
    others = logits if other is None else other.device_logits(rows[:, :-1], lengths)
    found = jax.device_get(_compared(logits, others, padded(rows[:, 1:], logits.shape[:2])))
    return np.stack(found).astype(np.float64)[:, : len(rows)]


@jax.jit
def _compared(
    logits: Float[Array, "B T O"], others: Float[Array, "B T O"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], ...]:
    """Sums over each row's targets: loss of both, Kullback-Leibler divergence of the second from the first,
    positions where both find the same token the likeliest."""
    p, q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(others, axis=-1)
    there = (targets != NO_TARGET).astype(p.dtype)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(p.dtype)
    losses = (-target_logprobs(of, targets).sum(axis=1) for of in (logits, others))
    return *losses, jnp.sum(divergence * there, axis=1), jnp.sum(same * there, axis=1)
