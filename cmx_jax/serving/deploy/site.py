"""Instances of a model on a supernode, on the slices that pools are carved into."""

from dataclasses import dataclass, field
from typing import NamedTuple

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import host_devices
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.pools import DECODE_NPUS, PREFILL_NPUS, Pools, Slice, carve
from cmx_jax.mesh.runners import make_runner
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.deploy.engine_args import EngineArgs
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.pages import pages_for


class NpuRange(NamedTuple):
    """Consecutive NPUs of a supernode.

    Attributes:
      first: Index of the first NPU.
      size: Number of NPUs.
    """

    first: int
    size: int


@dataclass(kw_only=True)
class Site:
    """Makes instances of a model on a supernode, and keeps those that it started.

    Attributes:
      model: The model to serve.
      args: Options of the instances. The ranks are those of the slices; `max_num_seqs` is not used.
        `microbatches`, `redundant_slots` and `shared_slots` are for decode instances only.
      context: Longest sequence to make room for, in tokens.
      sequences: Number of sequences per decode rank.
      decode_npus: Number of NPUs per decode instance.
      prefill_npus: Number of NPUs per prefill instance.
    """

    model: Model
    args: EngineArgs
    context: int
    sequences: int = 1
    decode_npus: int = DECODE_NPUS
    prefill_npus: int = PREFILL_NPUS
    _started: dict[Slice, Instance] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.args.runner == "devices":
            host_devices(CLOUDMATRIX384.npus)  # all of the supernode, not just what the first instance needs

    def carve(self, prefill: int, decode: int) -> Pools:
        """Returns the slices of this many prefill and decode instances.

        Raises:
          CmxError: The instances do not fit the supernode, or a number is below 1.
        """
        if prefill < 1 or decode < 1:
            raise CmxError(f"{prefill} prefill and {decode} decode instances, expected one of each at least")
        return carve(
            prefill=prefill, decode=decode, decode_npus=self.decode_npus, prefill_npus=self.prefill_npus
        )

    def instances(self, pools: Pools) -> tuple[list[Instance], list[Instance]]:
        """Returns prefill and decode instances on these slices; existing ones stay."""
        kept = {s: self._started.get(s) or self._start(s) for s in (*pools.prefill, *pools.decode)}
        self._started = kept
        return [kept[s] for s in pools.prefill], [kept[s] for s in pools.decode]

    def npus(self) -> dict[str, NpuRange]:
        """Returns the NPUs of each instance, by its name."""
        return {s.name: NpuRange(s.start, s.npus) for s in self._started}

    def _start(self, s: Slice) -> Instance:
        c, args, width = self.model.config, self.args, Capacity().page_width
        decodes = s.role == "decode"
        fields = ("microbatches", "redundant_slots", "shared_slots") if decodes else ()
        layout = expert_parallel(
            s.npus,
            c.n_routed_experts,
            exchange=args.exchange,
            wire=self.model.dtype if args.wire is None else args.wire,
            **{name: getattr(args, name) for name in fields},
        )
        rows = max(self.sequences, args.microbatches) if decodes else 1
        capacity = Capacity(
            sequences=rows,
            pages=rows * pages_for(self.context, width),
            page_width=width,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        runner = make_runner(args.runner, layout.axes, s.start if args.runner == "devices" else 0)
        mtp = self.model.checkpoint.mtp
        drafts = args.drafts(mtp) if mtp else 0
        return self.model.instance(s.name, layout, runner, capacity, drafts, args.kv_cache_dtype)
