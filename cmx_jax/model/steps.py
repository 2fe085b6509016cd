"""The jitted programs of an instance: the per-rank functions of `prefill.py` and `decode.py` under a runner.

`step_specs` says how the ranks' parts make up whole arrays; `compile_steps` ties both together.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple, cast

from jax.sharding import PartitionSpec as P

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Abstract, Devices, Runner
from cmx_jax.model import cache as paged
from cmx_jax.model.batch import PrefillBatch, StepOutput
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decode import decode_step
from cmx_jax.model.moe import MoEStats
from cmx_jax.model.prefill import prefill_step, score_step
from cmx_jax.model.sharding import weight_specs
from cmx_jax.model.weights import Weights


@dataclass(frozen=True)
class Steps:
    """The jitted whole-array programs of an instance.

    Attributes:
      prefill: `(weights, cache, batch, sampled=..., logprobs=..., cached=...) -> (cache, StepOutput)`; the
        cache is donated. `sampled=False` is a cheaper program for batches in which every request is greedy,
        `cached=False` one for prompts of which no page holds anything yet, `logprobs=True` one that returns
        logprobs. A flag that is absent is False.
      decode: `(weights, cache, batch, sampled=..., logprobs=...) -> (cache, StepOutput)`; the cache is
        donated.
      score: `(weights, tokens, lengths) -> logits`.
      take_pages: `(cache, ids [ranks * n]) -> pages`: a copy of `n` pages of each rank.
      put_pages: `(cache, ids, pages) -> cache`; the cache is donated.
    """

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    score: Callable[..., Any]
    take_pages: Callable[..., Any]
    put_pages: Callable[..., Any]


class StepSpecs(NamedTuple):
    """Specs, or prefixes of them, of the arguments and results of a step.

    Attributes:
      weights: Specs of the weights.
      data: Spec of every array that is split like the sequences, the cache and a `DecodeBatch` included.
      prefill: Specs of a `PrefillBatch`.
      prefilled: Specs of the output of prefill.
      decoded: Specs of the output of decode.
    """

    weights: Weights
    data: P
    prefill: PrefillBatch
    prefilled: StepOutput
    decoded: StepOutput


def step_specs(c: ModelConfig, layout: Layout, mtp: bool) -> StepSpecs:
    """Specs of an instance's programs; `mtp` tells whether the weights have MTP layers."""
    data, tokens = layout.data_spec, layout.token_spec
    all_axes = () if layout.auto else tuple(name for name, _ in layout.axes)
    # ranks along tensor axes choose experts for the same tokens
    load_axes = tuple(name for name in all_axes if name not in layout.tensor)
    batch = PrefillBatch(tokens, tokens, tokens, tokens, data, data, data, data)
    stats = MoEStats(P(None, all_axes), P(None, load_axes)) if c.num_moe_layers or mtp else None
    drafts = data if mtp else None
    decoded = StepOutput(data, data, drafts, stats)
    return StepSpecs(weight_specs(c, layout, mtp), data, batch, replace(decoded, accepted=None), decoded)


def compile_steps(
    c: ModelConfig, layout: Layout, runner: Runner, mtp: bool, kv_dtype: str | None = None
) -> Steps:
    """Returns the programs of an instance under a runner; each compiles at its first call with new shapes.

    Equal arguments give the same programs, so that equal instances in a process trace only once, and compile
    only once for the same devices. Programs hold no arrays, and take placed arguments only (`Runner.put`).

    Args:
      c: The model.
      layout: Layout of the instance.
      runner: `Devices` or `Lanes` over the layout's axes. All `Devices` with the same axes share programs.
      mtp: True if the weights have MTP layers, which then draft.
      kv_dtype: Type of cached rows for `score`, which has no cache; None leaves rows as they are computed.
    """
    check_ragged(layout.exchange, runner)
    # GSPMD's programs are bound to a mesh of devices
    portable = runner.portable() if isinstance(runner, Devices) and not layout.auto else runner
    return _compile_steps(c, layout, cast(Hashable, portable), mtp, kv_dtype)


# Few instances' programs are kept: a program takes hundreds of memory mappings, of which Linux allows a
# process 65,530 by default, and XLA:CPU crashes when there are no more.
@lru_cache(maxsize=16)
def _compile_steps(c: ModelConfig, layout: Layout, runner: Any, mtp: bool, kv_dtype: str | None) -> Steps:
    specs = step_specs(c, layout, mtp)

    def step(fn: Callable[..., Any], batch: Any, output: StepOutput, *flags: str) -> Callable[..., Any]:
        def compiled(values: tuple[bool, ...]) -> Any:
            settings = dict(zip(flags, values, strict=True))
            static = partial(fn, c=c, layout=layout, **settings)
            ins = (specs.weights, specs.data, batch)
            outs = (specs.data, replace(output, logprobs=specs.data if settings["logprobs"] else None))
            return runner.jit(static, ins, outs, donate_argnums=(1,), auto=layout.auto)

        variants = {values: compiled(values) for values in product((False, True), repeat=len(flags))}
        return lambda weights, cache, batch, **settings: variants[
            tuple(settings.get(flag, False) for flag in flags)
        ](weights, cache, batch)

    data = specs.data
    return Steps(
        prefill=step(prefill_step, specs.prefill, specs.prefilled, "sampled", "logprobs", "cached"),
        decode=step(decode_step, data, specs.decoded, "sampled", "logprobs"),
        score=runner.jit(
            partial(score_step, c=c, layout=layout, kv_dtype=kv_dtype),
            (specs.weights, data, data),
            data,
            auto=layout.auto,
        ),
        take_pages=runner.jit(paged.take_pages, (data, data), data),
        put_pages=runner.jit(paged.put_pages, (data, data, data), data, donate_argnums=(0,)),
    )


def check_ragged(method: str, runner: Runner) -> None:
    """Refuses the ragged exchange where XLA has no ragged all-to-all: on CPU, and between lanes.

    The ragged exchange is traced and lowered everywhere, and compiled ahead of time for accelerators.

    Raises:
      CmxError: The runner cannot run the exchange.
    """
    if method != "ragged" or isinstance(runner, Abstract):
        return
    if isinstance(runner, Devices) and runner.mesh.devices.flat[0].platform != "cpu":
        return
    place = "on CPU" if isinstance(runner, Devices) else "between lanes"
    raise CmxError(
        f"exchange 'ragged' does not run {place}: XLA's ragged all-to-all is for accelerators. Choose flat, "
        "hierarchical or allgather, or runner 'devices' on accelerators"
    )
