"""The least that a step could take on a machine."""

from typing import Any

from cmx_jax.analysis.cost.constants import Machine
from cmx_jax.analysis.cost.operators import peak
from cmx_jax.analysis.predict.operators import Operator, Step, attention_work, loops
from cmx_jax.analysis.predict.tasks import nodes_reached
from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.model.sharding import shared_in_slots


def roofline(of: Step, on: Machine) -> dict[str, Any]:
    """The least that the step could take: all at its peak, everything overlapped with everything, even
    load."""
    ms = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    copies = of.c.num_experts_per_tok + shared_in_slots(of.c, of.layout)
    away = (
        of.stream_tokens * copies * max(of.layout.expert_ranks - on["near_ranks"], 0) / of.layout.expert_ranks
    )
    for loop in loops(of):
        for operator in (o for operators in loop.streams.values() for o in operators):
            for what, us in _least(operator, of, on, away).items():
                ms[what] += loop.times * us / 1e3
    bound = max(ms, key=lambda what: ms[what])
    return {"step_ms": ms[bound], "bound": bound, **{f"{what}_ms": value for what, value in ms.items()}}


def _least(operator: Operator, of: Step, on: Machine, away: float) -> dict[str, float]:
    c, stage, network = of.c, operator.stage, on["network_peak_gb_s"] * 1e3
    memory = on["hbm_gb_s"] * 1e3
    if stage == "FusedAttention":
        flops, moved = attention_work(operator, of)
        return {"compute": flops / peak(on, "bfloat16") / 1e6, "memory": moved / memory}
    if stage in ("Dispatch", "Combine"):
        wide = c.hidden_size * 2 if stage == "Combine" else message_bytes(c.hidden_size, of.layout.wire)
        if on.kind == "gpu" and of.kind == "prefill":
            reached = nodes_reached(c, of.layout.expert_ranks, on) - 1
            return {"network": of.stream_tokens * max(reached, 0) * wide / network}
        if on.kind == "gpu":  # what stays on the node may go by NVLink
            away = away * max(1 - on.ranks_per_node / of.layout.expert_ranks, 0)
        return {"network": away * wide / network}
    compute = moved = 0.0
    rows = of.stream_tokens * (c.num_experts_per_tok + shared_in_slots(c, of.layout))
    for p in operator.products:
        batch, _, k, n = p.shape
        item = 1 if p.dtype == "int8" else 2
        if stage == "MLP":
            batch = of.layout.slots_per_rank
            compute += 2 * rows * k * n / peak(on, p.dtype) / 1e6
        else:
            compute += p.flops / peak(on, p.dtype) / 1e6
        moved += batch * k * n * item
    sent = sum(x.wire_bytes for x in operator.collectives)
    return {"compute": compute, "memory": moved / memory, "network": sent / network}
