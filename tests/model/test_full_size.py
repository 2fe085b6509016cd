"""Models at full size, without weights: their steps lower in seconds."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.runners import Abstract
from cmx_jax.model.cache import abstract_cache
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import preset, presets
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import DecodeBatch, PrefillBatch, decode_step, prefill_step, step_specs
from cmx_jax.model.weights import abstract_weights


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return preset("deepseek-r1")


def test_a_token_caches_70272_bytes(config: ModelConfig) -> None:
    page = abstract_cache(config, 1, 1, jnp.bfloat16).pages
    assert math.prod(page.shape) * page.dtype.itemsize == 70272  # the paper's section 9.2


def abstract_step(c: ModelConfig, layout: Layout, step: Any, batch: int, pages: int, length: int = 0) -> Any:
    """A step traced without arrays: `batch` sequences a rank, of prompts of `length` or of one token."""
    runner, (weights, data, output) = Abstract(layout.axes), step_specs(c, layout, True)
    rows = (batch * layout.data_ranks,)

    def put(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return runner.put(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), data)

    sampling = Sampling(put(rows, "float32"), put(rows, "int32"), put(rows, "float32"), put(rows, "uint32"))
    kind, tokens = (PrefillBatch, (*rows, length)) if length else (DecodeBatch, rows)
    fn = partial(step, c=c, layout=layout, sampled=False)
    return runner.jit(fn, (weights, data, data), (data, output)).trace(
        runner.put(abstract_weights(c, layout.slots, jnp.bfloat16), weights),
        runner.put(abstract_cache(c, rows[0] * pages, 128, jnp.bfloat16), data),
        kind(put(tokens, "int32"), put(rows, "int32"), put((*rows, pages), "int32"), sampling),
    )


@pytest.mark.parametrize("ranks", [160, 320, 384, 768])
def test_the_decode_step_lowers_at_any_width(config: ModelConfig, ranks: int) -> None:
    """96 sequences a rank at 4,096 tokens: two all-to-alls in the MoE layers' scan, INT8 out, BF16 back."""
    layout = expert_parallel(ranks, config.n_routed_experts, wire="int8", mailbox_rows=0)
    traced = abstract_step(config, layout, decode_step, 96, 33)
    text = str(traced.jaxpr)
    assert text.count("all_to_all") == 2
    mailbox = 96 * min(8, layout.slots_per_rank)
    assert f"i8[{ranks},{mailbox},{7168 + 6}]" in text
    assert f"bf16[{ranks},{mailbox},7168]" in text
    assert "all_to_all" in traced.lower(lowering_platforms=("cpu",)).as_text()


def outside_loops(jaxpr: Any) -> Iterator[Any]:
    """The equations that run once a step."""
    for eqn in jaxpr.eqns:
        inner = [eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params]
        if eqn.primitive.name in ("scan", "while") or not inner:
            yield eqn
            continue
        yield from outside_loops(getattr(inner[0], "jaxpr", inner[0]))


@pytest.mark.parametrize("name", sorted(presets()))
@pytest.mark.parametrize(("step", "ranks", "length"), [(decode_step, 160, 0), (prefill_step, 32, 1024)])
def test_both_steps_of_every_preset_lower_and_copy_no_weights(name, step, ranks, length) -> None:
    """Nothing outside the layers' loops makes an array of the size of a stack of weights."""
    c = preset(name)
    layout = expert_parallel(ranks, c.n_routed_experts, wire="bfloat16")
    traced = abstract_step(c, layout, step, 1 if length else 8, 9, length)
    stack = c.num_hidden_layers * c.hidden_size * c.hidden_size // 4
    head = c.vocab_size * c.hidden_size
    for eqn in outside_loops(traced.jaxpr.jaxpr):
        for out in eqn.outvars:
            size = math.prod(getattr(out.aval, "shape", ()))
            assert size < stack or size <= head or eqn.primitive.name in ("scan", "while"), eqn.primitive
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
