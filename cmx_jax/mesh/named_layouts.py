"""Layouts by name: the paper's, DeepSeek's, and the simpler ones that a newcomer would write instead."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel, tensor_parallel
from cmx_jax.mesh.supernode import CLOUDMATRIX384, H800_NODE, Supernode


@dataclass(frozen=True)
class NamedLayout:
    """A layout that has a name.

    Attributes:
      make: Makes the layout for a number of routed experts.
      step: Step that the layout is for, `decode` or `prefill`.
      ranks_per_npu: Number of ranks on an NPU: 2 where a rank is a die.
      batch: Sequences per NPU. Ranks that share sequences or matrices have the sequences of all of them.
      about: Description in one line.
      machine: Machine that the layout is for.
    """

    make: Callable[[int], Layout]
    step: str
    ranks_per_npu: int
    batch: int
    about: str
    machine: Supernode = CLOUDMATRIX384


def _decode(experts: int, **fields: Any) -> Layout:
    spare: dict[str, Any] = {"redundant_slots": 32, "shared_slots": 32}
    return expert_parallel(320, experts, wire="int8", mailbox_rows=0, **spare, **fields)


def _nodes(ranks: int, experts: int, **fields: Any) -> Layout:
    return expert_parallel(ranks, experts, exchange="hierarchical", wire="int8", redundant_slots=32, **fields)


_gathered = partial(expert_parallel, exchange="allgather")
_whole_experts = partial(tensor_parallel, whole_experts=True)
_auto = partial(expert_parallel, auto=True, mailbox_rows=0)

LAYOUTS = {
    "ep320": NamedLayout(_decode, "decode", 2, 96, "the paper's decode instance: a slot on each of 320 dies"),
    "ep32": NamedLayout(
        partial(_nodes, 32, share_sequences=True),
        "prefill",
        2,
        2,
        "the paper's prefill instance: 32 dies share each sequence",
    ),
    # DeepSeek's overview of its inference system (open-infra-index, day 6); batches: the paper's tables 3, 4
    "h800-ep144": NamedLayout(
        partial(_nodes, 144, mailbox_rows=0),
        "decode",
        1,
        128,
        "DeepSeek's decode instance: 2 routed experts and the shared one on each of 144 GPUs",
        H800_NODE,
    ),
    "h800-ep32": NamedLayout(
        partial(_nodes, 32),
        "prefill",
        1,
        4,
        "DeepSeek's prefill instance: 9 routed experts and the shared one on each of 32 GPUs",
        H800_NODE,
    ),
    "tp": NamedLayout(
        partial(tensor_parallel, 16),
        "decode",
        1,
        8,
        "every matrix over 16 NPUs, 128 sequences on all of them",
    ),
    "tp-ep": NamedLayout(
        partial(_whole_experts, 16), "decode", 1, 8, "as tp, but each routed expert whole on one of 16 NPUs"
    ),
    "ag-rs": NamedLayout(
        partial(_decode, exchange="allgather"),
        "decode",
        2,
        96,
        "as ep320, but all tokens go to all dies: all-gather, reduce-scatter",
    ),
    "auto": NamedLayout(
        partial(expert_parallel, 256, auto=True),
        "decode",
        2,
        96,
        "GSPMD splits a plain program, an expert on each of 256 dies; beyond twice the mean load dropped",
    ),
}

_FAMILIES: dict[str, tuple[Callable[..., Layout], str]] = {
    "ep": (expert_parallel, "experts over {} NPUs, each with its own sequences"),
    "tp": (tensor_parallel, "every matrix over {} NPUs"),
    "tp-ep": (_whole_experts, "every matrix over {} NPUs, but each routed expert whole on one"),
    "ag-rs": (_gathered, "as ep, but all tokens go to all {} NPUs"),
    "auto": (_auto, "GSPMD splits a plain program over {} NPUs, nothing dropped"),
}


def named_layout(name: str) -> NamedLayout:
    """Returns the layout of a name in `LAYOUTS`, or of `epN`, `tpN`, `tp-epN`, `ag-rsN`, `autoN`.

    The latter are layouts of N NPUs with one rank each. `autoN` has room for the worst case and drops
    nothing, unlike `auto`.

    Raises:
      CmxError: There is no layout of that name.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    match = re.fullmatch(rf"({'|'.join(_FAMILIES)})([1-9][0-9]{{0,8}})", name)
    if match is None:
        raise CmxError(
            f"layout {name!r}, expected {', '.join(_FAMILIES)} and a number of ranks, or one of "
            f"{', '.join(LAYOUTS)}"
        )
    ranks, (make, about) = int(match[2]), _FAMILIES[match[1]]
    return NamedLayout(partial(make, ranks), "decode", 1, 1, about.format(ranks))
