"""Checks of instances and prompts before an engine accepts them."""

from collections.abc import Sequence

from cmx_jax.errors import CmxError
from cmx_jax.mesh.placement import check_slots
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.sharding import shared_in_slots
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.request import Request


def check_pages(instances: Sequence[Instance]) -> None:
    """Checks that the pages of all instances are interchangeable.

    Raises:
      CmxError: Two instances have different pages.
    """
    expected = instances[-1]
    for instance in instances:
        page, expected_page = instance.programs.page, expected.programs.page
        if page != expected_page:
            raise CmxError(
                f"{instance.name} has pages of {page}, expected {expected.name}'s {expected_page}: give both "
                "the same page width, dtype, kv_cache_dtype and num_speculative_tokens"
            )


def check_rebalanced(instances: Sequence[Instance]) -> None:
    """Checks that the experts of instances can be rebalanced.

    Raises:
      CmxError: The experts do not fill the slots of a layout.
    """
    for instance in instances:
        config, layout = instance.config, instance.layout
        check_slots(layout, config.n_routed_experts, shared_in_slots(config, layout))


def check_prompt(prompt: Sequence[int], config: ModelConfig) -> None:
    """Checks that a prompt consists of token ids of the vocabulary.

    Raises:
      CmxError: The prompt is empty, or holds an id outside the vocabulary.
    """
    if not prompt:
        raise CmxError("the prompt is empty, expected at least one token")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise CmxError(f"the prompt holds token id {token}, expected ids in [0, {config.vocab_size})")


def check_context(request: Request, config: ModelConfig) -> None:
    """Checks that a request fits the model's context.

    Raises:
      CmxError: The prompt and the longest answer exceed the context.
    """
    if request.total_tokens > config.max_position_embeddings:
        raise CmxError(
            f"a prompt of {len(request.prompt)} tokens and max_tokens {request.params.max_tokens} exceed the "
            f"context of {config.max_position_embeddings}: shorten the prompt or ask for fewer tokens"
        )
