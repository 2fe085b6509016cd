"""The deployments of `cmx serve`: one instance that does everything, the supernode's pools, or, as one role
of several processes, an instance that only prefills or only decodes."""

from dataclasses import dataclass, field
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.serving.deploy.llm import from_pretrained
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.deploy.site import NpuRange, Site
from cmx_jax.serving.ems import Fingerprint, Pool
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.kv import JaxTransport, LeasedPages
from cmx_jax.serving.scheduling.request import SamplingParams


@dataclass(kw_only=True)
class ModelInfo:
    """A model that is served, by this process or by workers.

    Attributes:
      name: `colocated`, `pools`, `router`, or the role of a worker.
      model: Config and tokenizer.
      max_model_len: Longest sequence that there is room for, in tokens.
      npus: NPUs of each instance, by its name.
    """

    name: str
    model: Model
    max_model_len: int
    npus: dict[str, NpuRange] = field(default_factory=dict)


@dataclass(kw_only=True)
class Deployment(ModelInfo):
    """A model on instances of this process.

    Attributes:
      engine: Engine over the instances.
      site: Site of the pools, whose instances can change; None for a single instance.
    """

    engine: Engine
    site: Site | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of its pages."""
        return self.engine.instances[0].programs.fingerprint(self.model.id)

    def cache(self, pool: Pool, block: int, generated: bool = False) -> None:
        """Reuses the KV blocks of prompts from a caching pool, and stores new ones there.

        Args:
          pool: The caching pool.
          block: Tokens per block.
          generated: True to store generated text too; see `ContextCache`.

        Raises:
          CmxError: A block is not a whole number of pages.
        """
        self.engine.mover.reuse_blocks(pool, block, self.model.id, generated)

    def recarve(self, prefill: int, decode: int, grace_s: float) -> None:
        """Changes the number of prefill and decode instances; see `Engine.recarve`.

        Raises:
          CmxError: The deployment has no pools, or the instances do not fit the supernode.
        """
        if self.site is None:
            raise CmxError(f"deployment {self.name!r} has one instance, expected --deployment pools")
        instances = self.site.instances(self.site.carve(prefill, decode))
        self.engine.recarve(*instances, grace_s=grace_s)
        self.npus.update(self.site.npus())


def colocated(name_or_path: str, **options: Any) -> Deployment:
    """Starts one instance that prefills and decodes.

    Args:
      name_or_path: The model.
      options: Fields of `EngineArgs`. `num_speculative_tokens` is by default one, if the model has an MTP
        layer.

    Raises:
      CmxError: The reasons are those of `from_pretrained`.
    """
    return _single_instance("colocated", name_or_path, options)


def worker(role: str, name_or_path: str, *, host: str, **options: Any) -> Deployment:
    """Starts one instance that only prefills, or only decodes, for other processes.

    Args:
      role: `prefill` or `decode`.
      name_or_path: The model.
      host: Address of this machine from which other processes fetch pages.
      options: Fields of `EngineArgs`, with the defaults of `colocated`.

    Raises:
      CmxError: The reasons are those of `from_pretrained`.
    """
    deployment = _single_instance(role, name_or_path, options)
    [instance] = deployment.engine.instances
    outbox = LeasedPages(JaxTransport(host), deployment.fingerprint)
    pools = ([instance], []) if role == "prefill" else ([], [instance])
    deployment.engine = Engine(*pools, outbox=outbox)
    return deployment


def _single_instance(name: str, name_or_path: str, options: dict[str, Any]) -> Deployment:
    llm = from_pretrained(name_or_path, **{"num_speculative_tokens": None, **options})
    return Deployment(
        name=name,
        model=llm.model,
        engine=llm.engine,
        max_model_len=llm.max_model_len,
        npus={llm.instance.name: NpuRange(0, llm.instance.layout.ranks)},
    )


def pools(name_or_path: str, recipe: Recipe | None = None) -> Deployment:
    """Starts the pools of a recipe on the supernode.

    Args:
      name_or_path: The model.
      recipe: Layouts and options of the instances; None: the paper's.

    Raises:
      CmxError: The model is unknown or refused, or the instances do not fit it or the supernode.
    """
    enable_compilation_cache()
    site = Site.read(name_or_path, recipe or Recipe())
    return Deployment(
        name="pools",
        model=site.model,
        engine=site.start(),
        max_model_len=site.context,
        npus=site.npus(),
        site=site,
    )


def warm_up(engine: Engine) -> None:
    """Compiles the programs of short sequences, greedy and sampled, before the first request.

    A decode-only engine compiles with its first request: it has no pages to begin with.
    """
    for temperature in (0.0, 1.0) if engine.prefill else ():
        request = engine.submit([0], SamplingParams(max_tokens=2, temperature=temperature, ignore_eos=True))
        engine.run()
        if ticket := engine.mover.tickets.pop(request, None):
            engine.outbox.withdraw(ticket.transfer_id)
    engine.reset_counters()
