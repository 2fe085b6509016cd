"""Hugging Face's names: every tensor of a family's files once, and where it lies in our fields.

A *piece* is our field of one layer, of one expert where there are experts. Each source is one tensor of the
file format with its shape there, and a NumPy *view* that makes it look like (a part of) its piece; so
reading and writing are the same assignment in two directions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmx_jax.model.config import GQAConfig, MLAConfig, ModelConfig

View = Callable[[np.ndarray], np.ndarray]
Piece = tuple[str, str, int, int]
"""Stack, path, number in the stack, expert (0 where there are none): see `cmx_jax.model.weights.Leaf`."""


@dataclass(frozen=True)
class Stacked:
    """Where an expert's tensor lies when a file has all experts of a layer in one."""

    name: str
    shape: tuple[int, ...]
    at: tuple[Any, ...]
    transposed: bool


@dataclass(frozen=True)
class Source:
    """One tensor of the file format.

    Attributes:
      name: as the file has it, experts one by one.
      shape: there.
      unit: the layer that it belongs to, or `top`: what is read and written at a time.
      piece: where it goes.
      part: which part of the piece.
      view: the file's array as the piece has it.
      stacked: where it lies if experts are stacked.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    piece: Piece
    part: tuple[Any, ...]
    view: View
    stacked: Stacked | None = None


@dataclass(frozen=True)
class Names:
    """How a family calls what others call differently."""

    ffn: str = "mlp"
    router: str = "gate"
    shared: str = "shared_experts"
    experts_transposed: bool = False  # stacked ones are [E, D, 2 F] instead of [E, 2 F, D]


NAMES = {
    "deepseek_v3": Names(),
    "qwen3_moe": Names(),
    "llama4": Names(ffn="feed_forward", router="router", shared="shared_expert", experts_transposed=True),
    "pangu_ultra_moe": Names(),
    "palm": Names(),
}
NORMS = {  # by the kind of block: with sandwich norms one name means another place
    "pre": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "sandwich": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_mlp_layernorm",
        "ffn_out_norm": "post_mlp_layernorm",
    },
    "parallel": {"attn_norm": "input_layernorm"},
}

Row = tuple[str, tuple[int, ...], str, View]  # name, shape, path, view


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _transposed(a: np.ndarray) -> np.ndarray:
    return a.T


def _heads_out(heads: int) -> View:
    """`[H N, D] -> [D, H, N]`: a projection to heads."""
    return lambda a: a.reshape(heads, -1, a.shape[-1]).transpose(2, 0, 1)


def _heads_in(heads: int) -> View:
    """`[D, H V] -> [H, V, D]`: a projection from heads."""
    return lambda a: a.reshape(a.shape[0], heads, -1).transpose(1, 2, 0)


def _per_head(heads: int) -> View:
    """`[H N] -> [H, N]`."""
    return lambda a: a.reshape(heads, -1)


def _mla(c: ModelConfig, a: MLAConfig) -> Iterator[Row]:
    heads, nope, value = c.num_attention_heads, a.qk_nope_head_dim, a.v_head_dim
    width, query, latent = c.hidden_size, a.q_lora_rank, a.kv_lora_rank

    def by_head(x: np.ndarray) -> np.ndarray:  # [H (N + V), A] -> [H, N + V, A]
        return x.reshape(heads, nope + value, latent)

    if query:
        yield "q_a_proj.weight", (query, width), "q_a", _transposed
        yield "q_a_layernorm.weight", (query,), "q_norm", _same
    shape = (heads * a.qk_head_dim, query or width)
    yield ("q_b_proj" if query else "q_proj") + ".weight", shape, "q_b", _heads_out(heads)
    yield "kv_a_proj_with_mqa.weight", (a.row_dim, width), "kv_a", _transposed
    yield "kv_a_layernorm.weight", (latent,), "kv_norm", _same
    kv_b = (heads * (nope + value), latent)
    yield "kv_b_proj.weight", kv_b, "k_b", lambda x: by_head(x)[:, :nope]
    yield "kv_b_proj.weight", kv_b, "v_b", lambda x: by_head(x)[:, nope:]
    yield "o_proj.weight", (width, heads * value), "o", _heads_in(heads)
    if c.attention_bias:
        if query:
            yield "q_a_proj.bias", (query,), "q_a_bias", _same
        yield "kv_a_proj_with_mqa.bias", (a.row_dim,), "kv_a_bias", _same
        yield "o_proj.bias", (width,), "o_bias", _same


def _gqa(c: ModelConfig, a: GQAConfig) -> Iterator[Row]:
    width, dim = c.hidden_size, a.head_dim
    for path, heads in (
        ("q", c.num_attention_heads),
        ("k", a.num_key_value_heads),
        ("v", a.num_key_value_heads),
    ):
        yield f"{path}_proj.weight", (heads * dim, width), path, _heads_out(heads)
        if c.attention_bias:
            yield f"{path}_proj.bias", (heads * dim,), f"{path}_bias", _per_head(heads)
        if a.qk_norm == "weighted" and path != "v":
            yield f"{path}_norm.weight", (dim,), f"{path}_norm", _same
    yield "o_proj.weight", (width, c.num_attention_heads * dim), "o", _heads_in(c.num_attention_heads)
    if c.attention_bias:
        yield "o_proj.bias", (width,), "o_bias", _same


class _Layer:
    """Names the tensors of one layer."""

    def __init__(self, c: ModelConfig, stack: str, number: int, index: int):
        self.c, self.stack, self.index = c, stack, index
        self.names, self.unit = NAMES[c.family], f"layers.{number}"

    def source(self, name: str, shape: tuple[int, ...], path: str, view: View, **more: Any) -> Source:
        piece = (self.stack, path, self.index, more.pop("expert", 0))
        return Source(
            f"model.{self.unit}.{name}", shape, self.unit, piece, more.pop("part", ()), view, **more
        )

    def swiglu(self, name: str, path: str, hidden: int) -> Iterator[Source]:
        width, every = self.c.hidden_size, slice(None)
        for i, proj in enumerate(("gate_proj", "up_proj")):
            shape, part = (hidden, width), (every, i)
            yield self.source(f"{name}.{proj}.weight", shape, f"{path}.gate_up", _transposed, part=part)
        yield self.source(f"{name}.down_proj.weight", (width, hidden), f"{path}.down", _transposed)

    def expert(self, e: int) -> Iterator[Source]:
        width, hidden, every = self.c.hidden_size, self.c.moe_intermediate_size, slice(None)
        experts, turned = f"{self.names.ffn}.experts", self.names.experts_transposed

        def stacked(name: str, out: int, rows: slice, into: int) -> Stacked:
            shape, at = ((into, out), (every, rows)) if turned else ((out, into), (rows, every))
            full = f"model.{self.unit}.{experts}.{name}"
            return Stacked(full, (self.c.n_routed_experts, *shape), (e, *at), turned)

        for i, proj in enumerate(("gate_proj", "up_proj")):
            rows = slice(i * hidden, (i + 1) * hidden)
            yield self.source(
                f"{experts}.{e}.{proj}.weight",
                (hidden, width),
                "ffn.experts.gate_up",
                _transposed,
                part=(every, i),
                expert=e,
                stacked=stacked("gate_up_proj", 2 * hidden, rows, width),
            )
        yield self.source(
            f"{experts}.{e}.down_proj.weight",
            (width, hidden),
            "ffn.experts.down",
            _transposed,
            expert=e,
            stacked=stacked("down_proj", width, every, hidden),
        )

    def moe(self) -> Iterator[Source]:
        c, ffn = self.c, self.names.ffn
        router = f"{ffn}.{self.names.router}"
        yield self.source(f"{router}.weight", (c.n_routed_experts, c.hidden_size), "ffn.router", _same)
        if c.router_bias:
            bias = f"{router}.e_score_correction_bias"
            yield self.source(bias, (c.n_routed_experts,), "ffn.router_bias", _same)
        for e in range(c.n_routed_experts):
            yield from self.expert(e)
        if c.n_shared_experts:
            hidden = c.n_shared_experts * c.moe_intermediate_size
            yield from self.swiglu(f"{ffn}.{self.names.shared}", "ffn.shared", hidden)

    def all(self) -> Iterator[Source]:
        c, width = self.c, self.c.hidden_size
        for path, name in NORMS[c.block].items():
            yield self.source(f"{name}.weight", (width,), path, _same)
        rows = _mla(c, c.attention) if isinstance(c.attention, MLAConfig) else _gqa(c, c.attention)
        for name, shape, path, view in rows:
            yield self.source(f"self_attn.{name}", shape, f"attn.{path}", view)
        if self.stack == "dense":
            yield from self.swiglu(self.names.ffn, "ffn", c.intermediate_size)
            return
        yield from self.moe()
        if self.stack == "mtp":
            yield self.source("enorm.weight", (width,), "enorm", _same)
            yield self.source("hnorm.weight", (width,), "hnorm", _same)
            yield self.source("eh_proj.weight", (width, 2 * width), "eh_proj", _transposed)
            yield self.source("shared_head.norm.weight", (width,), "norm", _same)


def sources(c: ModelConfig, mtp: bool) -> Iterator[Source]:
    """Every tensor of the file format for this config, layer by layer; `mtp`: those of MTP layers too."""
    shape = (c.vocab_size, c.hidden_size)
    yield Source("model.embed_tokens.weight", shape, "top", ("", "embed", 0, 0), (), _same)
    done = {"dense": 0, "moe": 0}
    for number, kind in enumerate(c.layers):
        stack = "moe" if kind.moe else "dense"
        yield from _Layer(c, stack, number, done[stack]).all()
        done[stack] += 1
    for index in range(c.num_nextn_predict_layers if mtp else 0):
        yield from _Layer(c, "mtp", c.num_hidden_layers + index, index).all()
    yield Source("model.norm.weight", (c.hidden_size,), "top", ("", "norm", 0, 0), (), _same)
    if not c.tie_word_embeddings:
        yield Source("lm_head.weight", shape, "top", ("", "head", 0, 0), (), _transposed)
