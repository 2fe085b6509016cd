"""Steps of a model of any size, traced without weights: what their collectives move."""

import time
from pathlib import Path
from typing import Any

from cmx_jax.analysis.trace.steps import trace_step
from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import message_bytes
from cmx_jax.mesh.jax_versions import auto_mesh
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.supernode import CLOUDMATRIX384, Supernode
from cmx_jax.mesh.targets import target_devices
from cmx_jax.mesh.trace.ops.collective import Collective
from cmx_jax.mesh.trace.ops.contents import Product
from cmx_jax.mesh.trace.program import trace
from cmx_jax.mesh.trace.table import Trace, View
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decode import MAX_DRAFTS
from cmx_jax.model.sharding import shared_in_slots


def trace_model(
    c: ModelConfig,
    layout: Layout,
    step: str,
    *,
    batch: int,
    context: int,
    drafts: int = 0,
    ranks_per_npu: int = 1,
    dtype: str = "bfloat16",
    source: str = "jaxpr",
    target: str = "cpu",
    dump: Path | None = None,
    machine: Supernode = CLOUDMATRIX384,
) -> Trace:
    """A step's collectives and products on one rank.

    Dispatch, Combine and the experts' products count what is useful: tokens x copies at balanced load, in all
    rounds together. Mailboxes are larger.

    Args:
      c: the model.
      layout: how it lies on its ranks.
      step: `decode` or `prefill` (of whole prompts, `context` tokens each).
      batch: sequences of an NPU; where ranks share sequences, or matrices, all of them have those of all.
      context: tokens of a sequence.
      drafts: MTP drafts of a decode step; in prefill whether the MTP layer runs.
      ranks_per_npu: 2 where a rank is a die.
      dtype: of weights and cache.
      source, target, dump: as of `cmx_jax.mesh.trace.trace`.
      machine: whose nodes the ranks sit on.

    Raises:
      CmxError: the batch does not divide over an NPU's ranks, or the context is beyond the model's.
    """
    shared = layout.sequence_ranks * layout.tensor_ranks
    if batch < 1 or (batch * shared) % ranks_per_npu:
        raise CmxError(f"batch is {batch}, expected a positive multiple of an NPU's {ranks_per_npu} ranks")
    if not 1 <= context <= c.max_position_embeddings:
        raise CmxError(f"context is {context}, expected 1 to the model's {c.max_position_embeddings}")
    most = MAX_DRAFTS if c.num_nextn_predict_layers else 0
    if not 0 <= drafts <= most:
        raise CmxError(f"num_speculative_tokens is {drafts}, expected 0 to {most}")
    sequences = batch * shared // ranks_per_npu
    given: dict[str, Any] = {"sequences": sequences, "context": context, "drafts": drafts, "dtype": dtype}
    mesh = None
    if source == "hlo":
        mesh = auto_mesh(layout.axes, target_devices(target, layout.ranks))
        given |= {"mesh": mesh, "in_order": target != "cpu"}
    began = time.perf_counter()
    traced = trace_step(c, layout, step, length=context, **given)
    took = time.perf_counter() - began
    tokens = sequences * (context if step == "prefill" else 1 + drafts) // layout.sequence_ranks
    view = _view(c, layout, tokens, dtype, machine, ranks_per_npu)
    found = trace(traced, source=source, target=target, dump=dump, view=view)
    found.seconds["trace"] += took
    if layout.auto and source != "hlo":
        found.notes.append(
            "auto: collectives are the compiler's, which source hlo shows; products are of all ranks"
        )
    return found


def _view(
    c: ModelConfig, layout: Layout, tokens: int, dtype: str, machine: Supernode, ranks_per_npu: int
) -> View:
    """Where ranks sit, and what is useful when a rank has so many tokens: each goes to its experts once."""
    copies = c.num_experts_per_tok + shared_in_slots(c, layout)

    def useful(found: Product) -> float | None:
        if layout.auto or "MLP" not in found.scope.split("/"):
            return None
        first = found.scope.endswith("ndh->nth")  # gate and up
        wide = c.hidden_size * c.moe_intermediate_size * (2 if first else 1)
        return 2 * tokens * copies * wide / layout.microbatches / layout.tensor_ranks

    def payload(found: Collective) -> float | None:
        scopes = found.scope.split("/")
        if layout.exchange == "allgather" or found.op not in ("all_to_all", "ragged_all_to_all"):
            return None
        if "Dispatch" in scopes:
            return tokens * copies * message_bytes(c.hidden_size, layout.wire) / layout.microbatches
        if "Combine" in scopes:
            back = dtype if layout.wire == "float32" else "bfloat16"
            return tokens * copies * c.hidden_size * (4 if back == "float32" else 2) / layout.microbatches
        return None

    return View(machine, ranks_per_npu, payload=payload, useful=useful)
