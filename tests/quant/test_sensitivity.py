"""Tensors kept in floats: within the budget, worth it, and none left out that would fit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmx_jax.quant.mixed_precision import keep_precision

TENSORS = st.dictionaries(st.text("abc", max_size=3), st.tuples(st.floats(0, 1), st.integers(1, 1000)))


@given(TENSORS, st.floats(0, 2), st.floats(0, 1))
def test_kept_tensors_are_worth_it_and_fit_the_budget(
    tensors: dict[str, tuple[float, int]], budget: float, threshold: float
) -> None:
    errors, sizes = ({n: t[i] for n, t in tensors.items()} for i in (0, 1))
    kept = keep_precision(errors, sizes, budget, threshold=threshold)
    room = budget * sum(sizes.values())
    spent = sum(sizes[n] for n in kept)
    assert spent <= room + 1e-6
    assert all(errors[n] > threshold for n in kept)
    for name in errors.keys() - kept:
        ahead = sum(sizes[n] for n in kept if errors[n] / sizes[n] >= errors[name] / sizes[name])
        assert errors[name] <= threshold or ahead + sizes[name] > room - 1e-6


def test_largest_error_per_byte_comes_first() -> None:
    errors = {"large": 0.9, "small": 0.3, "fine": 0.01, "middle": 0.4}
    sizes = {"large": 100, "small": 10, "fine": 1, "middle": 40}
    assert keep_precision(errors, sizes, 0.0) == frozenset()
    assert keep_precision(errors, sizes, 10 / 151) == {"small"}
    assert keep_precision(errors, sizes, 50 / 151) == {"small", "middle"}
    assert keep_precision(errors, sizes, 1.0) == {"small", "middle", "large"}
    assert keep_precision(errors, sizes, 1.0, threshold=0.5) == {"large"}


def test_equal_tensors_are_kept_in_order_of_their_names() -> None:
    assert keep_precision({"b": 0.5, "a": 0.5}, {"a": 1, "b": 1}, 0.5) == {"a"}


@pytest.mark.parametrize(
    ("errors", "sizes", "budget", "message"),
    [
        ({"a": 0.5}, {}, 1.0, "a has None bytes"),
        ({"a": 0.5}, {"a": 0}, 1.0, "a has 0 bytes"),
        ({"a": math.nan}, {"a": 1}, 1.0, "a has error nan"),
        ({"a": -0.5}, {"a": 1}, 1.0, "a has error"),
        ({"a": 0.5}, {"a": 1}, -1.0, "budget"),
        ({"a": 0.5}, {"a": 1}, math.nan, "budget"),
    ],
)
def test_mistakes_are_named(
    errors: dict[str, float], sizes: dict[str, int], budget: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        keep_precision(errors, sizes, budget)
