"""The router: sigmoid or softmax scores, a correction bias for selection only, groups, top-k."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from cmx_jax.model.config import ModelConfig


@struct.dataclass
class Routing:
    """Experts of each token.

    Attributes:
      experts: Expert numbers, int32 `[T, K]`, distinct in a row.
      weights: Weights of their results, float32 `[T, K]`.
    """

    experts: Any
    weights: Any


def route(
    x: Float[Array, "T D"], router: Float[Array, "E D"], bias: Float[Array, " E"] | None, c: ModelConfig
) -> Routing:
    """Selects experts by score plus bias, and weighs them by the score alone.

    With groups (DeepSeek-V3) only experts of the `topk_group` best of `n_group` groups compete. The worth of
    a group is the sum of its two best scores. Other groups are masked with -inf, since biased scores may be
    negative. Without a bias experts are selected by their logits: the order is the same, but large logits do
    not become equal, as large scores do.
    """
    logits = jnp.einsum("td,ed->te", x.astype(jnp.float32), router, precision="highest")
    scores = jax.nn.sigmoid(logits) if c.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = logits if bias is None else scores + bias[None]
    if c.n_group > 1:
        grouped = choice.reshape(choice.shape[0], c.n_group, -1)
        worth = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        kept = jax.lax.top_k(worth, c.topk_group)[1]
        mask = jnp.any(kept[:, :, None] == jnp.arange(c.n_group)[None, None], axis=1)
        choice = jnp.where(mask[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    experts = jax.lax.top_k(choice, c.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if c.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts.astype(jnp.int32), weights * c.routed_scaling_factor)
