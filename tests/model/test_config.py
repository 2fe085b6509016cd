"""Configs: both of Hugging Face's styles, and its defaults."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support import GOLDENS

from cmx_jax.model.config import LayerKind, ModelConfig, RopeConfig, segments
from cmx_jax.model.families import parse_config, read_config
from model.small import config, raw_config, refused, without

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def test_parse_config_of_both_transformers_styles() -> None:
    old, new = raw_config("style4"), raw_config("yarn", num_nextn_predict_layers=0)
    assert "rope_scaling" in old
    assert "rope_parameters" in new
    assert parse_config(old) == parse_config(new)


def test_fields_are_copied() -> None:
    raw, c = raw_config("yarn_mscale"), config("yarn_mscale")
    for part in (c, c.attention):
        for field in {field.name for field in fields(part)} & raw.keys():
            assert getattr(part, field) == raw[field], field
    assert [kind.moe for kind in c.layers] == [False, True, True]
    assert c.rope == RopeConfig(
        interleaved=True,
        theta=10.0,
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=2.0,
        beta_slow=1.0,
        mscale=0.707,
        mscale_all_dim=1.3,
    )


@pytest.mark.parametrize(
    ("field", "default"),
    [
        ("n_shared_experts", 1),
        ("n_group", 8),
        ("topk_group", 4),
        ("routed_scaling_factor", 2.5),
        ("norm_topk_prob", True),
        ("max_position_embeddings", 4096),
        ("rms_norm_eps", 1e-6),
        ("attention_bias", False),
        ("tie_word_embeddings", False),
    ],
)
def test_absent_field_has_the_default_of_transformers(field: str, default: Any) -> None:
    assert getattr(parse_config(without(field)), field) == default


def test_absent_fields_have_defaults_of_transformers() -> None:
    assert parse_config(without("q_lora_rank")).attention.q_lora_rank == 1536
    assert parse_config(without("first_k_dense_replace")).num_dense_layers == 3
    assert parse_config(without("rope_interleave")).rope.interleaved


def test_absent_rope_is_plain_with_default_theta() -> None:
    rope = parse_config(without("rope_parameters")).rope
    assert (rope.kind, rope.theta) == ("default", 10000.0)


def test_yarn_defaults_are_those_of_transformers() -> None:
    rope = config(rope_parameters=YARN | {"beta_fast": None, "factor": None, "rope_theta": 50.0}).rope
    assert (rope.theta, rope.beta_fast, rope.beta_slow, rope.truncate) == (50.0, 32.0, 1.0, True)
    assert rope.factor == 128 / 16  # max_position_embeddings / original_max_position_embeddings


def test_rope_scaling_overrides_rope_parameters() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    c = config("yarn", rope_theta=50.0, rope_scaling=scaling)
    assert (c.rope.kind, c.rope.factor, c.rope.theta) == ("linear", 2.0, 50.0)


def test_null_query_rank_is_none() -> None:
    assert config(q_lora_rank=None).attention.q_lora_rank is None


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), ([5, 6], (5, 6)), ([], ()), (None, ())])
def test_end_tokens_one_many_or_none(value: Any, ids: tuple[int, ...]) -> None:
    assert config(eos_token_id=value).eos_token_ids == ids


def test_absent_end_token_is_that_of_transformers() -> None:
    assert parse_config(without("eos_token_id")).eos_token_ids == (1,)


def test_experts_unchecked_without_moe_layers() -> None:
    c = config(first_k_dense_replace=99, n_routed_experts=4, num_experts_per_tok=8)
    assert (c.num_dense_layers, c.num_moe_layers) == (3, 0)


def test_layer_counts_and_row_dim() -> None:
    c: ModelConfig = config("two_dense")
    assert (c.num_hidden_layers, c.num_dense_layers, c.num_moe_layers) == (4, 2, 2)
    assert c.row_dim == 18 + 8


def test_read_config_of_a_directory() -> None:
    assert read_config(GOLDENS / "base") == config("base")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("dddmmmmm", [(3, "d"), (5, "m")]),
        ("dmdmdmdm", [(4, "dm")]),
        ("rrrnrrrnrrrn", [(3, "rrrn")]),
        ("rrrnr", [(3, "r"), (1, "n"), (1, "r")]),
        ("d", [(1, "d")]),
        ("dmm", [(1, "d"), (2, "m")]),
    ],
)
def test_segments_are_repeated_patterns(kinds: str, expected: list[tuple[int, str]]) -> None:
    kind = {
        "d": LayerKind(moe=False),
        "m": LayerKind(moe=True),
        "r": LayerKind(True),
        "n": LayerKind(True, rope=False),
    }
    layers = tuple(kind[letter] for letter in kinds)
    assert segments(layers) == [
        (times, tuple(kind[letter] for letter in pattern)) for times, pattern in expected
    ]


@pytest.mark.parametrize(
    ("case", "field", "read"),
    [
        ("base", "norm_topk_prob", lambda c: c.norm_topk_prob),
        ("base", "rope_interleave", lambda c: c.rope.interleaved),
        ("qwen3_bias", "attention_bias", lambda c: c.attention_bias),
        ("llama4_base", "use_qk_norm", lambda c: c.attention.qk_norm == "l2"),
        ("llama4_base", "attn_temperature_tuning", lambda c: c.attention.temperature_scale != 0),
    ],
)
def test_null_flag_is_false(case: str, field: str, read: Any) -> None:
    assert read(config(case, **{field: True}))
    assert not read(config(case, **{field: None}))


def test_null_window_is_none() -> None:
    assert config("qwen3_sliding").attention.sliding_window == 9
    assert config("qwen3_sliding", sliding_window=None).attention.sliding_window is None
    assert config("qwen3_sliding", use_sliding_window=False).attention.sliding_window is None


def test_tie_word_embeddings_of_the_text_config() -> None:
    assert not config("llama4_conditional", tie_word_embeddings=True).tie_word_embeddings


def test_generation_config_overrides_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config("base", eos_token_id=3)))
    assert read_config(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert read_config(tmp_path).eos_token_ids == (3, 7)


def test_rope_by_kind_of_layer_is_refused() -> None:
    nested = {"full_attention": {"rope_type": "default"}, "chunked_attention": {"rope_type": "default"}}
    with refused("rope_parameters"):
        config("llama4_base", rope_parameters=nested)


@pytest.mark.parametrize(
    ("kind", "lacking"), [("linear", "factor"), ("llama3", "factor"), ("llama3", "low_freq_factor")]
)
def test_rope_type_without_its_fields_is_refused(kind: str, lacking: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with refused(lacking):
        config("base", rope_parameters={name: value for name, value in rope.items() if name != lacking})
