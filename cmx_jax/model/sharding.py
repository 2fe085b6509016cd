"""Sharding of the weights: which of them are split over the ranks of an instance, and along which axis."""

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.weights import Weights, all_leaves, weight_tree


def shared_in_slots(c: ModelConfig, layout: Layout) -> int:
    """Number of shared experts that have slots: all of them if the layout has `shared_slots`, else none."""
    return c.n_shared_experts if layout.shared_slots else 0


def laid_out(c: ModelConfig, layout: Layout, make: Callable[[Leaf], Any], mtp: bool) -> Weights:
    """Builds a `weight_tree` with the slots of a layout.

    Raises:
      CmxError: Ranks are to share sequences or matrices, but attention is not latent, or ranks that share
        matrices do not divide the heads or a width.
    """
    shared, heads = layout.sequence_ranks * layout.tensor_ranks, c.num_attention_heads
    latent = isinstance(c.attention, MLAConfig)
    if ((layout.sequence or layout.tensor) and not latent) or heads % layout.tensor_ranks:
        raise CmxError(
            f"{heads} heads cannot be shared by {shared} ranks, expected latent attention and a divisor "
            f"of {heads}"
        )
    _check_widths(c, all_leaves(c, layout.slots, mtp), layout)
    return weight_tree(c, layout.slots, make, mtp, layout.shared_slots > 0)


def abstract_weights(c: ModelConfig, layout: Layout, dtype: Any, mtp: bool = True) -> Weights:
    """Shapes and types of the weights, without arrays."""
    return laid_out(c, layout, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(leaf, dtype)), mtp)


def head_axes(c: ModelConfig, layout: Layout) -> tuple[str, ...]:
    """Returns the axes of `layout.sequence` over which heads are split (the TP stage of SP-TP-SP).

    These are the axes with the most ranks that divide the heads; of equally many, the inner ones. Along the
    other axes ranks have the same heads and attend for different tokens. With 128 heads, the paper's 32 ranks
    have four heads each.
    """
    choices = [
        names
        for count in range(len(layout.sequence) + 1)
        for names in combinations(layout.sequence, count)
        if c.num_attention_heads % layout.size(names) == 0
    ]
    return max(choices, key=lambda names: (layout.size(names), [layout.sequence.index(n) for n in names]))


SEQUENCE = {"attn.q_b": -2, "attn.k_b": -3, "attn.v_b": -3}
"""Leaves that are split when ranks share sequences (section 4.3.1), and their axis of heads, counted from the
end."""

TENSOR = SEQUENCE | {"attn.o": -3, "gate_up": -1, "down": -2, "head": -1}
"""Leaves that tensor parallelism splits, and the axis, counted from the end: that of heads, of the
intermediate width of any FFN, or of the vocabulary."""


def _split(c: ModelConfig, leaf: Leaf, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """The axis along which a leaf is split, counted from the end (0: none), and the mesh axes over which it
    is split. Slots of experts are not considered."""
    if layout.sequence:
        return SEQUENCE.get(leaf.path, 0), head_axes(c, layout)
    axis = TENSOR.get(leaf.path, TENSOR.get(leaf.path.split(".")[-1], 0))
    # axes that carry whole experts split none of them; a scale is not split along inputs, of which it has one
    names = tuple(name for name in layout.tensor if not (leaf.experts and name in layout.experts))
    return (0 if leaf.kind == "scale" and leaf.shape[axis] == 1 else axis), names


def _check_widths(c: ModelConfig, leaves: Iterable[Leaf], layout: Layout) -> None:
    for leaf in leaves:
        axis, names = _split(c, leaf, layout)
        if axis and leaf.shape[axis] % layout.size(names):
            raise CmxError(
                f"{leaf.path}: a width of {leaf.shape[axis]} cannot be shared by {layout.size(names)} ranks, "
                f"expected a divisor of {leaf.shape[axis]}"
            )


def leaf_spec(c: ModelConfig, leaf: Leaf, layout: Layout) -> P:
    """Spec of a leaf: experts are split over `experts`, heads over `head_axes`, leaves in `TENSOR` over
    `tensor`. All others are replicated (section 2): routers, norms, projections to latents, the embedding."""
    axes: list[Any] = [None] * len(leaf.shape)
    if leaf.experts:
        axes[0] = layout.experts or None
    axis, names = _split(c, leaf, layout)
    if axis and names:
        axes[axis] = names
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def weight_specs(c: ModelConfig, layout: Layout, mtp: bool = True) -> Weights:
    """Specs of all weights, by `leaf_spec`."""
    return laid_out(c, layout, lambda leaf: leaf_spec(c, leaf, layout), mtp)
