"""Requests of a measurement: random prompts, shared prefixes, or a trace in Mooncake's format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cmx_jax.analysis.simulate.workload import BLOCK, Arrival, synthetic
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import locate

FEWEST = 64  # words of a vocabulary from which prompts use words only


@dataclass(frozen=True)
class BenchRequest:
    """A request.

    Attributes:
      time: Time of sending, in seconds from the beginning.
      prompt: Token ids of the prompt.
      max_tokens: Maximum number of tokens of the answer.
      text: Text of the prompt, for endpoints that take no ids; None: not computed.
    """

    time: float
    prompt: list[int]
    max_tokens: int
    text: str | None = None


class Words:
    """Vocabulary of random prompts whose text has the same tokens: words, each with a space before it.

    If the tokenizer has few such words, all tokens are used that decoding and encoding leaves unchanged.

    Args:
      name_or_path: Name of a shipped model, a directory with a tokenizer.json, or that file.

    Raises:
      CmxError: There is no tokenizer, or it has no such token.
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
        tokens = [[token] for token in range(self._tokenizer.get_vocab_size())]
        texts = self._tokenizer.decode_batch(tokens)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        pairs = zip(texts, encodings, strict=True)
        same = [(token, text) for token, (text, encoding) in enumerate(pairs) if encoding.ids == [token]]
        words = [token for token, text in same if text[0] == " " and text[1:].isalpha() and text.isascii()]
        self._ids = np.array(words if len(words) >= FEWEST else [token for token, _ in same])
        if not len(self._ids):
            raise CmxError(
                f"{path}: no token is the same when written and read again: give another --tokenizer"
            )

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Draws `count` token ids."""
        return list(rng.choice(self._ids, count).tolist())

    def as_text(self, requests: Sequence[BenchRequest]) -> list[BenchRequest]:
        """Copies of requests with the text of their prompts."""
        texts = self._tokenizer.decode_batch([request.prompt for request in requests])
        return [replace(request, text=text) for request, text in zip(requests, texts, strict=True)]

    def warmups(self, requests: Sequence[BenchRequest], count: int, seed: int) -> list[BenchRequest]:
        """Requests as long as the first ones with different prompts, so that they warm no prefix cache."""
        rng = np.random.default_rng([seed, 2])
        models = [requests[i % len(requests)] for i in range(count)]
        return [BenchRequest(0.0, self.draw(rng, len(r.prompt)), r.max_tokens) for r in models]


def drawn(
    count: int, rate: float, burstiness: float, prompt: int, output: int, spread: float, seed: int
) -> list[Arrival]:
    """Draws arrivals at a rate, with uniform lengths (like vLLM's `--random-range-ratio`).

    Args:
      count: Number of arrivals.
      rate: Requests per second; inf: all at once.
      burstiness: Shape of the gamma-distributed intervals, as in `simulate.workload.synthetic`.
      prompt: Mean prompt length, in tokens.
      output: Mean output length, in tokens.
      spread: Half the width of the range of lengths, as a fraction of their mean, in [0, 1).
      seed: Seed of the random generator.

    Raises:
      CmxError: A number is out of range.
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
    at_once = rate == math.inf
    arrivals = synthetic(
        rate=1.0 if at_once else rate,
        prompt=lengths[0],
        output=lengths[1],
        burstiness=burstiness,
        seed=seed,
        requests=count,
    )
    return [arrival._replace(time=0.0) if at_once else arrival for arrival in arrivals]


def prefixed(
    words: Words, arrivals: Sequence[Arrival], num_prefixes: int, prefix_len: int, seed: int
) -> list[BenchRequest]:
    """Makes requests whose prompts share prefixes, equally often and in random order.

    Args:
      words: Vocabulary of the prompts.
      arrivals: Times and lengths; prompt lengths are without the prefix.
      num_prefixes: Number of prefixes.
      prefix_len: Tokens per prefix; 0: no prefix.
      seed: Seed of the random generator.

    Raises:
      CmxError: A number is out of range.
    """
    for name, value, least in (("num_prefixes", num_prefixes, 1), ("prefix_len", prefix_len, 0)):
        if value < least:
            raise CmxError(f"{name} is {value}, expected at least {least}")
    rng = np.random.default_rng([seed, 1])
    prefixes = [words.draw(rng, prefix_len) for _ in range(num_prefixes)]
    choices = rng.permutation(len(arrivals)) % num_prefixes
    return [
        BenchRequest(arrival.time, prefixes[choice] + words.draw(rng, arrival.prompt), arrival.output)
        for arrival, choice in zip(arrivals, choices, strict=True)
    ]


def replayed(
    words: Words,
    arrivals: Sequence[Arrival],
    input_scale: float,
    output_scale: float,
    time_scale: float,
    seed: int,
) -> list[BenchRequest]:
    """Makes the requests of a trace, timed from its first one; equal block ids give equal tokens.

    Args:
      words: Vocabulary of the prompts.
      arrivals: Requests of the trace, such as `simulate.workload.mooncake` reads; tokens without a block id
        are different in each request.
      input_scale: Factor of prompt lengths, which stay above zero; a block has `512 input_scale` tokens.
      output_scale: Factor of output lengths, which stay above zero.
      time_scale: Factor of times; below 1 the trace runs faster.
      seed: Seed of the random generator.

    Raises:
      CmxError: A number is out of range.
    """
    scales = {"input_scale": input_scale, "output_scale": output_scale, "time_scale": time_scale}
    for name, value in scales.items():
        if not 0 < value < math.inf:
            raise CmxError(f"{name} is {value:g}, expected above zero")
    rng, width = np.random.default_rng([seed, 1]), max(1, round(BLOCK * input_scale))
    requests = []
    for arrival in arrivals:
        length = max(1, round(arrival.prompt * input_scale))
        prompt: list[int] = []
        for block in arrival.blocks[: math.ceil(length / width)]:
            prompt += words.draw(np.random.default_rng([seed, 3, block % 2**64]), width)
        prompt += words.draw(rng, max(0, length - len(prompt)))
        output = max(1, round(arrival.output * output_scale))
        time = (arrival.time - arrivals[0].time) * time_scale
        requests.append(BenchRequest(time, prompt[:length], output))
    return requests


def check_lengths(requests: Sequence[BenchRequest], max_model_len: int | None) -> None:
    """Checks that all requests fit the model's context of `max_model_len` tokens; None: unknown.

    Raises:
      CmxError: A prompt and its answer exceed the context.
    """
    for number, r in enumerate(requests, 1):
        if max_model_len is not None and len(r.prompt) + r.max_tokens > max_model_len:
            raise CmxError(
                f"request {number} has {len(r.prompt)} tokens and asks for {r.max_tokens}, expected at "
                f"most the model's {max_model_len} together: give shorter lengths, or scale a trace's"
            )
