"""What a checkpoint holds: family, sizes, how each group of tensors is stored, what is missing or unknown.

Of an Orbax directory, whose arrays were held against the config, and of a preset it counts the config.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.load import open_checkpoint
from cmx_jax.model.checkpoint.manifest import read_manifest
from cmx_jax.model.checkpoint.names import sources
from cmx_jax.model.checkpoint.schemes import check_scales
from cmx_jax.model.config import MLAConfig, ModelConfig
from cmx_jax.model.families import preset, presets
from cmx_jax.model.parameters import parameter_counts


@dataclass(frozen=True)
class Held:
    """One tensor: its group, how it is stored, its shape and bytes."""

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


def _stored(checkpoint: HuggingFace) -> Iterator[Held]:
    seen = set()
    for s in checkpoint.sources:
        if s.name in seen or s.name not in checkpoint.stored:
            continue
        seen.add(s.name)
        found = checkpoint.stored[s.name]
        headers = checkpoint.files.headers
        stacked = s.stacked is not None and found.name == s.stacked.name
        size = headers[found.name].nbytes
        size = size * math.prod(s.shape) // max(math.prod(headers[found.name].shape), 1) if stacked else size
        size += sum(headers[name].nbytes for name in found.companions)
        scheme = f"{found.scheme}, stacked" if stacked else found.scheme
        yield Held(_group(*s.piece[:2], s.shape), scheme, s.shape, size)


def _expected(c: ModelConfig, mtp: bool, dtype: str) -> Iterator[Held]:
    seen = set()
    for s in sources(c, mtp):
        if s.name not in seen:
            seen.add(s.name)
            wide = "float32" if s.piece[1].startswith("ffn.router") else dtype
            size = math.prod(s.shape) * np.dtype(wide).itemsize
            yield Held(_group(*s.piece[:2], s.shape), wide, s.shape, size)


def _table(tensors: Iterable[Held]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = defaultdict(set)
    for held in tensors:
        key = (held.group, held.scheme)
        empty = {"group": key[0], "scheme": key[1], "tensors": 0, "parameters": 0, "bytes": 0}
        row = rows.setdefault(key, empty)
        row["tensors"] += 1
        row["parameters"] += math.prod(held.shape)
        row["bytes"] += held.nbytes
        shapes[key].add(held.shape)
    return [row | {"shapes": sorted(map(list, shapes[key]))} for key, row in rows.items()]


def _model(c: ModelConfig) -> dict[str, Any]:
    counts, a = parameter_counts(c), c.attention
    kind = "MLA" if isinstance(a, MLAConfig) else f"GQA, {a.num_key_value_heads} key-value heads"
    return {
        "family": c.family,
        "layers": {"dense": c.num_dense_layers, "moe": c.num_moe_layers, "mtp": c.num_nextn_predict_layers},
        "attention": f"{kind}, {c.num_attention_heads} heads",
        "experts": {
            "routed": c.n_routed_experts,
            "shared": c.n_shared_experts,
            "per_token": c.num_experts_per_tok,
        },
        "context": c.max_position_embeddings,
        "parameters": {"total": counts.total, "active": counts.active, "mtp": counts.mtp},
        "cache_numbers_per_token": c.row_dim * c.num_hidden_layers,
    }


def inspect(path: str | Path) -> dict[str, Any]:
    """What `cmx inspect` prints: of a Hugging Face or Orbax directory, or of a preset by name.

    `problems` lists what keeps it from being loaded, a line each; empty is good.

    Raises:
      CmxError: so little is right that there is nothing to list (no config, a damaged file).
    """
    if str(path) in presets() and not Path(path).exists():
        c = preset(str(path))
        table = _table(_expected(c, True, "bfloat16"))
        mtp = "named" if c.num_nextn_predict_layers else "none"
        return _report(str(path), "preset (no weights)", c, mtp, table)
    directory = Path(path)
    manifest = read_manifest(directory)
    if manifest is not None and (manifest.format == "orbax" or not manifest.complete):
        checkpoint = open_checkpoint(directory)
        c = checkpoint.config
        table = _table(_expected(c, checkpoint.mtp, manifest.dtype))
        return _report(str(path), f"orbax, {manifest.slots} expert slots", c, _mtp(c, checkpoint.mtp), table)
    found = HuggingFace(directory)
    faults = list(found.faults)
    for name in found.stored:
        try:
            check_scales(found.files, found.stored[name])
        except CmxError as error:
            faults.append(str(error))
    mtp, table = _mtp(found.config, found.mtp), _table(_stored(found))
    result = _report(str(path), "safetensors", found.config, mtp, table)
    result |= {"missing": found.missing, "unknown": found.unknown}
    result["problems"] = [
        *faults,
        *(f"tensor {name} is missing" for name in found.missing),
        *(f"tensor {name} is not part of this architecture" for name in found.unknown),
    ]
    return result


def _mtp(c: ModelConfig, stored: bool) -> str:
    if not c.num_nextn_predict_layers:
        return "none"
    return "stored" if stored else "named in the config, not stored"


def _report(name: str, format: str, c: ModelConfig, mtp: str, table: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": name,
        "format": format,
        **_model(c),
        "mtp": mtp,
        "groups": table,
        "tensors": sum(row["tensors"] for row in table),
        "bytes": sum(row["bytes"] for row in table),
        "missing": [],
        "unknown": [],
        "problems": [],
    }


def render(result: dict[str, Any]) -> str:
    """The report for a terminal."""
    layers, experts, count = result["layers"], result["experts"], result["parameters"]
    lines = [
        f"{result['model']}: {result['family']}, {result['format']}",
        f"  {layers['dense']} dense and {layers['moe']} MoE layers, MTP {result['mtp']}; "
        f"{result['attention']}; context {result['context']:,}",
        f"  {experts['routed']} routed experts, {experts['per_token']} a token, {experts['shared']} shared",
        f"  {count['total']:,} parameters, {count['active']:,} active, {count['mtp']:,} in MTP layers",
        "",
        f"  {'group':<22} {'scheme':<26} {'tensors':>8} {'parameters':>18} {'bytes':>18}  shapes",
    ]
    for row in result["groups"]:
        shapes = [" x ".join(map(str, shape)) for shape in row["shapes"]]
        more = f", {len(shapes) - 3} more" if len(shapes) > 3 else ""
        lines.append(
            f"  {row['group']:<22} {row['scheme']:<26} {row['tensors']:>8,} {row['parameters']:>18,} "
            f"{row['bytes']:>18,}  {', '.join(shapes[:3])}{more}"
        )
    lines.append(f"  {'total':<49} {result['tensors']:>8,} {'':>18} {result['bytes']:>18,}")
    shown = result["problems"][:20]
    lines += ["", *(f"  ! {problem}" for problem in shown)] if shown else []
    if len(result["problems"]) > len(shown):
        lines.append(f"  ! and {len(result['problems']) - len(shown)} more")
    return "\n".join(lines)
