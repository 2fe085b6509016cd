"""Recipes: the paper's numbers, mechanisms that are switched off, and models that they do not fit."""

from dataclasses import replace

import numpy as np
import pytest

from cmx_jax.errors import CmxError
from cmx_jax.mesh.pools import DECODE_NPUS, PREFILL_NPUS
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.model.families import preset
from cmx_jax.serving.deploy.recipe import MECHANISMS, Recipe, plain
from cmx_jax.serving.deploy.recipe_layouts import recipe_layout
from cmx_jax.serving.scheduling.allocator import Capacity, RankAllocator, spread_order
from cmx_jax.serving.scheduling.request import Request, SamplingParams

R1 = preset("deepseek-r1")


def test_recipe_is_the_papers_deployment() -> None:
    """Sections 4.2.1 and 4.3.1, table 2: EP320 with a slot a die, EP32 with ten slots a die."""
    recipe = Recipe()
    assert (recipe.decode_npus, recipe.prefill_npus) == (DECODE_NPUS, PREFILL_NPUS)
    assert recipe.engine.ranks_per_npu == CLOUDMATRIX384.npu.dies
    decode, prefill = (recipe_layout(recipe, role, R1, "bfloat16") for role in ("decode", "prefill"))
    assert (decode.ranks, decode.slots, decode.slots_per_rank) == (320, 256 + 32 + 32, 1)
    assert (prefill.ranks, prefill.slots_per_rank, prefill.sequence_ranks) == (32, 8 + 1 + 1, 32)
    assert (decode.ranks_per_npu, decode.microbatches, decode.wire, decode.mailbox_rows) == (2, 2, "int8", 0)
    npus = recipe.decode_instances * recipe.decode_npus + recipe.prefill_instances * recipe.prefill_npus
    assert npus == CLOUDMATRIX384.npus


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_is_switched_off_alone(name: str) -> None:
    without = Recipe().without(name)
    assert without != Recipe()
    assert without.without(name) == without
    assert recipe_layout(without, "decode", R1, "bfloat16").ranks in (160, 320)


def test_plain_recipe_has_floats_and_a_rank_a_device() -> None:
    layout = recipe_layout(plain(Recipe()), "prefill", R1, "float32")
    assert (layout.ranks, layout.sequence, layout.wire, layout.microbatches) == (16, (), "float32", 1)
    assert plain(Recipe()).cache_block == plain(Recipe()).engine.eplb_interval == 0


@pytest.mark.parametrize(
    ("recipe", "model", "message"),
    [
        (
            Recipe().without("sp-tp-sp", "mtp"),
            "qwen3-235b-a22b",
            r"redundant_slots is 32, .* for example 160",
        ),
        (
            Recipe(prefill_npus=10, decode_npus=80).without("replicas", "mtp"),
            "qwen3-235b-a22b",
            "recipe: share_sequences, expected a model with latent attention: switch off 'sp-tp-sp'",
        ),
        (
            Recipe().without("replicas", "sp-tp-sp"),
            "qwen3-235b-a22b",
            "num_speculative_tokens is 1, expected 0",
        ),
        (replace(Recipe(), sequences=3), "deepseek-r1", "3 sequences per decode rank do not divide into 2"),
    ],
)
def test_recipe_that_does_not_fit_names_its_field(recipe: Recipe, model: str, message: str) -> None:
    def fit() -> None:
        for role in ("prefill", "decode"):
            recipe_layout(recipe, role, preset(model), "bfloat16")

    with pytest.raises(CmxError, match=message) as error:
        fit()
    assert "\n" not in str(error.value)


def test_int8_is_switched_off_for_stored_int8_as_well() -> None:
    assert Recipe().without("int8").engine.quant == "none"


def test_invalid_recipes_are_refused() -> None:
    with pytest.raises(CmxError, match="mechanism 'magic' is unknown, expected one of dies, int8"):
        Recipe().without("magic")
    with pytest.raises(CmxError, match="sequences is 0, expected at least 1"):
        Recipe(sequences=0)
    with pytest.raises(CmxError, match="cache_block is -1, expected zero or more"):
        Recipe(cache_block=-1)


@pytest.mark.parametrize("ranks", [1, 2, 7, 160, 320])
def test_requests_are_spread_over_distant_ranks(ranks: int) -> None:
    order = spread_order(ranks)
    assert sorted(order.tolist()) == list(range(ranks))
    first = np.sort(order[: min(ranks, 8)])
    assert np.diff(first).min(initial=ranks) >= ranks // 16
    allocator = RankAllocator(Capacity(sequences=1, pages=4), ranks)
    requests = [Request([1, 2], SamplingParams()) for _ in range(ranks)]
    assert all(allocator.place(request, 2, decode=True) for request in requests)
    assert [allocator.places[request].rank for request in requests] == order.tolist()
