"""Layouts: the placement of a model on the ranks of an instance.

Changing one field of a `Layout` is one experiment.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import MAX_SLOTS_PER_RANK, WIRES, exchange, usual_rows, worst_case_rows
from cmx_jax.mesh.groups import Axes
from cmx_jax.mesh.supernode import CLOUDMATRIX384

MAX_MICROBATCHES = 64  # each is compiled separately


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh axes of an instance and what they carry.

    Attributes:
      axes: Name and size of each mesh axis, outermost first. The product of the sizes is the number of ranks.
      data: Axes over which sequences (and their cache) are split.
      experts: Axes over which expert slots are split. They may share axes with `data`: the paper's decode
        instance is data-parallel attention and expert-parallel MoE over the same ranks.
      slots: Number of expert slots on all ranks, the same number on each. Slots without an expert stay empty.
      redundant_slots: Number of slots that hold further replicas of busy experts.
      shared_slots: Number of slots that hold copies of the shared expert. With 0 it is on every rank.
      sequence: Axes over which ranks share each sequence, by tokens and then by heads (section 4.3.1).
      tensor: Axes over which ranks share each matrix: attention by heads, an FFN by its intermediate width,
        the head by the vocabulary. Each of these ranks has all tokens and latents, and they sum their parts.
      auto: The program is one of whole arrays, which the compiler (GSPMD) splits. `mailbox_rows` is then the
        number of places for a rank's tokens in each slot; tokens that do not fit are dropped.
      microbatches: Number of streams in which a step's rows go through the layers (sections 4.2.3, 4.3.2).
      exchange: Method that brings tokens to their experts, a name in `cmx_jax.mesh.exchange.EXCHANGES`.
      wire: Type of dispatched tokens. Results return in bfloat16, or in the model's type if `wire` is
        `float32`.
      mailbox_rows: Rows of the mailbox for each peer. None sizes it for twice the mean load, 0 for the worst
        case.

    Example:
      >>> from dataclasses import replace
      >>> layout = expert_parallel(8, 256)
      >>> layout.ranks, layout.slots
      (8, 256)
      >>> replace(layout, wire="int8").wire
      'int8'
    """

    axes: Axes
    data: tuple[str, ...]
    experts: tuple[str, ...]
    slots: int
    redundant_slots: int = 0
    shared_slots: int = 0
    sequence: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    auto: bool = False
    microbatches: int = 1
    exchange: str = "flat"
    wire: str = "float32"
    mailbox_rows: int | None = None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            if names.count(name) > 1:
                raise CmxError(f"layout: axis {name!r} is given twice")
            if size < 1:
                raise CmxError(f"layout: axis {name!r} has size {size}, expected at least 1")
        for field in ("data", "experts", "sequence", "tensor"):
            used = getattr(self, field)
            for name in used:
                if name not in names:
                    raise CmxError(f"layout: {field} uses axis {name!r}, expected one of {names}")
                if used.count(name) > 1:
                    raise CmxError(f"layout: {field} uses axis {name!r} twice")
        for one, other in (("data", "sequence"), ("data", "tensor")):
            for name in getattr(self, one):
                if name in getattr(self, other):
                    raise CmxError(f"layout: axis {name!r} carries {one} and {other}, expected one of them")
        self._check_kinds()
        for field, least in (("redundant_slots", 0), ("shared_slots", 0), ("microbatches", 1)):
            if getattr(self, field) < least:
                raise CmxError(f"layout: {field} is {getattr(self, field)}, expected {least} or more")
        if self.microbatches > MAX_MICROBATCHES:
            raise CmxError(
                f"layout: microbatches is {self.microbatches}, expected at most {MAX_MICROBATCHES}"
            )
        ranks = self.expert_ranks
        if self.slots < 1 or self.slots % ranks:
            raise CmxError(
                f"layout: {self.slots} expert slots do not divide over {ranks} ranks, expected equally many "
                f"on each, such as {-(-max(self.slots, 1) // ranks) * ranks}"
            )
        if self.slots_per_rank > MAX_SLOTS_PER_RANK:
            raise CmxError(
                f"layout: {self.slots_per_rank} slots a rank, expected at most {MAX_SLOTS_PER_RANK}: "
                "take more ranks"
            )
        if self.wire not in WIRES:
            raise CmxError(f"layout: wire {self.wire!r}, expected one of {list(WIRES)}")
        if self.mailbox_rows is not None and self.mailbox_rows < 0:
            raise CmxError(f"layout: mailbox_rows is {self.mailbox_rows}, expected zero or more")
        exchange(self.exchange)

    def _check_kinds(self) -> None:
        """Refuses fields that do not go together."""
        if self.sequence and self.tensor:
            raise CmxError("layout: heads are split over sequence and tensor, expected one of them")
        gathers = self.exchange == "allgather"
        if not gathers and not self.auto and (not self.experts or set(self.experts) & set(self.tensor)):
            raise CmxError(
                f"layout: exchange {self.exchange!r} where ranks have the tokens of all experts, "
                "expected 'allgather'"
            )
        ranked = self.sequence or self.tensor or self.replicated or self.microbatches > 1
        if self.auto and (ranked or self.experts != self.data):
            raise CmxError(
                "layout: auto splits a whole program over one set of axes, expected experts like data, no "
                "sequence, tensor, redundant_slots or shared_slots, and one microbatch"
            )

    def size(self, names: tuple[str, ...]) -> int:
        """Number of ranks along some axes."""
        return math.prod(dict(self.axes)[name] for name in names)

    @property
    def ranks(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def ranks_per_npu(self) -> int:
        """Number of ranks that share an NPU: the size of axis `die`, 1 without one."""
        return dict(self.axes).get("die", 1)

    @property
    def data_ranks(self) -> int:
        return self.size(self.data)

    @property
    def expert_ranks(self) -> int:
        return self.size(self.experts)

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.expert_ranks

    @property
    def sequence_ranks(self) -> int:
        return self.size(self.sequence)

    @property
    def tensor_ranks(self) -> int:
        return self.size(self.tensor)

    @property
    def groups(self) -> int:
        """Number of parts of a program's arrays, in each of which pages are numbered from 0.

        A program of one rank has one part; a program of whole arrays (`auto`) has one for each data rank.
        """
        return self.data_ranks if self.auto else 1

    @property
    def replicated(self) -> bool:
        """True if an expert may have several slots."""
        return self.redundant_slots > 0 or self.shared_slots > 0

    @property
    def token_spec(self) -> P:
        """Spec of an array of tokens [B, T]."""
        return P(self.data, self.sequence)

    @property
    def data_spec(self) -> P:
        """Spec of an array whose first axis is split like the sequences."""
        return P(self.data)

    def rows(self, tokens: int, top_k: int) -> int:
        """Mailbox rows for one peer (under `auto` for one slot) if a rank sends `tokens` tokens."""
        slots, peers = (1, self.slots) if self.auto else (self.slots_per_rank, self.expert_ranks)
        if self.mailbox_rows:
            return self.mailbox_rows
        if self.mailbox_rows == 0:
            return worst_case_rows(tokens, top_k, slots)
        return usual_rows(tokens, top_k, slots, peers)

    def placement(self, experts: int) -> np.ndarray:
        """Slot of each expert, int32 [E]. Experts are spread evenly, and with them the empty slots.

        Raises:
          CmxError: There are more experts than slots.
        """
        if experts > self.slots:
            raise CmxError(
                f"layout: {experts} experts do not fit {self.slots} slots, expected at least as many"
            )
        return (np.arange(experts, dtype=np.int64) * self.slots // max(experts, 1)).astype(np.int32)


MAX_RANKS = 4096  # several supernodes; on one machine memory ends long before


def _check_ranks(ranks: int) -> None:
    if ranks < 1:
        raise CmxError(f"{ranks} ranks, expected at least 1")
    if ranks > MAX_RANKS:
        raise CmxError(f"{ranks} ranks, expected at most {MAX_RANKS}")


def expert_parallel(
    ranks: int,
    experts: int,
    *,
    exchange: str = "flat",
    share_sequences: bool = False,
    ranks_per_npu: int = 1,
    **fields: Any,
) -> Layout:
    """The paper's layouts (section 2): expert-parallel MoE over all ranks.

    Over the same ranks runs either data-parallel attention (decode) or, with `share_sequences`, SP-TP-SP
    (prefill). The ranks lie on one axis `ep`, or for the hierarchical exchange on two, `node` and `npu`.
    Where several ranks share an NPU, they lie on a further, innermost axis `die`.

    256 experts get 320 slots on 160 ranks, the smallest number that is equal on each rank. With
    `redundant_slots` or `shared_slots` there are exactly as many slots as these and the experts need.

    Args:
      ranks: Number of ranks.
      experts: Number of routed experts.
      exchange: Exchange method.
      share_sequences: Shares each sequence among all ranks.
      ranks_per_npu: Number of ranks per NPU: 2 where a rank is a die.
      **fields: Other fields of `Layout`.

    Raises:
      CmxError: There is no rank, ranks are not whole NPUs, or not whole nodes where nodes are needed, or
        slots do not divide.

    Example:
      >>> expert_parallel(160, 256).slots  # equally many on each rank; 64 stay empty
      320
    """
    _check_ranks(ranks)
    npus, part = divmod(ranks, max(ranks_per_npu, 1))
    if ranks_per_npu < 1 or part:
        raise CmxError(f"{ranks} ranks with {ranks_per_npu} on an NPU, expected a multiple")
    dies: Axes = (("die", ranks_per_npu),) if ranks_per_npu > 1 else ()
    axes: Axes = (("npu" if dies else "ep", npus), *dies)
    if exchange == "hierarchical":
        per_node = min(npus, CLOUDMATRIX384.npus_per_node)
        if npus % per_node:
            raise CmxError(
                f"{ranks} ranks on {npus} NPUs, expected whole nodes of {per_node} for exchange "
                "'hierarchical'"
            )
        axes = (("node", npus // per_node), ("npu", per_node), *dies)
    names = tuple(name for name, _ in axes)
    extra = fields.get("redundant_slots", 0) + fields.get("shared_slots", 0)
    slots = experts + extra if extra else -(-max(experts, 1) // ranks) * ranks
    split: dict[str, Any] = {"data": (), "sequence": names} if share_sequences else {"data": names}
    merged: dict[str, Any] = {"slots": slots, "exchange": exchange} | split | fields
    return Layout(axes=axes, experts=names, **merged)


def tensor_parallel(ranks: int, experts: int, *, whole_experts: bool = False, **fields: Any) -> Layout:
    """Layout with every matrix split over all ranks of one axis `tp` (Megatron-LM, arXiv 1909.08053).

    As vLLM's `--tensor-parallel-size`: two all-reduces per layer, and all tokens and their cache on every
    rank.

    Args:
      ranks: Number of ranks.
      experts: Number of routed experts.
      whole_experts: Puts each routed expert on one rank, which runs it, instead of splitting it (vLLM's
        `--enable-expert-parallel`). The sums go into the same all-reduce.
      **fields: Other fields of `Layout`.

    Raises:
      CmxError: There is no rank.

    Example:
      >>> tensor_parallel(4, 256).tensor_ranks
      4
    """
    _check_ranks(ranks)
    names = ("tp",)
    slots = -(-max(experts, 1) // ranks) * ranks if whole_experts else max(experts, 1)
    merged: dict[str, Any] = {"slots": slots, "exchange": "allgather"} | fields
    return Layout(
        axes=(("tp", ranks),), data=(), tensor=names, experts=names if whole_experts else (), **merged
    )
