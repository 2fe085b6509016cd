"""Where `cmx serve` puts a model: on one instance that does everything, or on the supernode's pools."""

from dataclasses import asdict, dataclass
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.mesh.pools import carve
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.model.checkpoint import open_checkpoint
from cmx_jax.serving.demo import deploy
from cmx_jax.serving.engine import Engine
from cmx_jax.serving.llm import from_pretrained
from cmx_jax.serving.model import Model, locate
from cmx_jax.serving.request import SamplingParams
from cmx_jax.serving.traffic import Traffic


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
        for name, limit in asdict(self).items():
            if limit is not None and not limit > 0:
                raise CmxError(f"{name} is {limit}, expected more than zero")

    def apply(self, engine: Engine) -> None:
        """Holds an engine to them."""
        for name, limit in asdict(self).items():
            setattr(engine, name, limit)


@dataclass(frozen=True)
class Deployment:
    """A model that is ready to serve.

    Attributes:
      name: `colocated` or `pools`.
      model: config and tokenizer.
      engine: its instances.
      max_model_len: tokens of the longest sequence that there is room for.
      npus: first NPU and number of them, by the instance's name.
    """

    name: str
    model: Model
    engine: Engine
    max_model_len: int
    npus: dict[str, tuple[int, int]]


def colocated(name_or_path: str, *, num_speculative_tokens: int | None = None, **options: Any) -> Deployment:
    """One instance that prefills and decodes.

    Args:
      name_or_path: the model.
      num_speculative_tokens: MTP drafts; None: one, if the model has an MTP layer.
      options: further ones of `from_pretrained`.

    Raises:
      CmxError: as `from_pretrained`.
    """
    if num_speculative_tokens is None:
        num_speculative_tokens = int(open_checkpoint(locate(name_or_path)).mtp)
    llm = from_pretrained(name_or_path, num_speculative_tokens=num_speculative_tokens, **options)
    ranks = {llm.instance.name: (0, llm.instance.layout.ranks)}
    return Deployment("colocated", llm.model, llm.engine, llm.max_model_len, ranks)


def pools(
    name_or_path: str,
    *,
    prefill: int,
    max_model_len: int | None = None,
    dtype: str = "float32",
    quant: str = "auto",
    num_speculative_tokens: int | None = None,
    **options: Any,
) -> Deployment:
    """The paper's pools on the whole mesh: a decode instance of 160 NPUs, `prefill` instances of 16.

    Args:
      name_or_path: the model.
      prefill: instances to start, of six.
      max_model_len: tokens to make room for; None takes the model's context, at most 256.
      dtype: see `from_pretrained`.
      quant: see `from_pretrained`.
      num_speculative_tokens: MTP drafts, if the model has an MTP layer; None: one.
      options: further ones of `serving.demo.deploy`.

    Raises:
      CmxError: the length exceeds the model's context, or as `Model.read` and `deploy`.
    """
    enable_compilation_cache()
    model, carved = Model.read(name_or_path, dtype, quant), carve(CLOUDMATRIX384)
    context = model.config.max_position_embeddings
    length = min(context, 256) if max_model_len is None else max_model_len
    if not 1 <= length <= context:
        raise CmxError(f"max_model_len is {length}, expected 1 to the model's context of {context}")
    drafts = 1 if num_speculative_tokens is None else num_speculative_tokens
    engine = deploy(model, carved, prefill, length, num_speculative_tokens=drafts, **options)
    slices = {s.name: (s.start, s.npus) for s in (*carved.decode, *carved.prefill[:prefill])}
    return Deployment("pools", model, engine, length, slices)


def warm_up(engine: Engine) -> None:
    """Compiles the programs of short sequences, greedy and sampled, so that the first request need not."""
    for temperature in (0.0, 1.0):
        engine.submit([0], SamplingParams(max_tokens=2, temperature=temperature, ignore_eos=True))
        engine.run()
    for instance in engine.instances:
        instance.traffic = Traffic()
    engine.steps, engine.step_s, engine.busy_s = 0, 0.0, 0.0
