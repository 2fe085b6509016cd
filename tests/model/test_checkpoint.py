"""Checkpoints: written and read back exactly, in every form that Hugging Face stores."""

from pathlib import Path

import chex
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import BASE, GOLDENS

from cmx_jax.model.checkpoint import read_weights, write_weights
from cmx_jax.model.weights import Weights
from model.small import EXPERT, GATE, TENSORS, config, random_weights, refused, save, shard

C = config()
MTP = "model.layers.3."
CASES = ("base", "no_q_lora", "no_shared", "two_dense", "all_dense", "two_shared", "attention_bias", "tied")


def assert_equal(one: Weights, other: Weights) -> None:
    """The same tensors, values and types."""
    chex.assert_trees_all_equal(one, other, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_float32_round_trip_is_exact(tmp_path: Path, case: str) -> None:
    c = config(case)
    weights = random_weights(c)
    write_weights(tmp_path, c, weights, np.float32)
    assert_equal(read_weights(tmp_path, c, np.float32), weights)


@pytest.mark.parametrize("case", CASES)
def test_golden_is_written_as_transformers_wrote_it(tmp_path: Path, case: str) -> None:
    c = config(case)
    path = write_weights(tmp_path, c, read_weights(GOLDENS / case, c, np.float32), np.float32)
    actual, expected = load_file(path), load_file(GOLDENS / case / "model.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if tensor.size}
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)


def test_bfloat16_round_trip_is_exact(tmp_path: Path) -> None:
    weights = random_weights(C, dtype=ml_dtypes.bfloat16)  # the router's float32 values are bfloat16's too
    write_weights(tmp_path, C, weights, ml_dtypes.bfloat16)
    assert_equal(read_weights(tmp_path, C, ml_dtypes.bfloat16), weights)


def test_bfloat16_rounds_once_and_spares_the_routers_bias(tmp_path: Path) -> None:
    tensors = load_file(write_weights(tmp_path, C, read_weights(BASE, C, np.float32)))
    for name, tensor in tensors.items():
        exact = name.endswith("e_score_correction_bias")
        expected = TENSORS[name] if exact else TENSORS[name].astype(ml_dtypes.bfloat16)
        assert tensor.dtype == expected.dtype
        np.testing.assert_array_equal(tensor, expected, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_tensors_are_widened_exactly(tmp_path: Path, dtype: type) -> None:
    narrow = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    wide = {name: tensor.astype(np.float32) for name, tensor in narrow.items()}
    (tmp_path / "wide").mkdir()
    actual = read_weights(save(tmp_path, narrow), C, np.float32)
    assert_equal(actual, read_weights(save(tmp_path / "wide", wide), C, np.float32))


def test_router_stays_float32_in_a_bfloat16_model() -> None:
    weights = read_weights(BASE, C, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(weights.moe.ffn.router[1], TENSORS[GATE])
    assert weights.moe.ffn.router.dtype == np.float32
    assert weights.moe.ffn.experts.gate_up.dtype == ml_dtypes.bfloat16


def test_tensors_have_the_axes_of_the_einsums() -> None:
    w = read_weights(BASE, C, np.float32)
    np.testing.assert_array_equal(w.moe.ffn.experts.gate_up[7, 0, :, 1], TENSORS[EXPERT].T)
    kv_b = TENSORS["model.layers.2.self_attn.kv_b_proj.weight"]  # [H (N + V), A], head by head
    np.testing.assert_array_equal(w.moe.attn.k_b[1, 2], kv_b[2 * 22 : 2 * 22 + 12])
    np.testing.assert_array_equal(w.moe.attn.v_b[1, 2], kv_b[2 * 22 + 12 : 3 * 22])
    o = TENSORS["model.layers.0.self_attn.o_proj.weight"]  # [D, H V]
    np.testing.assert_array_equal(w.dense.attn.o[0, 1], o[:, 10:20].T)


def test_shared_experts_of_a_model_without_them_are_none() -> None:
    assert read_weights(GOLDENS / "no_shared", config("no_shared"), np.float32).moe.ffn.shared is None


def test_empty_shared_experts_are_ignored(tmp_path: Path) -> None:
    tensors = load_file(GOLDENS / "no_shared" / "model.safetensors")
    for name, shape in (("gate", (0, 32)), ("up", (0, 32)), ("down", (32, 0))):
        tensors[f"model.layers.1.mlp.shared_experts.{name}_proj.weight"] = np.zeros(shape, np.float32)
    weights = read_weights(save(tmp_path, tensors), config("no_shared"), np.float32)
    assert_equal(weights, read_weights(GOLDENS / "no_shared", config("no_shared"), np.float32))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_stored_frequencies_are_ignored(tmp_path: Path, name: str) -> None:
    save(tmp_path, TENSORS | {name: np.ones(4, np.float32)})
    assert_equal(read_weights(tmp_path, C, np.float32), read_weights(BASE, C, np.float32))


def test_head_of_a_tied_model_may_be_stored_twice(tmp_path: Path) -> None:
    c, tensors = config("tied"), load_file(GOLDENS / "tied" / "model.safetensors")
    save(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert read_weights(tmp_path, c, np.float32).head is None


def test_indexed_files_load_as_one(tmp_path: Path) -> None:
    assert_equal(read_weights(shard(tmp_path), C, np.float32), read_weights(BASE, C, np.float32))


def test_mtp_layer_that_is_not_stored_is_none() -> None:
    assert C.num_nextn_predict_layers == 1
    assert read_weights(BASE, C, np.float32).mtp is None


def test_stored_mtp_layer_is_read_and_its_copies_are_ignored(tmp_path: Path) -> None:
    weights = random_weights(C)
    assert weights.mtp is not None
    tensors = load_file(write_weights(tmp_path, C, weights, np.float32))
    for copy in ("embed_tokens", "shared_head.head"):
        tensors[f"{MTP}{copy}.weight"] = np.full((64, 32), 7, np.float32)
    actual = read_weights(save(tmp_path, tensors), C, np.float32)
    assert_equal(actual, weights)
    np.testing.assert_array_equal(actual.mtp.eh_proj[0], tensors[f"{MTP}eh_proj.weight"].T)
    tensors[f"{MTP}embed_tokens.weight"] = np.zeros((64, 31), np.float32)
    with refused(f"{MTP}embed_tokens.weight"):
        read_weights(save(tmp_path, tensors), C, np.float32)


def test_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    c, tensors = config("tied"), load_file(GOLDENS / "tied" / "model.safetensors")
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    with refused("lm_head.weight"):
        read_weights(save(tmp_path, tensors | {"lm_head.weight": other}), c, np.float32)
