"""The jitted programs of an instance: the per-rank functions of `prefill.py` and `decode.py` under a runner.

`step_specs` says how the ranks' parts make up whole arrays; `compile_steps` ties both together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from cmx_jax.mesh.layout import Layout
from cmx_jax.mesh.runners import Runner, check_ragged
from cmx_jax.model import cache as paged
from cmx_jax.model.batch import DecodeBatch, PrefillBatch, StepOutput
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decode import decode_step
from cmx_jax.model.moe import MoEStats
from cmx_jax.model.prefill import prefill_step, score_step
from cmx_jax.model.sharding import weight_specs
from cmx_jax.model.weights import Weights

__all__ = [
    "DecodeBatch",
    "PrefillBatch",
    "StepOutput",
    "Steps",
    "compile_steps",
    "decode_step",
    "prefill_step",
    "score_step",
    "step_specs",
]


@dataclass(frozen=True)
class Steps:
    """The jitted whole-array programs of an instance.

    Attributes:
      prefill: `(weights, cache, batch, sampled=..., logprobs=..., cached=...) -> (cache, StepOutput)`; the
        cache is donated. `sampled=False` is a cheaper program for batches in which every request is greedy,
        `cached=False` one for prompts of which nothing lies in pages yet, `logprobs=True` one that returns
        them. A flag that is not given is False.
      decode: `(weights, cache, batch, sampled=..., logprobs=...) -> (cache, StepOutput)`.
      score: `(weights, tokens, lengths) -> logits`.
      take_pages: `(cache, ids [ranks * n]) -> pages`: each rank's `n` pages, copied out.
      put_pages: `(cache, ids, pages) -> cache`, donated.
    """

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    score: Callable[..., Any]
    take_pages: Callable[..., Any]
    put_pages: Callable[..., Any]


class StepSpecs(NamedTuple):
    """Specs, or prefixes of them, of what a step takes and gives; `data`: split like the sequences."""

    weights: Weights
    data: P
    prefill: PrefillBatch
    prefilled: StepOutput
    decoded: StepOutput


def step_specs(c: ModelConfig, layout: Layout, mtp: bool) -> StepSpecs:
    """Specs of an instance's programs. `mtp`: whether the weights carry MTP layers."""
    data, tokens = layout.data_spec, layout.token_spec
    every = () if layout.auto else tuple(name for name, _ in layout.axes)
    own = tuple(name for name in every if name not in layout.tensor)  # others chose for the same tokens
    batch = PrefillBatch(tokens, tokens, tokens, tokens, data, data, data, data)
    stats = MoEStats(P(None, every), P(None, own)) if c.num_moe_layers or mtp else None
    drafts = data if mtp else None
    decoded = StepOutput(data, data, drafts, stats)
    return StepSpecs(weight_specs(c, layout, mtp), data, batch, decoded.replace(accepted=None), decoded)


def compile_steps(
    c: ModelConfig, layout: Layout, runner: Runner, mtp: bool, kv_dtype: str | None = None
) -> Steps:
    """The programs of an instance under a runner; each compiles at its first call with new shapes.

    Args:
      c: the model.
      layout: how it lies on the instance.
      runner: over the layout's axes.
      mtp: whether the weights carry MTP layers, which then draft.
      kv_dtype: of the cache, for `score`, which has none; None: as rows are computed.
    """
    check_ragged(layout.exchange, runner)
    specs = step_specs(c, layout, mtp)

    def step(fn: Callable[..., Any], batch: Any, output: StepOutput, *flags: str) -> Callable[..., Any]:
        def compiled(chosen: tuple[bool, ...]) -> Any:
            given = dict(zip(flags, chosen, strict=True))
            static = partial(fn, c=c, layout=layout, **given)
            ins = (specs.weights, specs.data, batch)
            outs = (specs.data, output.replace(logprobs=specs.data if given["logprobs"] else None))
            return runner.jit(static, ins, outs, donate_argnums=(1,), auto=layout.auto)

        variants = {chosen: compiled(chosen) for chosen in product((False, True), repeat=len(flags))}
        return lambda weights, cache, batch, **given: variants[tuple(given.get(f, False) for f in flags)](
            weights, cache, batch
        )

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
