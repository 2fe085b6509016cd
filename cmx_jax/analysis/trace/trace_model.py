"""Traces steps of a model of any size without weights, to show what their collectives move."""

import time
from pathlib import Path
from typing import Any

from cmx_jax.analysis.trace.abstract_steps import trace_step
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
    """Traces a step and returns its collectives and products on one rank.

    Payloads of Dispatch and Combine, and operations of the experts, are the useful ones: tokens x copies at
    balanced load, in all rounds together. Mailboxes are larger.

    Args:
      c: Configuration of the model.
      layout: Layout of the model on its ranks.
      step: `decode` or `prefill` (of whole prompts, `context` tokens each).
      batch: Sequences per NPU; ranks that share sequences or matrices have the sequences of all of them.
      context: Tokens of each sequence.
      drafts: MTP drafts of a decode step; in prefill the MTP layer runs if there are any.
      ranks_per_npu: Number of ranks per NPU: 2 where a rank is a die.
      dtype: Type of weights and cache.
      source, target, dump: Options of `cmx_jax.mesh.trace.trace`.
      machine: Supernode whose nodes the ranks fill one after another.

    Raises:
      CmxError: The batch does not divide over an NPU's ranks, the context is longer than the model's, or
        there are more drafts than the model can have.
    """
    shared = layout.sequence_ranks * layout.tensor_ranks
    if batch < 1 or (batch * shared) % ranks_per_npu:
        raise CmxError(f"batch is {batch}, expected a positive multiple of an NPU's {ranks_per_npu} ranks")
    if not 1 <= context <= c.max_position_embeddings:
        raise CmxError(f"context is {context}, expected 1 to the model's {c.max_position_embeddings}")
    max_drafts = MAX_DRAFTS if c.num_nextn_predict_layers else 0
    if not 0 <= drafts <= max_drafts:
        raise CmxError(f"num_speculative_tokens is {drafts}, expected 0 to {max_drafts}")
    sequences = batch * shared // ranks_per_npu
    compiled = source == "hlo"
    mesh: Any = auto_mesh(layout.axes, target_devices(target, layout.ranks)) if compiled else None
    began = time.perf_counter()
    traced = trace_step(
        c,
        layout,
        step,
        sequences=sequences,
        context=context,
        length=context,
        drafts=drafts,
        dtype=dtype,
        mesh=mesh,
        in_order=compiled and target != "cpu",
    )
    trace_seconds = time.perf_counter() - began
    tokens = sequences * (context if step == "prefill" else 1 + drafts) // layout.sequence_ranks
    view = _view(c, layout, tokens, dtype, machine, ranks_per_npu)
    result = trace(traced, source=source, target=target, dump=dump, view=view)
    result.seconds["trace"] += trace_seconds
    if layout.auto and source != "hlo":
        result.notes.append(
            "auto: collectives are the compiler's, which source hlo shows; products are of all ranks"
        )
    return result


def _view(
    c: ModelConfig, layout: Layout, tokens: int, dtype: str, machine: Supernode, ranks_per_npu: int
) -> View:
    """Returns the view of a step in which each of a rank's `tokens` goes to its experts once."""
    copies = c.num_experts_per_tok + shared_in_slots(c, layout)

    def useful(product: Product) -> float | None:
        if layout.auto or "MLP" not in product.scope.split("/"):
            return None
        first = product.scope.endswith("ndh->nth")  # gate and up
        wide = c.hidden_size * c.moe_intermediate_size * (2 if first else 1)
        return 2 * tokens * copies * wide / layout.microbatches / layout.tensor_ranks

    def payload(collective: Collective) -> float | None:
        scopes = collective.scope.split("/")
        if layout.exchange == "allgather" or collective.op not in ("all_to_all", "ragged_all_to_all"):
            return None
        if "Dispatch" in scopes:
            return tokens * copies * message_bytes(c.hidden_size, layout.wire) / layout.microbatches
        if "Combine" in scopes:
            returned = dtype if layout.wire == "float32" else "bfloat16"
            return tokens * copies * c.hidden_size * (4 if returned == "float32" else 2) / layout.microbatches
        return None

    return View(machine, ranks_per_npu, payload=payload, useful=useful)
