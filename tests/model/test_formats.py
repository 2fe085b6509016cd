"""Published formats: what is read is what the files' bytes stand for, to the last bit."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import chex
import ml_dtypes
import numpy as np
import pytest
from reference.formats import dequantised, stored
from safetensors.numpy import save_file
from support import BASE

from cmx_jax.model.checkpoint import read_weights
from cmx_jax.model.families import read_config
from cmx_jax.model.weights import Weights
from model.small import TENSORS

FORMATS = Path(__file__).parents[1] / "formats"
NAMES = sorted(path.name for path in FORMATS.iterdir())
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_formats.py"

# Types that each fixture has to have, so that none of them tests less than it says
KINDS = {
    "fp8_block": {"float8_e4m3fn", "float32", "bfloat16"},
    "int8_block": {"int8", "float32", "bfloat16"},
    "int8_channel": {"int8", "float32", "bfloat16"},
    "int8_compressed": {"int8", "float32", "bfloat16"},
    "int8_compressed_tensor": {"int8", "float32", "bfloat16"},
    "ascend_w8a8": {"int8", "int32", "int64", "float32", "float16"},
    "ascend_w8a8_dynamic": {"int8", "int32", "float32", "bfloat16"},
    "ascend_v1": {"int8", "int32", "float32"},
    "stacked": {"float32", "bfloat16"},
    "sharded": {"float32", "bfloat16"},
    "f16": {"float16"},
}


def assert_equal(one: Weights, other: Weights) -> None:
    chex.assert_trees_all_equal(one, other, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_format_reads_as_the_plain_checkpoint_of_its_numbers(tmp_path: Path, name: str, dtype: type) -> None:
    shutil.copy(BASE / "config.json", tmp_path)
    save_file(dequantised(FORMATS / name), tmp_path / "model.safetensors")
    plain = read_weights(tmp_path, read_config(tmp_path), dtype)
    assert_equal(read_weights(FORMATS / name, read_config(FORMATS / name), dtype), plain)


@pytest.mark.parametrize("name", NAMES)
def test_oracle_is_near_the_original_weights(name: str) -> None:
    numbers = dequantised(FORMATS / name)
    assert numbers.keys() == TENSORS.keys()
    for tensor, array in TENSORS.items():  # half a step of E4M3 is 1/16, and scales may be rounded, too
        assert numbers[tensor].shape == array.shape
        assert np.abs(numbers[tensor] - array).max() <= 0.07 * np.abs(array).max(), tensor


@pytest.mark.parametrize("name", NAMES)
def test_fixture_has_the_types_of_its_format(name: str) -> None:
    assert {array.dtype.name for array in stored(FORMATS / name).values()} == KINDS[name]


def test_fixtures_are_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_formats", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    module.main()
    for name in NAMES:
        assert files(tmp_path / name) == files(FORMATS / name)
        written, kept = stored(tmp_path / name), stored(FORMATS / name)
        assert written.keys() == kept.keys()
        for tensor in kept:
            assert written[tensor].dtype == kept[tensor].dtype
            np.testing.assert_array_equal(written[tensor], kept[tensor], err_msg=f"{name}: {tensor}")


def files(directory: Path) -> dict[str, object]:
    """Names of all files, and what the JSON among them says."""
    return {
        path.name: json.loads(path.read_text()) if path.suffix == ".json" else None
        for path in directory.iterdir()
    }
