"""The presets: counted by closed form from their fields, by the package, and as published."""

import json
from pathlib import Path
from typing import Any

import pytest

import cmx_jax
from cmx_jax.model import families
from cmx_jax.model.parameters import parameter_counts

PRESETS = Path(cmx_jax.__file__).parent / "model" / "presets"

# Billions, as printed: in total, and active, that is all that a token uses but the input embedding.
PUBLISHED = {
    "deepseek-v3": ("671.0", "36.6"),
    "deepseek-r1": ("671.0", "36.6"),
    "openpangu-ultra-moe-718b": ("719.1", "39.2"),
    "qwen3-235b-a22b": ("235.1", "21.6"),
    "llama4-maverick": ("400.7", "16.1"),
    "llama4-scout": ("107.8", "16.1"),
}
MTP = {"deepseek-v3": "11.6", "deepseek-r1": "11.6", "openpangu-ultra-moe-718b": "12.4"}
NAMES = sorted((*PUBLISHED, "palm-540b", "llama4-behemoth-projected"))

Counts = tuple[int, int, int]  # total, active, MTP


def fields(name: str) -> dict[str, Any]:
    return json.loads((PRESETS / f"{name}.json").read_text())


def swiglu(width: int, hidden: int) -> int:
    return 3 * width * hidden


def mla(width: int, heads: int, query: int, latent: int, nope: int, rope: int, value: int) -> int:
    queries = width * query + query + query * heads * (nope + rope)
    keys = width * (latent + rope) + latent + latent * heads * (nope + value)
    return queries + keys + heads * value * width


def gqa(c: dict[str, Any]) -> int:
    width, dim = c["hidden_size"], c["head_dim"]
    return 2 * width * dim * (c["num_attention_heads"] + c["num_key_value_heads"])


def latent_moe(c: dict[str, Any], attention: int, norms: int, experts: int, shared: int, bias: int) -> Counts:
    """DeepSeek's plan: `dense` layers, then MoE layers; an MTP layer is a MoE layer between more norms."""
    width, dense = c["hidden_size"], c.get("first_k_dense_replace", c.get("num_dense_layers"))
    expert = swiglu(width, c["moe_intermediate_size"])
    every = attention + norms * width
    core = every + experts * width + bias + shared * expert  # of a MoE layer, but for its routed experts
    sparse = c["num_hidden_layers"] - dense
    rest = dense * (every + swiglu(width, c["intermediate_size"])) + sparse * core + width
    ends = c["vocab_size"] * width
    total = 2 * ends + rest + sparse * experts * expert
    active = ends + rest + sparse * c["num_experts_per_tok"] * expert
    return total, active, core + experts * expert + 3 * width + 2 * width * width


def deepseek(c: dict[str, Any]) -> Counts:
    attention = mla(
        c["hidden_size"],
        c["num_attention_heads"],
        c["q_lora_rank"],
        c["kv_lora_rank"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
        c["v_head_dim"],
    )
    experts = c["n_routed_experts"]
    return latent_moe(c, attention, 2, experts, c["n_shared_experts"], bias=experts)


def pangu(c: dict[str, Any]) -> Counts:
    attention = mla(
        c["hidden_size"],
        c["num_attention_heads"],
        c["attention_q_lora_dim"],
        c["attention_kv_lora_dim"],
        c["attention_qk_dim"],
        c["attention_qk_rope_dim"],
        c["attention_v_dim"],
    )
    assert c["sandwich_norm"]  # four norms a layer
    return latent_moe(c, attention, 4, c["num_routed_experts"], c["num_shared_experts"], bias=0)


def qwen(c: dict[str, Any]) -> Counts:
    width, layers, experts = c["hidden_size"], c["num_hidden_layers"], c["num_experts"]
    expert, ends = swiglu(width, c["moe_intermediate_size"]), c["vocab_size"] * c["hidden_size"]
    every = gqa(c) + 2 * c["head_dim"] + 2 * width + experts * width
    active = ends + width + layers * (every + c["num_experts_per_tok"] * expert)
    return active + ends + layers * (experts - c["num_experts_per_tok"]) * expert, active, 0


def llama(c: dict[str, Any]) -> Counts:
    c = c.get("text_config", c)
    width, layers, experts = c["hidden_size"], c["num_hidden_layers"], c["num_local_experts"]
    sparse = layers // c["interleave_moe_layer_step"]
    expert, ends = swiglu(width, c["intermediate_size"]), c["vocab_size"] * width
    active = ends + width + layers * (gqa(c) + 2 * width)
    active += (layers - sparse) * swiglu(width, c["intermediate_size_mlp"])
    active += sparse * (experts * width + (c["num_experts_per_tok"] + 1) * expert)  # + 1: shared
    return active + ends + sparse * (experts - c["num_experts_per_tok"]) * expert, active, 0


def palm(c: dict[str, Any]) -> Counts:
    width, ends = c["hidden_size"], c["vocab_size"] * c["hidden_size"]
    layer = gqa(c) + swiglu(width, c["intermediate_size"]) + width  # attention and FFN share one norm
    total = ends + c["num_hidden_layers"] * layer + width
    return total, total, 0  # the one matrix that is tied is the head


COUNT = {
    "deepseek_v3": deepseek,
    "pangu_ultra_moe": pangu,
    "qwen3_moe": qwen,
    "llama4": llama,
    "llama4_text": llama,
    "palm": palm,
}


def closed_form(name: str) -> Counts:
    c = fields(name)
    return COUNT[c["model_type"]](c)


def test_presets_are_all_counted() -> None:
    assert sorted(path.stem for path in PRESETS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_equal_the_closed_form(name: str) -> None:
    counts = parameter_counts(families.preset(name))
    assert (counts.total, counts.active, counts.mtp) == closed_form(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_as_published(name: str) -> None:
    for count, published in zip(closed_form(name), (*PUBLISHED[name], MTP.get(name, "0.0")), strict=True):
        cut_off = (name, published) == ("llama4-maverick", "16.1")  # 16.15 was not rounded
        assert f"{count // 10**8 / 10 if cut_off else count / 1e9:.1f}" == published


def test_palm_has_540_billion() -> None:
    assert round(closed_form("palm-540b")[0] / 1e9) == 540


def test_behemoth_is_projected_onto_its_public_totals() -> None:
    c = fields("llama4-behemoth-projected")
    total, active, _ = closed_form("llama4-behemoth-projected")
    assert c["projected"] is True
    assert "invented" in c["comment"]
    assert c["num_local_experts"] == 16
    assert total == pytest.approx(2.0e12, rel=0.01)
    assert active == pytest.approx(288e9, rel=0.005)


def test_only_the_projection_is_a_projection() -> None:
    assert [name for name in NAMES if fields(name).get("projected")] == ["llama4-behemoth-projected"]
