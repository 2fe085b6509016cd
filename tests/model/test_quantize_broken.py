"""`cmx quantize`: what breaks it off costs nothing finished, what it cannot use is one line."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import BASE

import cmx_jax
from cmx_jax.analysis.eval.calibration import calibration
from cmx_jax.cli import main
from cmx_jax.errors import CmxError
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.quantize.command import PARTS, quantize
from cmx_jax.model.quantize.report import REPORT
from cmx_jax.serving.deploy.model import Model
from model.quantized import FOLDED, ROUNDED, TEXT, files, run
from model.small import refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model quantised without a break."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(BASE, out)
    return out


@pytest.mark.parametrize("unit", ["layers.0", "layers.1", "layers.2"])
def test_interrupted_quantization_ends_with_the_same_bytes(unit: str, finished: Path, tmp_path: Path) -> None:
    def broken(line: str) -> None:
        if line.startswith(f"writing {unit}"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(BASE, tmp_path / "out", progress=broken)
    with refused("not complete"):
        cmx_jax.from_pretrained(tmp_path / "out")
    assert run(BASE, tmp_path / "out").units_resumed == 1 + int(unit[-1])
    assert files(tmp_path / "out") == files(finished)


KILLED = """
import os, signal, sys
import numpy as np
from cmx_jax.model.quantize.command import quantize
from cmx_jax.model.quantize.command import Int8Writer

arrays = Int8Writer.arrays
def dying(self, unit):
    for i, tensor in enumerate(arrays(self, unit)):
        if (unit.name, i) == ("layers.1", 20):
            os.kill(os.getpid(), signal.SIGKILL)
        yield tensor
Int8Writer.arrays = dying
parts = frozenset(sys.argv[4].split())
quantize(sys.argv[1], sys.argv[2], tokens=np.load(sys.argv[3]), parts=parts)
"""


def test_quantization_killed_within_a_file_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    out, tokens = tmp_path / "out", tmp_path / "tokens.npy"
    np.save(tokens, TEXT)
    command_line = [sys.executable, "-c", KILLED, str(BASE), str(out), str(tokens), " ".join(ROUNDED)]
    child = subprocess.run(command_line, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert child.returncode == -signal.SIGKILL
    assert list(out.glob("*.safetensors.unfinished"))
    assert run(BASE, out).units_resumed == 2
    assert files(out) == files(finished)


def test_report_of_the_source_is_not_copied(finished: Path, tmp_path: Path) -> None:
    result = run(finished, tmp_path / "out", FOLDED)
    assert result.as_dict()["layers"] != json.loads((finished / REPORT).read_text())["layers"]
    assert quantize(finished, tmp_path / "plain").layers == {}
    assert not (tmp_path / "plain" / REPORT).exists()


def test_finished_quantization_writes_nothing_again(finished: Path) -> None:
    before = files(finished)
    assert run(BASE, finished).units_resumed == 4
    assert files(finished) == before


def test_disk_full_names_the_destination_alone(tmp_path: Path, monkeypatch) -> None:
    """The error of the disk is not taken for one of the algorithms, which would be put before the source."""

    def full(self: Any, unit: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    out = tmp_path / "out"
    with pytest.raises(CmxError) as caught:
        run(BASE, out, FOLDED)
    assert str(caught.value) == (
        f"{out}: conversion broke off (the disk is full); run the same command to go on"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sensitivity": {}, "layers": {"layers.0": {"a": {}}}}'])
def test_damaged_report_is_named(text: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / REPORT).write_text(text)
    with refused(str(tmp_path / "out" / REPORT)):
        run(BASE, tmp_path / "out")


def planted(directory: Path, name: str, value: float) -> Path:
    """`base` with one number in a tensor replaced."""
    shutil.copytree(BASE, directory)
    tensors = load_file(BASE / "model.safetensors")
    tensors[name].flat[3] = value
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    "parts", [frozenset(), frozenset({"rotation"}), ROUNDED], ids=["none", "one", "most"]
)
def test_numbers_that_overflow_are_named(parts: frozenset[str], tmp_path: Path) -> None:
    source = planted(tmp_path / "in", "model.layers.1.input_layernorm.weight", 3e38)
    with refused("layer 1", "expected finite numbers"):
        run(source, tmp_path / "out", parts)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    with refused(name):
        run(planted(tmp_path / "in", name, value), tmp_path / "out", FOLDED)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"parts": frozenset({"magic"})}, "part 'magic' is unknown"), ({"budget": -0.1}, "budget is -0.1")],
)
def test_arguments_are_refused_before_anything_is_read(fields: Any, words: str, tmp_path: Path) -> None:
    with refused(words):
        run(BASE, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_destination_with_other_contents_is_refused_before_measuring(tmp_path: Path, finished: Path) -> None:
    def measured(line: str) -> None:
        raise AssertionError(line)

    full = partial(run, parts=frozenset(PARTS), progress=measured)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with refused("not empty"):
        full(BASE, tmp_path / "mine")
    with refused("another conversion"):
        full(BASE, finished)
    shutil.copytree(BASE, tmp_path / "source")
    with refused("lies in the source"):
        full(tmp_path / "source", tmp_path / "source" / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"short", "expected at least a window of 256"),
        (b"\xff\xfe" * 999, "not UTF-8"),
        (None, "cannot be read"),
    ],
    ids=["empty", "short", "latin", "missing"],
)
def test_calibration_text_that_cannot_be_used_is_one_line(
    text: bytes | None, words: str, tmp_path: Path, tiny: Model
) -> None:
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_bytes(text)
    with refused(words):
        calibration(tiny, file, 4096)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return Model.read("tiny")


def test_calibration_windows_are_spread_over_the_text(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(2000))))
    every = calibration(tiny, file, 10**6)
    assert every.shape[1] == 256
    np.testing.assert_array_equal(calibration(tiny, file, 512), every[[0, -1]])


@pytest.mark.parametrize("flags", [["--calibration-tokens", "9"], ["--budget", "-1"]])
def test_flags_that_cannot_be_used_are_one_line(flags: list[str], tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 400)
    assert main(["quantize", "tiny", str(tmp_path / "out"), "--calibration", str(text), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
