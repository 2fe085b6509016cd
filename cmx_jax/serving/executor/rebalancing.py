"""EPLB of several instances by the load that they measured together."""

from collections.abc import Sequence

from cmx_jax.model.rebalance import Move
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.executor.stats import total_load


def rebalance_all(instances: Sequence[Instance]) -> list[Move]:
    """Places the experts of all instances by the sum of their loads since the last time."""
    load = total_load(instance.traffic.load for instance in instances)
    return [instance.rebalance(load) for instance in instances]
