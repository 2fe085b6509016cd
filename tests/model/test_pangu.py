"""Random-weight Pangu Ultra MoE models against a dense NumPy reference: logits, greedy tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference import dense, pangu
from safetensors.numpy import load_file, save_file
from support import logits_of

import cmx_jax

pytestmark = pytest.mark.slow

LENGTHS, BATCH, PROMPT, NEW = (1, 7, 40), 2, 6, 64

# What each case changes in pangu.TINY. Seeds are those whose greedy tokens lead by 5e-3 and whose chosen
# experts lead by 1e-4: with less, another rounding could choose differently.
CASES: dict[str, dict] = {
    "base": {"seed": 2},
    "base_again": {"seed": 101},
    "no_q_lora": {"seed": 201, "attention_q_lora_dim": None},
    "plain_norm": {"seed": 301, "sandwich_norm": False},
    "two_dense": {"seed": 409, "num_dense_layers": 2, "num_hidden_layers": 4, "num_routed_experts": 12},
    "all_dense": {"seed": 503, "num_dense_layers": 3},
    "two_shared": {"seed": 605, "num_shared_experts": 2},
    "mtp": {"seed": 703, "mtp": True},
    "mtp_plain_norm": {"seed": 804, "mtp": True, "sandwich_norm": False},
    "no_mtp_layers": {"seed": 904, "num_mtp_layers": 0},
    "no_norm_topk": {"seed": 1002, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "norm_eps": {"seed": 1102, "rms_norm_eps": 0.3},
    "real_theta": {"seed": 1201, "rope_theta": 25600000},
    "tied": {"seed": 1302, "tie_word_embeddings": True},
    "renamed": {"seed": 1404, "renamed": True},
}

# In these cases decoding uses the same code as scoring for the part that differs: logits are enough.
SCORED = {"base_again", "no_norm_topk", "norm_eps", "real_theta", "renamed", "tied"}


def tokens_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1000 + seed).integers(0, pangu.TINY["vocab_size"], shape, dtype=np.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_the_reference(case: str, tmp_path: Path) -> None:
    path, seed = pangu.write_tiny(tmp_path / case, **CASES[case]), CASES[case]["seed"]
    llm = cmx_jax.from_pretrained(path, ranks=4, max_num_seqs=4)
    rows = [tokens_of(seed, BATCH, length) for length in LENGTHS]
    for tokens, result in zip(rows, logits_of(llm, rows), strict=True):
        expected = np.stack([pangu.logits(path, row) for row in tokens])
        np.testing.assert_allclose(result, expected, atol=1e-4, rtol=0)
    if case in SCORED:
        return
    prompt = tokens_of(seed, PROMPT).tolist()
    [completion] = llm.generate([prompt], max_new_tokens=NEW, ignore_eos=True)
    assert completion.tokens == pangu.greedy(path, prompt, NEW)


def as_deepseek(path: Path, to: Path) -> Path:
    """Writes the same model as a DeepSeek-V3 one: one group, correction biases of zero."""
    config = {
        pangu.NAMES.get(field, field): value
        for field, value in json.loads((path / "config.json").read_text()).items()
        if field != "sandwich_norm"
    }
    config |= {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1}
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        bias = name.replace("weight", "e_score_correction_bias")
        tensors[bias] = np.zeros(config["n_routed_experts"], np.float32)
    to.mkdir()
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors")
    return to


@pytest.mark.parametrize("changes", [{}, {"attention_q_lora_dim": None, "num_shared_experts": 2}])
def test_reference_without_sandwich_norm_equals_deepseek(changes: dict, tmp_path: Path) -> None:
    # 1e-6 is what DeepSeek's latent norms use whatever the config says
    path = pangu.write_tiny(tmp_path / "pangu", 3, sandwich_norm=False, rms_norm_eps=1e-6, **changes)
    other, tokens = as_deepseek(path, tmp_path / "deepseek"), tokens_of(3, 20)
    np.testing.assert_allclose(pangu.logits(path, tokens), dense.logits(other, tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["post_attention", "pre_mlp", "post_mlp"])
def test_reference_depends_on_every_sandwich_norm(norm: str, tmp_path: Path) -> None:
    path, tokens = pangu.write_tiny(tmp_path / "pangu", 4), tokens_of(4, 10)
    tensors, name = load_file(path / "model.safetensors"), f"model.layers.1.{norm}_layernorm.weight"
    before = pangu.logits(path, tokens)
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors | {name: tensors[name][::-1].copy()}, changed / "model.safetensors")
    assert np.abs(pangu.logits(changed, tokens) - before).max() > 0.1
