"""Checkpoints with one thing wrong: every one is refused at once, in one line that names what is wrong.

A row of a table is a name, the fixture that is copied, what is done to the copy, and the words of which the
line has to have one: where there are several, any of them may be looked at first.
"""

import io
import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference.formats import read_file
from safetensors.numpy import save_file

from cmx_jax.cli import main

TESTS = Path(__file__).parents[1]
FORMATS = TESTS / "formats"
SECONDS = 10.0  # far more than refusing takes, far less than computing would

WEIGHTS, CONFIG, DESCRIPTION = "model.safetensors", "config.json", "quant_model_description.json"
INDEX = "model.safetensors.index.json"
ASCEND = "quant_model_weight_w8a8.safetensors"
EXPERT = "model.layers.1.mlp.experts.7.up_proj"
O_PROJ = "model.layers.1.self_attn.o_proj"
GATE, NORM = "model.layers.2.mlp.gate.weight", "model.norm.weight"
STACK = "model.layers.1.mlp.experts"
LAST = "model-00003-of-00003.safetensors"

Tensors = dict[str, np.ndarray]
Mutation = Callable[[Path], Any]
Row = tuple[str, str, Mutation, str | tuple[str, ...]]


# What can be done to a copy.


def tensors(edit: Callable[[Tensors], Any], file: str = WEIGHTS) -> Mutation:
    """The tensors of one file, edited as a dictionary."""

    def mutate(directory: Path) -> None:
        contents = read_file(directory / file)
        edit(contents)
        save_file({name: np.ascontiguousarray(array) for name, array in contents.items()}, directory / file)

    return mutate


def put(name: str, value: np.ndarray, file: str = WEIGHTS) -> Mutation:
    return tensors(lambda contents: contents.update({name: value}), file)


def drop(name: str, file: str = WEIGHTS) -> Mutation:
    return tensors(lambda contents: contents.pop(name), file)


def change(name: str, convert: Callable[[np.ndarray], np.ndarray], file: str = WEIGHTS) -> Mutation:
    return tensors(lambda contents: contents.update({name: convert(contents[name])}), file)


def cast(name: str, dtype: Any, file: str = WEIGHTS) -> Mutation:
    return change(name, lambda array: array.astype(dtype), file)


def first(name: str, value: float, file: str = WEIGHTS) -> Mutation:
    """One number of a tensor, overwritten."""

    def convert(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change(name, convert, file)


def document(file: str, edit: Callable[[dict[str, Any]], Any]) -> Mutation:
    """A JSON object, changed in place."""

    def mutate(directory: Path) -> None:
        contents = json.loads((directory / file).read_text())
        edit(contents)
        (directory / file).write_text(json.dumps(contents))

    return mutate


def config(**fields: Any) -> Mutation:
    return document(CONFIG, lambda contents: contents.update(fields))


def quantization(**fields: Any) -> Mutation:
    return document(CONFIG, lambda contents: contents["quantization_config"].update(fields))


def scheme(**fields: Any) -> Mutation:
    """compressed-tensors' arguments of the weights."""
    return document(
        CONFIG,
        lambda contents: contents["quantization_config"]["config_groups"]["group_0"]["weights"].update(
            fields
        ),
    )


def without(field: str, *path: str) -> Mutation:
    def edit(contents: dict[str, Any]) -> None:
        for part in path:
            contents = contents[part]
        del contents[field]

    return document(CONFIG, edit)


def description(edit: Callable[[dict[str, Any]], Any]) -> Mutation:
    return document(DESCRIPTION, edit)


def text(file: str, content: str | bytes) -> Mutation:
    content = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / file).write_bytes(content)


def truncated(kept: float, file: str = WEIGHTS) -> Mutation:
    """The file up to a part of its length."""

    def mutate(directory: Path) -> None:
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(content[: int(kept * len(content))])

    return mutate


def headed(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Mutation:
    """A file of a header of one's own."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return text(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def zipped() -> bytes:
    """A zip archive, which torch.save writes too."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return buffer.getvalue()


def folder(file: str) -> Mutation:
    """A folder where a file is expected."""

    def mutate(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).mkdir()

    return mutate


def loop(file: str) -> Mutation:
    """A link to itself."""

    def mutate(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).symlink_to(file)

    return mutate


def twice(directory: Path) -> None:
    """One tensor in a second file as well, without an index."""
    contents = read_file(directory / WEIGHTS)
    save_file({GATE: contents[GATE]}, directory / "other.safetensors")


def one_by_one(directory: Path) -> None:
    """The experts of a stacked checkpoint beside their stacks."""
    contents = read_file(directory / WEIGHTS)
    down = {f"{STACK}.{e}.down_proj.weight": a for e, a in enumerate(contents[f"{STACK}.down_proj"])}
    halves = {"gate": slice(0, 8), "up": slice(8, 16)}
    for proj, half in halves.items():
        for e, array in enumerate(contents[f"{STACK}.gate_up_proj"]):
            down[f"{STACK}.{e}.{proj}_proj.weight"] = np.ascontiguousarray(array[half])
    save_file(contents | down, directory / WEIGHTS)


def moved(name: str, file: str) -> Mutation:
    return document(INDEX, lambda contents: contents["weight_map"].update({name: file}))


def swapped(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


SCALE, SCALE_INV = f"{EXPERT}.weight_scale", f"{EXPERT}.weight_scale_inv"
WEIGHT = f"{EXPERT}.weight"

FILES: list[Row] = [
    ("truncated data", "f16", truncated(0.9), WEIGHTS),
    ("truncated header", "f16", truncated(0.01), WEIGHTS),
    ("empty", "f16", text(WEIGHTS, b""), WEIGHTS),
    ("five bytes", "f16", text(WEIGHTS, b"12345"), WEIGHTS),
    ("random bytes", "f16", text(WEIGHTS, np.random.default_rng(0).bytes(5000)), WEIGHTS),
    ("zip", "f16", text(WEIGHTS, zipped()), WEIGHTS),
    ("header longer than anything", "f16", headed({}, length=2**62), WEIGHTS),
    ("header longer than the file", "f16", headed({}, length=10**6), WEIGHTS),
    ("negative header length", "f16", text(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS),
    ("header not JSON", "f16", headed(b"{tensors}"), WEIGHTS),
    ("header a list", "f16", headed(b"[1, 2]"), WEIGHTS),
    ("header not Unicode", "f16", headed(b'{"\xff": 1}'), WEIGHTS),
    ("header deeply nested", "f16", headed(b"[" * 100_000), WEIGHTS),
    (
        "overlapping offsets",
        "f16",
        headed({NORM: entry(0, 16, [4]), GATE: entry(8, 24, [4])}, bytes(24)),
        (WEIGHTS, NORM, GATE),
    ),
    ("offsets beyond the end", "f16", headed({NORM: entry(0, 128, [32])}, bytes(16)), (WEIGHTS, NORM)),
    ("offsets backwards", "f16", headed({NORM: entry(16, 0, [4])}, bytes(16)), (WEIGHTS, NORM)),
    ("offsets of another shape", "f16", headed({NORM: entry(0, 16, [8])}, bytes(16)), (WEIGHTS, NORM)),
    ("shape beyond memory", "f16", headed({NORM: entry(0, 16, [2**40, 2**40])}, bytes(16)), (WEIGHTS, NORM)),
    ("unknown type", "f16", headed({NORM: entry(0, 16, [4], "F7")}, bytes(16)), (WEIGHTS, NORM)),
    ("a folder", "f16", folder(WEIGHTS), WEIGHTS),
    ("a link to itself", "f16", loop(WEIGHTS), WEIGHTS),
    ("the same tensor twice", "f16", twice, GATE),
    ("index without a file", "sharded", moved(GATE, "model-00009-of-00003.safetensors"), "model-00009"),
    ("index to the wrong file", "sharded", moved(NORM, LAST), NORM),
    ("index to a folder", "sharded", moved(GATE, "."), (INDEX, GATE)),
    (
        "index lacks a tensor",
        "sharded",
        document(INDEX, lambda contents: contents["weight_map"].pop(GATE)),
        GATE,
    ),
    (
        "index names an unknown tensor",
        "sharded",
        moved("model.layers.9.input_layernorm.weight", LAST),
        "model.layers.9.input_layernorm.weight",
    ),
    ("index not JSON", "sharded", text(INDEX, "{"), INDEX),
    ("index a list", "sharded", text(INDEX, "[]"), INDEX),
    (
        "index of numbers",
        "sharded",
        document(INDEX, lambda contents: contents.update(weight_map={GATE: 1})),
        INDEX,
    ),
    (
        "index empty",
        "sharded",
        document(INDEX, lambda contents: contents.update(weight_map={})),
        (INDEX, "model."),
    ),
    ("index deeply nested", "sharded", text(INDEX, "[" * 100_000), INDEX),
    ("index not Unicode", "sharded", text(INDEX, b"\xff\xfe{}"), INDEX),
    ("index a folder", "sharded", folder(INDEX), (INDEX, "safetensors")),
    ("a shard is gone", "sharded", lambda directory: (directory / LAST).unlink(), LAST),
    ("a shard is cut", "sharded", truncated(0.5, LAST), LAST),
    (
        "an Ascend shard is gone",
        "ascend_w8a8_dynamic",
        lambda d: (d / "quant_model_weight_w8a8_dynamic-00002-of-00002.safetensors").unlink(),
        "quant_model_weight_w8a8_dynamic-00002-of-00002.safetensors",
    ),
]

PLAIN: list[Row] = [
    *(
        (f"{name} in a plain checkpoint", "f16", cast(GATE, dtype), GATE)
        for name, dtype in (
            *(("I8", np.int8), ("U8", np.uint8), ("I32", np.int32), ("I64", np.int64), ("F64", np.float64)),
            *(("BOOL", np.bool_), ("F8", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)),
        )
    ),
    ("swapped matrix", "f16", change(WEIGHT, swapped), WEIGHT),
    ("a missing tensor", "f16", drop(GATE), GATE),
    ("an unknown tensor", "f16", put("model.layers.1.adapter", np.ones(3, np.float32)), "adapter"),
    ("a scale of a plain tensor", "f16", put(SCALE_INV, np.ones((1, 1), np.float32)), EXPERT),
    ("a channel's scale of a plain tensor", "f16", put(SCALE, np.ones((8, 1), np.float32)), EXPERT),
    ("a scale of a norm", "f16", put(NORM + "_scale", np.ones((32, 1), np.float32)), NORM),
    (
        "a norm's bias",
        "f16",
        put("model.layers.1.input_layernorm.bias", np.ones(32, np.float16)),
        "input_layernorm.bias",
    ),
    ("stacked and one by one", "stacked", one_by_one, STACK),
    ("stack swapped", "stacked", change(f"{STACK}.gate_up_proj", swapped), f"{STACK}.gate_up_proj"),
    ("stack of down_proj swapped", "stacked", change(f"{STACK}.down_proj", swapped), f"{STACK}.down_proj"),
    ("stack of too few", "stacked", change(f"{STACK}.down_proj", lambda a: a[:-1]), f"{STACK}.down_proj"),
    ("stack of gates only", "stacked", change(f"{STACK}.gate_up_proj", lambda a: a[:, :8]), "gate_up_proj"),
    ("stack of one rank less", "stacked", change(f"{STACK}.gate_up_proj", lambda a: a[0]), "gate_up_proj"),
    ("half a stack", "stacked", drop(f"{STACK}.down_proj"), STACK),
    ("stack of integers", "stacked", cast(f"{STACK}.gate_up_proj", np.int8), f"{STACK}.gate_up_proj"),
]


def scales(fixture: str, scale: str) -> list[Row]:
    """Faults of a matrix and its scale that show without reading the numbers."""
    return [
        ("no scale", fixture, drop(scale), EXPERT),
        ("no weight", fixture, drop(WEIGHT), EXPERT),
        ("swapped weight", fixture, change(WEIGHT, swapped), EXPERT),
        ("short weight", fixture, change(WEIGHT, lambda a: a[:-1]), EXPERT),
        ("weight of another type", fixture, cast(WEIGHT, np.int32), EXPERT),
        ("unsigned weight", fixture, change(WEIGHT, lambda a: a.view(np.uint8)), EXPERT),
        ("scale of another shape", fixture, change(scale, lambda a: np.concatenate([a, a])), EXPERT),
        ("scale of another rank", fixture, change(scale, lambda a: a[None]), EXPERT),
        ("scale of no length", fixture, change(scale, lambda a: a[:0]), EXPERT),
        ("scale of integers", fixture, cast(scale, np.int32), EXPERT),
        ("scale in F64", fixture, cast(scale, np.float64), EXPERT),
        ("scale without a matrix", fixture, put(scale.replace(".7.", ".16."), np.ones((8, 1), "f4")), ".16."),
        ("quantised router", fixture, cast(GATE, np.int8), GATE),
        ("quantised norm", fixture, cast(NORM, np.int8), NORM),
    ]


QUANTISED: list[Row] = [
    *scales("fp8_block", SCALE_INV),
    *scales("int8_block", SCALE_INV),
    *scales("int8_channel", SCALE),
    *scales("int8_compressed", SCALE),
    *scales("int8_compressed_tensor", SCALE),
    ("both kinds of scale", "int8_block", put(SCALE, np.ones((8, 1), np.float32)), EXPERT),
    ("INT8 where FP8 is said", "int8_block", quantization(quant_method="fp8", fmt="e4m3"), "model.layers."),
    ("blocks of another size", "int8_block", quantization(weight_block_size=[16, 8]), "model.layers."),
    ("a scale a block where one a row is said", "int8_channel", put(SCALE, np.ones((8, 2), "f4")), EXPERT),
    ("zero point", "int8_compressed", put(f"{EXPERT}.weight_zero_point", np.ones((8, 1), "i1")), EXPERT),
]

ASCENDS: list[Row] = [
    ("no description", "ascend_w8a8", lambda d: (d / DESCRIPTION).unlink(), "model.layers."),
    ("description not JSON", "ascend_w8a8", text(DESCRIPTION, '{"a": '), DESCRIPTION),
    ("description a list", "ascend_w8a8", text(DESCRIPTION, "[]"), DESCRIPTION),
    ("description empty", "ascend_w8a8", text(DESCRIPTION, "{}"), (DESCRIPTION, "model.")),
    ("description not Unicode", "ascend_w8a8", text(DESCRIPTION, b"\xff{}"), DESCRIPTION),
    ("description deeply nested", "ascend_w8a8", text(DESCRIPTION, "[" * 100_000), DESCRIPTION),
    ("description a folder", "ascend_w8a8", folder(DESCRIPTION), (DESCRIPTION, "model.layers.")),
    ("unknown type", "ascend_w8a8", description(lambda d: d.update({O_PROJ + ".weight": "W4A8"})), O_PROJ),
    ("type a number", "ascend_w8a8", description(lambda d: d.update({O_PROJ + ".weight": 8})), O_PROJ),
    ("all of W4A8", "ascend_w8a8", description(lambda d: d.update(dict.fromkeys(d, "W4A8"))), "W4A8"),
    (
        "INT8 said to be float",
        "ascend_w8a8",
        description(lambda d: d.update({f"{O_PROJ}.weight": "FLOAT"})),
        O_PROJ,
    ),
    ("float said to be INT8", "ascend_w8a8", description(lambda d: d.update({GATE: "W8A8_DYNAMIC"})), GATE),
    ("description lacks a tensor", "ascend_w8a8", description(lambda d: d.pop(O_PROJ + ".weight")), O_PROJ),
    (
        "description of an absent tensor",
        "ascend_w8a8",
        description(lambda d: d.update({"model.layers.9.mlp.gate.weight": "FLOAT"})),
        "model.layers.9.mlp.gate.weight",
    ),
    ("missing weight", "ascend_w8a8", drop(f"{O_PROJ}.weight", ASCEND), O_PROJ),
    ("missing scale", "ascend_w8a8", drop(f"{O_PROJ}.weight_scale", ASCEND), O_PROJ),
    ("missing deq_scale", "ascend_w8a8", drop(f"{O_PROJ}.deq_scale", ASCEND), O_PROJ),
    ("missing input_scale", "ascend_w8a8", drop(f"{O_PROJ}.input_scale", ASCEND), O_PROJ),
    ("short scale", "ascend_w8a8", change(f"{O_PROJ}.weight_scale", lambda a: a[:-1], ASCEND), O_PROJ),
    ("flat scale", "ascend_w8a8", change(f"{O_PROJ}.weight_scale", lambda a: a[None], ASCEND), O_PROJ),
    ("short offset", "ascend_w8a8", change(f"{O_PROJ}.weight_offset", lambda a: a[:-1], ASCEND), O_PROJ),
    ("short deq_scale", "ascend_w8a8", change(f"{O_PROJ}.deq_scale", lambda a: a[:-1], ASCEND), O_PROJ),
    ("deq_scale of I32", "ascend_w8a8", cast(f"{O_PROJ}.deq_scale", np.int32, ASCEND), O_PROJ),
    ("long input_scale", "ascend_w8a8", put(f"{O_PROJ}.input_scale", np.ones(2, "f2"), ASCEND), O_PROJ),
    ("quant_bias of floats", "ascend_w8a8", cast(f"{O_PROJ}.quant_bias", np.float32, ASCEND), O_PROJ),
    ("swapped weight", "ascend_w8a8", change(f"{O_PROJ}.weight", swapped, ASCEND), O_PROJ),
    (
        "a norm's bias",
        "ascend_w8a8",
        put("model.layers.1.input_layernorm.bias", np.ones(32, np.float16), ASCEND),
        "input_layernorm.bias",
    ),
]

CONFIGS: list[Row] = [
    *(
        (f"{field} {value!r}", "f16", config(**{field: value}), field)
        for field in ("hidden_size", "vocab_size", "num_hidden_layers", "n_routed_experts", "kv_lora_rank")
        for value in (-1, 0, "32", 1e12, float("nan"), None, True, [], {})
    ),
    *(
        (
            f"{field} of a trillion",
            "f16",
            config(**{field: 10**12}),
            (field, "tensor model.", "tensor lm_head"),
        )
        for field in ("hidden_size", "vocab_size", "kv_lora_rank", "moe_intermediate_size", "v_head_dim")
    ),
    ("a trillion layers", "f16", config(num_hidden_layers=10**12), "num_hidden_layers"),
    ("many layers of many experts", "f16", config(num_hidden_layers=9000, n_routed_experts=1600), "experts"),
    ("a trillion experts", "f16", config(n_routed_experts=10**12), "n_routed_experts"),
    ("one layer more", "f16", config(num_hidden_layers=4), "model.layers.3."),
    ("one layer less", "f16", config(num_hidden_layers=2), "layer 2 is stored"),
    ("no hidden_size", "f16", without("hidden_size"), "hidden_size"),
    ("no kv_lora_rank", "f16", without("kv_lora_rank"), "kv_lora_rank"),
    ("more experts than there are", "f16", config(num_experts_per_tok=17), "num_experts_per_tok"),
    ("endless rms_norm_eps", "f16", config(rms_norm_eps=float("inf")), "rms_norm_eps"),
    ("rms_norm_eps in words", "f16", config(rms_norm_eps="small"), "rms_norm_eps"),
    ("another model", "f16", config(model_type="gpt2"), "model_type"),
    ("model_type a number", "f16", config(model_type=3), "model_type"),
    ("model_type a list", "f16", config(model_type=["deepseek_v3"]), "model_type"),
    ("no model_type", "f16", without("model_type"), "model_type"),
    ("no config.json", "f16", lambda directory: (directory / CONFIG).unlink(), CONFIG),
    ("config.json empty", "f16", text(CONFIG, ""), CONFIG),
    ("config.json cut", "f16", truncated(0.5, CONFIG), CONFIG),
    ("config.json a list", "f16", text(CONFIG, "[]"), CONFIG),
    ("config.json a number", "f16", text(CONFIG, "1"), CONFIG),
    ("config.json not Unicode", "f16", text(CONFIG, b"\xff\xfe{}"), CONFIG),
    ("config.json deeply nested", "f16", text(CONFIG, "[" * 100_000), CONFIG),
    ("config.json a folder", "f16", folder(CONFIG), CONFIG),
    ("config.json a link to itself", "f16", loop(CONFIG), CONFIG),
]

SAID: list[Row] = [
    *(
        (
            f"quantization_config {value!r}",
            "int8_block",
            config(quantization_config=value),
            ("quantization_config", "quant_method"),
        )
        for value in ("int8", 8, [], True, {})
    ),
    *(
        (f"quant_method {value!r}", "int8_block", quantization(quant_method=value), "quant_method")
        for value in ("awq", "gptq", "bitsandbytes", "", None, 8, ["fp8"])
    ),
    *(
        (f"blocks of {value!r}", fixture, quantization(weight_block_size=value), "weight_block_size")
        for fixture in ("int8_block", "fp8_block")
        for value in (
            *([0, 128], [-128, 128], [128], [128, 128, 128], [1.5, 2], ["8", "16"], [True, 128], [8, None]),
            *("x", 128, None, {}, []),
        )
    ),
    (
        "no weight_block_size",
        "int8_block",
        without("weight_block_size", "quantization_config"),
        "weight_block_size",
    ),
    ("FP8 of another kind", "fp8_block", quantization(fmt="e5m2"), "fmt"),
    (
        "no quantization_config",
        "int8_block",
        without("quantization_config"),
        ("quantization_config", "model.layers."),
    ),
    ("num_bits 4", "int8_compressed", scheme(num_bits=4), "num_bits"),
    ("num_bits in words", "int8_compressed", scheme(num_bits="eight"), "num_bits"),
    ("asymmetric", "int8_compressed", scheme(symmetric=False), "symmetric"),
    ("floats", "int8_compressed", scheme(type="float"), "compressed-tensors"),
    ("groups", "int8_compressed", scheme(strategy="group", group_size=8), "weight_scale"),
    ("strategy unknown", "int8_compressed", scheme(strategy="galaxy"), "strategy"),
    (
        "one scale a tensor where there are more",
        "int8_compressed",
        scheme(strategy="tensor"),
        "model.layers.",
    ),
    (
        "one scale a row where there is one",
        "int8_compressed_tensor",
        scheme(strategy="channel"),
        "model.layers.",
    ),
    ("packed", "int8_compressed", quantization(format="pack-quantized"), "format"),
    ("format a number", "int8_compressed", quantization(format=8), "format"),
    ("no groups", "int8_compressed", quantization(config_groups={}), "config_groups"),
    ("groups a list", "int8_compressed", quantization(config_groups=[]), "config_groups"),
    ("groups absent", "int8_compressed", without("config_groups", "quantization_config"), "config_groups"),
    ("group a number", "int8_compressed", quantization(config_groups={"group_0": 1}), "group"),
    (
        "rotations",
        "int8_compressed",
        quantization(transform_config={"config_groups": {"R1": {}}}),
        "transform",
    ),
    (
        "sparsity",
        "int8_compressed",
        quantization(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity",
    ),
    ("ignore a number", "int8_compressed", quantization(ignore=8), "ignore"),
    ("ignore of numbers", "int8_compressed", quantization(ignore=[8]), "ignore"),
    ("ignore a broken pattern", "int8_compressed", quantization(ignore=["re:("]), "ignore"),
    ("INT8 where it is ignored", "int8_compressed", quantization(ignore=["re:.*"]), "model.layers."),
]

SCALES: list[Row] = [
    *(
        (f"{kind} scale", fixture, first(scale, value), EXPERT)
        for kind, value in (("NaN", np.nan), ("infinite", np.inf), ("endless", -np.inf), ("negative", -1.0))
        for fixture, scale in (
            ("fp8_block", SCALE_INV),
            ("int8_block", SCALE_INV),
            ("int8_channel", SCALE),
            ("int8_compressed", SCALE),
        )
    ),
    ("NaN in an Ascend scale", "ascend_w8a8", first(f"{O_PROJ}.weight_scale", np.nan, ASCEND), O_PROJ),
    ("NaN in an Ascend offset", "ascend_w8a8", first(f"{O_PROJ}.weight_offset", np.nan, ASCEND), O_PROJ),
]

# Only reading all numbers tells: `inspect` reads the scales alone
VALUES: list[Row] = [
    ("NaN in an FP8 matrix", "fp8_block", first(WEIGHT, np.nan), EXPERT),
    ("NaN in a plain matrix", "f16", first(WEIGHT, np.nan), EXPERT),
    ("infinity in a stack", "stacked", first(f"{STACK}.down_proj", np.inf), f"{STACK}.down_proj"),
]


def cases(rows: list[Row]) -> pytest.MarkDecorator:
    values = [(fixture, mutate, words) for _, fixture, mutate, words in rows]
    ids = [f"{fixture}: {name}" for name, fixture, _, _ in rows]
    return pytest.mark.parametrize(("fixture", "mutate", "words"), values, ids=ids)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs verbs on a mutated copy of a fixture, and checks their output."""

    def run(fixture: str, mutate: Mutation, words: str | tuple[str, ...], *verbs: str) -> None:
        directory = tmp_path / "copy"
        shutil.copytree(FORMATS / fixture, directory)
        mutate(directory)
        for verb in verbs:
            prompt = ["--prompt", "x"] if verb == "generate" else []
            start = time.monotonic()
            code = main([verb, str(directory), *prompt])
            seconds, output = time.monotonic() - start, capsys.readouterr()
            assert code == 2, (verb, output.out)
            assert verb == "inspect" or output.out == ""  # it lists what it found
            lines = output.err.splitlines()
            assert len(lines) == 1, output.err
            named = lines[0].replace(str(tmp_path), "")
            assert any(word in named for word in ([words] if isinstance(words, str) else words)), named
            assert "tokenizer" not in named
            assert seconds < SECONDS, verb

    return run


@cases(FILES)
def test_damaged_file_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(PLAIN)
def test_wrong_tensor_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(QUANTISED)
@pytest.mark.slow
def test_wrong_quantised_tensor_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(ASCENDS)
def test_wrong_ascend_checkpoint_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(CONFIGS)
def test_absurd_config_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(SAID)
def test_absurd_quantization_config_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(SCALES)
@pytest.mark.slow
def test_wrong_scale_is_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "inspect", "generate")


@cases(VALUES)
def test_wrong_numbers_are_refused(refused, fixture, mutate, words) -> None:
    refused(fixture, mutate, words, "generate")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_unreadable_file_is_refused(refused, file: str) -> None:
    refused("f16", lambda directory: (directory / file).chmod(0), file, "inspect", "generate")


@pytest.mark.parametrize("fixture", sorted(path.name for path in FORMATS.iterdir()))
def test_unchanged_copy_gets_as_far_as_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fixture: str
) -> None:
    shutil.copytree(FORMATS / fixture, tmp_path / "copy")
    assert main(["generate", str(tmp_path / "copy"), "--prompt", "x"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "copy")]) == 0
