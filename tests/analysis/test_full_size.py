"""Models at full size, without weights: their steps lower in seconds."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from cmx_jax.analysis.trace.abstract_steps import trace_step
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.model.cache import abstract_cache
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import preset, presets


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return preset("deepseek-r1")


def test_token_caches_70272_bytes(config: ModelConfig) -> None:
    page = abstract_cache(config, 1, 1, jnp.bfloat16).pages
    assert math.prod(page.shape) * page.dtype.itemsize == 70272  # the paper's section 9.2


@pytest.mark.parametrize("ranks", [160, 320, 384, 768])
def test_decode_step_lowers_at_any_width(config: ModelConfig, ranks: int) -> None:
    """96 sequences a rank at 4,096 tokens: two all-to-alls in the MoE layers' scan, INT8 out, BF16 back."""
    layout = expert_parallel(ranks, config.n_routed_experts, wire="int8", mailbox_rows=0)
    traced = trace_step(config, layout, "decode", sequences=96, context=33 * 128)
    text = str(traced.jaxpr)
    assert text.count("all_to_all") == 2
    mailbox = 96 * min(8, layout.slots_per_rank)
    assert f"i8[{ranks},{mailbox},{7168 + 6}]" in text
    assert f"bf16[{ranks},{mailbox},7168]" in text
    assert "all_to_all" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_int8_cache_bytes_count_as_int8(config: ModelConfig) -> None:
    """Rows of 576 bytes and two scales; without the option nothing is INT8."""
    layout = expert_parallel(160, config.n_routed_experts, wire="bfloat16", mailbox_rows=0)
    sizes = {"sequences": 96, "context": 33 * 128, "drafts": 1}
    plain = str(trace_step(config, layout, "decode", **sizes).jaxpr)
    narrow = str(trace_step(config, layout, "decode", kv_cache_dtype="int8", **sizes).jaxpr)
    pages = f"{96 * 33},62,128"
    assert f"bf16[{pages},576]" in plain
    assert "i8[" not in plain
    assert f"i8[{pages},576]" in narrow
    assert f"f32[{pages},2]" in narrow
    assert f"bf16[{pages}" not in narrow


def outside_loops(jaxpr: Any) -> Iterator[Any]:
    """The equations that run once a step."""
    for eqn in jaxpr.eqns:
        inner = [eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params]
        if eqn.primitive.name in ("scan", "while") or not inner:
            yield eqn
            continue
        yield from outside_loops(getattr(inner[0], "jaxpr", inner[0]))


LOOPS_AND_CACHE = ("scan", "while", "scatter")  # the donated cache is written once, in place


@pytest.mark.parametrize("name", sorted(presets()))
@pytest.mark.parametrize(("step", "ranks", "length"), [("decode", 160, 0), ("prefill", 32, 1024)])
@pytest.mark.slow
def test_steps_of_every_preset_lower_without_copies_of_weights(name, step, ranks, length) -> None:
    """Nothing outside the layers' loops makes an array of the size of a stack of weights."""
    c = preset(name)
    layout = expert_parallel(ranks, c.n_routed_experts, wire="bfloat16")
    traced = trace_step(c, layout, step, sequences=1 if length else 8, context=1152, length=length)
    stack = c.num_hidden_layers * c.hidden_size * c.hidden_size // 4
    head = c.vocab_size * c.hidden_size
    for eqn in outside_loops(traced.jaxpr.jaxpr):
        for out in eqn.outvars:
            size = math.prod(getattr(out.aval, "shape", ()))
            assert size < stack or size <= head or eqn.primitive.name in LOOPS_AND_CACHE
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
