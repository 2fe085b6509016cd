"""Numbers of parameters of a model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import Leaf
from cmx_jax.model.weights import all_leaves


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model.

    Attributes:
      total: Number of all parameters except those of MTP layers.
      active: Number of parameters that one token uses: its top-k experts, and the input embedding only if it
        is the head too.
      active_with_embedding: The same with the input embedding, as most makers publish it.
      mtp: Number of parameters of MTP layers, which share embedding and head with the model.
    """

    total: int
    active: int
    active_with_embedding: int
    mtp: int


def parameter_counts(c: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a config (section 9)."""
    leaves = all_leaves(c, c.n_routed_experts)

    def total(chosen: Iterable[Leaf]) -> int:
        return sum(math.prod(leaf.shape) for leaf in chosen if leaf.kind not in ("slots", "scale"))

    main = [leaf for leaf in leaves if leaf.stack != "mtp"]
    experts = total(leaf for leaf in main if leaf.experts)
    used = experts * c.num_experts_per_tok // max(c.n_routed_experts, 1)
    embed = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    count = total(main)
    active = count - experts + used
    return ParameterCounts(
        total=count,
        active=active - embed,
        active_with_embedding=active,
        mtp=total(leaf for leaf in leaves if leaf.stack == "mtp"),
    )
