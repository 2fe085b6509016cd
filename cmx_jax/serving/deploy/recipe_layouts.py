"""Layout and capacity of each kind of instance of a recipe, for a model."""

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.pages import pages_for

MAX_MODEL_LEN = 256
"""Longest sequence of pools by default, in tokens."""
PREFILL_SEQUENCES = 2
"""Full-length sequences per microbatch for which a prefill instance with SP-TP-SP has pages."""


def recipe_layout(recipe: Recipe, role: str, c: ModelConfig, dtype: str) -> Layout:
    """Returns the layout of an instance.

    Args:
      recipe: The recipe.
      role: `prefill` or `decode`.
      c: The model.
      dtype: Type in which the model computes.

    Raises:
      CmxError: The recipe does not fit the model; the message names the field and says what would fit.
    """
    engine, decodes = recipe.engine, role == "decode"
    ranks = (recipe.decode_npus if decodes else recipe.prefill_npus) * engine.ranks_per_npu
    _check(recipe, role, ranks, c)
    return expert_parallel(
        ranks,
        c.n_routed_experts,
        ranks_per_npu=engine.ranks_per_npu,
        exchange=engine.exchange,
        wire=dtype if engine.wire is None else engine.wire,
        mailbox_rows=engine.mailbox_rows,
        redundant_slots=engine.redundant_slots,
        shared_slots=engine.shared_slots,
        microbatches=engine.microbatches if decodes else recipe.prefill_microbatches,
        share_sequences=recipe.share_sequences and not decodes,
    )


def _check(recipe: Recipe, role: str, ranks: int, c: ModelConfig) -> None:
    engine, experts = recipe.engine, c.n_routed_experts
    if (engine.redundant_slots or engine.shared_slots) and not experts:
        raise CmxError(
            "recipe: redundant_slots, expected 0 for a model without experts: switch off 'replicas'"
        )
    extra = engine.redundant_slots + engine.shared_slots
    if extra and (experts + extra) % ranks:
        fits = -(experts + engine.shared_slots) % ranks or ranks
        raise CmxError(
            f"recipe: redundant_slots is {engine.redundant_slots}, but {experts} experts, "
            f"{engine.redundant_slots} redundant and {engine.shared_slots} shared slots do not divide over "
            f"{ranks} {role} ranks, expected for example {fits}"
        )
    if role == "prefill" and recipe.share_sequences and not isinstance(c.attention, MLAConfig):
        raise CmxError(
            "recipe: share_sequences, expected a model with latent attention: switch off 'sp-tp-sp'"
        )
    if engine.num_speculative_tokens and not c.num_nextn_predict_layers:
        raise CmxError(
            f"recipe: num_speculative_tokens is {engine.num_speculative_tokens}, expected 0 for a model "
            "without MTP layers: switch off 'mtp'"
        )
    if recipe.sequences % engine.microbatches:
        raise CmxError(
            f"recipe: {recipe.sequences} sequences per decode rank do not divide into "
            f"{engine.microbatches} microbatches, expected a multiple"
        )


def recipe_capacity(recipe: Recipe, role: str, context: int) -> Capacity:
    """Returns the capacity of each data rank of an instance for sequences of `context` tokens.

    A prefill instance whose ranks share sequences is one data rank.
    """
    width, sequences = Capacity().page_width, recipe.sequences
    if role == "prefill":  # its rows are the microbatches
        sequences = recipe.prefill_microbatches * (PREFILL_SEQUENCES if recipe.share_sequences else 1)
    return Capacity(
        sequences=sequences,
        pages=sequences * pages_for(context, width),
        page_width=width,
        max_num_batched_tokens=recipe.engine.max_num_batched_tokens,
    )
