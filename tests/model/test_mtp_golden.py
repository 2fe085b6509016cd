"""The MTP layer against transformers: draft logits (goldens by scripts/make_mtp_goldens.py)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

import cmx_jax
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.runners import Lanes
from cmx_jax.model.checkpoint import read_weights
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import decoder, logits, mtp_hidden
from cmx_jax.model.layers import visible
from cmx_jax.model.mla import expanded
from cmx_jax.model.steps import run_experts
from cmx_jax.model.weights import Weights, weight_specs
from cmx_jax.serving.model import Model

GOLDENS = Path(__file__).parents[1] / "goldens_mtp"
CASES = sorted(path.name for path in GOLDENS.iterdir())
RANKS = 2


def drafted(
    weights: Weights, tokens: Int[Array, "B T"], *, c: ModelConfig, layout: Layout
) -> Float[Array, "B T O"]:
    """A rank's draft logits of whole sequences; the last position, which has no next token, means nothing."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    active, mask = jnp.ones_like(tokens, bool), visible(positions, tokens.shape[1])
    run = run_experts(c, layout, tokens.size)

    def attend(q, rows, w):
        return expanded(q, rows, mask, w, c), None

    def attend_main(cache, index, kind, q, rows, w):
        return attend(q, rows, w)

    hidden, _, _ = decoder(weights, c, tokens, positions, active, None, attend_main, run)
    following = jnp.roll(tokens, -1, axis=1)
    state, _, _ = mtp_hidden(weights, weights.mtp, c, 0, hidden, following, positions, active, attend, run)
    return logits(state, weights)


@pytest.mark.parametrize("case", CASES)
def test_draft_logits_equal_transformers(case: str) -> None:
    golden, c = np.load(GOLDENS / case / "golden.npz"), Model.read(GOLDENS / case).config
    layout = expert_parallel(RANKS, c.n_routed_experts)
    weights = jax.device_put(read_weights(GOLDENS / case, c, np.float32))
    specs = (weight_specs(c, layout.experts), layout.data_spec)
    program = Lanes(layout.axes).jit(partial(drafted, c=c, layout=layout), specs, layout.data_spec)
    found = program(weights, np.stack([golden["prompt"]] * RANKS))  # a sequence a rank
    for rank in range(RANKS):
        np.testing.assert_allclose(found[rank, :-1], golden["draft_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_beside_a_stored_mtp_layer_equal_transformers(case: str) -> None:
    golden, llm = np.load(GOLDENS / case / "golden.npz"), cmx_jax.from_pretrained(GOLDENS / case, ranks=4)
    assert llm.model.checkpoint.mtp
    np.testing.assert_allclose(llm.logits(golden["prompt"][None])[0], golden["logits"], atol=1e-4, rtol=0)
