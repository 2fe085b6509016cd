"""Where `cmx serve` puts a model: on one instance that does everything, on the supernode's pools, or, as one
role of several processes, on an instance that only prefills or only decodes."""

from dataclasses import asdict, dataclass, field
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.model.checkpoint import open_checkpoint
from cmx_jax.serving.deploy.llm import from_pretrained
from cmx_jax.serving.deploy.model import Model, locate
from cmx_jax.serving.deploy.site import Site
from cmx_jax.serving.ems import Fingerprint, Pool
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.stats import Traffic
from cmx_jax.serving.kv import JaxTransport, LeasedPages
from cmx_jax.serving.kv.prefix_cache import ContextCache
from cmx_jax.serving.scheduling.request import SamplingParams
from cmx_jax.serving.scheduling.waiting import check_limits


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """What may wait; see `Engine`.

    Raises:
      CmxError: one of them is not above zero.
    """

    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    queue_ttl_s: float | None = None

    def __post_init__(self) -> None:
        check_limits(**asdict(self))

    def apply(self, engine: Engine) -> None:
        """Holds an engine to them."""
        for name, limit in asdict(self).items():
            setattr(engine, name, limit)


@dataclass(kw_only=True)
class Hosted:
    """A model that is served, here or by others.

    Attributes:
      name: `colocated`, `pools`, `router`, or the role of a worker.
      model: config and tokenizer.
      max_model_len: tokens of the longest sequence that there is room for.
      npus: first NPU and number of them, by the instance's name.
    """

    name: str
    model: Model
    max_model_len: int
    npus: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Deployment(Hosted):
    """A model on instances of this process.

    Attributes:
      engine: over them.
      site: of pools, whose instances can change.
    """

    engine: Engine
    site: Site | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """Of its pages."""
        return self.engine.instances[0].fingerprint(self.model.id)

    def cache(self, pool: Pool, block: int, generated: bool = False) -> None:
        """Lets prompts begin behind what is found in a caching pool; `generated`: see `ContextCache`.

        Raises:
          CmxError: a block is not whole pages.
        """
        one = self.engine.instances[0]
        self.engine.context = ContextCache(pool, self.fingerprint.of(block), one.cache.pages, generated)

    def recarve(self, prefill: int, decode: int, grace_s: float) -> None:
        """Serves with so many instances of each kind from now on; see `Engine.recarve`.

        Raises:
          CmxError: there are no pools, or they do not fit the supernode.
        """
        if self.site is None:
            raise CmxError(f"deployment {self.name!r} has one instance, expected --deployment pools")
        instances = self.site.instances(self.site.carve(prefill, decode))
        self.engine.recarve(*instances, grace_s=grace_s)
        self.npus.update(self.site.npus())


def colocated(name_or_path: str, *, num_speculative_tokens: int | None = None, **options: Any) -> Deployment:
    """One instance that prefills and decodes.

    Args:
      name_or_path: the model.
      num_speculative_tokens: MTP drafts; None: one, if the model has an MTP layer.
      options: further ones of `from_pretrained`.

    Raises:
      CmxError: as `from_pretrained`.
    """
    return _alone("colocated", name_or_path, num_speculative_tokens, options)


def worker(
    role: str, name_or_path: str, *, host: str, num_speculative_tokens: int | None = None, **options: Any
) -> Deployment:
    """One instance that only prefills, or only decodes, for others.

    Args:
      role: `prefill` or `decode`.
      name_or_path: the model.
      host: the address of this machine under which the others fetch pages.
      num_speculative_tokens: see `colocated`.
      options: further ones of `from_pretrained`.

    Raises:
      CmxError: as `from_pretrained`.
    """
    found = _alone(role, name_or_path, num_speculative_tokens, options)
    [instance] = found.engine.instances
    outbox = LeasedPages(JaxTransport(host), found.fingerprint)
    pools = ([instance], []) if role == "prefill" else ([], [instance])
    found.engine = Engine(*pools, outbox=outbox)
    return found


def _alone(name: str, name_or_path: str, drafts: int | None, options: dict[str, Any]) -> Deployment:
    if drafts is None:
        drafts = int(open_checkpoint(locate(name_or_path)).mtp)
    llm = from_pretrained(name_or_path, num_speculative_tokens=drafts, **options)
    return Deployment(
        name=name,
        model=llm.model,
        engine=llm.engine,
        max_model_len=llm.max_model_len,
        npus={llm.instance.name: (0, llm.instance.layout.ranks)},
    )


def pools(
    name_or_path: str,
    *,
    prefill: int,
    decode: int = 1,
    max_model_len: int | None = None,
    dtype: str = "float32",
    quant: str = "auto",
    num_speculative_tokens: int | None = None,
    eplb_interval: int = 0,
    **options: Any,
) -> Deployment:
    """The paper's pools on the whole mesh: decode instances of 160 NPUs, prefill instances of 16.

    Args:
      name_or_path: the model.
      prefill: prefill instances to start.
      decode: decode instances to start.
      max_model_len: tokens to make room for; None takes the model's context, at most 256.
      dtype: see `from_pretrained`.
      quant: see `from_pretrained`.
      num_speculative_tokens: MTP drafts, if the model has an MTP layer; None: one.
      eplb_interval: see `Engine`.
      options: further ones of `serving.site.Site`.

    Raises:
      CmxError: as `Model.read` and `Site`.
    """
    enable_compilation_cache()
    model = Model.read(name_or_path, dtype, quant)
    length = min(model.config.max_position_embeddings, 256) if max_model_len is None else max_model_len
    drafts = 1 if num_speculative_tokens is None else num_speculative_tokens
    site = Site(model=model, context=length, num_speculative_tokens=drafts, **options)
    engine = Engine(*site.instances(site.carve(prefill, decode)), eplb_interval=eplb_interval)
    return Deployment(
        name="pools", model=model, engine=engine, max_model_len=length, npus=site.npus(), site=site
    )


def warm_up(engine: Engine) -> None:
    """Compiles the programs of short sequences, greedy and sampled, so that the first request need not. What
    only decodes compiles with its first request: it has no pages to begin with."""
    for temperature in (0.0, 1.0) if engine.prefill else ():
        request = engine.submit([0], SamplingParams(max_tokens=2, temperature=temperature, ignore_eos=True))
        engine.run()
        if ticket := engine.tickets.pop(request, None):
            engine.outbox.withdraw(ticket.transfer_id)
    for instance in engine.instances:
        instance.traffic = Traffic()
        instance.prefill_tokens = 0
    engine.steps, engine.step_s, engine.busy_s = 0, 0.0, 0.0
