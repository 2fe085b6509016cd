"""Rotary embedding against rotations of complex numbers, and YaRN's frequencies against its formula."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmx_jax.model.config import RopeConfig
from cmx_jax.model.rope import frequencies, rotate

DIM = 8
YARN = RopeConfig(kind="yarn", theta=10.0, factor=4.0, original_max_position_embeddings=24, beta_fast=2.0)
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False])

turn = jax.jit(rotate, static_argnums=2)


def as_complex(x: np.ndarray, interleaved: bool) -> np.ndarray:
    x = x.astype(np.float64)
    if interleaved:
        return x[..., 0::2] + 1j * x[..., 1::2]
    return x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]


def rotated(x: np.ndarray, positions: np.ndarray, rope: RopeConfig, interleaved: bool) -> np.ndarray:
    """`rotate` of x [T, H, R], as complex numbers: first members stand before second members."""
    out = turn(x[None], positions[None].astype(np.int32), replace(rope, interleaved=interleaved))
    return as_complex(np.asarray(out)[0], interleaved=False)


def vectors(seed: int, tokens: int = 5, heads: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, heads, DIM)).astype(np.float32)


@LAYOUTS
@given(st.lists(st.integers(0, 163839), min_size=5, max_size=5), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_rotation_is_multiplication_by_a_unit_complex_number(interleaved, places, seed) -> None:
    x, positions = vectors(seed), np.array(places)
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    expected = as_complex(x, interleaved) * np.exp(1j * angles)
    result = rotated(x, positions, RopeConfig(), interleaved)
    # the angle is a float32 product of a float32 frequency: two roundings of 2^-24 each
    bound = np.abs(expected) * (angles * 2**-23 + 2**-20)
    assert (np.abs(result - expected) <= bound).all()


@LAYOUTS
def test_position_zero_only_reorders(interleaved: bool) -> None:
    x = vectors(0)
    result = rotated(x, np.zeros(5), RopeConfig(), interleaved)
    np.testing.assert_array_equal(result, as_complex(x, interleaved))


@LAYOUTS
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_dot_products_depend_on_distance_only(interleaved, i, j, shift, seed) -> None:
    x = vectors(seed, tokens=2)

    def dots(i: int, j: int) -> np.ndarray:
        out = rotated(x, np.array([i, j]), YARN, interleaved)
        return np.sum(out[0] * out[1].conj(), axis=-1).real

    np.testing.assert_allclose(dots(i, j), dots(i + shift, j + shift), atol=5e-3, rtol=0)


def test_linear_scaling_divides_positions() -> None:
    x, positions = vectors(1), np.arange(5)
    scaled = rotated(x, positions * 2, RopeConfig(kind="linear", factor=2.0), True)
    np.testing.assert_allclose(scaled, rotated(x, positions, RopeConfig(), True), atol=1e-6)


def yarn_frequency(i: int, dim: int, rope: RopeConfig) -> float:
    """The paper's NTK-by-parts: pair `i` alone, as transformers rounds the ends of the ramp."""
    span, log = rope.original_max_position_embeddings, math.log
    first = dim / 2 * log(span / (2 * math.pi * rope.beta_fast)) / log(rope.theta)
    last = dim / 2 * log(span / (2 * math.pi * rope.beta_slow)) / log(rope.theta)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    kept = 1 - min(max((i - first) / (last - first), 0), 1)
    return rope.theta ** (-2 * i / dim) * (kept + (1 - kept) / rope.factor)


ROPES = {
    "r1": (64, RopeConfig(kind="yarn", factor=40.0)),
    "small": (DIM, YARN),
    "untruncated": (64, RopeConfig(kind="yarn", factor=40.0, truncate=False)),
    "short": (128, RopeConfig(kind="yarn", theta=1e6, factor=8.0, original_max_position_embeddings=32)),
}


@pytest.mark.parametrize("name", ROPES)
def test_yarn_frequencies_follow_the_formula(name: str) -> None:
    dim, rope = ROPES[name]
    expected = [yarn_frequency(i, dim, rope) for i in range(dim // 2)]
    np.testing.assert_allclose(frequencies(rope, dim)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(name: str) -> None:
    dim, rope = ROPES[name]
    inverse = frequencies(rope, dim)[0]
    plain = rope.theta ** (-np.arange(0, dim, 2) / dim)
    turns = plain * rope.original_max_position_embeddings / (2 * math.pi)
    fast, slow = turns >= rope.beta_fast, turns <= rope.beta_slow
    assert slow.any()
    np.testing.assert_allclose(inverse[fast], plain[fast], rtol=1e-6)
    np.testing.assert_allclose(inverse[slow], plain[slow] / rope.factor, rtol=1e-6)
    assert (inverse <= plain * (1 + 1e-6)).all()
    assert (inverse >= plain / rope.factor * (1 - 1e-6)).all()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 2.0}, (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)),
        ({"mscale": 0.5}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.75}, 0.75),
    ],
    ids=str,
)
def test_yarn_lengthens_vectors_by_its_attention_factor(fields: dict[str, float], expected: float) -> None:
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64, **fields)
    x = vectors(2)
    lengths = np.linalg.norm(rotated(x, np.arange(5), rope, True), axis=-1)
    np.testing.assert_allclose(lengths, expected * np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 1.0), (1.0, 1.0), (math.e, 1.07)])
def test_mscale_grows_with_the_logarithm_from_one(factor: float, expected: float) -> None:
    assert RopeConfig(factor=factor).temperature(0.7) == pytest.approx(expected)
