"""Text from tokens: whatever the tokens and stop strings, against whole texts cut with `str.find`."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cmx_jax.serving.api.choice import Choice
from cmx_jax.serving.api.detokenizer import Detokenizer, StopStrings
from cmx_jax.serving.deploy.model import locate
from cmx_jax.serving.scheduling.request import Request, SamplingParams, TokenLogprob
from cmx_jax.serving.service.generation import Chunk

TOKENIZER = Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))
tokens = st.lists(st.integers(1, TOKENIZER.get_vocab_size() - 1), max_size=40)
characters = st.text(st.sampled_from("ab\u00e9\u4f60\U0001f600 \n"), max_size=12)
stops = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=4)


@given(tokens)
def test_detokenizer_whole_text(ids: list[int]) -> None:
    """The pieces together are the text of all tokens."""
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.end() == TOKENIZER.decode(ids)


@given(characters)
def test_detokenizer_characters(text: str) -> None:
    """These characters have up to four bytes, and a token for each byte."""
    detokenizer, out = Detokenizer(TOKENIZER), ""
    for token in TOKENIZER.encode(text).ids:
        out += detokenizer.add(token)
        assert text.startswith(out)
    assert out == text  # nothing is held back after a whole character


@given(st.lists(st.text(st.sampled_from("abc"), max_size=4), max_size=12), stops)
@settings(max_examples=500)
def test_stop_strings(pieces: list[str], stops: list[str]) -> None:
    """Text ends before the first stop string."""
    cut, out = StopStrings(stops), ""
    for n in range(len(pieces)):
        so_far = "".join(pieces[: n + 1])
        positions = [so_far.find(stop) for stop in stops if stop in so_far]
        out += cut.add(pieces[n])
        assert cut.found == bool(positions)
        if positions:
            assert out == so_far[: min(positions)]
            return
        assert so_far.startswith(out)
        pending = so_far[len(out) :]  # just what may begin a stop string
        assert pending == max(
            (stop[:i] for stop in stops for i in range(len(stop)) if so_far.endswith(stop[:i])), key=len
        )
    assert out + cut.end() == "".join(pieces)


def chunk(ids: list[int], reason: str | None) -> Chunk:
    request = Request([1], SamplingParams())
    scores = [TokenLogprob(-float(i), []) for i in ids]
    return Chunk(0, request, ids, scores, reason, None, False, 0.0, 0.0)


@given(tokens, st.data())
def test_choice_chunking(ids: list[int], data: st.DataObject) -> None:
    """A step may give several tokens: text, tokens and log-probabilities are those of one at a time."""
    text = TOKENIZER.decode(ids)
    begin = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stops = [text[begin : begin + 3]] if text[begin:] else []

    def grown(parts: list[list[int]]) -> tuple[str, list[int], str | None]:
        choice, out, taken = Choice(TOKENIZER, stops), "", []
        for n, part in enumerate(parts):
            delta = choice.take(chunk(part, "length" if n == len(parts) - 1 else None))
            out, taken = out + delta.text, taken + delta.tokens
            assert [-score.logprob for score in delta.logprobs] == delta.tokens
            if choice.finish_reason:
                break
        assert choice.tokens == len(taken)
        return out, taken, choice.finish_reason

    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(ids), 1)))) | {0, len(ids)})
    dealt = [ids[a:b] for a, b in pairwise(cuts)] or [[]]
    one = [[token] for token in ids] or [[]]
    assert grown(dealt) == grown(one)
    if stops:
        assert grown(one)[2] == "stop"
        assert grown(one)[0] == text[: text.find(stops[0])] or "\ufffd" in text


def test_choice_end_token() -> None:
    """An end token is counted, but is not part of the text."""
    choice = Choice(TOKENIZER, [])
    word = TOKENIZER.encode("word").ids
    delta = choice.take(chunk([*word, 0], "stop"))
    assert (delta.text, choice.tokens, choice.finish_reason) == ("word", len(word) + 1, "stop")


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_choice_without_tokenizer(reason: str) -> None:
    """Without a tokenizer, a choice has tokens but no text."""
    choice = Choice(None, [])
    assert choice.take(chunk([5, 6], reason)).text == ""
    assert choice.tokens == 2
