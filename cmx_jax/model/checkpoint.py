"""Hugging Face directories: `config.json`, `*.safetensors`, read and written by one table of names.

Every tensor of the file format stands once in the table, with its shape there and a NumPy *view* that
makes it look like our field; so reading and writing are the same assignment in two directions. Tensors that
are missing, misshapen or unknown are refused by name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cmx_jax.errors import CmxError
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.weights import Leaf, Weights, leaf_dtype, weight_tree

FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One tensor of the file format and where it lies in our fields."""

    name: str
    shape: tuple[int, ...]
    field: tuple[str, str]  # stack, path
    at: tuple[Any, ...]  # index into the field
    view: View  # the file's array as the field has it


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _transposed(a: np.ndarray) -> np.ndarray:
    return a.T


def _attention(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str, View]]:
    heads, nope, value = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
    width, query, latent = c.hidden_size, c.q_lora_rank, c.kv_lora_rank
    start, per_head = query or width, nope + c.qk_rope_head_dim

    def by_head(a: np.ndarray) -> np.ndarray:  # [H (N + V), C] -> [H, N + V, C]
        return a.reshape(heads, nope + value, latent)

    def query_heads(a: np.ndarray) -> np.ndarray:  # [H (N + R), Q] -> [Q, H, N + R]
        return a.reshape(heads, per_head, start).transpose(2, 0, 1)

    def output_heads(a: np.ndarray) -> np.ndarray:  # [D, H V] -> [H, V, D]
        return a.reshape(width, heads, value).transpose(1, 2, 0)

    if query:
        yield "q_a_proj.weight", (query, width), "q_a", _transposed
        yield "q_a_layernorm.weight", (query,), "q_norm", _same
    yield ("q_b_proj" if query else "q_proj") + ".weight", (heads * per_head, start), "q_b", query_heads
    yield "kv_a_proj_with_mqa.weight", (c.latent_dim, width), "kv_a", _transposed
    yield "kv_a_layernorm.weight", (latent,), "kv_norm", _same
    kv_b = (heads * (nope + value), latent)
    yield "kv_b_proj.weight", kv_b, "k_b", lambda a: by_head(a)[:, :nope]
    yield "kv_b_proj.weight", kv_b, "v_b", lambda a: by_head(a)[:, nope:]
    yield "o_proj.weight", (width, heads * value), "o", output_heads
    if c.attention_bias:
        if query:
            yield "q_a_proj.bias", (query,), "q_a_bias", _same
        yield "kv_a_proj_with_mqa.bias", (c.latent_dim,), "kv_a_bias", _same
        yield "o_proj.bias", (width,), "o_bias", _same


def _swiglu(
    name: str, path: str, width: int, hidden: int, at: tuple[Any, ...] = ()
) -> Iterator[tuple[str, tuple[int, ...], str, tuple[Any, ...], View]]:
    every = slice(None)
    yield f"{name}.gate_proj.weight", (hidden, width), f"{path}.gate_up", (*at, every, 0), _transposed
    yield f"{name}.up_proj.weight", (hidden, width), f"{path}.gate_up", (*at, every, 1), _transposed
    yield f"{name}.down_proj.weight", (width, hidden), f"{path}.down", at, _transposed


def _layer(c: ModelConfig, stack: str, number: int, index: int) -> Iterator[Source]:
    prefix, width = f"model.layers.{number}.", c.hidden_size

    def source(name: str, shape: tuple[int, ...], path: str, at: tuple[Any, ...], view: View) -> Source:
        if path.startswith("ffn.experts."):  # the slot comes first there
            return Source(prefix + name, shape, (stack, path), (at[0], index, *at[1:]), view)
        return Source(prefix + name, shape, (stack, path), (index, *at), view)

    yield source("input_layernorm.weight", (width,), "attn_norm", (), _same)
    yield source("post_attention_layernorm.weight", (width,), "ffn_norm", (), _same)
    for name, shape, field, view in _attention(c):
        yield source(f"self_attn.{name}", shape, f"attn.{field}", (), view)
    if stack == "dense":
        for row in _swiglu("mlp", "ffn", width, c.intermediate_size):
            yield source(*row)
        return
    yield source("mlp.gate.weight", (c.n_routed_experts, width), "ffn.router", (), _same)
    bias = "mlp.gate.e_score_correction_bias"
    yield source(bias, (c.n_routed_experts,), "ffn.router_bias", (), _same)
    for e in range(c.n_routed_experts):
        name = f"mlp.experts.{e}"
        for row in _swiglu(name, "ffn.experts", width, c.moe_intermediate_size, (e,)):
            yield source(*row)
    if c.n_shared_experts:
        hidden = c.n_shared_experts * c.moe_intermediate_size
        for row in _swiglu("mlp.shared_experts", "ffn.shared", width, hidden):
            yield source(*row)
    if stack == "mtp":
        yield source("enorm.weight", (width,), "enorm", (), _same)
        yield source("hnorm.weight", (width,), "hnorm", (), _same)
        yield source("eh_proj.weight", (width, 2 * width), "eh_proj", (), _transposed)
        yield source("shared_head.norm.weight", (width,), "norm", (), _same)


def sources(c: ModelConfig, mtp: bool = True) -> Iterator[Source]:
    """Every tensor of the file format for this config, layer by layer; `mtp`: those of MTP layers too."""
    shape = (c.vocab_size, c.hidden_size)
    yield Source("model.embed_tokens.weight", shape, ("", "embed"), (), _same)
    for number in range(c.num_hidden_layers):
        dense = number < c.num_dense_layers
        stack, index = ("dense", number) if dense else ("moe", number - c.num_dense_layers)
        yield from _layer(c, stack, number, index)
    for index in range(c.num_nextn_predict_layers if mtp else 0):
        yield from _layer(c, "mtp", c.num_hidden_layers + index, index)
    yield Source("model.norm.weight", (c.hidden_size,), ("", "norm"), (), _same)
    if not c.tie_word_embeddings:
        yield Source("lm_head.weight", shape, ("", "head"), (), _transposed)


class _Files:
    """The safetensors files of a directory as one mapping from tensor name to array."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._handles: dict[Path, Any] = {}
        self.file_of = self._index() or self._single()

    def _index(self) -> dict[str, Path] | None:
        path = self.directory / "model.safetensors.index.json"
        if not path.is_file():
            return None
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = {str(name): self.directory / str(file) for name, file in weight_map.items()}
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise CmxError(f"{path}: not a safetensors index ({error!r})") from None
        for file in sorted(set(names.values())):
            if not file.is_file():
                raise CmxError(f"{path}: names {file.name}, which is not there")
        return names

    def _single(self) -> dict[str, Path]:
        seen: dict[str, Path] = {}
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CmxError(f"{self.directory}: no *.safetensors there, expected a model's weights")
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 (not a dict)
                if name in seen:
                    raise CmxError(f"{file}: holds tensor {name}, as {seen[name].name} does: which is meant?")
                seen[name] = file
        return seen

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CmxError(f"{file}: not a whole safetensors file ({error})") from None
        return self._handles[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor has in its file."""
        return tuple(self._header(name).get_shape())

    def _header(self, name: str) -> Any:
        try:
            return self._open(self.file_of[name]).get_slice(name)
        except SafetensorError:
            raise CmxError(f"{self.file_of[name]}: tensor {name} is not in it, but in the index") from None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses another shape, or a type that is not read."""
        header, given = self._header(name), self.shape(name)
        if given != shape:
            raise CmxError(f"tensor {name} has shape {list(given)}, expected {list(shape)}")
        if header.get_dtype() not in FLOATS:
            raise CmxError(f"tensor {name} is {header.get_dtype()}, expected one of {sorted(FLOATS)}")

    def array(self, name: str) -> np.ndarray:
        """The tensor."""
        return self._open(self.file_of[name]).get_tensor(name)


def _ignored(name: str, files: _Files, c: ModelConfig, mtp: bool) -> bool:
    """Tensors that carry nothing of their own: frequencies, copies of embedding and head, empty ones."""
    shared = tuple(
        f"model.layers.{c.num_hidden_layers + i}.{copy}"
        for i in range(c.num_nextn_predict_layers if mtp else 0)
        for copy in ("embed_tokens.weight", "shared_head.head.weight")
    )
    empty = ".mlp.shared_experts." in name and 0 in files.shape(name)
    tied = c.tie_word_embeddings and name == "lm_head.weight"
    return name in shared or empty or tied or name.endswith("rotary_emb.inv_freq")


def has_mtp(c: ModelConfig, names: Mapping[str, Any]) -> bool:
    """Whether any tensor of an MTP layer is stored."""
    prefixes = tuple(f"model.layers.{c.num_hidden_layers + i}." for i in range(c.num_nextn_predict_layers))
    return bool(prefixes) and any(name.startswith(prefixes) for name in names)


def _check_names(wanted: list[Source], files: _Files, c: ModelConfig, mtp: bool) -> None:
    names = {s.name for s in wanted}
    missing = sorted(names - files.file_of.keys())
    unknown = sorted(n for n in files.file_of.keys() - names if not _ignored(n, files, c, mtp))
    for what, found in (("is missing", missing), ("is not part of this architecture", unknown)):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CmxError(f"{files.directory}: tensor {found[0]} {what}{more}")


def read_weights(directory: str | Path, c: ModelConfig, dtype: Any) -> Weights:
    """Weights of a Hugging Face directory as NumPy arrays, expert `e` in slot `e`.

    A config that names MTP layers of which no tensor is stored loads without them (`mtp` is None).

    Raises:
      CmxError: a tensor is missing, unknown, misshapen, of another type, or not finite; it is named.
    """
    files, slot_of_expert = _Files(Path(directory)), np.arange(c.n_routed_experts, dtype=np.int32)
    mtp = has_mtp(c, files.file_of)
    wanted = list(sources(c, mtp))
    _check_names(wanted, files, c, mtp)
    for s in wanted:  # before anything of that size is allocated
        files.check(s.name, s.shape)
    fields: dict[tuple[str, str], np.ndarray] = {}

    def make(leaf: Leaf) -> np.ndarray:
        if leaf.kind == "slots":
            return np.broadcast_to(slot_of_expert, leaf.shape)
        field = np.zeros(leaf.shape, leaf_dtype(leaf, dtype))
        fields[leaf.stack, leaf.path] = field
        return field

    weights = weight_tree(c, c.n_routed_experts, make, mtp)
    for s in wanted:
        field = fields[s.field]
        with np.errstate(over="ignore"):  # what overflows is refused below
            array = files.array(s.name).astype(field.dtype)
        if not np.isfinite(array).all():
            raise CmxError(f"tensor {s.name} holds NaN or infinity as {field.dtype}, expected finite numbers")
        field[s.at] = s.view(array)
    return weights


def write_weights(
    directory: str | Path, c: ModelConfig, weights: Weights, dtype: Any = ml_dtypes.bfloat16
) -> Path:
    """Writes `model.safetensors`, matrices in `dtype`, the router's bias in float32.

    `weights` has expert `e` in slot `e`. Returns the file's path.
    """
    mtp = weights.mtp is not None
    fields: dict[tuple[str, str], np.ndarray] = {}
    leaves: list[Leaf] = []
    weight_tree(c, c.n_routed_experts, lambda leaf: leaves.append(leaf), mtp)
    for leaf in leaves:
        owner: Any = getattr(weights, leaf.stack) if leaf.stack else weights
        fields[leaf.stack, leaf.path] = _field(owner, leaf)
    tensors: dict[str, np.ndarray] = {}
    for s in sources(c, mtp):
        kept = np.float32 if s.name.endswith("e_score_correction_bias") else dtype
        tensor = tensors.setdefault(s.name, np.zeros(s.shape, kept))
        s.view(tensor)[...] = fields[s.field][s.at].astype(kept)
    path = Path(directory) / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _field(owner: Any, leaf: Leaf) -> np.ndarray:
    own = ("enorm", "hnorm", "eh_proj", "norm")
    path = leaf.path if leaf.stack != "mtp" or leaf.path in own else f"layer.{leaf.path}"
    for part in path.split("."):
        owner = getattr(owner, part)
    return np.asarray(owner)
