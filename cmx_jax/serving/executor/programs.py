"""What of an instance lies on devices: weights, cache, and the programs over them.

Every call takes host arrays and goes through `run`. An instance may span several processes, each of which has
some of its ranks (`spanning.py`): then one of them tells the others what it runs, and all run it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner
from cmx_jax.model.cache import PagedCache, abstract_cache, cache_dtype
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.rebalance import Placement, initial, rehoused
from cmx_jax.model.sampling import Sampling
from cmx_jax.model.steps import DecodeBatch, PrefillBatch, StepOutput, compile_steps, step_specs
from cmx_jax.model.weights import Weights
from cmx_jax.serving.ems.keys import Fingerprint
from cmx_jax.serving.scheduling.allocator import Capacity

Tell = Callable[[str, list[np.ndarray], dict[str, bool]], None]


@dataclass(eq=False)
class Programs:
    """A model on the ranks of one layout.

    `weights` are whole arrays with their experts where `placement` says. With MTP layers among them every
    decode step verifies `num_speculative_tokens` drafts. `kv_cache_dtype` is the type of the rows in pages.
    `tell`, where it is set, tells other processes what runs.
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

    @property
    def page(self) -> tuple[Any, ...]:
        """Shape `[L, W, C]` and type of a page."""
        return *self.cache.rows.shape[1:], str(self.cache.dtype)

    def fingerprint(self, model: str = "") -> Fingerprint:
        """All that the bytes of its pages depend on, for others to compare; `model`: an id of the weights."""
        *page, kept = self.page
        return Fingerprint(model=model, page=tuple(page), dtype=self.dtype, kv_cache_dtype=kept)

    @property
    def here(self) -> bool:
        """Whether all its ranks are in this process."""
        return bool(self.cache.rows.is_fully_addressable)

    def run(self, op: str, given: Any, **flags: bool) -> Any:
        """Runs a program: `prefill`, `decode`, `take`, `put`, `score`, `house` or `empty`.

        Args:
          op: which.
          given: what it takes, on the host.
          flags: of a step, see `cmx_jax.model.steps.Steps`.

        Returns:
          Of a step its output, which may not be there yet (`fetched` waits for it); pages, logits.
        """
        if self.tell is not None:
            self.tell(op, jax.tree.leaves(given), flags)
        return getattr(self, f"_{op}")(given, **flags)

    def follow(self, op: str, leaves: list[np.ndarray], flags: dict[str, bool]) -> None:
        """Runs what another process tells."""
        n = 0
        trees: dict[str, Any] = {
            "prefill": PrefillBatch(n, n, n, n, n, n, n, Sampling(n, n, n, n)),
            "decode": DecodeBatch(n, n, n, Sampling(n, n, n, n)),
            "take": n,
            "put": (n, self.cache.pages),
            "score": (n, n),
            "house": self.placement,
            "empty": (),
        }
        given = jax.tree.unflatten(jax.tree.structure(trees[op]), leaves)
        output = getattr(self, f"_{op}")(given, **flags)
        if op in ("prefill", "decode"):
            self.fetched(output)

    def fetched(self, tree: Any) -> Any:
        """Results on the host, those of other processes' ranks too."""
        return jax.device_get(tree) if self.here else multihost_utils.process_allgather(tree, tiled=True)

    def _prefill(self, batch: PrefillBatch, **flags: bool) -> StepOutput:
        placed = self.runner.put(batch, self._specs.prefill)
        self.cache, output = self.steps.prefill(self.weights, self.cache, placed, **flags)
        return output

    def _decode(self, batch: DecodeBatch, **flags: bool) -> StepOutput:
        placed = self.runner.put(batch, self._data)
        self.cache, output = self.steps.decode(self.weights, self.cache, placed, **flags)
        return output

    def _take(self, ids: np.ndarray) -> Any:
        pages = self.steps.take_pages(self.cache, self.runner.put(ids, self._data))
        return pages if self.here else self.fetched(pages)

    def _put(self, given: tuple[np.ndarray, Any]) -> None:
        self.cache = self.steps.put_pages(self.cache, *self.runner.put(given, (self._data, self._data)))

    def _score(self, given: tuple[np.ndarray, np.ndarray]) -> Any:
        logits = self.steps.score(self.weights, *self.runner.put(given, (self._data, self._data)))
        return logits if self.here else self.fetched(logits)

    def _house(self, after: Placement) -> None:
        c, layout = self.config, self.layout
        self.weights = rehoused(self.weights, self.placement, after, c, layout, self.runner)
        self.placement = after

    def _empty(self, _: tuple[()]) -> None:
        self.cache = self._zeros()

    def _zeros(self) -> PagedCache:
        pages, width = self.capacity.pages * self.layout.data_ranks, self.capacity.page_width
        shapes = abstract_cache(self.config, pages, width, self.kv_cache_dtype, self.weights.mtp is not None)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
        return self.runner.put(zeros, self._data)
