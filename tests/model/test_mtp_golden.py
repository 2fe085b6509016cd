"""The MTP layer against transformers: draft logits (goldens by scripts/make_mtp_goldens.py)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

import cmx_jax
from cmx_jax.mesh.lanes import Lanes
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.model.attention import TokenPositions, data_parallel_attention
from cmx_jax.model.batch import run_experts
from cmx_jax.model.checkpoint import read_weights
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import Stream, decoder, logits, mtp_hidden
from cmx_jax.model.sharding import weight_specs
from cmx_jax.model.weights import Weights
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.scheduling.request import SamplingParams

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[1] / "goldens_mtp"
CASES = sorted(path.name for path in GOLDENS.iterdir())
RANKS = 2


def drafted(
    weights: Weights, tokens: Int[Array, "B T"], *, c: ModelConfig, layout: Layout
) -> Float[Array, "B T O"]:
    """A rank's draft logits of whole sequences; the last position, which has no next token, means nothing."""
    positions = TokenPositions(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    attend = data_parallel_attention(positions, tokens.shape[1], c)
    stream = Stream(tokens, jnp.ones_like(tokens, bool), attend)
    run = run_experts(c, layout, tokens.size)
    [main] = decoder(weights, c, [stream], run)
    following = Stream(jnp.roll(tokens, -1, axis=1), stream.active, stream.attend)
    return logits(mtp_hidden(weights, c, main.hidden, following, run).hidden, weights)


@pytest.mark.parametrize("case", CASES)
def test_draft_logits_equal_transformers(case: str) -> None:
    golden, c = np.load(GOLDENS / case / "golden.npz"), Model.read(GOLDENS / case).config
    layout = expert_parallel(RANKS, c.n_routed_experts)
    weights = jax.device_put(read_weights(GOLDENS / case, c, np.float32))
    specs = (weight_specs(c, layout), layout.data_spec)
    program = Lanes(layout.axes).jit(partial(drafted, c=c, layout=layout), specs, layout.data_spec)
    drafts = program(weights, np.stack([golden["prompt"]] * RANKS))  # a sequence a rank
    for rank in range(RANKS):
        np.testing.assert_allclose(drafts[rank, :-1], golden["draft_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_checkpoint_with_mtp_equal_transformers(case: str) -> None:
    golden, llm = np.load(GOLDENS / case / "golden.npz"), cmx_jax.from_pretrained(GOLDENS / case, ranks=4)
    assert llm.model.checkpoint.mtp
    np.testing.assert_allclose(llm.logits(golden["prompt"][None])[0], golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_drafts_and_tokens_of_decode_equal_transformers(case: str) -> None:
    """Three drafts a step, whatever was accepted before: each is the draft of a program that knows all true
    tokens, and the text is that of a model without drafts."""
    golden = np.load(GOLDENS / case / "golden.npz")
    llm = cmx_jax.from_pretrained(GOLDENS / case, ranks=2, max_num_seqs=2, num_speculative_tokens=3)
    engine = Engine([llm.instance], llm.instance)
    prompt, expected = golden["prompt"].tolist(), golden["generated"].tolist()
    request = engine.submit(prompt, SamplingParams(max_tokens=len(expected), ignore_eos=True))
    compared = 0
    while engine.busy:
        engine.step()
        known = len(request.tokens)
        if request.drafts and known < len(expected):
            drafts = golden["drafts"][known - 1].tolist()
            assert request.drafts == drafts[: len(request.drafts)]
            compared += 1
    assert request.tokens == expected
    proposed, accepted = llm.instance.traffic.proposed, llm.instance.traffic.accepted
    assert compared >= llm.instance.traffic.steps - 2 > 15
    assert proposed[0] == llm.instance.traffic.steps - 1
    assert (np.diff(accepted) <= 0).all()
