"""Held-out text: what the tiny model was measured on, and two models' losses against NumPy."""

import json

import numpy as np
import pytest

import cmx_jax
from cmx_jax.analysis.eval.corpus import documents, fingerprint, split
from cmx_jax.analysis.eval.heldout_text import Text, _sums, evaluate_text, read_text, windows
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import locate
from cmx_jax.serving.executor import scoring

pytestmark = pytest.mark.slow

WORDS = "The json module returns a list of strings. Raise a ValueError if the argument is not a dict.\n" * 9


@pytest.fixture(scope="module")
def narrow() -> LLM:
    """The same model with its messages in INT8: a little off, and not quite the same in other batches."""
    return cmx_jax.from_pretrained("tiny", ranks=2, max_num_seqs=1, max_model_len=1, wire="int8")


def test_windows_are_documents_behind_end_tokens(tiny) -> None:
    model, texts = tiny.model, ["A class is", "Return a list"]
    ids = [0, *model.encode(texts[0]), 0, *model.encode(texts[1])]
    rows = windows(model, Text("two", texts), 4)
    assert rows.reshape(-1).tolist() == ids[: rows.size]
    assert rows.shape == (len(ids) // 4, 4)


@pytest.mark.parametrize("rows", [128, 2])
def test_losses_and_divergence_equal_numpy_in_any_batches(tiny, narrow, rows, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS", 2048 * 64 * rows)
    text = Text("words", [WORDS])
    cut = windows(tiny.model, text, 48)
    assert 3 < len(cut) < 8
    logprobs = []
    for model in (tiny, narrow):
        logits = model.logits(cut)[:, :-1].astype(np.float64)
        logprobs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    p, q = logprobs
    loss, other = (-np.take_along_axis(x, cut[:, 1:, None], -1)[..., 0].mean() for x in (p, q))
    result = evaluate_text(tiny, narrow, text, 48)
    against = result.against
    assert result.tokens_predicted == len(cut) * 47
    assert result.model.loss.value == pytest.approx(loss, abs=1e-5)
    assert result.model.perplexity == pytest.approx(np.exp(loss), rel=1e-5)
    assert against.loss_rise.value == pytest.approx(other - loss, abs=2e-4)
    assert against.kl_divergence.value == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=0.05)
    assert against.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.02)
    assert against.kl_divergence.low < against.kl_divergence.value < against.kl_divergence.high


def test_model_equals_itself(tiny) -> None:
    against = evaluate_text(tiny, tiny, Text("words", [WORDS]), 48).against
    assert against.kl_divergence.value == against.loss_rise.high == 0.0
    assert against.top1_agreement == 1.0
    assert not against.loss_rises


def test_shipped_model_quality_equals_training_report(tiny) -> None:
    """Runs the held-out text; `scripts/train_tiny.py` leaves out a rest that does not fill four windows."""
    report = json.loads((locate("tiny") / "training.json").read_text())
    texts = documents()
    if fingerprint(texts) != report["corpus_sha256"]:
        pytest.skip("another Python has other documentation")
    cut = windows(tiny.model, Text("held out", split(texts)[1]), 256)[: report["held_out_tokens"] // 255]
    loss = sum(_sums(tiny, None, cut[i : i + 32])[0].sum() for i in range(0, len(cut), 32))
    assert loss / report["held_out_tokens"] == pytest.approx(report["held_out_loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected text"),
        (b" \n\t", "empty, expected text"),
        (b"caf\xe9 au lait", "not UTF-8 text .* at byte 3"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_binary_file_is_refused(tmp_path, content, message) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CmxError, match=message):
        read_text(path)


def test_folder_is_refused(tmp_path) -> None:
    with pytest.raises(CmxError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (None, "words: 4 tokens, expected at least a window of 256"),
        (5, "expected at least a window of 5"),
        (1, "window is 1, expected 2 to the model's context of 512"),
        (513, "window is 513"),
    ],
)
def test_windows_that_cannot_be_are_refused(tiny, window, message) -> None:
    with pytest.raises(CmxError, match=message):
        evaluate_text(tiny, None, Text("words", ["A class is"]), window)


def test_heldout_documentation_is_found() -> None:
    text = read_text(None)
    assert text.name.startswith("held-out documentation of Python 3.")
    assert len(text.documents) > 100
