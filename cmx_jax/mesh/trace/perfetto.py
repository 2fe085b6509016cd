"""A program's schedule for ui.perfetto.dev: products and collectives in their order, each as long as the
machine's peak rates make it. A picture of what waits for what, not a prediction."""

import json
import math
from pathlib import Path
from typing import Any

from cmx_jax.mesh.supernode import Supernode
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Found, Product
from cmx_jax.mesh.trace.ops.place import groups_of, plane
from cmx_jax.mesh.trace.table import View

COMPUTE, NETWORK = 1, 2  # tracks


def timeline(found: Found, view: View) -> dict[str, Any]:
    """Trace events (the JSON form that Chrome and Perfetto read), microseconds.

    A loop's body stands there once, each event as long as all its executions together. A collective that is
    awaited later runs beside what stands between; any other holds up what follows.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((COMPUTE, "products"), (NETWORK, "collectives"))
    ]
    now, free = 0.0, 0.0  # of compute, of the network
    ends: dict[int, float] = {}  # of what is under way, by where it is awaited
    steps: list[Product | Collective] = sorted(
        (*found.products, *found.collectives), key=lambda step: step.at
    )
    for step in steps:
        for done in [at for at in ends if at <= step.at]:
            now = max(now, ends.pop(done))
        if isinstance(step, Product):
            begin, lasts = now, _compute_us(step, view)
            now += lasts
            name, tid = step.scope.rsplit("/", 1)[-1] or "product", COMPUTE
            more = {"dtype": step.dtype, "flops": step.flops}
        else:
            begin, lasts = max(now, free), _wire_us(step, found, view)
            free = begin + lasts
            if step.done is None:
                now = free
            else:
                ends[step.done] = free
            name, tid = f"{step.op} {','.join(step.axes)}", NETWORK
            more = {"operand": f"{step.dtype}{list(step.shape)}", "wire_bytes": step.wire_bytes}
        args = {"executions": step.count or "data decide", "scope": step.scope, **more}
        events.append(
            {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": begin, "dur": lasts, "args": args}
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def write_timeline(path: Path, found: Found, view: View) -> None:
    """`timeline` to a file."""
    path.write_text(json.dumps(timeline(found, view)))


def _compute_us(product: Product, view: View) -> float:
    """All executions, at the peak of a rank's cores or of its memory."""
    npu, part = view.machine.npu, view.useful(product)
    dies = npu.dies / view.ranks_per_npu
    peak = npu.int8_tops_per_die if product.dtype == "int8" else npu.bf16_tflops_per_die
    flops = product.flops if part is None else part
    return product.known * max(
        flops / (peak * dies * 1e6), product.bytes / (npu.hbm_gb_s / view.ranks_per_npu * 1e3)
    )


def _wire_us(collective: Collective, found: Found, view: View) -> float:
    """All executions, at the bandwidth of the plane that the widest group crosses."""
    groups = collective.groups or groups_of(collective.axes, found.axes)
    where = plane(groups, view.machine, view.ranks_per_npu, view.first_npu)
    part = view.payload(collective)
    moved = collective.wire_bytes if part is None else part
    return collective.known * moved / (bandwidth(view.machine, where) / view.ranks_per_npu * 1e3)


def bandwidth(machine: Supernode, where: str) -> float:
    """GB/s of an NPU, one way, for what crosses a boundary (`cmx_jax.mesh.trace.ops.place.plane`)."""
    if where == "die pair":
        return machine.npu.die_to_die_gb_s or math.inf
    return machine.planes[1 if where == "RDMA" else 0].npu_gb_s
