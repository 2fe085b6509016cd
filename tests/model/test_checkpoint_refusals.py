"""Damaged checkpoints: each is refused in one line that names the tensor or the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import BASE

from cmx_jax.model.checkpoint import read_weights, write_weights
from model.small import EXPERT, GATE, TENSORS, config, random_weights, refused, save, shard

C = config()
MTP = "model.layers.3."


def edit_index(directory: Path, edit: Callable[[dict], None]) -> Path:
    path = shard(directory) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("name", ["eh_proj.weight", "shared_head.norm.weight", "mlp.gate.weight"])
def test_partly_stored_mtp_layer_is_refused_by_tensor(tmp_path: Path, name: str) -> None:
    tensors = load_file(write_weights(tmp_path, C, random_weights(C), np.float32))
    del tensors[MTP + name]
    with refused(MTP + name, "missing"):
        read_weights(save(tmp_path, tensors), C, np.float32)


def test_mtp_layer_that_the_config_does_not_name_is_left_out(tmp_path: Path) -> None:
    weights = random_weights(C)
    write_weights(tmp_path, C, weights, np.float32)
    found = read_weights(tmp_path, config(num_nextn_predict_layers=0), np.float32)
    assert found.mtp is None
    np.testing.assert_array_equal(found.head, weights.head)


def test_layer_that_the_config_does_not_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, TENSORS | {"model.layers.9.input_layernorm.weight": np.ones(3, np.float32)})
    with refused("layer 9 is stored and not used"):
        read_weights(tmp_path, C, np.float32)


@pytest.mark.parametrize("name", sorted(n for n in TENSORS if ".experts." not in n or n == EXPERT))
def test_missing_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path, {n: tensor for n, tensor in TENSORS.items() if n != name})
    with refused(name, "missing"):
        read_weights(tmp_path, C, np.float32)


def test_many_missing_tensors_are_one_name_and_a_count(tmp_path: Path) -> None:
    save(tmp_path, {n: tensor for n, tensor in TENSORS.items() if ".layers.2." not in n})
    missing = sorted(n for n in TENSORS if ".layers.2." in n)
    with refused(missing[0], f"{len(missing) - 1} more"):
        read_weights(tmp_path, C, np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.16.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.bias",
        "model.layers.1.self_attn.kv_b_proj.weight_scale_inv",
        "adapter",
    ],
)
def test_unknown_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path, TENSORS | {name: np.ones(3, np.float32)})
    with refused(name, "not part"):
        read_weights(tmp_path, C, np.float32)


@pytest.mark.parametrize("name", [GATE, EXPERT, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: np.concatenate([tensor, tensor]),
        lambda tensor: tensor[:-1],
        lambda tensor: tensor[None],
        lambda tensor: tensor.reshape(-1)[:0],
    ],
    ids=["double", "short", "rank", "empty"],
)
def test_wrong_shape_is_refused_by_name(tmp_path: Path, name: str, change: Callable) -> None:
    changed = change(TENSORS[name])
    save(tmp_path, TENSORS | {name: changed})
    with refused(name, str(list(changed.shape)), str(list(TENSORS[name].shape))):
        read_weights(tmp_path, C, np.float32)


def test_transposed_tensor_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, TENSORS | {EXPERT: np.ascontiguousarray(TENSORS[EXPERT].T)})
    with refused(EXPERT, "[32, 8]", "[8, 32]"):
        read_weights(tmp_path, C, np.float32)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.int32, "I32"), (np.float64, "F64"), (np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")],
)
def test_type_that_is_not_read_is_refused_by_name(tmp_path: Path, dtype: type, name: str) -> None:
    save(tmp_path, TENSORS | {GATE: TENSORS[GATE].astype(dtype)})
    with refused(GATE, name):
        read_weights(tmp_path, C, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_number_that_is_not_finite_is_refused_by_tensor(tmp_path: Path, dtype: type, value: float) -> None:
    broken = TENSORS[EXPERT].astype(dtype)
    broken[3, 5] = value
    save(tmp_path, TENSORS | {EXPERT: broken})
    with refused(EXPERT):
        read_weights(tmp_path, C, np.float32)


def test_number_too_large_for_the_models_type_is_refused_by_tensor(tmp_path: Path) -> None:
    broken = TENSORS[EXPERT].copy()
    broken[3, 5] = np.finfo(np.float32).max  # finite, but infinity in bfloat16
    save(tmp_path, TENSORS | {EXPERT: broken})
    with refused(EXPERT):
        read_weights(tmp_path, C, ml_dtypes.bfloat16)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    content = (BASE / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:kept])
    with refused("model.safetensors"):
        read_weights(tmp_path, C, np.float32)


@pytest.mark.parametrize(
    "junk", [b"not tensors at all", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{]", bytes(64)]
)
def test_garbage_is_refused_by_file(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(junk)
    with refused("model.safetensors"):
        read_weights(tmp_path, C, np.float32)


def test_directory_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copy(BASE / "config.json", tmp_path)
    for directory in (tmp_path, tmp_path / "absent"):
        with refused(str(directory), "safetensors"):
            read_weights(directory, C, np.float32)


def test_index_that_names_an_absent_file_is_refused_by_file(tmp_path: Path) -> None:
    edit_index(tmp_path, lambda files: files.update({GATE: "model-00003-of-00003.safetensors"}))
    with refused("model.safetensors.index.json", "model-00003-of-00003.safetensors"):
        read_weights(tmp_path, C, np.float32)


def test_index_that_names_the_wrong_file_is_refused_by_tensor(tmp_path: Path) -> None:
    def swap(files: dict[str, str]) -> None:
        files[GATE] = next(file for file in files.values() if file != files[GATE])

    with refused(GATE, "index"):
        read_weights(edit_index(tmp_path, swap), C, np.float32)


def test_index_that_leaves_out_a_tensor_is_refused_by_tensor(tmp_path: Path) -> None:
    with refused(GATE, "missing"):
        read_weights(edit_index(tmp_path, lambda files: files.pop(GATE)), C, np.float32)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 1}}']
)
def test_broken_index_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (save(tmp_path, TENSORS) / "model.safetensors.index.json").write_text(text)
    with refused("model.safetensors.index.json"):
        read_weights(tmp_path, C, np.float32)
