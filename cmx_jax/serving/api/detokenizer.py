"""Incremental conversion of tokens to text, without half characters and without parts of stop strings."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # a decoder's text for bytes that are no character (yet)


class Detokenizer:
    """Text of tokens that arrive one by one; the pieces together are the text of all tokens.

    A window of the last tokens is decoded with and without the new one, because a decoder may join tokens (or
    cut a space before the first one). Text that ends within a character is held back.

    `tokenizers.decoders.DecodeStream` does the same for byte-level tokenizers, but cannot return the text
    that it holds back at the end, and raises for a byte-fallback tokenizer if bytes are no character.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._read = 0  # start of the window; tokens before `_read` were returned as text

    def add(self, token: int) -> str:
        """Adds a token. Returns the text that is complete now; without a tokenizer, ""."""
        self._tokens.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """Returns the text that was held back."""
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
    """Cuts text before the first stop string; holds back text that may be the beginning of one.

    Attributes:
      found: True if the text contains a stop string; it is complete then.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Adds text. Returns the part of all text so far that is final now and was not returned before."""
        pending = self._held + text
        places = [index for index in map(pending.find, self._stops) if index >= 0]
        if places:
            self.found, self._held = True, ""
            return pending[: min(places)]
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def end(self) -> str:
        """Returns the text that was held back and is no stop string after all."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Returns the number of characters at the end of `text` that are a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
