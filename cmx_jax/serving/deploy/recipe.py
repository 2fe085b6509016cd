"""The recipe of a deployment: what runs on the pools of a supernode. The default is the paper's.

Plain data, so that commands show their flags without loading JAX; `recipe_layouts.py` makes layouts of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.engine_args import EngineArgs

_ENGINE = EngineArgs(
    runner="devices",
    ranks_per_npu=2,  # a rank is a die
    quant="int8",
    wire="int8",
    exchange="hierarchical",
    mailbox_rows=0,
    num_speculative_tokens=1,
    microbatches=2,
    redundant_slots=32,
    shared_slots=32,
    eplb_interval=16,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Layouts and options of the instances on a supernode's pools.

    The defaults are the deployment of CloudMatrix-Infer (sections 2 and 4): decode with EP320, a slot on each
    die (256 routed experts, 32 redundant and 32 shared ones), prefill instances of 16 NPUs with EP32 and
    SP-TP-SP, INT8 weights and dispatch, static mailboxes, two microbatches, one MTP draft, EPLB in both pools
    and a caching pool. There are as many prefill instances as the supernode has room for; the paper's
    evaluation has six.

    Attributes:
      prefill_instances: Number of prefill instances.
      decode_instances: Number of decode instances.
      prefill_npus: Number of NPUs per prefill instance.
      decode_npus: Number of NPUs per decode instance.
      sequences: Number of sequences per decode rank, a multiple of the microbatches.
      share_sequences: True if the ranks of a prefill instance share each sequence (SP-TP-SP, section 4.3.1);
        otherwise each has sequences of its own.
      prefill_microbatches: Number of microbatches per prefill step (section 4.3.2).
      prefill_eplb_interval: Number of prefill steps between two rebalancings of the experts of the prefill
        instances, by the loads of all of them; 0: never.
      cache_block: Tokens per block of the caching pool in this process; 0: no such pool.
      engine: Options of the instances. `microbatches` and `eplb_interval` are those of decode; `ranks` and
        `max_num_seqs` are not used.

    Example:
      >>> recipe = Recipe()
      >>> recipe.decode_npus * recipe.engine.ranks_per_npu
      320
      >>> recipe.without("mtp", "eplb").engine.num_speculative_tokens
      0
    """

    prefill_instances: int = 14
    decode_instances: int = 1
    prefill_npus: int = 16
    decode_npus: int = 160
    sequences: int = 2
    share_sequences: bool = True
    prefill_microbatches: int = 2
    prefill_eplb_interval: int = 4
    cache_block: int = 16
    engine: EngineArgs = field(default=_ENGINE)

    def __post_init__(self) -> None:
        for name in ("sequences", "prefill_microbatches"):
            if getattr(self, name) < 1:
                raise CmxError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("prefill_eplb_interval", "cache_block"):
            if getattr(self, name) < 0:
                raise CmxError(f"{name} is {getattr(self, name)}, expected zero or more")

    def with_engine(self, **options: Any) -> "Recipe":
        """Returns the recipe with other options of its instances, fields of `EngineArgs`."""
        return replace(self, engine=replace(self.engine, **options))

    def without(self, *mechanisms: str) -> "Recipe":
        """Returns the recipe with mechanisms of the paper switched off; `MECHANISMS` has their names.

        Raises:
          CmxError: A name is unknown.
        """
        recipe = self
        for name in mechanisms:
            if name not in MECHANISMS:
                raise CmxError(f"mechanism {name!r} is unknown, expected one of {', '.join(MECHANISMS)}")
            recipe = MECHANISMS[name].switch_off(recipe)
        return recipe


@dataclass(frozen=True)
class Mechanism:
    """A mechanism of the paper that a recipe may have.

    Attributes:
      about: Description in a few words, with its section.
      switch_off: Returns a recipe without it.
    """

    about: str
    switch_off: Callable[[Recipe], Recipe]


def _engine_without(**options: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.with_engine(**options)


def _recipe_without(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, **fields)


def _without_eplb(recipe: Recipe) -> Recipe:
    return replace(recipe, prefill_eplb_interval=0).with_engine(eplb_interval=0)


def _without_replicas(recipe: Recipe) -> Recipe:
    return _without_eplb(recipe).with_engine(redundant_slots=0, shared_slots=0)


def _without_microbatches(recipe: Recipe) -> Recipe:
    return replace(recipe, prefill_microbatches=1).with_engine(microbatches=1)


MECHANISMS = {
    "dies": Mechanism("two ranks on an NPU (2)", _engine_without(ranks_per_npu=1)),
    "int8": Mechanism("INT8 weights and products (4.5)", _engine_without(quant="none")),
    "int8-wire": Mechanism("INT8 dispatch (4.2.1)", _engine_without(wire=None)),
    "static-mailboxes": Mechanism("mailboxes for the worst case (4.2.1)", _engine_without(mailbox_rows=None)),
    "microbatches": Mechanism("two streams in a step (4.2.3, 4.3.2)", _without_microbatches),
    "mtp": Mechanism("drafts by multi-token prediction (4.2.4)", _engine_without(num_speculative_tokens=0)),
    "replicas": Mechanism("redundant and shared expert slots (2)", _without_replicas),
    "eplb": Mechanism("experts placed by their load while serving (2)", _without_eplb),
    "sp-tp-sp": Mechanism("prefill ranks share sequences (4.3.1)", _recipe_without(share_sequences=False)),
    "caching": Mechanism("KV blocks of prompts reused (4.4.2)", _recipe_without(cache_block=0)),
}
"""Mechanisms that `Recipe.without` and `--without` switch off, by name."""


def plain(recipe: Recipe) -> Recipe:
    """Returns a recipe with all of `MECHANISMS` switched off: floating point, one rank on a device."""
    return recipe.without(*MECHANISMS)


def parse_mechanisms(texts: Iterable[str]) -> list[str]:
    """Returns the names in comma-separated lists."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]
