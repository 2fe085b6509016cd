"""How the weights lie on an instance: which are split over its ranks, and along which axis."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.weights import Leaf, Weights, leaf_dtype, weight_tree


def shared_in_slots(c: ModelConfig, layout: Layout) -> int:
    """Shared experts that lie in slots: all of them, or with no slots of their own none."""
    return c.n_shared_experts if layout.shared_slots else 0


def laid_out(c: ModelConfig, layout: Layout, make: Callable[[Leaf], Any], mtp: bool) -> Weights:
    """A `weight_tree` in the layout's slots.

    Raises:
      CmxError: ranks are to share sequences, but cannot share the heads.
    """
    shared, heads = layout.sequence_ranks, c.num_attention_heads
    if layout.sequence and (heads % shared or not isinstance(c.attention, MLAConfig)):
        raise CmxError(
            f"{heads} heads cannot be shared by {shared} ranks, expected latent attention and a divisor "
            f"of {heads}"
        )
    return weight_tree(c, layout.slots, make, mtp, layout.shared_slots > 0)


def abstract_weights(c: ModelConfig, layout: Layout, dtype: Any, mtp: bool = True) -> Weights:
    """Shapes and dtypes without arrays."""
    return laid_out(c, layout, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(leaf, dtype)), mtp)


HEADS = {"attn.q_b": 2, "attn.k_b": 1, "attn.v_b": 1}
"""The axis of heads of what ranks share when they share sequences (section 4.3.1)."""


def leaf_spec(leaf: Leaf, layout: Layout) -> P:
    """Experts over their axes, MLA's heads over `sequence`, everything else replicated (section 2)."""
    if leaf.experts:
        return P(layout.experts)
    if layout.sequence and leaf.path in HEADS:
        return P(*[None] * HEADS[leaf.path], layout.sequence)
    return P()


def weight_specs(c: ModelConfig, layout: Layout, mtp: bool = True) -> Weights:
    """`leaf_spec` of every leaf."""
    return laid_out(c, layout, lambda leaf: leaf_spec(leaf, layout), mtp)
