"""Offline use: `from_pretrained` gives a model with `.logits` and `.generate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import ArrayLike

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.mesh.named_layouts import named_layout
from cmx_jax.mesh.runners import make_runner
from cmx_jax.model.rebalance import Move
from cmx_jax.serving.deploy.engine_args import EngineArgs
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.deploy.site import Site
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.scoring import device_logits
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.pages import pages_for
from cmx_jax.serving.scheduling.request import Request, SamplingParams

MAX_MODEL_LEN = 4096  # tokens to make room for at most, by default


@dataclass(frozen=True)
class Completion:
    """Continuation of one prompt; `str()` of it is its text.

    Attributes:
      prompt_tokens: Token ids of the prompt.
      tokens: Generated token ids.
      text: Generated text.
      finish_reason: `stop` at an end token, `length` at `max_new_tokens`.
      ttft_s: Time to first token, in seconds.
      tpot_s: Mean time per output token after the first, in seconds.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    ttft_s: float
    tpot_s: float

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model on one instance that prefills and decodes, or on the pools of a recipe.

    Attributes:
      model: Config, weights and tokenizer as read.
      instance: The (first) decode instance; `instance.traffic` has counts of its exchanges and drafts.
      engine: Serving loop over the instances.
      max_model_len: Longest sequence that there is room for, in tokens.

    Example:
      >>> import cmx_jax
      >>> model = cmx_jax.from_pretrained("tiny", ranks=2, max_num_seqs=2, max_model_len=64)
      >>> [answer] = model.generate(["The json module"], max_new_tokens=4)
      >>> len(answer.tokens)
      4
    """

    def __init__(self, model: Model, engine: Engine, max_model_len: int, site: Site | None = None):
        """Serves a model with an engine; `on_layout` and `from_pretrained` make one.

        Args:
          model: Config, weights and tokenizer as read.
          engine: Serving loop with a decode instance.
          max_model_len: Longest sequence that there is room for, in tokens.
          site: Site of the engine's pools, whose caching pool `close` ends.
        """
        self.model, self.engine, self.max_model_len = model, engine, max_model_len
        self.instance, self._site = engine.decode, site

    def close(self) -> None:
        """Ends the caching pool of a recipe, if there is one."""
        if self._site is not None:
            self._site.close()

    @classmethod
    def on_layout(cls, model: Model, layout: Layout, args: EngineArgs) -> "LLM":
        """Puts a model on the ranks of one instance, which prefills and decodes.

        Args:
          model: Config, weights and tokenizer as read.
          layout: Layout of the ranks, instead of the options of `args` that describe one.
          args: Options of the engine.

        Raises:
          CmxError: The layout does not fit the model or the machine, or an option does not fit the model.
        """
        width, parts = Capacity().page_width, layout.microbatches
        sequences = -(-args.max_num_seqs // (layout.data_ranks * parts)) * parts
        max_model_len = args.context(model.config.max_position_embeddings, MAX_MODEL_LEN)
        capacity = Capacity(
            sequences=sequences,
            pages=sequences * pages_for(max_model_len, width),
            page_width=width,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        instance = model.instance(
            args.runner,
            layout,
            make_runner(args.runner, layout.axes, ranks_per_device=layout.ranks_per_npu),
            capacity,
            args.drafts(model.checkpoint.mtp),
            args.kv_cache_dtype,
        )
        return cls(model, Engine([instance], instance, eplb_interval=args.eplb_interval), max_model_len)

    @property
    def moves(self) -> list[Move]:
        """Results of the rebalancings of the experts."""
        return self.engine.moves

    def logits(self, tokens: ArrayLike) -> Float[np.ndarray, "B T O"]:
        """Float32 logits of every position: row `t` predicts token `t + 1`.

        Args:
          tokens: Token ids, integers `[B, T]`.

        Raises:
          CmxError: The tokens are not `[B, T]` integers of the vocabulary, or exceed the context.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
            raise CmxError(f"tokens are {tokens.dtype} {list(tokens.shape)}, expected integers [B, T]")
        batch, length = tokens.shape
        return np.asarray(self.device_logits(tokens, np.full(batch, length, np.int32)))[:batch, :length]

    def device_logits(
        self, tokens: Integer[np.ndarray, "B T"], lengths: Integer[np.ndarray, " B"]
    ) -> Float[jax.Array, "rows span O"]:
        """Returns the logits of sequences of unequal length, left on the devices.

        Experts compute nothing after the end of a sequence, and the logits there are meaningless.

        Args:
          tokens: Token ids, padded to one length.
          lengths: Number of tokens of each sequence.

        Returns:
          Logits of at least the `B` rows and `T` positions, rounded up: few shapes, few programs.

        Raises:
          CmxError: A token is outside the vocabulary, or the tokens exceed the context.
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

        The same seed gives the same continuation of a prompt in any batch and on any runner.

        Args:
          prompts: A text, or a sequence of texts and lists of token ids.
          max_new_tokens: Largest number of tokens to generate for each prompt.
          temperature: Temperature; 0 is greedy.
          top_k: Number of most likely tokens to sample from; 0: all.
          top_p: Probability mass of the most likely tokens to sample from.
          seed: Seed of the draws.
          ignore_eos: True to continue after the model's end tokens.

        Raises:
          CmxError: A prompt or a parameter cannot be served; no prompt is served then.
        """
        params = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            ignore_eos=ignore_eos,
        )
        texts = [prompts] if isinstance(prompts, str) else prompts
        prompts_ids = [self.model.encode(prompt) for prompt in texts]
        try:
            requests = [self.engine.submit(ids, params) for ids in prompts_ids]
            self.engine.run()
        except BaseException:  # an interrupt, say: the next call must not find half-served requests
            self.engine.reset()
            raise
        return [completion(request, self.model) for request in requests]


def completion(request: Request, model: Model) -> Completion:
    """Returns the result of a finished request."""
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
    layout: str | Layout | None = None,
    recipe: Recipe | None = None,
    **options: Any,
) -> LLM:
    """Loads a Hugging Face directory, or `tiny`, the model that ships.

    Args:
      name_or_path: The model.
      layout: Layout of the ranks: a `Layout`, or the name of one such as `tp4` (see
        `cmx_jax.mesh.named_layouts`). It replaces the options `ranks`, `ranks_per_npu`, `wire`, `exchange`,
        `mailbox_rows`, `microbatches`, `redundant_slots` and `shared_slots`. None: expert parallelism by
        these options.
      recipe: Pools of prefill and decode instances on the supernode's devices, instead of one instance. It
        has options of its own: `layout` and `options` cannot be given with it.
      options: Fields of `EngineArgs`, such as `runner="devices"`. `max_model_len` is by default the model's
        context, at most 4,096.

    Raises:
      CmxError: The model is unknown or refused, or the layout or recipe does not fit it or the machine.

    Example:
      >>> import cmx_jax
      >>> model = cmx_jax.from_pretrained("tiny", ranks=2, max_num_seqs=2, max_model_len=64)
      >>> model.logits([[462, 1113, 83]]).shape
      (1, 3, 2048)
    """
    enable_compilation_cache()
    if recipe is not None:
        if layout is not None or options:
            given = ", ".join(["layout"] * (layout is not None) + sorted(options))
            raise CmxError(f"{given}: given beside a recipe, expected in the recipe (Recipe.with_engine)")
        site = Site.read(name_or_path, recipe)
        return LLM(site.model, site.start(), site.context, site)
    args = EngineArgs(**options)
    model = Model.read(name_or_path, args.dtype, args.quant)
    experts = model.config.n_routed_experts
    if layout is None:
        layout = expert_parallel(
            args.ranks,
            experts,
            ranks_per_npu=args.ranks_per_npu,
            exchange=args.exchange,
            wire=args.dtype if args.wire is None else args.wire,
            mailbox_rows=args.mailbox_rows,
            microbatches=args.microbatches,
            redundant_slots=args.redundant_slots,
            shared_slots=args.shared_slots,
        )
    chosen = named_layout(layout).make(experts) if isinstance(layout, str) else layout
    return LLM.on_layout(model, chosen, args)
