"""The device side of an instance: weights, KV cache and compiled programs.

Every call takes host arrays and goes through `run`. An instance may span several processes, each of which has
some of its ranks (`spanning.py`): then process 0 tells the others what it runs, and all run it.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.batch import DecodeBatch, PrefillBatch, StepOutput
from cmx_jax.model.cache import PagedCache, abstract_cache, cache_dtype
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.rebalance import Placement, initial, relocate_experts
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import compile_steps, step_specs
from cmx_jax.model.weights import Weights
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.scheduling.allocator import Capacity


class Op(enum.StrEnum):
    """An operation on the devices; `Programs.run` runs it."""

    PREFILL = "prefill"
    DECODE = "decode"
    TAKE_PAGES = "take_pages"
    PUT_PAGES = "put_pages"
    SCORE = "score"
    RELOCATE = "relocate"
    EMPTY = "empty"


Tell = Callable[[Op, list[np.ndarray], dict[str, bool]], None]


@dataclass(eq=False)
class Programs:
    """A model on the ranks of one layout.

    Attributes:
      name: Name of the instance.
      config: Config of the model.
      layout: Layout of the ranks.
      runner: Places arrays on the ranks and runs programs there.
      weights: Whole arrays with their experts at the slots of `placement`. With MTP layers every decode step
        verifies `num_speculative_tokens` drafts.
      capacity: Capacity of each rank.
      dtype: Type of weights and arithmetic.
      num_speculative_tokens: MTP drafts of a decode step; 0 without MTP layers.
      kv_cache_dtype: Type of the rows in pages; `auto` is `dtype`.
      tell: Tells other processes what runs; None: the instance is in this process alone.
    """

    name: str
    config: ModelConfig
    layout: Layout
    runner: Runner
    weights: Weights
    capacity: Capacity
    dtype: str = "float32"
    num_speculative_tokens: int = 0
    kv_cache_dtype: str = "auto"
    tell: Tell | None = None

    def __post_init__(self) -> None:
        c = self.config
        mtp = self.weights.mtp is not None
        if mtp != (self.num_speculative_tokens > 0):
            raise CmxError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, expected "
                + ("1 or more with MTP layers" if mtp else "0 without MTP layers")
            )
        if self.capacity.sequences % self.layout.microbatches:
            raise CmxError(
                f"{self.capacity.sequences} sequences a rank do not divide into {self.layout.microbatches} "
                "microbatches, expected a multiple"
            )
        self.kv_cache_dtype = cache_dtype(self.kv_cache_dtype, self.dtype)
        self.steps = compile_steps(c, self.layout, self.runner, mtp, self.kv_cache_dtype)
        self._specs = step_specs(c, self.layout, mtp)
        self._data = self._specs.data
        self.weights = self.runner.put(self.weights, self._specs.weights)
        self.placement = initial(c, self.layout, mtp)
        self.cache: PagedCache = self._zeros()
        self._methods: dict[Op, Callable[..., Any]] = {
            Op.PREFILL: self._prefill,
            Op.DECODE: self._decode,
            Op.TAKE_PAGES: self._take_pages,
            Op.PUT_PAGES: self._put_pages,
            Op.SCORE: self._score,
            Op.RELOCATE: self._relocate,
            Op.EMPTY: self._empty,
        }

    @property
    def page(self) -> tuple[Any, ...]:
        """Shape `[L, W, C]` and type of a page."""
        return *self.cache.rows.shape[1:], str(self.cache.dtype)

    def fingerprint(self, model: str = "") -> Fingerprint:
        """Returns everything that the bytes of a page depend on, for comparison with other instances.

        Args:
          model: An id of the weights.
        """
        *page, kv_cache_dtype = self.page
        return Fingerprint(model=model, page=tuple(page), dtype=self.dtype, kv_cache_dtype=kv_cache_dtype)

    @property
    def is_local(self) -> bool:
        """True if all its ranks are in this process."""
        return bool(self.cache.rows.is_fully_addressable)

    def run(self, op: Op, arguments: Any, **flags: bool) -> Any:
        """Runs an operation, in all processes of the instance.

        Args:
          op: The operation.
          arguments: Arguments of its method, on the host.
          flags: Flags of a step; see `cmx_jax.model.steps.Steps`.

        Returns:
          Step output (asynchronous; `fetched` waits until it is ready), pages, or logits, depending on `op`.
        """
        if self.tell is not None:
            self.tell(op, jax.tree.leaves(arguments), flags)
        return self._methods[op](arguments, **flags)

    def follow(self, op: Op, leaves: list[np.ndarray], flags: dict[str, bool]) -> None:
        """Runs an operation that process 0 runs, with the leaves of its arguments."""
        leaf = 0
        sampling = Sampling(leaf, leaf, leaf, leaf)
        trees: dict[Op, Any] = {
            Op.PREFILL: PrefillBatch(leaf, leaf, leaf, leaf, leaf, leaf, leaf, sampling),
            Op.DECODE: DecodeBatch(leaf, leaf, leaf, sampling),
            Op.TAKE_PAGES: leaf,
            Op.PUT_PAGES: (leaf, self.cache.pages),
            Op.SCORE: (leaf, leaf),
            Op.RELOCATE: self.placement,
            Op.EMPTY: (),
        }
        arguments = jax.tree.unflatten(jax.tree.structure(trees[op]), leaves)
        output = self._methods[op](arguments, **flags)
        if op in (Op.PREFILL, Op.DECODE):
            self.fetched(output)

    def fetched(self, tree: Any) -> Any:
        """Returns results on the host, those of other processes' ranks included."""
        return jax.device_get(tree) if self.is_local else multihost_utils.process_allgather(tree, tiled=True)

    def _prefill(self, batch: PrefillBatch, **flags: bool) -> StepOutput:
        placed = self.runner.put(batch, self._specs.prefill)
        self.cache, output = self.steps.prefill(self.weights, self.cache, placed, **flags)
        return output

    def _decode(self, batch: DecodeBatch, **flags: bool) -> StepOutput:
        placed = self.runner.put(batch, self._data)
        self.cache, output = self.steps.decode(self.weights, self.cache, placed, **flags)
        return output

    def _take_pages(self, ids: np.ndarray) -> Any:
        pages = self.steps.take_pages(self.cache, self.runner.put(ids, self._data))
        return pages if self.is_local else self.fetched(pages)

    def _put_pages(self, ids_and_pages: tuple[np.ndarray, Any]) -> None:
        placed = self.runner.put(ids_and_pages, (self._data, self._data))
        self.cache = self.steps.put_pages(self.cache, *placed)

    def _score(self, tokens_and_lengths: tuple[np.ndarray, np.ndarray]) -> Any:
        placed = self.runner.put(tokens_and_lengths, (self._data, self._data))
        logits = self.steps.score(self.weights, *placed)
        return logits if self.is_local else self.fetched(logits)

    def _relocate(self, after: Placement) -> None:
        """Moves the experts' weights to another placement."""
        c, layout = self.config, self.layout
        self.weights = relocate_experts(self.weights, self.placement, after, c, layout, self.runner)
        self.placement = after

    def _empty(self, _: tuple[()]) -> None:
        """Replaces the cache by zeros."""
        self.cache = self._zeros()

    def _zeros(self) -> PagedCache:
        pages, width = self.capacity.pages * self.layout.data_ranks, self.capacity.page_width
        shapes = abstract_cache(self.config, pages, width, self.kv_cache_dtype, self.weights.mtp is not None)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
        return self.runner.put(zeros, self._data)
