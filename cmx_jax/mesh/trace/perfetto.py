"""A program's schedule for ui.perfetto.dev: products and collectives in order, at the machine's peak rates.

It is a picture of what waits for what, not a prediction.
"""

import json
import math
from pathlib import Path

from cmx_jax.mesh.supernode import Supernode
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Contents, Product
from cmx_jax.mesh.trace.ops.place import groups_of, plane
from cmx_jax.mesh.trace.table import View

COMPUTE, NETWORK = 1, 2  # tracks


def timeline(contents: Contents, view: View) -> dict[str, object]:
    """Returns trace events in microseconds, in the JSON form that Chrome and Perfetto read.

    A loop's body appears once, and each event is as long as all its executions together. An asynchronous
    collective overlaps with what follows until it is awaited; any other blocks what follows.
    """
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((COMPUTE, "products"), (NETWORK, "collectives"))
    ]
    now, network_free = 0.0, 0.0  # end of the last product, and of the last collective
    ends: dict[int, float] = {}  # of asynchronous collectives, by the position that awaits them
    steps: list[Product | Collective] = sorted(
        (*contents.products, *contents.collectives), key=lambda step: step.position
    )
    for step in steps:
        for position in [p for p in ends if p <= step.position]:
            now = max(now, ends.pop(position))
        if isinstance(step, Product):
            begin, duration = now, _compute_us(step, view)
            now += duration
            name, tid = step.scope.rsplit("/", 1)[-1] or "product", COMPUTE
            details = {"dtype": step.dtype, "flops": step.flops}
        else:
            begin, duration = max(now, network_free), _wire_us(step, contents, view)
            network_free = begin + duration
            if step.awaited_at is None:
                now = network_free
            else:
                ends[step.awaited_at] = network_free
            name, tid = f"{step.op} {','.join(step.axes)}", NETWORK
            details = {"operand": f"{step.dtype}{list(step.shape)}", "wire_bytes": step.wire_bytes}
        args = {"executions": step.count or "data decide", "scope": step.scope, **details}
        events.append(
            {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": begin, "dur": duration, "args": args}
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def write_timeline(path: Path, contents: Contents, view: View) -> None:
    """Writes `timeline` to a file."""
    path.write_text(json.dumps(timeline(contents, view)))


def _compute_us(product: Product, view: View) -> float:
    """Returns the time of all executions at the peak rate of a rank's cores or of its memory."""
    npu, useful = view.machine.npu, view.useful(product)
    dies = npu.dies / view.ranks_per_npu
    peak = npu.int8_tops_per_die if product.dtype == "int8" else npu.bf16_tflops_per_die
    flops = product.flops if useful is None else useful
    return product.known * max(
        flops / (peak * dies * 1e6), product.bytes / (npu.hbm_gb_s / view.ranks_per_npu * 1e3)
    )


def _wire_us(collective: Collective, contents: Contents, view: View) -> float:
    """Returns the time of all executions at the bandwidth of the widest boundary that messages cross."""
    groups = collective.groups or groups_of(collective.axes, contents.axes)
    crossed = plane(groups, view.machine, view.ranks_per_npu, view.first_npu)
    payload = view.payload(collective)
    moved = collective.wire_bytes if payload is None else payload
    return collective.known * moved / (bandwidth(view.machine, crossed) / view.ranks_per_npu * 1e3)


def bandwidth(machine: Supernode, boundary: str) -> float:
    """Returns the GB/s of an NPU, one way, across a boundary (`cmx_jax.mesh.trace.ops.place.plane`)."""
    if boundary == "die pair":
        return machine.npu.die_to_die_gb_s or math.inf
    return machine.planes[1 if boundary == "RDMA" else 0].npu_gb_s
