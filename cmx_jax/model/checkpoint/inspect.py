"""Report on a checkpoint: family, sizes, storage of each group of tensors, missing and unknown tensors.

For an Orbax directory, whose arrays were checked against the config, and for a preset the report counts the
tensors that the config asks for.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.faults import grouped
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.load import open_checkpoint
from cmx_jax.model.checkpoint.manifest import read_manifest
from cmx_jax.model.checkpoint.names import sources
from cmx_jax.model.checkpoint.schemes import check_scales
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.families import preset, presets, read_config
from cmx_jax.model.parameters import ParameterCounts, parameter_counts


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind that are stored in the same way.

    Attributes:
      group: Kind of tensor, such as `experts` or `MTP attention`.
      scheme: Storage scheme, such as `BF16` or `FP8 128x128 blocks`.
      tensors: Number of tensors, stacked experts counted one by one.
      parameters: Number of parameters.
      bytes: Bytes in the files, with scales.
      shapes: Different shapes of the tensors.
    """

    group: str
    scheme: str
    tensors: int
    parameters: int
    bytes: int
    shapes: list[list[int]]


@dataclass(frozen=True)
class LayerCounts:
    """Number of layers of each kind in the config."""

    dense: int
    moe: int
    mtp: int


@dataclass(frozen=True)
class ExpertCounts:
    """Number of experts of an MoE layer.

    Attributes:
      routed: Number of routed experts.
      shared: Number of shared experts.
      per_token: Number of routed experts that a token chooses.
    """

    routed: int
    shared: int
    per_token: int


@dataclass(frozen=True)
class Inspection:
    """Report on a checkpoint or preset.

    Attributes:
      model: Directory, or name of a preset.
      format: Format in words.
      family: Model family.
      layers: Number of layers of each kind.
      attention: Kind of attention in words.
      experts: Number of experts.
      context: Maximum number of tokens of a sequence.
      parameters: Number of parameters.
      cache_numbers_per_token: Numbers that the KV cache holds for a token, over all layers but MTP layers.
      mtp: Storage of MTP layers, in words.
      groups: Tensors by kind and storage scheme.
      tensors: Number of tensors.
      bytes: Bytes of all tensors.
      missing: Names of tensors that the config asks for and the files lack.
      unknown: Names of tensors that the config does not ask for.
      problems: Reasons why the checkpoint does not load, a line each; empty if it loads.
    """

    model: str
    format: str
    family: str
    layers: LayerCounts
    attention: str
    experts: ExpertCounts
    context: int
    parameters: ParameterCounts
    cache_numbers_per_token: int
    mtp: str
    groups: list[TensorGroup]
    tensors: int
    bytes: int
    missing: list[str]
    unknown: list[str]
    problems: list[str]


@dataclass(frozen=True)
class _Tensor:
    """One tensor: its group, storage scheme, shape and bytes."""

    group: str
    scheme: str
    shape: tuple[int, ...]
    nbytes: int


_GROUPS = {
    "attn.": "attention",
    "ffn.router": "router",
    "ffn.experts.": "experts",
    "ffn.shared.": "shared expert",
    "ffn.": "dense FFN",
    "eh_proj": "projection",
    "embed": "embedding",
    "head": "head",
}


def _group(stack: str, path: str, shape: tuple[int, ...]) -> str:
    prefix = next((p for p in _GROUPS if path.startswith(p)), "")
    name = "router" if prefix == "ffn.router" else "norms and biases" if len(shape) == 1 else _GROUPS[prefix]
    return f"MTP {name}" if stack == "mtp" else name


def _stored(checkpoint: HuggingFace) -> Iterator[_Tensor]:
    """The tensors that the files hold and the config asks for."""
    seen = set()
    for s in checkpoint.sources:
        if s.name in seen or s.name not in checkpoint.stored:
            continue
        seen.add(s.name)
        stored = checkpoint.stored[s.name]
        headers = checkpoint.files.headers
        stacked = s.stacked is not None and stored.name == s.stacked.name
        size = headers[stored.name].nbytes
        size = size * math.prod(s.shape) // max(math.prod(headers[stored.name].shape), 1) if stacked else size
        size += sum(headers[name].nbytes for name in stored.companions)
        scheme = f"{stored.scheme}, stacked" if stacked else stored.scheme
        yield _Tensor(_group(*s.piece[:2], s.shape), scheme, s.shape, size)


def _expected(c: ModelConfig, mtp: bool, dtype: str) -> Iterator[_Tensor]:
    """The tensors that a config asks for."""
    seen = set()
    for s in sources(c, mtp):
        if s.name not in seen:
            seen.add(s.name)
            wide = "float32" if s.piece[1].startswith("ffn.router") else dtype
            size = math.prod(s.shape) * np.dtype(wide).itemsize
            yield _Tensor(_group(*s.piece[:2], s.shape), wide, s.shape, size)


def _table(tensors: Iterable[_Tensor]) -> list[TensorGroup]:
    members: dict[tuple[str, str], list[_Tensor]] = defaultdict(list)
    for tensor in tensors:
        members[tensor.group, tensor.scheme].append(tensor)
    return [
        TensorGroup(
            group,
            scheme,
            tensors=len(rows),
            parameters=sum(math.prod(row.shape) for row in rows),
            bytes=sum(row.nbytes for row in rows),
            shapes=sorted(map(list, {row.shape for row in rows})),
        )
        for (group, scheme), rows in members.items()
    ]


def inspect(path: str | Path) -> Inspection:
    """Inspects a Hugging Face or Orbax directory, or a preset given by name.

    Raises:
      CmxError: There is nothing to list, since there is no config or a file is damaged.
    """
    if str(path) in presets() and not Path(path).exists():
        c = preset(str(path))
        mtp = "named" if c.num_nextn_predict_layers else "none"
        return _report(str(path), "preset (no weights)", c, mtp, _expected(c, True, "bfloat16"))
    directory = Path(path)
    manifest = read_manifest(directory)
    if manifest is not None and (manifest.format == "orbax" or not manifest.complete):
        orbax = open_checkpoint(directory)
        c, form = orbax.config, f"orbax, {manifest.slots} expert slots"
        return _report(str(path), form, c, _mtp(c, orbax.mtp), _expected(c, orbax.mtp, manifest.dtype))
    if (directory / "config.json").is_file() and not any(directory.glob("*.safetensors*")):
        c = read_config(directory)
        mtp = "named" if c.num_nextn_predict_layers else "none"
        return _report(str(path), "config.json (no weights)", c, mtp, _expected(c, True, "bfloat16"))
    checkpoint = HuggingFace(directory)
    problems = grouped(
        [
            *checkpoint.faults,
            *_scale_faults(checkpoint),
            *(f"tensor {name} is missing" for name in checkpoint.missing),
            *(f"tensor {name} is not part of this architecture" for name in checkpoint.unknown),
        ]
    )
    mtp = "; ".join([_mtp(checkpoint.config, checkpoint.mtp), *checkpoint.notes])
    return _report(
        str(path),
        "safetensors",
        checkpoint.config,
        mtp,
        _stored(checkpoint),
        missing=checkpoint.missing,
        unknown=checkpoint.unknown,
        problems=problems,
    )


def _scale_faults(checkpoint: HuggingFace) -> Iterator[str]:
    """Errors in the values of scales and offsets."""
    for stored in checkpoint.stored.values():
        try:
            check_scales(checkpoint.files, stored)
        except CmxError as error:
            yield str(error)


def _mtp(c: ModelConfig, stored: bool) -> str:
    if not c.num_nextn_predict_layers:
        return "none"
    return "stored" if stored else "named in the config, not stored"


def _report(
    name: str,
    format: str,
    c: ModelConfig,
    mtp: str,
    tensors: Iterable[_Tensor],
    missing: Iterable[str] = (),
    unknown: Iterable[str] = (),
    problems: Iterable[str] = (),
) -> Inspection:
    a, table = c.attention, _table(tensors)
    kind = "MLA" if isinstance(a, MLAConfig) else f"GQA, {a.num_key_value_heads} key-value heads"
    return Inspection(
        model=name,
        format=format,
        family=c.family,
        layers=LayerCounts(c.num_dense_layers, c.num_moe_layers, c.num_nextn_predict_layers),
        attention=f"{kind}, {c.num_attention_heads} heads",
        experts=ExpertCounts(c.n_routed_experts, c.n_shared_experts, c.num_experts_per_tok),
        context=c.max_position_embeddings,
        parameters=parameter_counts(c),
        cache_numbers_per_token=c.row_dim * c.num_hidden_layers,
        mtp=mtp,
        groups=table,
        tensors=sum(row.tensors for row in table),
        bytes=sum(row.bytes for row in table),
        missing=list(missing),
        unknown=list(unknown),
        problems=list(problems),
    )


def render(result: Inspection) -> str:
    """Formats the report for a terminal."""
    layers, experts, count = result.layers, result.experts, result.parameters
    lines = [
        f"{result.model}: {result.family}, {result.format}",
        f"  {layers.dense} dense and {layers.moe} MoE layers, MTP {result.mtp}; "
        f"{result.attention}; context {result.context:,}",
        f"  {experts.routed} routed experts, {experts.per_token} a token, {experts.shared} shared",
        f"  {count.total:,} parameters, {count.active:,} active "
        f"({count.active_with_embedding:,} with the input embedding), {count.mtp:,} in MTP layers",
        "",
        f"  {'group':<22} {'scheme':<26} {'tensors':>8} {'parameters':>18} {'bytes':>18}  shapes",
    ]
    for row in result.groups:
        shapes = [" x ".join(map(str, shape)) for shape in row.shapes]
        remainder = f", {len(shapes) - 3} more" if len(shapes) > 3 else ""
        lines.append(
            f"  {row.group:<22} {row.scheme:<26} {row.tensors:>8,} {row.parameters:>18,} "
            f"{row.bytes:>18,}  {', '.join(shapes[:3])}{remainder}"
        )
    lines.append(f"  {'total':<49} {result.tensors:>8,} {'':>18} {result.bytes:>18,}")
    shown = result.problems[:20]
    lines += ["", *(f"  ! {problem}" for problem in shown)] if shown else []
    if len(result.problems) > len(shown):
        lines.append(f"  ! and {len(result.problems) - len(shown)} more")
    return "\n".join(lines)
