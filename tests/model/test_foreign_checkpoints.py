"""Checkpoints and configs as other tools write them, after public bug reports."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference.formats import stored
from safetensors.numpy import save_file
from support import BASE, GOLDENS, MTP_GOLDENS

from cmx_jax.cli import main
from cmx_jax.model.checkpoint import open_checkpoint, read_weights
from cmx_jax.model.checkpoint.declared import declared
from cmx_jax.model.checkpoint.huggingface import HuggingFace
from cmx_jax.model.checkpoint.inspect import inspect, render
from cmx_jax.model.families import parse_config, read_config
from cmx_jax.model.parameters import parameter_counts
from model.small import TENSORS, raw_config, refused, save

FORMATS = Path(__file__).parents[1] / "formats"
MTP = MTP_GOLDENS / "yarn"


def changed(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with some fields of its config changed."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    raw = json.loads((source / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(raw))
    return target


KIMI_K2: dict[str, Any] = {  # the public config of Kimi-K2-Instruct
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 163585,
}


def test_kimi_k2_has_its_published_sizes() -> None:
    """1.03 trillion parameters, 32.9 billion active with the input embedding."""
    counts = parameter_counts(parse_config(KIMI_K2))
    sizes = (counts.total, counts.active, counts.active_with_embedding)
    assert [round(size / 1e9, 2) for size in sizes] == [1026.41, 31.69, 32.86]


def test_mindie_config_is_deepseek_v3() -> None:
    """MindIE calls V3 and R1 `deepseekv2`; without V3's router it would be another model."""
    raw = raw_config(model_type="deepseekv2", scoring_func="sigmoid")
    assert parse_config(raw) == parse_config(raw_config(scoring_func="sigmoid"))
    with refused("scoring_func", "softmax"):
        parse_config(raw | {"scoring_func": "softmax"})


def test_mindie_quantization_needs_the_description(tmp_path: Path) -> None:
    fields = {"quantize": "w8a8_dynamic", "quantization_config": {"group_size": 0, "kv_quant_type": None}}
    directory = changed(FORMATS / "ascend_w8a8_dynamic", tmp_path, **fields)
    assert not HuggingFace(directory).check().faults
    (directory / "quant_model_description.json").unlink()
    with refused("there is no quant_model_description.json"):
        HuggingFace(directory)
    changed(FORMATS / "ascend_w8a8_dynamic", tmp_path, quantize="w4a4")
    with refused("quantize is 'w4a4', expected w8a8 or w8a8_dynamic"):
        HuggingFace(directory)


def test_ascend_description_with_its_kind_in_the_name(tmp_path: Path) -> None:
    directory = changed(FORMATS / "ascend_w8a8_dynamic", tmp_path)
    file = directory / "quant_model_description.json"
    file.rename(directory / "quant_model_description_w8a8_dynamic.json")
    assert not HuggingFace(directory).check().faults
    shutil.copy(FORMATS / "ascend_w8a8_dynamic" / file.name, directory)
    with refused(
        "quant_model_description.json", "quant_model_description_w8a8_dynamic.json", "which is meant?"
    ):
        HuggingFace(directory)


def test_stored_mtp_layer_that_the_config_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = changed(MTP, tmp_path, num_nextn_predict_layers=0)
    layer = read_config(directory).num_hidden_layers
    assert open_checkpoint(directory).mtp is False
    note = f"MTP layer {layer} is stored and not used, as num_nextn_predict_layers is 0"
    assert [record.getMessage() for record in caplog.records] == [f"{directory}: {note}"]
    assert inspect(directory).mtp == f"none; {note}"


def test_layers_that_the_config_leaves_out_are_one_line(tmp_path: Path) -> None:
    layers = raw_config()["num_hidden_layers"]
    directory = changed(BASE, tmp_path, num_hidden_layers=layers - 2)
    with refused(f"layers {layers - 2} to {layers - 1} are stored and not used"):
        open_checkpoint(directory)
    assert len(inspect(directory).problems) == 1


def test_state_of_transformer_engine(tmp_path: Path) -> None:
    """Empty states are ignored; others may hold scales, and are one line."""
    shutil.copy(BASE / "config.json", tmp_path)
    names = [f"model.layers.{i}.self_attn.o_proj._extra_state" for i in range(3)]
    empty = {name: np.zeros(0, np.uint8) for name in names}
    open_checkpoint(save(tmp_path, TENSORS | empty))
    fault = f"tensor {names[0]} is not part of this architecture"
    with refused(f"{fault} (and 2 more)"):
        open_checkpoint(save(tmp_path, TENSORS | {name: np.ones(4, np.uint8) for name in names}))
    assert inspect(tmp_path).problems == [
        f"tensor {names[0]} is not part of this architecture (and 2 more like it)"
    ]


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """F8_E8M0 is 2^(v - 127), and 255 is no number."""
    tensors = stored(FORMATS / "fp8_block")
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    powers = {name: 2.0 ** np.round(np.log2(tensors[name].astype(np.float32))) for name in scales}
    narrow = {name: scale.astype(ml_dtypes.float8_e8m0fnu) for name, scale in powers.items()}
    floats, bytes_ = tmp_path / "floats", tmp_path / "bytes"
    for target, found in ((floats, powers), (bytes_, narrow)):
        target.mkdir()
        shutil.copy(FORMATS / "fp8_block" / "config.json", target)
        save_file(tensors | found, target / "model.safetensors")
    one, other = (stored_weights(target) for target in (floats, bytes_))
    for name, expected in one.items():
        np.testing.assert_array_equal(other[name], expected)
    narrow[scales[0]] = np.full_like(narrow[scales[0]].view(np.uint8), 255).view(ml_dtypes.float8_e8m0fnu)
    save_file(tensors | narrow, bytes_ / "model.safetensors")
    with refused(f"tensor {scales[0]} holds NaN"):
        stored_weights(bytes_)


def stored_weights(directory: Path) -> dict[str, np.ndarray]:
    checkpoint = HuggingFace(directory).check()
    return {name: checkpoint.tensor(name, np.float32) for name in checkpoint.stored}


def test_compressed_tensors_in_blocks(tmp_path: Path) -> None:
    """The strategy `block` is DeepSeek's FP8 with another name for the scales."""
    config = json.loads((FORMATS / "fp8_block" / "config.json").read_text())
    block = config.pop("quantization_config")["weight_block_size"]
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": block,
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = stored(FORMATS / "fp8_block")
    save_file(
        {name.removesuffix("_inv"): array for name, array in tensors.items()}, tmp_path / "model.safetensors"
    )
    expected, found = stored_weights(FORMATS / "fp8_block"), stored_weights(tmp_path)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    weights["block_structure"] = [128]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("block_structure is '[128]', expected two positive integers"):
        HuggingFace(tmp_path)


def test_quantization_of_the_text_model(tmp_path: Path) -> None:
    """A multimodal config may announce it inside `text_config`."""
    source = GOLDENS / "llama4_conditional"
    raw = json.loads((source / "config.json").read_text())
    quantized = json.loads((FORMATS / "int8_compressed" / "config.json").read_text())["quantization_config"]
    outside = declared(raw | {"quantization_config": quantized}, tmp_path)
    inside = declared(
        raw | {"text_config": raw["text_config"] | {"quantization_config": quantized}}, tmp_path
    )
    assert inside == outside
    assert inside.method == "compressed-tensors"


def test_config_alone_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(BASE / "config.json", tmp_path)
    alone, whole = inspect(tmp_path), inspect(BASE)
    assert (alone.format, alone.parameters) == ("config.json (no weights)", whole.parameters)
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}: deepseek_v3, config.json (no weights)")
    assert "with the input embedding" in render(alone)
    with refused("no *.safetensors there"):
        read_weights(tmp_path, read_config(tmp_path), np.float32)
