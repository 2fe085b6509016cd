"""A second implementation of Pangu Ultra MoE in NumPy, slow and obvious, and random tiny checkpoints of it.

No code of the package. MLA and SwiGLU are DeepSeek-V3's (reference/dense.py). What differs: the names in
config.json; a sandwich norm, that is one RMS norm before and one after attention and after the feed-forward
part, the latter before the residual is added; a sigmoid router without correction bias or groups; one epsilon
for every norm, those of the latents too.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from reference.dense import Array, Dense, sigmoid

# Pangu's names and DeepSeek's; a released config.json has either.
NAMES = {
    "attention_q_lora_dim": "q_lora_rank",
    "attention_kv_lora_dim": "kv_lora_rank",
    "attention_qk_dim": "qk_nope_head_dim",
    "attention_qk_rope_dim": "qk_rope_head_dim",
    "attention_v_dim": "v_head_dim",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_dense_layers": "first_k_dense_replace",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# Sizes that can meet in one contraction all differ, so that a swapped dimension cannot pass.
TINY = {
    "architectures": ["PanguUltraMoEForCausalLM"],
    "attention_bias": False,
    "attention_kv_lora_dim": 18,
    "attention_q_lora_dim": 24,
    "attention_qk_dim": 12,
    "attention_qk_rope_dim": 8,
    "attention_v_dim": 10,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 21,
    "max_position_embeddings": 128,
    "model_type": "pangu_ultra_moe",
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 3,
    "num_dense_layers": 1,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "num_mtp_layers": 1,
    "num_routed_experts": 16,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sandwich_norm": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 64,
}


def logits(directory: str | Path, tokens: Array, dtype: type = np.float64) -> Array:
    """Tokens [T] to logits [T, O]."""
    return _model(str(directory), dtype).logits(np.asarray(tokens))


def greedy(directory: str | Path, prompt: Array, n: int, dtype: type = np.float64) -> list[int]:
    """The `n` tokens of greedy decoding."""
    tokens = list(map(int, prompt))
    for _ in range(n):
        tokens.append(int(logits(directory, tokens, dtype)[-1].argmax()))
    return tokens[len(prompt) :]


def route(scores: Array, c: dict) -> tuple[list[int], Array]:
    """Sigmoid scores [E] of one token to its experts and their weights."""
    experts = sorted(range(len(scores)), key=lambda e: -scores[e])[: c["num_experts_per_tok"]]
    weights = scores[experts]
    if c["norm_topk_prob"] and len(experts) > 1:
        weights = weights / (weights.sum() + 1e-20)
    return experts, weights * c["routed_scaling_factor"]


class Pangu(Dense):
    """One model: its config under DeepSeek's names, its tensors by name in one dtype."""

    def __init__(self, directory: str, dtype: type):
        super().__init__(directory, dtype)
        self.c = {NAMES.get(field, field): value for field, value in self.c.items()}

    def norm(self, name: str, x: Array, eps: float) -> Array:
        return super().norm(name, x, self.c["rms_norm_eps"])

    def moe(self, name: str, x: Array) -> Array:
        y = self.swiglu(f"{name}.shared_experts", x) if self.c["n_shared_experts"] else np.zeros_like(x)
        for t, scores in enumerate(sigmoid(x @ self.w[f"{name}.gate.weight"].T)):
            experts, weights = route(scores, self.c)
            for e, weight in zip(experts, weights, strict=True):
                y[t] += weight * self.swiglu(f"{name}.experts.{e}", x[t])
        return y

    def layer(self, i: int, x: Array) -> Array:
        name, eps = f"model.layers.{i}", self.c["rms_norm_eps"]
        ffn = self.swiglu if i < self.c["first_k_dense_replace"] else self.moe
        y = self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x, eps))
        if not self.c["sandwich_norm"]:
            x = x + y
            return x + ffn(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x, eps))
        x = x + self.norm(f"{name}.post_attention_layernorm", y, eps)
        y = ffn(f"{name}.mlp", self.norm(f"{name}.pre_mlp_layernorm", x, eps))
        return x + self.norm(f"{name}.post_mlp_layernorm", y, eps)

    def logits(self, tokens: Array) -> Array:
        x = self.w["model.embed_tokens.weight"][tokens]
        for i in range(self.c["num_hidden_layers"]):
            x = self.layer(i, x)
        head = "model.embed_tokens" if self.c["tie_word_embeddings"] else "lm_head"
        return self.linear(head, self.norm("model.norm", x, self.c["rms_norm_eps"]))


_model = lru_cache(maxsize=16)(Pangu)

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _attention(c: dict) -> Shapes:
    width, heads, query = c["hidden_size"], c["num_attention_heads"], c["attention_q_lora_dim"]
    latent, value = c["attention_kv_lora_dim"], c["attention_v_dim"]
    nope, rope = c["attention_qk_dim"], c["attention_qk_rope_dim"]
    if query is None:
        yield "q_proj", (heads * (nope + rope), width)
    else:
        yield "q_a_proj", (query, width)
        yield "q_a_layernorm", (query,)
        yield "q_b_proj", (heads * (nope + rope), query)
    yield "kv_a_proj_with_mqa", (latent + rope, width)
    yield "kv_a_layernorm", (latent,)
    yield "kv_b_proj", (heads * (nope + value), latent)
    yield "o_proj", (width, heads * value)


def _swiglu(name: str, width: int, hidden: int) -> Shapes:
    yield f"{name}.gate_proj", (hidden, width)
    yield f"{name}.up_proj", (hidden, width)
    yield f"{name}.down_proj", (width, hidden)


def _ffn(c: dict, i: int) -> Shapes:
    width, hidden, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_routed_experts"]
    if i < c["num_dense_layers"]:
        yield from _swiglu("mlp", width, c["intermediate_size"])
        return
    yield "mlp.gate", (experts, width)
    for e in range(experts):
        yield from _swiglu(f"mlp.experts.{e}", width, hidden)
    if c["num_shared_experts"]:
        yield from _swiglu("mlp.shared_experts", width, hidden * c["num_shared_experts"])


def _layer(c: dict, i: int) -> Shapes:
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_mlp_layernorm", "post_mlp_layernorm"] if c["sandwich_norm"] else []
    yield from ((norm, (c["hidden_size"],)) for norm in norms)
    yield from ((f"self_attn.{name}", shape) for name, shape in _attention(c))
    yield from _ffn(c, i)


def _mtp(c: dict) -> Shapes:
    width, vocabulary = c["hidden_size"], c["vocab_size"]
    yield from ((norm, (width,)) for norm in ("enorm", "hnorm", "shared_head.norm"))
    yield "eh_proj", (width, 2 * width)
    yield "embed_tokens", (vocabulary, width)
    yield "shared_head.head", (vocabulary, width)


def shapes(c: dict, mtp: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint by name; `mtp` includes those of MTP layers."""
    layers, vocabulary = c["num_hidden_layers"], (c["vocab_size"], c["hidden_size"])
    result = {"model.embed_tokens": vocabulary, "model.norm": (c["hidden_size"],)}
    result |= {} if c["tie_word_embeddings"] else {"lm_head": vocabulary}
    for i in range(layers + (c["num_mtp_layers"] if mtp else 0)):
        result |= {f"model.layers.{i}.{name}": shape for name, shape in _layer(c, i)}
        if i >= layers:
            result |= {f"model.layers.{i}.{name}": shape for name, shape in _mtp(c)}
    return {f"{name}.weight": shape for name, shape in result.items()}


def _random(name: str, shape: tuple[int, ...], tied: bool, rng: np.random.Generator) -> Array:
    """Values that give activations and logits a spread of 1 to 3."""
    noise = rng.standard_normal(shape)
    if "norm." in name:
        return (1 + 0.2 * noise).astype(np.float32)
    scale = 1 if "embed_tokens" in name and not tied else 1.5 / np.sqrt(shape[-1])
    return (scale * noise).astype(np.float32)


def write_tiny(
    directory: str | Path, seed: int, *, mtp: bool = False, renamed: bool = False, **changes: object
) -> Path:
    """Writes config.json and model.safetensors, and returns the directory.

    Args:
      directory: Directory to write to.
      seed: Seed of the weights, which are float32.
      mtp: True to store the MTP layers that the config names.
      renamed: True to write the config's fields under DeepSeek's names.
      changes: Fields that differ from TINY.
    """
    c, rng = TINY | changes, np.random.default_rng(seed)
    tied = c["tie_word_embeddings"]
    tensors = {name: _random(name, shape, tied, rng) for name, shape in shapes(c, mtp).items()}
    for i in range(c["num_hidden_layers"], c["num_hidden_layers"] + c["num_mtp_layers"]):
        if mtp:  # copies
            tensors[f"model.layers.{i}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
            head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
            tensors[f"model.layers.{i}.shared_head.head.weight"] = head.copy()
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = {NAMES.get(field, field): value for field, value in c.items()} if renamed else c
    (path / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return path
