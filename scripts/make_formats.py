"""Write tiny checkpoints in the formats that quantised models are published in.

Takes a plain checkpoint, by default tests/goldens/base, and writes one directory for each row of FORMATS:

    python scripts/make_formats.py [--source DIR] [--out DIR]

Names, types, shapes and JSON are those of the published checkpoints; only the sizes are not. Which matrices
are quantised is each format's own choice, too. What they dequantise to, tests/reference/formats.py says.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

TESTS = Path(__file__).resolve().parents[1] / "tests"
Tensors = dict[str, np.ndarray]
Rows = Iterator[tuple[str, np.ndarray]]
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
FP8_MOST = 448.0

PROJECTION = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
KEPT_FLOAT32 = "e_score_correction_bias"


def kept(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """A tensor that is not quantised."""
    return array.astype(np.float32 if name.endswith(KEPT_FLOAT32) else dtype)


def blocks(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`[m, n]` padded with zeros and cut into blocks: `[rows, size[0], columns, size[1]]`."""
    rows, columns = (-(-length // block) for length, block in zip(array.shape, size, strict=True))
    padded = np.zeros((rows * size[0], columns * size[1]), np.float32)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded.reshape(rows, size[0], columns, size[1])


def by_block(array: np.ndarray, size: tuple[int, int], most: float) -> tuple[np.ndarray, np.ndarray]:
    """The matrix in units of its blocks' scales, unrounded, and the scales."""
    cut = blocks(array, size)
    scale = (np.abs(cut).max((1, 3)) / most).astype(np.float32)
    units = (cut / scale[:, None, :, None]).reshape(cut.shape[0] * size[0], -1)
    return units[: array.shape[0], : array.shape[1]], scale


def int8(units: np.ndarray) -> np.ndarray:
    return np.clip(np.round(units), -127, 127).astype(np.int8)


def by_channel(array: np.ndarray, scale_dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric INT8 with one scale for each output: `[out, 1]`."""
    scale = (np.abs(array).max(1, keepdims=True) / 127).astype(scale_dtype)
    return int8(array / scale.astype(np.float32)), scale


def write(directory: Path, config: dict[str, Any], tensors: Tensors, name: str = "model") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})


def write_sharded(
    directory: Path, config: dict[str, Any], tensors: Tensors, count: int, name: str = "model"
) -> None:
    """In `count` files, neighbouring tensors not always in the same one, and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    files = {key: f"{name}-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, key in enumerate(tensors)}
    for file in sorted(set(files.values())):
        part = {key: tensors[key] for key in tensors if files[key] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    write_json(directory / f"{name}.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def each(
    base: Tensors, dtype: Any, quantise: Callable[[str, np.ndarray], Rows], chosen: Callable[[str], Any]
) -> Tensors:
    """All tensors: the chosen ones as `quantise` yields them, the others in `dtype`."""
    tensors: Tensors = {}
    for name, array in base.items():
        tensors.update(quantise(name, array) if chosen(name) else [(name, kept(name, array, dtype))])
    return tensors


def fp8_block(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """DeepSeek-V3's own."""
    size = (128, 128)

    def quantise(name: str, array: np.ndarray) -> Rows:
        units, scale = by_block(array, size, FP8_MOST)
        yield name, units.astype(FP8)
        yield name + "_scale_inv", scale

    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    config |= {"quantization_config": said | {"weight_block_size": list(size)}}
    write(directory, config, each(base, BF16, quantise, PROJECTION.search))


def int8_block(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """DeepSeek-R1-Block-INT8, as SGLang's blockwise_int8 reads it; small blocks give several a matrix."""
    size = (8, 16)

    def quantise(name: str, array: np.ndarray) -> Rows:
        units, scale = by_block(array, size, 127)
        yield name, int8(units)
        yield name + "_scale_inv", scale

    said = {"activation_scheme": "dynamic", "quant_method": "blockwise_int8"}
    config |= {"quantization_config": said | {"weight_block_size": list(size)}}
    write(directory, config, each(base, BF16, quantise, PROJECTION.search))


def int8_channel(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """DeepSeek-R1-Channel-INT8: nothing in config.json says so."""

    def quantise(name: str, array: np.ndarray) -> Rows:
        weight, scale = by_channel(array)
        yield name, weight
        yield name + "_scale", scale

    write(directory, config, each(base, BF16, quantise, PROJECTION.search))


def compressed(strategy: str) -> dict[str, Any]:
    """compressed-tensors' quantization_config of a W8A8 model."""
    common = {"actorder": None, "block_structure": None, "group_size": None, "num_bits": 8}
    common |= {"observer_kwargs": {}, "symmetric": True, "type": "int"}
    inputs = common | {"dynamic": True, "observer": None, "strategy": "token"}
    weights = common | {"dynamic": False, "observer": "minmax", "strategy": strategy}
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"]}
    said = {"config_groups": {"group_0": group | {"weights": weights}}, "format": "int-quantized"}
    said |= {"global_compression_ratio": None, "ignore": ["lm_head", "re:.*mlp.gate$"]}
    said |= {"kv_cache_scheme": None, "quant_method": "compressed-tensors"}
    return said | {"quantization_status": "compressed"}


def int8_compressed(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """compressed-tensors W8A8, a scale for each output channel in the model's type; `kv_b_proj` ignored."""

    def quantise(name: str, array: np.ndarray) -> Rows:
        weight, scale = by_channel(array, BF16)
        yield name, weight
        yield name + "_scale", scale

    said = compressed("channel")
    said["ignore"] += [name.removesuffix(".weight") for name in base if ".kv_b_proj." in name]
    tensors = each(base, BF16, quantise, lambda n: PROJECTION.search(n) and ".kv_b_proj." not in n)
    write(directory, config | {"quantization_config": said}, tensors)


def int8_compressed_tensor(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """compressed-tensors W8A8, one scale for each tensor."""

    def quantise(name: str, array: np.ndarray) -> Rows:
        scale = (np.abs(array).max() / 127).astype(np.float32)
        yield name, int8(array / scale)
        yield name + "_scale", scale[None]

    tensors = each(base, BF16, quantise, PROJECTION.search)
    write(directory, config | {"quantization_config": compressed("tensor")}, tensors)


def ascend_dynamic(name: str, array: np.ndarray, scale_dtype: Any) -> Rows:
    """W8A8_DYNAMIC: scales of activations are found at run time."""
    weight, scale = by_channel(array, scale_dtype)
    yield name, weight
    yield name + "_scale", scale
    yield name + "_offset", np.zeros_like(scale)


def ascend_static(name: str, array: np.ndarray, dtype: Any, bits: bool, with_scale: bool) -> Rows:
    """W8A8: `deq_scale` is both scales' product, as float32 or (`bits`) as its bits in int64."""
    module = name.removesuffix(".weight")
    weight, scale = by_channel(array)
    input_scale = np.array([0.02 + 0.001 * (len(name) % 7)], dtype)
    input_offset = np.array([len(name) % 11 - 5], dtype)
    deq_scale = input_scale.astype(np.float32) * scale[:, 0]
    correction = weight.astype(np.float32).sum(1) * input_offset.astype(np.float32)
    yield name, weight
    if with_scale:
        yield name + "_scale", scale
        yield name + "_offset", np.zeros_like(scale)
    yield module + ".input_scale", input_scale
    yield module + ".input_offset", input_offset
    yield module + ".quant_bias", np.round(-correction).astype(np.int32)
    yield module + ".deq_scale", deq_scale.view(np.int32).astype(np.int64) if bits else deq_scale


def ascend_kind(name: str) -> str:
    """The type that a DeepSeek model's matrix gets by default."""
    if not PROJECTION.search(name) or ".kv_b_proj." in name:
        return "FLOAT"
    return "W8A8" if ".self_attn." in name else "W8A8_DYNAMIC"


def ascend(
    base: Tensors, kinds: dict[str, str], dtype: Any, static: dict[str, Any]
) -> tuple[Tensors, dict[str, str]]:
    """The tensors and their description."""
    tensors: Tensors = {}
    said: dict[str, str] = {}
    for name, array in base.items():
        if kinds[name] == "W8A8":
            rows = dict(ascend_static(name, array, **static))
        elif kinds[name] == "W8A8_DYNAMIC":
            rows = dict(ascend_dynamic(name, array, dtype))
        else:
            rows = {name: kept(name, array, dtype)}
        tensors |= rows
        said |= dict.fromkeys(rows, kinds[name])
    return tensors, said


def ascend_w8a8(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """msModelSlim's static W8A8 of a float16 model (`deq_scale` is int64), experts not quantised."""
    kinds = {n: "FLOAT" if EXPERT.match(n) else ascend_kind(n).removesuffix("_DYNAMIC") for n in base}
    static = {"dtype": np.float16, "bits": True, "with_scale": True}
    tensors, said = ascend(base, kinds, np.float16, static)
    write(directory, config | {"dtype": "float16"}, tensors, "quant_model_weight_w8a8")
    write_json(directory / "quant_model_description.json", {"model_quant_type": "W8A8"} | said)


def ascend_w8a8_dynamic(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """msModelSlim's mixture for DeepSeek in bfloat16: static in attention, dynamic elsewhere."""
    static = {"dtype": BF16, "bits": False, "with_scale": True}
    tensors, said = ascend(base, {n: ascend_kind(n) for n in base}, BF16, static)
    config |= {"dtype": "bfloat16", "mla_quantize": "w8a8", "quantize": "w8a8_dynamic"}
    write_sharded(directory, config, tensors, 2, "quant_model_weight_w8a8_dynamic")
    head = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "kv_quant_type": None}
    head |= {"fa_quant_type": None, "group_size": 0}
    write_json(directory / "quant_model_description.json", head | said)


def ascend_v1(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """The same as its later AscendV1Saver writes it: no `weight_scale` beside `deq_scale`."""
    static = {"dtype": np.float32, "bits": False, "with_scale": False}
    tensors, said = ascend(base, {n: ascend_kind(n) for n in base}, np.float32, static)
    write_sharded(directory, config | {"dtype": "bfloat16"}, tensors, 1, "quant_model_weights")
    tail = {"version": "1.0.0", "model_quant_type": "W8A8", "metadata": {}, "group_size": 0, "optional": {}}
    write_json(directory / "quant_model_description.json", said | tail)


def stacked(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """Routed experts in two tensors a layer, as transformers 5 holds them."""
    tensors = {n: kept(n, a, BF16) for n, a in base.items() if not EXPERT.match(n)}
    for prefix in sorted({m[1] for m in map(EXPERT.match, base) if m}):

        def part(which: str, prefix: str = prefix) -> np.ndarray:
            names = [f"{prefix}.{e}.{which}_proj.weight" for e in range(config["n_routed_experts"])]
            return np.stack([base[name].astype(BF16) for name in names])

        tensors[f"{prefix}.gate_up_proj"] = np.concatenate([part("gate"), part("up")], 1)
        tensors[f"{prefix}.down_proj"] = part("down")
    write(directory, config, tensors)


def sharded(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """bfloat16 in three files."""
    write_sharded(directory, config, {n: kept(n, a, BF16) for n, a in base.items()}, 3)


def f16(directory: Path, config: dict[str, Any], base: Tensors) -> None:
    """float16 in one file, the router's bias too."""
    write(directory, config, {n: a.astype(np.float16) for n, a in base.items()})


FORMATS: dict[str, Callable[[Path, dict[str, Any], Tensors], None]] = {
    make.__name__: make
    for make in (
        *(fp8_block, int8_block, int8_channel, int8_compressed, int8_compressed_tensor),
        *(ascend_w8a8, ascend_w8a8_dynamic, ascend_v1, stacked, sharded, f16),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, default=TESTS / "goldens" / "base")
    parser.add_argument("--out", type=Path, default=TESTS / "formats")
    args = parser.parse_args()
    base = {name: a.astype(np.float32) for name, a in load_file(args.source / "model.safetensors").items()}
    base = dict(sorted(base.items()))
    for name, make in FORMATS.items():
        make(args.out / name, json.loads((args.source / "config.json").read_text()), base)


if __name__ == "__main__":
    main()
