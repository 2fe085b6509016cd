"""Configs that are refused: every absurd field in one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cmx_jax.model.families import parse_config, read_config
from model.small import config, raw_config, refused, without

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "q_lora_rank",
    "max_position_embeddings",
)
MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
FLAGS = ("norm_topk_prob", "rope_interleave", "attention_bias", "tie_word_embeddings")
NUMBERS = ("rms_norm_eps", "routed_scaling_factor")
REQUIRED = COUNTS[:12]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def with_heads(raw: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The config with a field changed; the number of heads is in two fields that must agree."""
    raw = raw | {field: value}
    return raw | {"num_key_value_heads": value} if field == "num_attention_heads" else raw


@pytest.mark.parametrize("value", ["1", 1.0, True, [1, "2"], [1, None], {"a": 1}])
def test_absurd_end_token_is_refused(value: Any) -> None:
    with refused("eos_token_id"):
        config(eos_token_id=value)


@pytest.mark.parametrize("value", [-1, 0, "8", 8.0, True, [8], {}])
@pytest.mark.parametrize("field", COUNTS)
def test_absurd_count_is_refused_by_name(field: str, value: Any) -> None:
    with refused(field):
        parse_config(with_heads(raw_config(), field, value))


@pytest.mark.parametrize("value", [-1, "1", 1.0, True, [1]])
@pytest.mark.parametrize("field", MAY_BE_ZERO)
def test_absurd_count_that_may_be_zero_is_refused_by_name(field: str, value: Any) -> None:
    with refused(field):
        config(**{field: value})


@pytest.mark.parametrize("field", REQUIRED)
def test_required_field_null_or_absent_is_refused_by_name(field: str) -> None:
    for raw in (with_heads(raw_config(), field, None), without(field)):
        with refused(field):
            parse_config(raw)


@pytest.mark.parametrize("value", [1, 0, "true", 1.0, []])
@pytest.mark.parametrize("field", FLAGS)
def test_absurd_flag_is_refused_by_name(field: str, value: Any) -> None:
    with refused(field):
        config(**{field: value})


@pytest.mark.parametrize(
    "value",
    ["1e-6", True, [1.0], float("nan"), float("inf"), 10**400],
    ids=["text", "bool", "list", "nan", "inf", "huge"],
)
@pytest.mark.parametrize("field", NUMBERS)
def test_absurd_number_is_refused_by_name(field: str, value: Any) -> None:
    with refused(field):
        config(**{field: value})


@pytest.mark.parametrize("value", [0, 0.0, -1e-6])
def test_norm_epsilon_not_positive_is_refused(value: float) -> None:
    with refused("rms_norm_eps"):
        config(rms_norm_eps=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", 0.0),
        ("rope_theta", -1.0),
        ("rope_theta", 1.0),  # yarn divides by its logarithm
        ("rope_theta", "10000"),
        ("rope_theta", float("inf")),
        ("factor", 0.0),
        ("factor", -4),
        ("factor", True),
        ("factor", float("nan")),
        ("original_max_position_embeddings", 0),
        ("original_max_position_embeddings", 16.0),
        ("beta_fast", "32"),
        ("beta_fast", -1.0),
        ("beta_slow", -1.0),
        ("mscale", []),
        ("mscale_all_dim", "1"),
        ("attention_factor", False),
        ("truncate", 1),
    ],
)
def test_absurd_rope_number_is_refused_by_name(field: str, value: Any) -> None:
    with refused(field.removeprefix("rope_")):
        config(rope_parameters=YARN | {field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 3},  # does not divide 16 experts
        {"n_group": 16, "topk_group": 4},  # one expert a group: no second best
        {"topk_group": 5},
        {"num_experts_per_tok": 9},  # two groups of four can be reached
        {"qk_rope_head_dim": 7},
        {"num_key_value_heads": 1},
        {"model_type": "deepseek_v2"},
        {"model_type": None},
        {"hidden_act": "gelu"},
        {"scoring_func": "softmax"},
        {"topk_method": "greedy"},
        {"moe_layer_freq": 2},
        {"rope_parameters": "yarn"},
        {"rope_parameters": [1]},
    ],
    ids=str,
)
def test_unimplemented_field_is_refused_by_name(changes: dict[str, Any]) -> None:
    with refused(next(iter(changes))):
        config(**changes)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "", None, 1])
def test_unknown_rope_type_is_refused(kind: Any) -> None:
    with refused("rope type", repr(kind)):
        config(rope_parameters={"rope_type": kind})


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"vocab_size": 64,}', b"\xff\xfe{}", b"[" * 100_000, b"9" * 5000],
    ids=["empty", "open", "comma", "not-utf8", "deep", "long-number"],
)
def test_broken_json_is_refused_by_file(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with refused("config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("document", [[], [{}], "config", 1, None])
def test_json_other_than_an_object_is_refused_by_file(tmp_path: Path, document: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document))
    with refused("config.json", "object"):
        read_config(tmp_path)


def test_directory_without_config_is_refused_by_name(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with refused(str(directory), "config.json"):
            read_config(directory)
