"""Counters of an engine for metrics, and the load of its instances for status pages."""

from collections.abc import Mapping
from typing import Any

from cmx_jax.serving.deploy.site import NpuRange
from cmx_jax.serving.engine.engine import Engine


def engine_counters(engine: Engine) -> dict[str, Any]:
    """Returns counters and gauges of an engine, by name.

    They may be read while the engine runs: each is right, but they may be a step apart.
    """
    instances, context = engine.instances, engine.mover.context
    traffic = [i.traffic for i in engine.decoders]
    pages = sum(i.capacity.pages * i.allocator.ranks for i in instances)
    return {
        "waiting": len(engine.waiting),
        "transfers": len(engine.transfers),
        "running": sum(len(i.allocator.places) for i in instances),
        "kv_cache_usage": sum(i.allocator.load for i in instances) / pages,
        "prefix_queries": context.queries if context else 0,
        "prefix_hits": context.hits if context else 0,
        "drafts": sum(int(t.proposed.sum()) for t in traffic),
        "accepted": sum(int(t.accepted.sum()) for t in traffic),
        "step_s": engine.step_s,
        "steps": engine.steps,
        "preemptions": engine.scheduler.preempted,
        "kv_moved": engine.outbox.counts["acknowledged"],
        "kv_lost": engine.mover.lost + engine.outbox.counts["expired"],
        "eplb_moves": len(engine.moves),
    }


def instance_loads(engine: Engine, npus: Mapping[str, NpuRange]) -> list[dict[str, Any]]:
    """Returns the roles and the load of each instance.

    Args:
      engine: Engine of the instances.
      npus: NPUs of each instance, by its name.
    """
    roles = {"prefill": engine.prefill, "decode": engine.decoders}
    return [
        {
            "name": i.name,
            "roles": [role for role, instances in roles.items() if i in instances],
            "first_npu": npus[i.name].first,
            "npus": npus[i.name].size,
            "requests": len(i.allocator.places),
            "prefilling": len(i.allocator.prefilling),
            "pages_used": i.allocator.load,
            "pages": i.capacity.pages * i.allocator.ranks,
        }
        for i in engine.instances
    ]
