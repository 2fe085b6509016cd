"""Offline use: `from_pretrained` gives a model with `.logits` and `.generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import ArrayLike

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.named_layouts import ready
from cmx_jax.mesh.runners import make_runner
from cmx_jax.model.rebalance import Move
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.scoring import device_logits
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, SamplingParams


@dataclass(frozen=True)
class Completion:
    """What became of one prompt; `str()` of it is its text."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str  # "stop" at an end token, "length" at max_new_tokens
    ttft_s: float
    tpot_s: float

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model on one instance that prefills and decodes.

    Attributes:
      model: config, weights and tokenizer as read.
      instance: the ranks it runs on; `instance.traffic` counts what the exchanges and drafts did.
      engine: the serving loop over it.
      max_model_len: tokens of the longest sequence that there is room for.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        runner: str,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        num_speculative_tokens: int,
        eplb_interval: int,
        kv_cache_dtype: str = "auto",
    ):
        width, parts = Capacity().page_width, layout.microbatches
        sequences = -(-max_num_seqs // (layout.data_ranks * parts)) * parts
        capacity = Capacity(
            sequences=sequences,
            pages=sequences * pages_for(max_model_len, width),
            page_width=width,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.model = model
        self.max_model_len = max_model_len
        self.instance = model.instance(
            runner,
            layout,
            make_runner(runner, layout.axes),
            capacity,
            num_speculative_tokens,
            kv_cache_dtype,
        )
        self.engine = Engine([self.instance], self.instance, eplb_interval=eplb_interval)

    @property
    def moves(self) -> list[Move]:
        """What each rebalancing of the experts did."""
        return self.engine.moves

    def logits(self, tokens: ArrayLike) -> Float[np.ndarray, "B T O"]:
        """Float32 logits of every position: row `t` predicts token `t + 1`.

        Args:
          tokens: integers [B, T].

        Raises:
          CmxError: not [B, T] integers of the vocabulary, or longer than the context.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
            raise CmxError(f"tokens are {tokens.dtype} {list(tokens.shape)}, expected integers [B, T]")
        batch, length = tokens.shape
        return np.asarray(self.device_logits(tokens, np.full(batch, length, np.int32)))[:batch, :length]

    def device_logits(
        self, tokens: Integer[np.ndarray, "B T"], lengths: Integer[np.ndarray, " B"]
    ) -> Float[jax.Array, "rows span O"]:
        """As `logits`, but left on the devices, for sequences of unequal length.

        Nothing is computed of the experts behind a sequence's length; logits there mean nothing.

        Returns:
          More rows and positions than were given: few shapes, few programs.

        Raises:
          CmxError: tokens that the vocabulary lacks, or more of them than the context holds.
        """
        c = self.model.config
        if tokens.min() < 0 or tokens.max() >= c.vocab_size:
            raise CmxError(
                f"tokens reach from {tokens.min()} to {tokens.max()}, expected [0, {c.vocab_size})"
            )
        return device_logits(self.instance, tokens, lengths)

    def generate(
        self,
        prompts: str | Sequence[object],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> list[Completion]:
        """Continues each prompt (text or token ids); greedy unless `temperature` is above 0.

        The same seed gives the same continuation of a prompt in any company and on any runner.

        Raises:
          CmxError: a prompt or a parameter cannot be served; none is then.
        """
        params = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            ignore_eos=ignore_eos,
        )
        given = [prompts] if isinstance(prompts, str) else prompts
        requests = [self.engine.submit(self.model.encode(prompt), params) for prompt in given]
        try:
            self.engine.run()
        except BaseException:  # an interrupt, say: the next call must not find half-served requests
            self.engine.reset()
            raise
        return [completion(request, self.model) for request in requests]


def completion(request: Request, model: Model) -> Completion:
    """The result of a finished request."""
    kept = request.tokens[:-1] if request.finish_reason == "stop" else request.tokens
    return Completion(
        prompt_tokens=list(request.prompt),
        tokens=request.tokens,
        text=model.decode(kept),
        finish_reason=request.finish_reason or "",
        ttft_s=request.ttft_s,
        tpot_s=request.tpot_s,
    )


def from_pretrained(
    name_or_path: str | Path,
    *,
    runner: str = "lanes",
    ranks: int = 8,
    layout: str | Layout | None = None,
    dtype: str = "float32",
    quant: str = "auto",
    kv_cache_dtype: str = "auto",
    wire: str | None = None,
    exchange: str = "flat",
    max_num_seqs: int = 32,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 2048,
    num_speculative_tokens: int = 0,
    microbatches: int = 1,
    redundant_slots: int = 0,
    shared_slots: int = 0,
    eplb_interval: int = 0,
) -> LLM:
    """Loads a Hugging Face directory, or `tiny`, the model that ships.

    Args:
      name_or_path: the model.
      runner: `lanes` (any number of ranks on one device) or `devices` (one device a rank).
      ranks: expert-parallel ranks.
      layout: of other ranks than those: a `Layout`, or the name of a ready one such as `tp4` (see
        `cmx_jax.mesh.named_layouts`). It has wire, exchange, microbatches and slots of its own, instead of
        those below.
      dtype: `float32` or `bfloat16`, of weights, cache and arithmetic.
      quant: `int8` rounds the large matrices while they are loaded, with a scale for each output channel, and
        computes with them in INT8 (W8A8: activations are rounded token by token); `auto` does so where the
        checkpoint is stored like that; `none` computes in `dtype` whatever is stored.
      kv_cache_dtype: of the cache alone: `auto` takes `dtype`; `int8`, `bfloat16` or `float32`. Attention
        sees what is kept, in `logits` too.
      wire: type of dispatched tokens, `float32`, `bfloat16` or `int8`; None takes `dtype`.
      exchange: how they travel: `flat`, `hierarchical` (by node, then NPU), `allgather` (everywhere), or, on
        accelerators, `ragged` (messages only).
      max_num_seqs: sequences decoded at once, over all ranks; further ones wait.
      max_model_len: longest sequence to make room for; None takes the model's context, at most 4,096.
      max_num_batched_tokens: of a prefill step's row; longer prompts are prefilled in chunks.
      num_speculative_tokens: drafts of the MTP layer that each decode step verifies; the text stays the same.
      microbatches: streams in which a step's rows go through the layers.
      redundant_slots: further replicas of busy experts, over all ranks.
      shared_slots: slots for copies of the shared expert; with 0 every rank has it.
      eplb_interval: decode steps after which experts are placed anew by their load; 0: never.

    Raises:
      CmxError: the model is unknown or refused, or the layout does not fit it or the machine.
    """
    enable_compilation_cache()
    if max_num_seqs < 1:
        raise CmxError(f"max_num_seqs is {max_num_seqs}, expected at least 1")
    model = Model.read(name_or_path, dtype, quant)
    context = model.config.max_position_embeddings
    length = min(context, 4096) if max_model_len is None else max_model_len
    if not 1 <= length <= context:
        raise CmxError(f"max_model_len is {length}, expected 1 to the model's context of {context}")
    if max_num_batched_tokens < 1:
        raise CmxError(f"max_num_batched_tokens is {max_num_batched_tokens}, expected at least 1")
    experts = model.config.n_routed_experts
    if layout is None:
        layout = expert_parallel(
            ranks,
            experts,
            exchange=exchange,
            wire=dtype if wire is None else wire,
            microbatches=microbatches,
            redundant_slots=redundant_slots,
            shared_slots=shared_slots,
        )
    return LLM(
        model,
        ready(layout).make(experts) if isinstance(layout, str) else layout,
        runner,
        max_num_seqs,
        length,
        max_num_batched_tokens,
        num_speculative_tokens,
        eplb_interval,
        kv_cache_dtype,
    )
