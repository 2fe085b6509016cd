"""DeepSeek-R1 at full size, without weights: it has the published size, and its steps lower in seconds."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import Abstract
from cmx_jax.model.cache import abstract_cache
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.families import preset
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import DecodeBatch, decode_step, step_specs
from cmx_jax.model.weights import abstract_weights


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return preset("deepseek-r1")


def test_parameters_are_the_published_671_billion(config: ModelConfig) -> None:
    leaves = jax.tree.leaves(abstract_weights(config, 256, jnp.bfloat16, mtp=False))
    assert round(sum(math.prod(leaf.shape) for leaf in leaves) / 1e9, 1) == 671.0


def test_a_token_caches_70272_bytes(config: ModelConfig) -> None:
    page = abstract_cache(config, 1, 1, jnp.bfloat16).pages
    assert math.prod(page.shape) * page.dtype.itemsize == 70272  # the paper's section 9.2


@pytest.mark.parametrize("ranks", [160, 320, 384, 768])
def test_the_decode_step_lowers_at_any_width(config: ModelConfig, ranks: int) -> None:
    """96 sequences a rank at 4,096 tokens: two all-to-alls in the MoE layers' scan, INT8 out, BF16 back."""
    layout = expert_parallel(ranks, config.n_routed_experts, wire="int8", mailbox_rows=0)
    runner, (weights, data, output) = Abstract(layout.axes), step_specs(config, layout, True)
    batch, width, pages = 96 * ranks, 128, 33

    def put(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return runner.put(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), data)

    rows = (batch,)
    sampling = Sampling(put(rows, "float32"), put(rows, "int32"), put(rows, "float32"), put(rows, "uint32"))
    step = runner.jit(
        partial(decode_step, c=config, layout=layout, sampled=False), (weights, data, data), (data, output)
    )
    traced = step.trace(
        runner.put(abstract_weights(config, layout.slots, jnp.bfloat16), weights),
        runner.put(abstract_cache(config, batch * pages, width, jnp.bfloat16), data),
        DecodeBatch(put(rows, "int32"), put(rows, "int32"), put((batch, pages), "int32"), sampling),
    )
    text = str(traced.jaxpr)
    assert text.count("all_to_all") == 2
    mailbox = 96 * min(8, layout.slots_per_rank)
    assert f"i8[{ranks},{mailbox},{7168 + 6}]" in text
    assert f"bf16[{ranks},{mailbox},7168]" in text
    assert "all_to_all" in traced.lower(lowering_platforms=("cpu",)).as_text()
