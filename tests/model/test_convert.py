"""Conversions: every format to every other, killed and resumed, verified; shards under another layout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from support import GOLDENS

import cmx_jax
from cmx_jax.cli import main
from cmx_jax.mesh.lanes import Lanes
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.model.checkpoint import load_weights, open_checkpoint, read_weights
from cmx_jax.model.checkpoint.convert import convert
from cmx_jax.model.families import read_config
from model.small import refused, save

pytestmark = pytest.mark.slow

FORMATS = Path(__file__).parents[1] / "formats"
SOURCES = (GOLDENS / "base", GOLDENS / "qwen3_bias", GOLDENS / "llama4_conditional", FORMATS / "fp8_block")


def equal(a: Any, b: Any) -> None:
    chex.assert_trees_all_equal(a, b)


def weights(directory: Path, dtype: Any = np.float32) -> Any:
    return read_weights(directory, read_config(directory), dtype)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_float32_conversions_lose_nothing(tmp_path: Path, source: Path, format: str) -> None:
    result = convert(source, tmp_path / "out", format=format, dtype="float32")
    assert result.verified
    assert read_config(tmp_path / "out") == read_config(source)
    equal(weights(tmp_path / "out"), weights(source))


@pytest.mark.parametrize("case", ["base", "qwen3_tied", "llama4_interleave"])
def test_orbax_round_trip_gives_the_original_tensors(tmp_path: Path, case: str) -> None:
    """Safetensors to Orbax for one layout, for another, to safetensors: transformers' own tensors."""
    convert(GOLDENS / case, tmp_path / "a", format="orbax", ranks=3)
    convert(tmp_path / "a", tmp_path / "b", format="orbax", ranks=8)
    convert(tmp_path / "b", tmp_path / "c")
    actual = {
        name: t for file in (tmp_path / "c").glob("*.safetensors") for name, t in load_file(file).items()
    }
    expected = load_file(GOLDENS / case / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)
        assert actual[name].dtype == tensor.dtype


def test_bfloat16_conversion_is_a_cast(tmp_path: Path) -> None:
    convert(GOLDENS / "base", tmp_path / "out", dtype="bfloat16")
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            source = load_file(GOLDENS / "base" / "model.safetensors")[name]
            kept = np.float32 if name.endswith("e_score_correction_bias") else ml_dtypes.bfloat16
            np.testing.assert_array_equal(tensor, source.astype(kept))


def test_int8_conversion_is_compressed_tensors_by_channel(tmp_path: Path) -> None:
    convert(GOLDENS / "base", tmp_path / "out", dtype="int8")
    actual = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    source = load_file(GOLDENS / "base" / "model.safetensors")[name]
    least, scale = np.abs(source).max(axis=1, keepdims=True) / np.float32(127), actual[f"{name}_scale"]
    assert scale.dtype == ml_dtypes.bfloat16
    scale = scale.astype(np.float32)
    assert ((scale >= least) & (scale < least * (1 + 2**-7))).all()  # the next bfloat16
    np.testing.assert_array_equal(actual[name], np.rint(source / scale).astype(np.int8))
    assert (
        actual["lm_head.weight"].dtype == actual["model.layers.1.mlp.gate.weight"].dtype == ml_dtypes.bfloat16
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "int-quantized")
    got = weights(tmp_path / "out").moe.ffn.experts.down[7, 0]
    down = name.replace("up", "down")
    s = actual[f"{down}_scale"].astype(np.float32)
    np.testing.assert_array_equal(got, (actual[down].astype(np.float32) * s).T)


@pytest.mark.parametrize("saved", [1, 3, 16])
def test_orbax_logits_do_not_depend_on_the_layout(tmp_path: Path, saved: int) -> None:
    golden = np.load(GOLDENS / "base" / "golden.npz")
    convert(GOLDENS / "base", tmp_path / "out", format="orbax", ranks=saved)
    plain = cmx_jax.from_pretrained(GOLDENS / "base", ranks=4, max_num_seqs=4)
    for ranks, runner in ((4, "lanes"), (4, "devices"), (5, "lanes")):
        llm = cmx_jax.from_pretrained(tmp_path / "out", ranks=ranks, runner=runner, max_num_seqs=4)
        for array, reference in zip(
            *map(jax.tree.leaves, (one.instance.programs.weights for one in (llm, plain))), strict=True
        ):
            if ranks == 4:
                np.testing.assert_array_equal(np.asarray(array), np.asarray(reference))
        actual = llm.logits(golden["tokens_40"])
        np.testing.assert_allclose(actual, golden["logits_40"], atol=1e-4, rtol=0)
        if (ranks, runner) == (4, "lanes"):
            np.testing.assert_array_equal(actual, plain.logits(golden["tokens_40"]))


def test_orbax_library_reads_a_written_unit(tmp_path: Path) -> None:
    convert(GOLDENS / "base", tmp_path / "out", format="orbax", ranks=8)
    runner = make_runner("devices", (("ep", 8),))
    path = (tmp_path / "out" / "units" / "layers.1.slots.2-3").absolute()
    handler = ocp.PyTreeCheckpointer()
    restored = handler.restore(path)
    c = read_config(GOLDENS / "base")
    expected = load_weights(open_checkpoint(GOLDENS / "base"), expert_parallel(8, 16), runner, np.float32)
    np.testing.assert_array_equal(
        restored["ffn.experts.down"], np.asarray(expected.moe.ffn.experts.down)[2:4, 0]
    )
    assert restored["ffn.experts.down"].shape == (2, c.moe_intermediate_size, c.hidden_size)


def test_rank_reads_only_its_own_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of 8 ranks reads its part from the files, and no other experts."""
    for format in ("safetensors", "orbax"):
        convert(GOLDENS / "base", tmp_path / format, format=format, ranks=8 if format == "orbax" else None)
        checkpoint = open_checkpoint(tmp_path / format)
        experts_read: list[int] = []
        fill = checkpoint.fill

        def spy(piece: Any, out: Any, fill: Any = fill, experts_read: list[int] = experts_read) -> None:
            if "experts" in piece[1]:
                experts_read.append(piece[3])
            fill(piece, out)

        monkeypatch.setattr(checkpoint, "fill", spy)

        class First(Lanes):
            def make(self, shape: Any, dtype: Any, spec: Any, part: Any) -> Any:
                del dtype
                cut = shape[0] // 8 if spec and spec[0] else shape[0]
                return part((slice(0, cut), *(slice(0, n) for n in shape[1:])))

        layout = expert_parallel(8, 16)
        first = load_weights(checkpoint, layout, First(layout.axes), np.float32)
        assert set(experts_read) == {0, 1}
        full = load_weights(checkpoint, layout, make_runner("lanes", layout.axes), np.float32)
        np.testing.assert_array_equal(first.moe.ffn.experts.down, np.asarray(full.moe.ffn.experts.down)[:2])


KILLED = """
import os, signal, sys
from cmx_jax.model.checkpoint import convert as module
from cmx_jax.model.checkpoint.safetensors import SafetensorsWriter
from cmx_jax.model.checkpoint.orbax import OrbaxWriter
writer = {"safetensors": SafetensorsWriter, "orbax": OrbaxWriter}[sys.argv[3]]
write, left = writer.write, [int(sys.argv[4])]
def dying(self, unit):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, unit)
writer.write = dying
module.convert(sys.argv[1], sys.argv[2], format=sys.argv[3], dtype="float32")
"""


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_killed_conversion_resumes_after_the_last_unit(tmp_path: Path, format: str) -> None:
    source, out = GOLDENS / "base", tmp_path / "out"
    child = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), format, "2"], check=False)
    assert child.returncode == -signal.SIGKILL
    with refused("not complete"):
        open_checkpoint(out)
    (out / "model-00003-of-00005.safetensors.unfinished").write_bytes(b"half")
    result = convert(source, out, format=format, dtype="float32")
    assert result.units_resumed == 2
    equal(weights(out), weights(source))
    assert convert(source, out, format=format, dtype="float32").units_resumed == result.units


def test_conversion_killed_at_any_moment_can_be_resumed(tmp_path: Path) -> None:
    """SIGKILL from outside, later and later, until a run ends by itself."""
    source, out = GOLDENS / "two_dense", tmp_path / "out"
    command = [sys.executable, "-m", "cmx_jax.cli", "convert", str(source), str(out), "--dtype", "float32"]
    for delay in (0.3, 0.5, 0.6, 0.7, 60.0):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            try:
                child.wait(delay)
            except subprocess.TimeoutExpired:
                child.kill()
        if child.returncode == 0:
            break
    assert child.returncode == 0
    equal(weights(out), weights(source))


def test_unit_that_reads_back_otherwise_is_named_and_written_again(tmp_path: Path, monkeypatch) -> None:
    from cmx_jax.model.checkpoint import safetensors

    out, write = tmp_path / "out", safetensors.SafetensorsWriter.write

    def rotten(self: Any, unit: str) -> Any:
        sums = write(self, unit)
        if unit == "layers.1":
            with self.files[unit].open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xaa")
        return sums

    monkeypatch.setattr(safetensors.SafetensorsWriter, "write", rotten)
    with refused("layers.1", "tensor model.layers.1."):
        convert(GOLDENS / "base", out)
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    assert convert(GOLDENS / "base", out).units_resumed == 3
    equal(weights(out), weights(GOLDENS / "base"))


def test_source_changed_during_conversion_is_refused(tmp_path: Path, monkeypatch) -> None:
    from cmx_jax.model.checkpoint import safetensors

    shutil.copytree(GOLDENS / "base", tmp_path / "source")
    write = safetensors.SafetensorsWriter.write

    def meddling(self: Any, unit: str) -> Any:
        (tmp_path / "source" / "model.safetensors").touch()
        return write(self, unit)

    monkeypatch.setattr(safetensors.SafetensorsWriter, "write", meddling)
    with refused("changed while it was converted"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_text_file_in_the_source_does_not_change_its_fingerprint(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "base", tmp_path / "source")
    units = convert(tmp_path / "source", tmp_path / "out").units
    (tmp_path / "source" / "notes.txt").write_text("all is well")
    assert convert(tmp_path / "source", tmp_path / "out").units_resumed == units


@pytest.mark.parametrize(
    ("free", "reason"), [(0, "the disk is full"), (1 << 50, "PERMISSION_DENIED: read-only file system")]
)
def test_orbax_error_says_whether_the_disk_is_full(tmp_path: Path, monkeypatch, free, reason) -> None:
    """TensorStore raises ValueError for every refusal of the system; free space tells which one it is."""

    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise ValueError("PERMISSION_DENIED: read-only file system")

    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(ocp.Checkpointer, "save", refuse)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused(f"cannot be written ({reason})"):
        convert(GOLDENS / "base", tmp_path / "out", format="orbax")


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_default_dtype_keeps_every_digit(tmp_path: Path, format: str) -> None:
    """A BF16 model whose router, norms and head have more digits keeps those."""
    tensors = load_file(GOLDENS / "base" / "model.safetensors")
    kept = ("gate.weight", "norm.weight", "lm_head.weight", "e_score_correction_bias")
    mixed = {n: t if n.endswith(kept) else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    shutil.copytree(GOLDENS / "base", tmp_path / "source")
    save(tmp_path / "source", mixed)
    result = convert(tmp_path / "source", tmp_path / "out", format=format)
    assert result.dtype == "bfloat16"
    equal(weights(tmp_path / "out"), weights(tmp_path / "source"))
    convert(tmp_path / "out", tmp_path / "back")
    actual = {n: t for file in (tmp_path / "back").glob("*.safetensors") for n, t in load_file(file).items()}
    for name, tensor in mixed.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)
        assert actual[name].dtype == tensor.dtype, name


def test_second_conversion_at_once_is_refused(tmp_path: Path, monkeypatch) -> None:
    from cmx_jax.model.checkpoint import safetensors

    write, seen = safetensors.SafetensorsWriter.write, []

    def nested(self: Any, unit: str) -> Any:
        if not seen:
            seen.append(unit)
            with refused("another conversion is writing there"):
                convert(GOLDENS / "base", tmp_path / "out")
        return write(self, unit)

    monkeypatch.setattr(safetensors.SafetensorsWriter, "write", nested)
    assert convert(GOLDENS / "base", tmp_path / "out").verified
    assert seen


@pytest.mark.parametrize("left", ["conversion.json.unfinished", "conversion.lock"])
def test_leftovers_of_an_early_kill_are_ignored(tmp_path: Path, left: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_text("")
    assert convert(GOLDENS / "base", tmp_path / "out").verified


def test_damaged_units_of_a_finished_orbax_directory_are_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    units = convert(GOLDENS / "base", out, format="orbax").units
    for unit in ("layers.1.slots.0-1", "layers.2"):
        for path in (out / "units" / unit).rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[:-3])
    with refused("and 1 more was written wrongly"):
        convert(GOLDENS / "base", out, format="orbax")
    assert not (out / "config.json").exists()
    assert convert(GOLDENS / "base", out, format="orbax").units_resumed == units - 2
    equal(weights(out), weights(GOLDENS / "base"))


def test_impossible_destinations_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("x" * 300, "a"):
        with refused(name[:50]):
            convert(GOLDENS / "base", tmp_path / name)


def test_destination_with_other_contents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with refused("not empty"):
        convert(GOLDENS / "base", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with refused("is a file"):
        convert(GOLDENS / "base", tmp_path / "file")
    shutil.copytree(GOLDENS / "base", tmp_path / "source")
    for inside in ("source", "source/deeper"):
        with refused("lies in the source"):
            convert(tmp_path / "source", tmp_path / inside)
    convert(GOLDENS / "base", tmp_path / "out")
    with refused("another conversion"):
        convert(GOLDENS / "base", tmp_path / "out", dtype="int8")
    with refused("another conversion"):
        convert(GOLDENS / "tied", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "zip"}, "zip"),
        ({"dtype": "int4"}, "int4"),
        ({"dtype": "int8", "format": "orbax"}, "int8"),
        ({"ranks": 4}, "--format orbax"),
        ({"ranks": 0, "format": "orbax"}, "0 ranks"),
    ],
)
def test_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with refused(words):
        convert(GOLDENS / "base", tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["array", "unit", "manifest", "slots", "incomplete"])
def test_damaged_orbax_directory_is_refused(tmp_path: Path, capsys, damage: str) -> None:
    out = tmp_path / "out"
    convert(GOLDENS / "base", out, format="orbax", ranks=4)
    manifest = json.loads((out / "conversion.json").read_text())
    if damage == "array":
        for path in (out / "units" / "layers.1").rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[:10])
    elif damage == "unit":
        shutil.rmtree(out / "units" / "layers.1")
    elif damage == "manifest":
        (out / "conversion.json").write_text("{")
    else:
        manifest |= {"complete": False} if damage == "incomplete" else {"slots": 20}
        (out / "conversion.json").write_text(json.dumps(manifest))
    start = time.monotonic()
    assert main(["generate", str(out), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert {"array": "layers.1", "unit": "layers.1", "manifest": "conversion.json"}.get(
        damage, str(out)
    ) in error
    assert time.monotonic() - start < 10


def test_convert_verb_reports_its_result(tmp_path: Path, capsys) -> None:
    assert (
        main(["convert", "tiny", str(tmp_path / "out"), "--format", "orbax", "--layout", "ep16", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["verified"] is True
    assert result["units"] == 8 + 4 * 8  # embedding, norm, head, five layers, experts of four in eight parts
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["format"] == "orbax, 256 expert slots"
    assert seen["parameters"]["total"] == 7466272
    command = ["generate", str(tmp_path / "out"), "--prompt", "The json", "--max-tokens", "4", "--json"]
    assert main(command) == 0
    from_orbax = json.loads(capsys.readouterr().out)["requests"][0]["tokens"]
    assert main([command[0], "tiny", *command[2:]]) == 0
    assert json.loads(capsys.readouterr().out)["requests"][0]["tokens"] == from_orbax
