"""INT8 weights while serving: read as they are stored or rounded while loading, computed in INT8 anywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from reference import pangu
from reference.int8 import Int8
from safetensors.numpy import load_file
from support import BASE, GOLDENS

import cmx_jax
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.model.checkpoint import load_weights
from cmx_jax.model.checkpoint.convert import convert
from cmx_jax.model.checkpoint.names import sources
from cmx_jax.model.weights import Weights, int8_fields
from cmx_jax.quant import QTensor
from cmx_jax.serving.deploy.model import Model
from model.small import refused

pytestmark = pytest.mark.slow

FORMATS = Path(__file__).parents[1] / "formats"
FAMILIES = ("base", "qwen3_base", "llama4_conditional", "pangu")
TOKENS = 16


def directory(case: str, tmp_path: Path) -> Path:
    return pangu.write_tiny(tmp_path / case, seed=2) if case == "pangu" else GOLDENS / case


def loaded(path: Path | str, ranks: int = 1, dtype: str = "float32", **quant: str) -> tuple[Model, Weights]:
    """The weights as they lie on the devices; of one rank expert `e` is in slot `e`."""
    model = Model.read(path, dtype, **quant)
    layout = expert_parallel(ranks, model.config.n_routed_experts)
    runner = make_runner("lanes", layout.axes)
    weights = load_weights(model.checkpoint, layout, runner, model.dtype, None, model.config)
    return model, weights


def of(weights: Weights, stack: str, path: str) -> Any:
    field: Any = getattr(weights, stack)
    for name in (path if stack != "mtp" or path == "eh_proj" else f"layer.{path}").split("."):
        field = getattr(field, name)
    return field


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_of_int8_weights_are_near_those_of_floats(case: str, tmp_path: Path) -> None:
    """Random weights are a hard case: a token that changes its expert changes a lot."""
    path = directory(case, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 60, (2, 12))
    exact, rounded = (
        cmx_jax.from_pretrained(path, ranks=2, max_num_seqs=2, quant=quant).logits(tokens)
        for quant in ("none", "int8")
    )
    off = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(off) < 0.1
    assert off.max() > 1e-3  # it is not the floats that were computed


def test_logits_are_those_of_products_rounded_by_hand() -> None:
    tokens = np.load(BASE / "golden.npz")["tokens_7"]
    llm = cmx_jax.from_pretrained(BASE, ranks=4, max_num_seqs=4, quant="int8")
    reference = Int8(str(BASE), np.float64)
    expected = np.stack([reference.logits(row) for row in tokens])
    np.testing.assert_allclose(llm.logits(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_int8_fields_take_little_more_than_half_of_bfloat16(case: str, tmp_path: Path) -> None:
    model, weights = loaded(directory(case, tmp_path), quant="int8")
    assert model.config.int8 == int8_fields(model.config)
    for stack, path in model.config.int8:
        if stack == "mtp" and weights.mtp is None:
            continue
        field = of(weights, stack, path)
        assert (field.q.dtype, field.scale.dtype) == (np.int8, ml_dtypes.bfloat16)
        summed = [n for n, s in zip(field.q.shape, field.scale.shape, strict=True) if s == 1 < n]
        assert field.q.nbytes + field.scale.nbytes == field.q.size + 2 * field.q.size // np.prod(summed)


def test_shipped_model_in_int8_takes_53_percent_of_its_bytes() -> None:
    model, weights = loaded("tiny", dtype="bfloat16", quant="int8")
    fields = [of(weights, *field) for field in model.config.int8]
    size = sum(field.q.nbytes + field.scale.nbytes for field in fields)
    assert size <= 0.53 * sum(2 * field.q.size for field in fields)


@pytest.fixture(scope="module")
def alone() -> list[int]:
    """Tokens that one rank by itself generates."""
    return greedy(ranks=1)


def greedy(**fields: Any) -> list[int]:
    prompt = np.load(BASE / "golden.npz")["prompt"].tolist()
    llm = cmx_jax.from_pretrained(BASE, max_num_seqs=4, max_model_len=64, quant="int8", **fields)
    [completion] = llm.generate([prompt], max_new_tokens=TOKENS, ignore_eos=True)
    assert bool(llm.moves) == ("eplb_interval" in fields)
    return completion.tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"ranks": 4},
        {"ranks": 2, "runner": "devices"},
        {"ranks": 4, "redundant_slots": 4, "shared_slots": 4, "eplb_interval": 4},
    ],
    ids=["lanes", "devices", "replicas"],
)
def test_int8_tokens_do_not_depend_on_the_layout(fields: dict[str, Any], alone: list[int]) -> None:
    assert greedy(**fields) == alone


def test_shared_experts_in_slots_have_their_scales() -> None:
    """A slot holds a share of the hidden width: its columns of gate and up, its rows of down."""
    model = Model.read(GOLDENS / "two_shared", quant="int8")
    experts = model.config.n_routed_experts
    layout = expert_parallel(4, experts, shared_slots=8)
    runner = make_runner("lanes", layout.axes)
    inside = load_weights(model.checkpoint, layout, runner, "float32", None, model.config)
    shared = loaded(GOLDENS / "two_shared", quant="int8")[1].moe.ffn.shared
    slots, first = (np.asarray(a)[0] for a in (inside.moe.ffn.slots, inside.moe.ffn.first_slot))
    width = model.config.moe_intermediate_size
    for part in range(2):
        slot = slots[first[experts + part]]
        hidden = slice(part * width, (part + 1) * width)
        gate_up, down = (
            jax.tree.map(lambda a, s=slot: a[s, 0], e) for e in vars(inside.moe.ffn.experts).values()
        )
        np.testing.assert_array_equal(gate_up.q, shared.gate_up.q[0, ..., hidden])
        np.testing.assert_array_equal(gate_up.scale, shared.gate_up.scale[0, ..., hidden])
        np.testing.assert_array_equal(down.q, shared.down.q[0, hidden])
        np.testing.assert_array_equal(down.scale, shared.down.scale[0])


def stored_as_int8(path: Path, **quant: str) -> int:
    """Number of tensors of a directory that are on the device as the file has them, scales too."""
    model, weights = loaded(path, **quant)
    tensors = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    count = 0
    for s in sources(model.config, model.checkpoint.mtp):
        stack, name, layer, expert = s.piece
        if f"{s.name}_scale" not in tensors:
            continue
        field = of(weights, stack, name)
        if not isinstance(field, QTensor):
            continue
        index = (expert, layer) if name.startswith("ffn.experts.") else (layer,)
        scale = np.broadcast_to(tensors[f"{s.name}_scale"].reshape(-1, 1), tensors[s.name].shape)
        loaded_scale = np.broadcast_to(np.asarray(field.scale[index]), field.q[index].shape)
        np.testing.assert_array_equal(np.asarray(field.q[index])[s.part], s.view(tensors[s.name]))
        np.testing.assert_array_equal(
            loaded_scale[s.part].astype(np.float32), s.view(scale.astype(np.float32))
        )
        count += 1
    return count


@pytest.mark.parametrize("case", ["base", "qwen3_base", "llama4_interleave"])
def test_converted_int8_is_not_decoded(case: str, tmp_path: Path, monkeypatch) -> None:
    convert(GOLDENS / case, tmp_path / "out", dtype="int8")
    tensors = sum(
        len([n for n in load_file(f) if n.endswith("_scale")])
        for f in (tmp_path / "out").glob("*.safetensors")
    )
    latents = Model.read(GOLDENS / case).config.num_hidden_layers if case == "base" else 0
    assert stored_as_int8(tmp_path / "out") == tensors - latents  # kv_b is absorbed, and decoded for that
    assert stored_as_int8(tmp_path / "out", quant="none") == 0


def test_published_w8a8_is_not_decoded() -> None:
    c = Model.read(FORMATS / "int8_compressed").config
    assert c.int8 == {field for field in int8_fields(c) if field[0] != "mtp"}
    assert stored_as_int8(FORMATS / "int8_compressed") > 100


@pytest.mark.parametrize("name", ["int8_block", "int8_compressed_tensor", "ascend_w8a8", "fp8_block", "f16"])
def test_other_schemes_are_decoded(name: str) -> None:
    assert not Model.read(FORMATS / name).config.int8


def test_int8_weights_with_float_activations_are_decoded(tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "int8_compressed", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    path.write_text(json.dumps(raw))
    assert not Model.read(tmp_path / "out").config.int8
    model, weights = loaded(tmp_path / "out", quant="int8")  # unless it is asked for
    assert model.config.int8
    assert of(weights, "moe", "attn.o").q.dtype == np.int8


def test_unknown_quant_is_one_line() -> None:
    with refused("quant 'int4' is unknown", "int8"):
        cmx_jax.from_pretrained(BASE, quant="int4")
