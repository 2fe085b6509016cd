"""How the weights lie on an instance: which are split over its ranks, and along which axis."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.weights import Leaf, Weights, all_leaves, leaf_dtype, weight_tree


def shared_in_slots(c: ModelConfig, layout: Layout) -> int:
    """Shared experts that lie in slots: all of them, or with no slots of their own none."""
    return c.n_shared_experts if layout.shared_slots else 0


def laid_out(c: ModelConfig, layout: Layout, make: Callable[[Leaf], Any], mtp: bool) -> Weights:
    """A `weight_tree` in the layout's slots.

    Raises:
      CmxError: ranks are to share sequences or matrices, but cannot share the heads, or a width.
    """
    shared, heads = layout.sequence_ranks * layout.tensor_ranks, c.num_attention_heads
    latent = isinstance(c.attention, MLAConfig)
    if (layout.sequence or layout.tensor) and (heads % shared or not latent):
        raise CmxError(
            f"{heads} heads cannot be shared by {shared} ranks, expected latent attention and a divisor "
            f"of {heads}"
        )
    _check_widths(all_leaves(c, layout.slots, mtp), layout)
    return weight_tree(c, layout.slots, make, mtp, layout.shared_slots > 0)


def abstract_weights(c: ModelConfig, layout: Layout, dtype: Any, mtp: bool = True) -> Weights:
    """Shapes and dtypes without arrays."""
    return laid_out(c, layout, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(leaf, dtype)), mtp)


SEQUENCE = {"attn.q_b": -2, "attn.k_b": -3, "attn.v_b": -3}
"""The axis of heads, from behind, of what ranks share when they share sequences (section 4.3.1)."""

TENSOR = SEQUENCE | {"attn.o": -3, "gate_up": -1, "down": -2, "head": -1}
"""The axis of heads, of an FFN's intermediate width (whosever it is), or of the vocabulary, of what tensor
parallelism splits."""


def _split(leaf: Leaf, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """The axis of a leaf, from behind, that is split, and over which mesh axes; experts' slots aside."""
    if layout.sequence:
        return SEQUENCE.get(leaf.path, 0), layout.sequence
    at = TENSOR.get(leaf.path, TENSOR.get(leaf.path.split(".")[-1], 0))
    # a whole expert is not split, nor a scale along the inputs that it holds for
    over = tuple(name for name in layout.tensor if not (leaf.experts and name in layout.experts))
    return (0 if leaf.kind == "scale" and leaf.shape[at] == 1 else at), over


def _check_widths(leaves: Iterable[Leaf], layout: Layout) -> None:
    for leaf in leaves:
        at, over = _split(leaf, layout)
        if at and leaf.shape[at] % layout.size(over):
            raise CmxError(
                f"{leaf.path}: a width of {leaf.shape[at]} cannot be shared by {layout.size(over)} ranks, "
                f"expected a divisor of {leaf.shape[at]}"
            )


def leaf_spec(leaf: Leaf, layout: Layout) -> P:
    """Experts over their axes, heads over `sequence`, what `TENSOR` names over `tensor`; everything else,
    routers, norms, latents' projections, the embedding, is replicated (section 2)."""
    axes: list[Any] = [None] * len(leaf.shape)
    if leaf.experts:
        axes[0] = layout.experts or None
    at, over = _split(leaf, layout)
    if at and over:
        axes[at] = over
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def weight_specs(c: ModelConfig, layout: Layout, mtp: bool = True) -> Weights:
    """`leaf_spec` of every leaf."""
    return laid_out(c, layout, lambda leaf: leaf_spec(leaf, layout), mtp)
