"""What is asked, and when: random prompts, prompts with shared beginnings, a trace of Mooncake's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cmx_jax.analysis.simulate.workload import BLOCK, Arrival, synthetic
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import locate

FEWEST = 64  # words, that prompts are made of them only


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
      time: seconds from the beginning to when it is due.
      prompt: token ids.
      max_tokens: of the answer.
      text: the prompt for endpoints that take no ids.
    """

    time: float
    prompt: list[int]
    max_tokens: int
    text: str | None = None


class Words:
    """Tokens to make prompts of: each is a word with its space, so that their text has the same tokens.

    A tokenizer with few such words gives all tokens that survive being written and read again.

    Args:
      name_or_path: a model that ships, a directory with a tokenizer.json, or that file.

    Raises:
      CmxError: there is no tokenizer, or it has no such token.
    """

    def __init__(self, name_or_path: str):
        try:
            path = Path(name_or_path)
            path = path if path.is_file() else locate(name_or_path) / "tokenizer.json"
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own
            raise CmxError(
                f"no tokenizer at {name_or_path!r} ({error}): give --tokenizer, the model's directory"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        each = [[token] for token in range(self._tokenizer.get_vocab_size())]
        texts = self._tokenizer.decode_batch(each)
        again = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        pairs = zip(texts, again, strict=True)
        same = [(token, text) for token, (text, read) in enumerate(pairs) if read.ids == [token]]
        words = [token for token, text in same if text[0] == " " and text[1:].isalpha() and text.isascii()]
        self._ids = np.array(words if len(words) >= FEWEST else [token for token, _ in same])
        if not len(self._ids):
            raise CmxError(
                f"{path}: no token is the same when written and read again: give another --tokenizer"
            )

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Token ids, at random."""
        return list(rng.choice(self._ids, count).tolist())

    def as_text(self, asks: Sequence[Ask]) -> list[Ask]:
        """The same requests with the text of their prompts."""
        texts = self._tokenizer.decode_batch([ask.prompt for ask in asks])
        return [replace(ask, text=text) for ask, text in zip(asks, texts, strict=True)]

    def others(self, asks: Sequence[Ask], count: int, seed: int) -> list[Ask]:
        """Requests as long as the first ones, with prompts of their own: no cache is warm after them."""
        rng = np.random.default_rng([seed, 2])
        some = [asks[i % len(asks)] for i in range(count)]
        return [Ask(0.0, self.draw(rng, len(ask.prompt)), ask.max_tokens) for ask in some]


def drawn(
    count: int, rate: float, burstiness: float, prompt: int, output: int, spread: float, seed: int
) -> list[Arrival]:
    """Arrivals at a rate, with lengths drawn evenly (as vLLM's `--random-range-ratio`).

    Args:
      count: how many.
      rate: requests a second; inf: all at once.
      burstiness: see `simulate.workload.synthetic`.
      prompt, output: tokens, in the middle.
      spread: lengths are within (1 - spread, 1 + spread) of that.
      seed: of all draws.

    Raises:
      CmxError: a number that cannot be.
    """
    for name, value in (("num_prompts", count), ("a prompt's length", prompt), ("an answer's", output)):
        if value < 1:
            raise CmxError(f"{name} is {value}, expected at least 1")
    if not 0 <= spread < 1:
        raise CmxError(f"range_ratio is {spread:g}, expected zero or more, below 1")
    lengths = [
        f"uniform:{max(1, round(mean * (1 - spread)))},{round(mean * (1 + spread))}"
        for mean in (prompt, output)
    ]
    now = rate == math.inf
    found = synthetic(
        rate=1.0 if now else rate,
        prompt=lengths[0],
        output=lengths[1],
        burstiness=burstiness,
        seed=seed,
        requests=count,
    )
    return [arrival._replace(time=0.0) if now else arrival for arrival in found]


def prefixed(
    words: Words, arrivals: Sequence[Arrival], num_prefixes: int, prefix_len: int, seed: int
) -> list[Ask]:
    """Requests whose prompts begin with one of some prefixes, equally often, in random order.

    Args:
      words: of prompts.
      arrivals: with the tokens behind the prefix.
      num_prefixes: how many there are.
      prefix_len: tokens of each; 0: none.
      seed: of all draws.

    Raises:
      CmxError: a number that cannot be.
    """
    for name, value, least in (("num_prefixes", num_prefixes, 1), ("prefix_len", prefix_len, 0)):
        if value < least:
            raise CmxError(f"{name} is {value}, expected at least {least}")
    rng = np.random.default_rng([seed, 1])
    prefixes = [words.draw(rng, prefix_len) for _ in range(num_prefixes)]
    which = rng.permutation(len(arrivals)) % num_prefixes
    return [
        Ask(arrival.time, prefixes[prefix] + words.draw(rng, arrival.prompt), arrival.output)
        for arrival, prefix in zip(arrivals, which, strict=True)
    ]


def replayed(
    words: Words,
    arrivals: Sequence[Arrival],
    input_scale: float,
    output_scale: float,
    time_scale: float,
    seed: int,
) -> list[Ask]:
    """A trace's requests, timed from its first; a block id is the same tokens wherever it stands.

    Args:
      words: of prompts.
      arrivals: see `simulate.workload.mooncake`; of what has no block ids all tokens are its own.
      input_scale, output_scale: by which lengths are multiplied, at least one token stays; a block
        has `512 input_scale` tokens.
      time_scale: by which times are multiplied; below 1 the trace runs faster.
      seed: of all draws.

    Raises:
      CmxError: a number that cannot be.
    """
    scales = {"input_scale": input_scale, "output_scale": output_scale, "time_scale": time_scale}
    for name, value in scales.items():
        if not 0 < value < math.inf:
            raise CmxError(f"{name} is {value:g}, expected above zero")
    rng, width = np.random.default_rng([seed, 1]), max(1, round(BLOCK * input_scale))
    asks = []
    for arrival in arrivals:
        length = max(1, round(arrival.prompt * input_scale))
        prompt: list[int] = []
        for block in arrival.blocks[: math.ceil(length / width)]:
            prompt += words.draw(np.random.default_rng([seed, 3, block % 2**64]), width)
        prompt += words.draw(rng, max(0, length - len(prompt)))
        output = max(1, round(arrival.output * output_scale))
        asks.append(Ask((arrival.time - arrivals[0].time) * time_scale, prompt[:length], output))
    return asks


def check_lengths(asks: Sequence[Ask], max_model_len: int | None) -> None:
    """Refuses what the server would refuse.

    Raises:
      CmxError: a prompt and its answer exceed the model's context.
    """
    for number, ask in enumerate(asks, 1):
        if max_model_len is not None and len(ask.prompt) + ask.max_tokens > max_model_len:
            raise CmxError(
                f"request {number} has {len(ask.prompt)} tokens and asks for {ask.max_tokens}, expected at "
                f"most the model's {max_model_len} together: give shorter lengths, or scale a trace's"
            )
