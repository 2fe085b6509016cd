"""From tokens to text, piece by piece: never half a character, nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class Detokenizer:
    """Text of tokens that come one by one; together the pieces are the text of all tokens.

    A window of the last tokens is decoded with and without the new one, because a decoder may join tokens (or
    cut a space before the first one). Text that ends within a character is held back.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._read = 0  # the window; what is before `_read` was given out

    def add(self, token: int) -> str:
        """The text that is complete with one more token; empty without a tokenizer."""
        self._tokens.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """What was held back."""
        return self._new(last=True)

    def _new(self, last: bool) -> str:
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        text = self._tokenizer.decode(self._tokens[self._start :])
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not last):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]


class StopStrings:
    """Text up to the first of some strings; what may become the beginning of one is held back.

    Attributes:
      found: whether one came; the text is complete then.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The part of all text so far that can be given out now and was not before."""
        held = self._held + text
        places = [at for at in map(held.find, self._stops) if at >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a string, not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
