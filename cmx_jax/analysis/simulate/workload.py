"""Arriving requests, drawn from distributions or read from a trace."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmx_jax.errors import CmxError

BLOCK = 512  # tokens per id in a trace's `hash_ids`
CHUNK = 1 << 14  # arrivals drawn at once


class Arrival(NamedTuple):
    """A request.

    Attributes:
      time: Seconds from the beginning.
      prompt: Prompt tokens.
      output: Tokens to generate.
      blocks: Ids of the prompt's blocks of 512 tokens; equal ids mean equal text from the prompt's start.
    """

    time: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


Draw = Callable[[np.random.Generator, int], np.ndarray]

# Number of parameters and a function that draws real lengths, by name.
DISTRIBUTIONS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "fixed": (1, lambda rng, n, tokens: np.full(n, tokens)),
    "uniform": (2, lambda rng, n, low, high: rng.uniform(low - 0.5, high + 0.5, n)),
    "exponential": (1, lambda rng, n, mean: rng.exponential(mean, n)),
    "lognormal": (2, lambda rng, n, median, sigma: rng.lognormal(math.log(median), sigma, n)),
}


def lengths(text: str) -> Draw:
    """Parses `4096`, `uniform:LOW,HIGH`, `exponential:MEAN` or `lognormal:MEDIAN,SIGMA`, all in tokens.

    Raises:
      CmxError: The text has none of these forms.
    """
    name, _, parameters = text.partition(":") if ":" in text else ("fixed", "", text)
    count, draw = DISTRIBUTIONS.get(name, (0, None))
    try:
        numbers = [float(number) for number in parameters.split(",")]
        if draw is None or len(numbers) != count or not all(0 < n < 1e9 for n in numbers):
            raise ValueError
    except ValueError:
        raise CmxError(
            f"a length is {text!r}, expected tokens such as 4096, or uniform:LOW,HIGH, exponential:MEAN or "
            "lognormal:MEDIAN,SIGMA, of numbers above zero"
        ) from None
    return lambda rng, n: np.maximum(np.rint(draw(rng, n, *numbers)), 1).astype(np.int64)


def synthetic(
    *,
    rate: float,
    prompt: str,
    output: str,
    burstiness: float = 1.0,
    seed: int = 0,
    requests: int | None = None,
    duration: float | None = None,
) -> Iterator[Arrival]:
    """Requests whose intervals follow a gamma distribution (like vLLM's `--burstiness`).

    Args:
      rate: Requests per second.
      prompt: Distribution of prompt lengths in tokens, in a form that `lengths` parses.
      output: Distribution of output lengths in tokens, in a form that `lengths` parses.
      burstiness: Shape of the gamma distribution; 1 is a Poisson process, lower is burstier.
      seed: Seed of the random generator.
      requests: Number of requests; exclusive with `duration`.
      duration: Seconds of arrivals; exclusive with `requests`.

    Raises:
      CmxError: A number is out of range, or not exactly one of `requests` and `duration` is given.
    """
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not 0 < value < math.inf:
            raise CmxError(f"{name} is {value:g}, expected above zero")
    if (requests is None) == (duration is None):
        raise CmxError("expected a number of requests or a duration, one of them")
    for name, limit in (("requests", requests), ("duration", duration)):
        if limit is not None and not 0 < limit < math.inf:
            raise CmxError(f"{name} is {limit:g}, expected above zero")
    if seed < 0:
        raise CmxError(f"seed is {seed}, expected zero or more")
    drawn = _drawn(rate, burstiness, lengths(prompt), lengths(output), np.random.default_rng(seed))
    if requests is not None:
        return islice(drawn, requests)
    return _until(drawn, duration or 0.0)


def _drawn(
    rate: float, burstiness: float, prompt: Draw, output: Draw, rng: np.random.Generator
) -> Iterator[Arrival]:
    now = 0.0
    while True:
        times = now + rng.gamma(burstiness, 1 / (rate * burstiness), CHUNK).cumsum()
        prompts, outputs = prompt(rng, CHUNK).tolist(), output(rng, CHUNK).tolist()
        yield from map(Arrival, times.tolist(), prompts, outputs)
        now = float(times[-1])


def _until(drawn: Iterator[Arrival], duration: float) -> Iterator[Arrival]:
    for arrival in drawn:
        if arrival.time > duration:
            return
        yield arrival


def mooncake(path: Path, flag: str = "--trace") -> list[Arrival]:
    """Reads a trace in Mooncake's format.

    A line is `{"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}`, with one id per 512
    tokens of the prompt. `hash_ids` may be missing.

    Args:
      path: JSONL file.
      flag: Command-line flag that names the file, for error messages.

    Raises:
      CmxError: The file cannot be read, has no requests, or a line has another form.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise CmxError(f"{flag} {path}: {reason}; give a JSONL file in Mooncake's format") from None
    arrivals = [_arrival(f"{flag} {path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not arrivals:
        raise CmxError(f"{flag} {path}: no requests in it; give a JSONL file in Mooncake's format")
    return sorted(arrivals, key=lambda arrival: arrival.time)


def _arrival(location: str, line: str) -> Arrival:
    try:
        row = json.loads(line)
        arrival = Arrival(
            float(row["timestamp"]) / 1e3,
            int(row["input_length"]),
            int(row["output_length"]),
            tuple(int(block) for block in row.get("hash_ids", ())),
        )
        ok = 0 <= arrival.time < math.inf and arrival.prompt > 0 and arrival.output > 0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        ok = False
    if not ok:
        raise CmxError(
            f"{location}: expected an object with timestamp (ms, zero or more), "
            "input_length and output_length (above zero), and hash_ids (integers)"
        )
    if len(arrival.blocks) > -(-arrival.prompt // BLOCK):
        raise CmxError(
            f"{location}: {len(arrival.blocks)} hash_ids for {arrival.prompt} tokens, expected one for each "
            f"{BLOCK}: is this Mooncake's format, with timestamps in milliseconds?"
        )
    return arrival
