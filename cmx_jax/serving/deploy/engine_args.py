"""The options of an engine, once: `from_pretrained` takes them, and the flags of `cmx` are made from them."""

from dataclasses import dataclass, field
from typing import Any

from cmx_jax.errors import CmxError


def _option(default: Any, group: str, about: str) -> Any:
    """Returns a field of `EngineArgs`.

    Args:
      default: Default value.
      group: Group of options that a command takes together: `model`, `exchange`, `size` or `decode`.
      about: Meaning and values, for `--help`.
    """
    return field(default=default, metadata={"group": group, "help": about})


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Options of an engine, with vLLM's names where it has them. Defaults are those of one instance.

    Attributes:
      runner: `lanes` (any number of ranks on one device) or `devices` (`ranks_per_npu` ranks on each device).
      ranks: Number of expert-parallel ranks.
      ranks_per_npu: Number of ranks that share an NPU, which is a device of runner `devices`: 2 where a rank
        is a die.
      dtype: `float32` or `bfloat16`, the type of weights, cache and arithmetic.
      quant: `int8` rounds the large matrices while they are loaded, with a scale for each output channel, and
        computes with them in INT8 (W8A8: activations are rounded token by token); `auto` does so where the
        checkpoint is stored like that; `none` computes in `dtype` whatever is stored.
      kv_cache_dtype: Type of the cached rows: `auto` takes `dtype`; `int8`, `bfloat16` or `float32`.
        Attention sees the rounded rows, in `logits` too.
      wire: Type of dispatched tokens, `float32`, `bfloat16` or `int8`; None takes `dtype`.
      exchange: Method by which tokens travel to experts: `flat`, `hierarchical` (by node, then NPU),
        `allgather` (everywhere), or, on accelerators, `ragged` (messages only).
      mailbox_rows: Messages for each peer in a round of dispatch; 0 has room for the worst case, so that one
        round always suffices; None: twice the mean.
      max_num_seqs: Number of sequences decoded at once, over all ranks; further ones wait.
      max_model_len: Longest sequence to make room for, in tokens; None takes the model's context, up to a
        limit of the deployment.
      max_num_batched_tokens: Tokens per row of a prefill step; longer prompts are prefilled in chunks.
      num_speculative_tokens: Number of MTP drafts that each decode step verifies; the text stays the same.
        None: one, if the model has an MTP layer.
      microbatches: Number of independent streams into which a decode step's rows are split.
      redundant_slots: Number of further replicas of busy experts, over all ranks.
      shared_slots: Number of slots for copies of the shared expert; with 0 every rank has it.
      eplb_interval: Number of decode steps between two rebalancings of the experts by their load; 0: never.

    Raises:
      CmxError: A number of sequences, tokens, microbatches or ranks is below 1.
    """

    runner: str = _option("lanes", "model", "execution of ranks on this machine: lanes or devices")
    ranks: int = _option(8, "model", "number of expert-parallel ranks")
    ranks_per_npu: int = _option(1, "model", "ranks that share an NPU (a device), as its two dies do")
    dtype: str = _option("float32", "model", "dtype of weights, cache and arithmetic: float32 or bfloat16")
    quant: str = _option("auto", "model", "quantization of weights: auto (as stored), int8 or none")
    kv_cache_dtype: str = _option(
        "auto", "exchange", "dtype of KV cache rows: auto (the model's), int8, bfloat16 or float32"
    )
    wire: str | None = _option(
        None, "exchange", "dtype of tokens sent to experts: float32, bfloat16 or int8 (default: the model's)"
    )
    exchange: str = _option(
        "flat",
        "exchange",
        "exchange of tokens with experts: flat, hierarchical, allgather, or ragged (accelerators only)",
    )
    mailbox_rows: int | None = _option(
        None, "exchange", "messages for each peer in a round, 0: the worst case (default: twice the mean)"
    )
    max_num_seqs: int = _option(32, "size", "largest number of sequences that decode at once")
    max_model_len: int | None = _option(
        None, "size", "most tokens per sequence (default: the model's context, limited)"
    )
    max_num_batched_tokens: int = _option(2048, "size", "tokens per row of a prefill step")
    num_speculative_tokens: int | None = _option(0, "decode", "MTP drafts verified in each decode step")
    microbatches: int = _option(1, "decode", "microbatches per decode step")
    redundant_slots: int = _option(0, "decode", "slots for further replicas of busy experts")
    shared_slots: int = _option(0, "decode", "slots for copies of the shared expert")
    eplb_interval: int = _option(
        0, "decode", "decode steps between two rebalancings of the experts, 0: never"
    )

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "microbatches", "ranks_per_npu"):
            if getattr(self, name) < 1:
                raise CmxError(f"{name} is {getattr(self, name)}, expected at least 1")

    def context(self, longest: int, limit: int) -> int:
        """Returns the number of tokens of the longest sequence to make room for.

        Args:
          longest: The model's context.
          limit: Largest default.

        Raises:
          CmxError: `max_model_len` exceeds the model's context or is below 1.
        """
        length = min(longest, limit) if self.max_model_len is None else self.max_model_len
        if not 1 <= length <= longest:
            raise CmxError(f"max_model_len is {length}, expected 1 to the model's context of {longest}")
        return length

    def drafts(self, mtp: bool) -> int:
        """Returns the number of drafts for a model with or without an MTP layer."""
        return int(mtp) if self.num_speculative_tokens is None else self.num_speculative_tokens
