"""Starting and switching models from object storage, local DRAM and the pool (section 4.4.3, table 2).

* *no cache*: every instance loads its model from a bucket of object storage (OBS) that all share.
* *local DRAM*: an instance's first load is the same; then its node keeps some models in DRAM.
* *EMS*: a model is loaded once, into the pool, from which every instance reads; the pool keeps all models.

A switch draws one of the models, each as likely as any other. A model that is not cached is loaded by its
instance alone.
"""

import math
from dataclasses import asdict, dataclass, replace

import jax.numpy as jnp

from cmx_jax.analysis.cost.operator_times import pool_read_s
from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.leaf import leaf_dtype
from cmx_jax.model.weights import all_leaves, int8_fields


@dataclass(frozen=True)
class Tier:
    """Metrics of one way to store models.

    Attributes:
      cold_start_s: Seconds until all instances have started when nothing is cached.
      warm_start_s: Seconds to start an instance whose model is cached; None if models are never cached.
      dram_models: DRAM for cached models, as a multiple of one model's size.
      hit_rate: Share of switches that find their model cached.
      switch_s: Mean seconds of a switch.
    """

    cold_start_s: float
    warm_start_s: float | None
    dram_models: int
    hit_rate: float
    switch_s: float


METRICS = {
    "cold_start_s": "cold start, s",
    "warm_start_s": "warm start, s",
    "dram_models": "DRAM, times the model",
    "hit_rate": "switches that hit",
    "switch_s": "mean switch, s",
}
PUBLISHED = {
    "no cache": Tier(2560, None, 0, 0.0, 320),
    "local DRAM": Tier(2560, 5, 8, 0.125, 281),
    "EMS": Tier(320, 5, 1, 1.0, 5),
}
"""Table 2, called illustrative there: 671 GB, 8 instances, 8 models, a bucket of 2.5 GB/s."""
NOTES = (
    "one load takes ~320 s in table 2, and 671 GB at 2.5 GB/s are 268 s: "
    "the cause of the rest is not published",
    "warm starts of ~5 s are one die's path to the pool (147 GB/s); with --dies more read at once",
)


@dataclass(frozen=True)
class Switching:
    """Table 2 for a model; see `switching` for the parameters.

    Attributes:
      bytes: Bytes of the model's weights.
      tiers: Metrics by name of the tier.
      published: Table 2's metrics by name of the tier.
      notes: Remarks on the published numbers.
    """

    bytes: float
    instances: int
    models: int
    local_models: int
    dies: int
    obs_gb_s: float
    tiers: dict[str, Tier]
    published: dict[str, Tier]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The result as a JSON object, without metrics that a tier does not have."""
        tables = {
            table: {name: _present(tier) for name, tier in tiers.items()}
            for table, tiers in (("tiers", self.tiers), ("published", self.published))
        }
        return asdict(self) | tables


def _present(tier: Tier) -> dict[str, float]:
    return {name: value for name, value in asdict(tier).items() if value is not None}


def model_bytes(c: ModelConfig, weights: str) -> int:
    """Bytes of a model's weights without its MTP layers.

    Args:
      c: Config of the model.
      weights: `int8`, for all matrices that can be INT8, or `bfloat16`.

    Raises:
      CmxError: `weights` is something else.
    """
    if weights not in ("int8", "bfloat16"):
        raise CmxError(f"weights are {weights!r}, expected int8 or bfloat16")
    c = replace(c, int8=int8_fields(c, False)) if weights == "int8" else c
    leaves = all_leaves(c, c.n_routed_experts, mtp=False)
    return sum(math.prod(leaf.shape) * leaf_dtype(leaf, jnp.bfloat16).itemsize for leaf in leaves)


def switching(
    size: float,
    *,
    instances: int = 8,
    models: int = 8,
    local_models: int = 1,
    obs_gb_s: float = 2.5,
    dies: int = 1,
) -> Switching:
    """Computes table 2 for a model.

    Args:
      size: Bytes of the model's weights.
      instances: Number of instances that serve the model and load it at once in a cold start.
      models: Number of models of that size among which instances switch.
      local_models: Number of models that an instance's DRAM keeps.
      obs_gb_s: Bandwidth of the bucket, GB/s.
      dies: Number of dies of an instance that read DRAM at once (table 1: 147 GB/s each).

    Raises:
      CmxError: A number is not above zero, or not finite.
    """
    counts = {"instances": instances, "models": models, "local_models": local_models, "dies": dies}
    for name, value in {**counts, "obs_gb_s": obs_gb_s, "size": size}.items():
        if not 0 < value < math.inf:
            raise CmxError(f"{name} is {value:g}, expected more than 0")
    load, warm = size / (obs_gb_s * 1e9), pool_read_s(size, dies)
    hit = min(local_models / models, 1.0)
    tiers = {
        "no cache": Tier(instances * load, None, 0, 0.0, load),
        "local DRAM": Tier(instances * load, warm, instances, hit, hit * warm + (1 - hit) * load),
        "EMS": Tier(load, warm, 1, 1.0, warm),
    }
    return Switching(size, instances, models, local_models, dies, obs_gb_s, tiers, PUBLISHED, NOTES)


def render(result: Switching) -> str:
    """Formats each metric of each tier, with table 2's in parentheses."""
    setup = f"{result.bytes / 1e9:,.0f} GB, {result.instances} instances, {result.models} models, OBS "
    lines = [f"{setup}{result.obs_gb_s:g} GB/s; in parentheses table 2 (671 GB, 8, 8, 2.5 GB/s)"]
    lines.append(f"{'':24}" + "".join(f"{tier:>20}" for tier in result.tiers))
    for name, title in METRICS.items():
        cells = [_cell(name, tier, result.published[key]) for key, tier in result.tiers.items()]
        lines.append(f"{title:24}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, *result.notes])


def _cell(name: str, tier: Tier, published: Tier) -> str:
    value = getattr(tier, name)
    if value is None:
        return "-"
    if name == "hit_rate":
        return f"{value:.1%} ({getattr(published, name):.1%})"
    return f"{value:,.1f} ({getattr(published, name):,g})"
