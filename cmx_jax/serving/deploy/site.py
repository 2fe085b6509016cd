"""Starts a recipe's instances on their NPUs, and keeps them for later changes of the pools."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import host_devices
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.pools import Pools, Slice, carve
from cmx_jax.mesh.runners import make_runner
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.model.checkpoint.load import HostParts
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.deploy.recipe_layouts import MAX_MODEL_LEN, recipe_capacity, recipe_layout
from cmx_jax.serving.ems import MPServer, Pool
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance

CACHE_DRAM_BYTES, CACHE_DISK_BYTES = 64 << 20, 256 << 20  # tiers of a recipe's caching pool


class NpuRange(NamedTuple):
    """Consecutive NPUs of a supernode.

    Attributes:
      first: Index of the first NPU.
      size: Number of NPUs.
    """

    first: int
    size: int


@dataclass(kw_only=True)
class Site:
    """Makes instances of a model on a supernode, and keeps those that it started.

    Attributes:
      model: The model to serve.
      recipe: Layouts and options of the instances.
    """

    model: Model
    recipe: Recipe
    _started: dict[Slice, Instance] = field(default_factory=dict, init=False)
    _resources: ExitStack = field(default_factory=ExitStack, init=False)
    _read: dict[Layout, HostParts] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.recipe.engine.runner == "devices":
            host_devices(CLOUDMATRIX384.npus)  # all of the supernode, not just what the first instance needs

    @classmethod
    def read(cls, name_or_path: str | Path, recipe: Recipe) -> "Site":
        """Returns the site of a model, read in the types of a recipe.

        Raises:
          CmxError: The model is unknown or refused.
        """
        model = Model.read(name_or_path, recipe.engine.dtype, recipe.engine.quant)
        return cls(model=model, recipe=recipe)

    @property
    def context(self) -> int:
        """Longest sequence that there is room for, in tokens."""
        return self.recipe.engine.context(self.model.config.max_position_embeddings, MAX_MODEL_LEN)

    def carve(self, prefill: int, decode: int) -> Pools:
        """Returns the slices of this many prefill and decode instances.

        Raises:
          CmxError: The instances do not fit the supernode, or a number is below 1.
        """
        if prefill < 1 or decode < 1:
            raise CmxError(f"{prefill} prefill and {decode} decode instances, expected one of each at least")
        recipe = self.recipe
        return carve(
            prefill=prefill, decode=decode, decode_npus=recipe.decode_npus, prefill_npus=recipe.prefill_npus
        )

    def instances(self, pools: Pools) -> tuple[list[Instance], list[Instance]]:
        """Returns prefill and decode instances on these slices; existing ones stay."""
        kept = {s: self._started.get(s) or self._start(s) for s in (*pools.prefill, *pools.decode)}
        self._started = kept
        return [kept[s] for s in pools.prefill], [kept[s] for s in pools.decode]

    def start(self) -> Engine:
        """Starts all instances of the recipe and its caching pool, and returns their engine.

        Raises:
          CmxError: The instances do not fit the supernode or the model.
        """
        recipe = self.recipe
        engine = Engine(
            *self.instances(self.carve(recipe.prefill_instances, recipe.decode_instances)),
            eplb_interval=recipe.engine.eplb_interval,
            prefill_eplb_interval=recipe.prefill_eplb_interval,
        )
        if recipe.cache_block:
            folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="cmx-cache-"))
            store = MPServer(Path(folder), dram=CACHE_DRAM_BYTES, disk=CACHE_DISK_BYTES)
            pool = Pool({"here": store})
            self._resources.callback(pool.close)
            engine.mover.reuse_blocks(pool, recipe.cache_block, self.model.id)
        return engine

    def close(self) -> None:
        """Ends the caching pool that `start` started."""
        self._resources.close()

    def npus(self) -> dict[str, NpuRange]:
        """Returns the NPUs of each instance, by its name."""
        return {s.name: NpuRange(s.start, s.npus) for s in self._started}

    def _start(self, s: Slice) -> Instance:
        recipe, args = self.recipe, self.recipe.engine
        layout = recipe_layout(recipe, s.role, self.model.config, self.model.dtype)
        first = s.start if args.runner == "devices" else 0
        runner = make_runner(args.runner, layout.axes, first, layout.ranks_per_npu)
        shared = self._read.setdefault(layout, {})  # instances of equal layouts read the weights once
        capacity = recipe_capacity(recipe, s.role, self.context)
        drafts = args.drafts(self.model.checkpoint.mtp)
        return self.model.instance(s.name, layout, runner, capacity, drafts, args.kv_cache_dtype, shared)
