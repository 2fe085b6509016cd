"""Output of `cmx quantize`: it loads, it is close to the original model, other programs can read it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import BASE, MTP_GOLDENS

import cmx_jax
from cmx_jax.model.checkpoint import open_checkpoint
from cmx_jax.model.checkpoint.convert import convert
from cmx_jax.model.families import read_config
from cmx_jax.model.quantize import command
from cmx_jax.model.quantize.command import PARTS, Quantization, quantize
from cmx_jax.model.quantize.report import REPORT
from cmx_jax.model.weights import int8_fields
from model.quantized import run

pytestmark = pytest.mark.slow

SAMPLE = Path(__file__).parents[1] / "formats" / "int8_compressed" / "config.json"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Quantization]:
    """A model with an MTP layer, quantised with all parts; so small a one has nothing that costs much."""
    out = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "THRESHOLD", 0.0)
        return out, run(MTP_GOLDENS / "base", out, frozenset(PARTS))


def test_errors_are_smaller_than_those_of_rounding_alone(done: tuple[Path, Quantization]) -> None:
    out, result = done
    report = json.loads((out / REPORT).read_text())
    document = result.as_dict()
    assert report == {name: document[name] for name in ("sensitivity", "layers")}
    assert result.layers.keys() == {"layers.0", "layers.1", "layers.2"}
    errors = [e for matrices in result.layers.values() for e in matrices.values()]
    assert np.mean([e.written for e in errors]) < 0.95 * np.mean([e.plain for e in errors])
    assert max(e.written for e in errors) < 0.03


def test_quantized_model_loads_and_its_logits_are_close(done: tuple[Path, Quantization]) -> None:
    tokens, source = np.random.default_rng(1).integers(0, 60, (2, 12)), MTP_GOLDENS / "base"
    exact = cmx_jax.from_pretrained(source, ranks=2, max_num_seqs=2).logits(tokens)
    llm = cmx_jax.from_pretrained(done[0], ranks=2, max_num_seqs=2, max_model_len=32)
    rounded = llm.logits(tokens)
    assert llm.model.config.int8
    off = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(off) < 0.1
    prompt = tokens[0].tolist()
    other = cmx_jax.from_pretrained(done[0], ranks=4, runner="devices", max_num_seqs=4, max_model_len=32)
    [first], [second] = (x.generate([prompt], max_new_tokens=12, ignore_eos=True) for x in (llm, other))
    assert first.tokens == second.tokens
    sequence = np.asarray([prompt + first.tokens])
    likeliest = llm.logits(sequence)[0, len(prompt) - 1 : -1].argmax(axis=-1)
    assert likeliest.tolist() == first.tokens  # decoded in latent space, scored with keys and values


def test_config_is_that_of_compressed_tensors(done: tuple[Path, Quantization]) -> None:
    """Every field of ours is in a published file, with the same value; `ignore` names what is in floats."""
    ours = json.loads((done[0] / "config.json").read_text())["quantization_config"]
    theirs = json.loads(SAMPLE.read_text())["quantization_config"]
    ignore = ours.pop("ignore")
    assert within(ours, theirs)
    tensors = {n: t for file in done[0].glob("*.safetensors") for n, t in load_file(file).items()}
    linear = {n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2 and "embed" not in n}
    floats = {n.removesuffix(".weight") for n in linear if tensors[n].dtype != np.int8}
    routers = {n for n in floats if n.endswith(".gate")}
    assert set(ignore) - {r"re:.*\.(gate|router)$"} == floats - routers
    assert done[1].kept  # not kv_b alone


def within(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() <= theirs.keys() and all(within(ours[key], theirs[key]) for key in ours)
    return ours == theirs


def test_most_sensitive_fields_stay_in_floats(tmp_path: Path, monkeypatch) -> None:
    """Within the budget, by what they cost for their bytes."""
    fields = {"/".join(field) for field in int8_fields(read_config(BASE), mtp=False)}
    costs = dict.fromkeys(fields, 1e-9) | {"moe/attn.q_a": 0.5, "moe/ffn.shared.down": 0.2}
    monkeypatch.setattr(command, "sensitivity", lambda walk, progress: costs)
    result = run(BASE, tmp_path / "out", frozenset({"precision"}), budget=0.1)
    # what others fuse to one matrix is of one kind
    assert result.kept == ["moe/attn.kv_a", "moe/attn.q_a", "moe/ffn.shared.down"]
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for number in (1, 2):
        names = {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.shared_experts.down_proj"}
        assert {f"model.layers.{number}.{name}" for name in names} <= set(raw["ignore"])
    fields_stored = open_checkpoint(tmp_path / "out").int8[0]
    assert {"/".join(field) for field in fields_stored} == fields - set(result.kept)
    assert run(BASE, tmp_path / "none", frozenset({"precision"}), budget=0).kept == []


def test_quantize_without_calibration_is_a_conversion_to_int8(tmp_path: Path) -> None:
    quantize(BASE, tmp_path / "out")
    convert(BASE, tmp_path / "other", dtype="int8")
    actual, expected = (
        {n: t for f in (tmp_path / d).glob("*.safetensors") for n, t in load_file(f).items()}
        for d in ("out", "other")
    )
    decoded = {n for n in expected if "kv_b_proj" in n}  # absorbed: floats here
    assert actual.keys() == expected.keys() - {n for n in decoded if n.endswith("_scale")}
    for name in actual.keys() - decoded:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
