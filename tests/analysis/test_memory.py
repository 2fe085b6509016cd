"""Memory of the exchange's buffers; that of weights and pages is in `tests/scripts/test_full_size.py`."""

import math

import jax.numpy as jnp
import pytest

from cmx_jax.analysis.trace.memory import by_layout
from cmx_jax.analysis.trace.trace_model import trace_model
from cmx_jax.mesh import expert_parallel
from cmx_jax.model.families import preset


@pytest.mark.parametrize(
    ("exchange", "gives", "takes"),
    [("flat", "all_to_all", "all_to_all"), ("allgather", "all_gather", "reduce_scatter")],
)
def test_buffers_are_operands_and_results_of_the_exchange(exchange: str, gives: str, takes: str) -> None:
    c = preset("deepseek-r1")
    layout = expert_parallel(16, c.n_routed_experts, exchange=exchange, wire="int8", mailbox_rows=0)
    memory = by_layout(c, layout, batch=4, length=256, prefill=False, drafts=0)
    rows = trace_model(c, layout, "decode", batch=4, context=256).collectives

    def carried(op: str, scope: str) -> int:
        row = next(r for r in rows if r["op"] == op and r["scope"] == scope)
        size = math.prod(row["shape"]) * jnp.dtype(row["dtype"]).itemsize
        return size * (16 if op == "all_gather" else 1)

    assert memory["dispatch buffer"] == carried(gives, "Dispatch")
    assert memory["combine buffer"] == carried(takes, "Combine")
