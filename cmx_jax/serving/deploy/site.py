"""A model on a supernode: instances on the slices that pools are carved into."""

from dataclasses import dataclass, field

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import host_devices
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.pools import DECODE_NPUS, PREFILL_NPUS, Pools, Slice, carve
from cmx_jax.mesh.runners import make_runner
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.pages import pages_for


@dataclass(kw_only=True)
class Site:
    """Makes instances of a model, and keeps those that it made.

    Attributes:
      model: what to serve.
      context: longest sequence to make room for, tokens.
      runner: `devices`, or `lanes` for the same ranks on one device.
      sequences: of a decode rank.
      max_num_batched_tokens: of a prefill step's row.
      kv_cache_dtype: of all instances' pages.
      wire: type of dispatched tokens; None takes the model's.
      exchange: how they travel.
      num_speculative_tokens: MTP drafts; 0 where the model has no MTP layer.
      microbatches, redundant_slots, shared_slots: of decode instances.
      decode_npus, prefill_npus: of each instance.
    """

    model: Model
    context: int
    runner: str = "devices"
    sequences: int = 1
    max_num_batched_tokens: int = Capacity().max_num_batched_tokens
    kv_cache_dtype: str = "auto"
    wire: str | None = None
    exchange: str = "hierarchical"
    num_speculative_tokens: int = 1
    microbatches: int = 1
    redundant_slots: int = 0
    shared_slots: int = 0
    decode_npus: int = DECODE_NPUS
    prefill_npus: int = PREFILL_NPUS
    _made: dict[Slice, Instance] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        longest = self.model.config.max_position_embeddings
        if not 1 <= self.context <= longest:
            raise CmxError(f"max_model_len is {self.context}, expected 1 to the model's context of {longest}")
        if not self.model.checkpoint.mtp:
            self.num_speculative_tokens = 0
        if self.runner == "devices":
            host_devices(CLOUDMATRIX384.npus)  # all of the supernode, not just what the first instance needs

    def carve(self, prefill: int, decode: int) -> Pools:
        """The slices of so many instances.

        Raises:
          CmxError: they do not fit the supernode, or there is none of a kind.
        """
        if prefill < 1 or decode < 1:
            raise CmxError(f"{prefill} prefill and {decode} decode instances, expected one of each at least")
        return carve(
            prefill=prefill, decode=decode, decode_npus=self.decode_npus, prefill_npus=self.prefill_npus
        )

    def instances(self, pools: Pools) -> tuple[list[Instance], list[Instance]]:
        """Prefill and decode instances on these slices; what is there already stays."""
        kept = {s: self._made.get(s) or self._start(s) for s in (*pools.prefill, *pools.decode)}
        self._made = kept
        return [kept[s] for s in pools.prefill], [kept[s] for s in pools.decode]

    def npus(self) -> dict[str, tuple[int, int]]:
        """First NPU and number of them, by the instance's name."""
        return {s.name: (s.start, s.npus) for s in self._made}

    def _start(self, s: Slice) -> Instance:
        c, width = self.model.config, Capacity().page_width
        decodes = s.role == "decode"
        fields = ("microbatches", "redundant_slots", "shared_slots") if decodes else ()
        layout = expert_parallel(
            s.npus,
            c.n_routed_experts,
            exchange=self.exchange,
            wire=self.wire or self.model.dtype,
            **{name: getattr(self, name) for name in fields},
        )
        rows = max(self.sequences, self.microbatches) if decodes else 1
        capacity = Capacity(
            sequences=rows,
            pages=rows * pages_for(self.context, width),
            page_width=width,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )
        runner = make_runner(self.runner, layout.axes, s.start if self.runner == "devices" else 0)
        drafts = self.num_speculative_tokens
        return self.model.instance(s.name, layout, runner, capacity, drafts, self.kv_cache_dtype)
