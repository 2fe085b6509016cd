"""Starting and switching models from object storage, local DRAM and the pool (section 4.4.3, table 2).

* *no cache*: every instance loads its model from a bucket of object storage (OBS) that all share.
* *local DRAM*: so it does the first time; then each instance's node keeps some models.
* *EMS*: a model is loaded once, into the pool, from which every instance reads; the pool keeps all models.

A switch draws one of the models, each as likely as any other. What it misses it loads alone.
"""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from cmx_jax.analysis.cost.operators import pool_read_s
from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.weights import all_leaves, int8_fields, leaf_dtype

METRICS = {
    "cold_start_s": "cold start, s",
    "warm_start_s": "warm start, s",
    "dram_models": "DRAM, times the model",
    "hit_rate": "switches that hit",
    "switch_s": "mean switch, s",
}
PUBLISHED = {
    "no cache": {"cold_start_s": 2560, "dram_models": 0, "hit_rate": 0.0, "switch_s": 320},
    "local DRAM": {
        "cold_start_s": 2560,
        "warm_start_s": 5,
        "dram_models": 8,
        "hit_rate": 0.125,
        "switch_s": 281,
    },
    "EMS": {"cold_start_s": 320, "warm_start_s": 5, "dram_models": 1, "hit_rate": 1.0, "switch_s": 5},
}
"""Table 2, called illustrative there: 671 GB, 8 instances, 8 models, a bucket of 2.5 GB/s."""
NOTES = (
    "one load takes ~320 s in table 2, and 671 GB at 2.5 GB/s are 268 s: what the rest is, is not published",
    "warm starts of ~5 s are one die's path to the pool (147 GB/s); with --dies more read at once",
)


def model_bytes(c: ModelConfig, weights: str) -> int:
    """Bytes of a model's weights without its MTP layers, `int8` for the matrices that may be, or `bfloat16`.

    Raises:
      CmxError: `weights` is neither.
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
) -> dict[str, Any]:
    """Table 2 for a model.

    Args:
      size: its bytes.
      instances: that serve it, and load it at once when all start cold.
      models: of that size, among which instances switch.
      local_models: that an instance's DRAM keeps.
      obs_gb_s: of the bucket.
      dies: of an instance that read DRAM at once (table 1: 147 GB/s each).

    Returns:
      `tiers`: by name, `METRICS`; `published`: table 2's; `notes`.

    Raises:
      CmxError: a number that is not above zero.
    """
    given = {"instances": instances, "models": models, "local_models": local_models, "dies": dies}
    for name, value in {**given, "obs_gb_s": obs_gb_s, "size": size}.items():
        if not 0 < value < math.inf:
            raise CmxError(f"{name} is {value:g}, expected more than 0")
    load, warm = size / (obs_gb_s * 1e9), pool_read_s(size, dies)
    hit = min(local_models / models, 1.0)
    tiers: dict[str, dict[str, float]] = {
        "no cache": {"cold_start_s": instances * load, "dram_models": 0, "hit_rate": 0.0, "switch_s": load},
        "local DRAM": {
            "cold_start_s": instances * load,
            "warm_start_s": warm,
            "dram_models": instances,
            "hit_rate": hit,
            "switch_s": hit * warm + (1 - hit) * load,
        },
        "EMS": {
            "cold_start_s": load,
            "warm_start_s": warm,
            "dram_models": 1,
            "hit_rate": 1.0,
            "switch_s": warm,
        },
    }
    about = {"bytes": size, **given, "obs_gb_s": obs_gb_s}
    return {**about, "tiers": tiers, "published": PUBLISHED, "notes": list(NOTES)}


def render(found: dict[str, Any]) -> str:
    """Each metric of each tier, and in parentheses table 2's."""
    about = f"{found['bytes'] / 1e9:,.0f} GB, {found['instances']} instances, {found['models']} models, OBS "
    lines = [f"{about}{found['obs_gb_s']:g} GB/s; in parentheses table 2 (671 GB, 8, 8, 2.5 GB/s)"]
    lines.append(f"{'':24}" + "".join(f"{tier:>20}" for tier in found["tiers"]))
    for name, title in METRICS.items():
        cells = [_cell(name, of, found["published"][tier]) for tier, of in found["tiers"].items()]
        lines.append(f"{title:24}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*lines, *found["notes"]])


def _cell(name: str, of: dict[str, float], published: dict[str, float]) -> str:
    if name not in of:
        return "-"
    if name == "hit_rate":
        return f"{of[name]:.1%} ({published[name]:.1%})"
    return f"{of[name]:,.1f} ({published[name]:,g})"
