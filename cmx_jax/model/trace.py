"""Steps of a model of any size, traced without weights: what their collectives move."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.message import message_bytes
from cmx_jax.mesh.supernode import CLOUDMATRIX384, Supernode
from cmx_jax.mesh.targets import target_devices
from cmx_jax.mesh.trace.collective import Collective
from cmx_jax.mesh.trace.jaxpr import Product
from cmx_jax.mesh.trace.program import trace
from cmx_jax.mesh.trace.table import Trace, View
from cmx_jax.model.abstract import trace_step
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.sharding import shared_in_slots


@dataclass(frozen=True)
class Ready:
    """A layout by name.

    Attributes:
      make: of the model's routed experts.
      step: which it is for.
      ranks_per_npu: 2 where a rank is a die.
      batch: sequences of an NPU, as in the paper's tables.
      about: in a line.
    """

    make: Callable[[int], Layout]
    step: str
    ranks_per_npu: int
    batch: int
    about: str


def _decode(experts: int) -> Layout:
    return expert_parallel(320, experts, wire="int8", mailbox_rows=0, redundant_slots=32, shared_slots=32)


def _prefill(experts: int) -> Layout:
    return expert_parallel(
        32, experts, exchange="hierarchical", wire="int8", redundant_slots=32, share_sequences=True
    )


LAYOUTS = {
    "ep320": Ready(_decode, "decode", 2, 96, "the paper's decode instance: a slot on each of 320 dies"),
    "ep32": Ready(_prefill, "prefill", 2, 2, "the paper's prefill instance: 32 dies share each sequence"),
}


def ready(name: str) -> Ready:
    """A ready layout, or `epN`: N NPUs with one rank each.

    Raises:
      CmxError: there is none of that name.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    if name.startswith("ep") and name[2:].isdecimal() and int(name[2:]) > 0:
        ranks = int(name[2:])
        return Ready(lambda experts: expert_parallel(ranks, experts), "decode", 1, 1, f"{ranks} NPUs")
    raise CmxError(f"layout {name!r}, expected ep and a number of ranks, or one of {', '.join(LAYOUTS)}")


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
      batch: sequences of an NPU.
      context: tokens of a sequence.
      drafts: MTP drafts of a decode step; in prefill whether the MTP layer runs.
      ranks_per_npu: 2 where a rank is a die.
      dtype: of weights and cache.
      source, target, dump: as of `cmx_jax.mesh.trace.trace`.
      machine: whose nodes the ranks sit on.

    Raises:
      CmxError: the batch does not divide over an NPU's ranks, or the context is beyond the model's.
    """
    shared = layout.sequence_ranks
    if batch < 1 or (batch * shared) % ranks_per_npu:
        raise CmxError(f"batch is {batch}, expected a positive multiple of an NPU's {ranks_per_npu} ranks")
    if not 1 <= context <= c.max_position_embeddings:
        raise CmxError(f"context is {context}, expected 1 to the model's {c.max_position_embeddings}")
    sequences = batch * shared // ranks_per_npu
    given: dict[str, Any] = {"sequences": sequences, "context": context, "drafts": drafts, "dtype": dtype}
    mesh = None
    if source == "hlo":
        devices = np.array(target_devices(target, layout.ranks))
        mesh = Mesh(devices.reshape([n for _, n in layout.axes]), [name for name, _ in layout.axes])
        given |= {"mesh": mesh, "in_order": target != "cpu"}
    began = time.perf_counter()
    traced = trace_step(c, layout, step, length=context, **given)
    took = time.perf_counter() - began
    tokens = sequences * (context if step == "prefill" else 1 + drafts) // shared
    copies = c.num_experts_per_tok + shared_in_slots(c, layout)

    def useful(found: Product) -> float | None:
        if "MLP" not in found.scope.split("/"):
            return None
        first = found.scope.endswith("ndh->nth")  # gate and up
        wide = c.hidden_size * c.moe_intermediate_size * (2 if first else 1)
        return 2 * tokens * copies * wide / layout.microbatches

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

    view = View(machine, ranks_per_npu, payload=payload, useful=useful)
    found = trace(traced, source=source, target=target, dump=dump, view=view)
    found.seconds["trace"] += took
    return found
