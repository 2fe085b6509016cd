"""Requests of a measurement: rates and lengths against closed forms, texts against the tokenizer."""

import math
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from cmx_jax.analysis.bench import BenchRequest, Words, check_lengths, drawn, prefixed, replayed
from cmx_jax.analysis.simulate import Arrival
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import locate

MANY = 20_000


@pytest.fixture(scope="module")
def words() -> Words:
    return Words("tiny")


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_intervals_are_gamma_distributed(burstiness: float) -> None:
    arrivals = drawn(MANY, 5.0, burstiness, 100, 10, 0.0, seed=1)
    gaps = np.diff([0.0, *(a.time for a in arrivals)])
    deviation = 1 / math.sqrt(burstiness)  # of the mean
    assert gaps.mean() == pytest.approx(1 / 5, rel=5 * deviation / math.sqrt(MANY))
    assert gaps.std() / gaps.mean() == pytest.approx(deviation, rel=0.05)


def test_lengths_are_uniform_around_their_mean() -> None:
    arrivals = drawn(MANY, math.inf, 1.0, 100, 10, 0.2, seed=2)
    assert {a.time for a in arrivals} == {0.0}
    for lengths, low, high in (
        ([a.prompt for a in arrivals], 80, 120),
        ([a.output for a in arrivals], 8, 12),
    ):
        counts = Counter(lengths)
        assert sorted(counts) == list(range(low, high + 1))
        expected = MANY / len(counts)
        chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
        assert chi2 < len(counts) + 5 * math.sqrt(2 * len(counts))


def test_rate_changes_only_times() -> None:
    slow, fast = (drawn(50, rate, 1.0, 100, 10, 0.5, seed=3) for rate in (1.0, math.inf))
    assert [a[1:] for a in slow] == [a[1:] for a in fast]


def test_text_of_prompts_has_the_same_tokens(words: Words) -> None:
    tokenizer = Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))
    requests = prefixed(words, drawn(20, math.inf, 1.0, 60, 4, 0.9, seed=4), 3, 40, seed=4)
    for before, request in zip(requests, words.as_text(requests), strict=True):
        assert tokenizer.encode(request.text, add_special_tokens=False).ids == before.prompt
        assert 40 + 6 <= len(request.prompt) <= 40 + 114


def test_prefixes_are_shared_equally_and_suffixes_are_not(words: Words) -> None:
    requests = prefixed(words, drawn(12, math.inf, 1.0, 20, 4, 0.0, seed=5), 3, 30, seed=5)
    assert sorted(Counter(tuple(a.prompt[:30]) for a in requests).values()) == [4, 4, 4]
    assert len({tuple(a.prompt[30:]) for a in requests}) == 12
    again = prefixed(words, drawn(12, math.inf, 1.0, 20, 4, 0.0, seed=5), 3, 30, seed=5)
    other = prefixed(words, drawn(12, math.inf, 1.0, 20, 4, 0.0, seed=6), 3, 30, seed=6)
    assert requests == again
    assert not {tuple(a.prompt[:30]) for a in requests} & {tuple(a.prompt[:30]) for a in other}


def test_equal_block_ids_are_equal_text(words: Words) -> None:
    trace = [
        Arrival(100.0, 1100, 40, (7, 8, 9)),
        Arrival(102.0, 1000, 20, (7, 8)),
        Arrival(104.0, 600, 2, (10, 8)),
        Arrival(106.0, 512, 1, ()),
        Arrival(107.0, 2000, 1, (7,)),
    ]
    requests = replayed(words, trace, 0.125, 0.1, 0.5, seed=0)
    assert [a.time for a in requests] == [0, 1, 2, 3, 3.5]
    assert [len(a.prompt) for a in requests] == [138, 125, 75, 64, 250]
    assert [a.max_tokens for a in requests] == [4, 2, 1, 1, 1]
    first, second, third, own, long = (a.prompt for a in requests)
    assert second == first[:125]
    assert third[64:] == first[64:75]
    assert third[:64] != first[:64]
    assert long[:64] == first[:64]
    assert long[64:128] != first[64:128]
    assert own not in (first[:64], third[:64])
    assert len(replayed(words, trace, 1.0, 1.0, 1.0, seed=0)[0].prompt) == 1100


def test_warmups_have_equal_lengths_and_different_text(words: Words) -> None:
    requests = prefixed(words, drawn(3, math.inf, 1.0, 40, 4, 0.5, seed=0), 1, 10, seed=0)
    warmups = words.warmups(requests, 5, seed=0)
    assert [len(a.prompt) for a in warmups] == [len(requests[i % 3].prompt) for i in range(5)]
    assert not {tuple(a.prompt[:10]) for a in warmups} & {tuple(a.prompt[:10]) for a in requests}


def test_requests_longer_than_the_context_are_refused() -> None:
    requests = [BenchRequest(0.0, [1] * 10, 6), BenchRequest(0.0, [1] * 11, 6)]
    check_lengths(requests, None)
    check_lengths(requests, 17)
    with pytest.raises(
        CmxError, match="request 2 has 11 tokens and asks for 6, expected at most the model's 16"
    ):
        check_lengths(requests, 16)


def test_file_without_tokenizer_is_one_line(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "none"):
        with pytest.raises(CmxError, match=r"no tokenizer at .*: give --tokenizer"):
            Words(str(path))
