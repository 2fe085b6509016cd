"""A second implementation of DeepSeek-V3 in NumPy, slow and obvious: the oracle of the package.

No code of the package; loops over tokens, heads, experts. test_dense.py compares it with transformers.
"""

import json
from functools import cached_property, lru_cache
from math import ceil, floor, log, pi
from pathlib import Path

import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16)
import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray


def logits(directory: str | Path, tokens: Array, dtype: type = np.float64) -> Array:
    """Tokens [T] to logits [T, O]."""
    return _model(str(directory), dtype).logits(np.asarray(tokens))


def greedy(directory: str | Path, prompt: Array, n: int, dtype: type = np.float64) -> list[int]:
    """The `n` tokens of greedy decoding."""
    tokens = list(map(int, prompt))
    for _ in range(n):
        tokens.append(int(logits(directory, tokens, dtype)[-1].argmax()))
    return tokens[len(prompt) :]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def route(scores: Array, bias: Array, c: dict) -> tuple[list[int], Array]:
    """Sigmoid scores [E] of one token to its experts and their weights."""
    size = len(scores) // c["n_group"]
    choice = scores + bias
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c["n_group"])]
    groups.sort(key=lambda group: -sum(sorted(choice[group])[-2:]))
    candidates = [e for group in groups[: c["topk_group"]] for e in group]
    experts = sorted(candidates, key=lambda e: -choice[e])[: c["num_experts_per_tok"]]
    weights = scores[experts]
    if c.get("norm_topk_prob", True):
        weights = weights / weights.sum()
    return experts, weights * c["routed_scaling_factor"]


def mscale(factor: float, weight: float) -> float:
    return 1 if factor <= 1 else 0.1 * weight * log(factor) + 1


class Dense:
    """One model: its config as JSON has it, its tensors by name in one dtype."""

    def __init__(self, directory: str, dtype: type):
        self.c = json.loads((Path(directory) / "config.json").read_text())
        self.rope = self.c.get("rope_parameters") or self.c.get("rope_scaling") or {}
        files = sorted(Path(directory).glob("*.safetensors"))
        self.w = {name: t.astype(dtype) for file in files for name, t in load_file(file).items()}

    def linear(self, name: str, x: Array) -> Array:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name: str, x: Array, eps: float) -> Array:
        return self.w[f"{name}.weight"] * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)

    @cached_property
    def rotation(self) -> tuple[Array, float, float]:
        """Radians per position of each pair, the rotated vectors' factor, the scores' factor."""
        dim, r = self.c["qk_rope_head_dim"], self.rope
        theta = r.get("rope_theta", self.c.get("rope_theta", 10000))
        plain = theta ** (-np.arange(0, dim, 2) / dim)
        scale = (self.c["qk_nope_head_dim"] + dim) ** -0.5
        kind = r.get("rope_type", r.get("type", "default"))
        if kind == "default":
            return plain, 1, scale
        factor, every = r["factor"], r.get("mscale_all_dim")
        scale *= mscale(factor, every or 0) ** 2
        if kind == "linear":
            return plain / factor, 1, scale
        turns = r["original_max_position_embeddings"] / (2 * pi)
        first = max(floor(dim / 2 * log(turns / r["beta_fast"], theta)), 0)
        last = min(ceil(dim / 2 * log(turns / r["beta_slow"], theta)), dim - 1)
        for i in range(dim // 2):  # fast pairs stay, slow ones are stretched
            stretched = min(max((i - first) / (last - first), 0), 1)
            plain[i] *= stretched / factor + (1 - stretched)
        length = mscale(factor, r["mscale"]) / mscale(factor, every) if every else mscale(factor, 1)
        return plain, length, scale

    def rotate(self, x: Array, position: int) -> Array:
        """Turns the pairs of x [R], as complex numbers."""
        frequency, length, _ = self.rotation
        half = len(x) // 2
        pairs = x.reshape(half, 2).T if self.c.get("rope_interleave", True) else x.reshape(2, half)
        z = (pairs[0] + 1j * pairs[1]) * np.exp(1j * position * frequency) * length
        return np.concatenate([z.real, z.imag]).astype(x.dtype)

    def kept(self, latent: Array, rotated: Array) -> tuple[Array, Array]:
        """Latents [T, A] and rotated keys [T, R] as read back from a cache; this one keeps all digits."""
        return latent, rotated

    def attention(self, name: str, x: Array) -> Array:
        c, tokens, heads = self.c, len(x), self.c["num_attention_heads"]
        nope, latent = c["qk_nope_head_dim"], c["kv_lora_rank"]
        if c["q_lora_rank"] is None:
            q = self.linear(f"{name}.q_proj", x)
        else:
            q = self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", x), 1e-6)
            q = self.linear(f"{name}.q_b_proj", q)
        q = q.reshape(tokens, heads, -1)
        kv = self.linear(f"{name}.kv_a_proj_with_mqa", x)
        rotated = np.array([self.rotate(kv[t, latent:], t) for t in range(tokens)])
        normed, rotated = self.kept(self.norm(f"{name}.kv_a_layernorm", kv[:, :latent], 1e-6), rotated)
        kv = self.linear(f"{name}.kv_b_proj", normed)
        kv = kv.reshape(tokens, heads, -1)
        out = np.zeros((tokens, heads, c["v_head_dim"]), x.dtype)
        for h in range(heads):
            keys = np.concatenate([kv[:, h, :nope], rotated], axis=1)
            for t in range(tokens):
                query = np.concatenate([q[t, h, :nope], self.rotate(q[t, h, nope:], t)])
                p = softmax(keys[: t + 1] @ query * self.rotation[2])
                out[t, h] = p @ kv[: t + 1, h, nope:]
        return self.linear(f"{name}.o_proj", out.reshape(tokens, -1))

    def swiglu(self, name: str, x: Array) -> Array:
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate * sigmoid(gate) * self.linear(f"{name}.up_proj", x))

    def moe(self, name: str, x: Array) -> Array:
        y = self.swiglu(f"{name}.shared_experts", x) if self.c["n_shared_experts"] else np.zeros_like(x)
        for t, scores in enumerate(sigmoid(x @ self.w[f"{name}.gate.weight"].T)):
            experts, weights = route(scores, self.w[f"{name}.gate.e_score_correction_bias"], self.c)
            for e, weight in zip(experts, weights, strict=True):
                y[t] += weight * self.swiglu(f"{name}.experts.{e}", x[t])
        return y

    def logits(self, tokens: Array) -> Array:
        x, eps = self.w["model.embed_tokens.weight"][tokens], self.c["rms_norm_eps"]
        for i in range(self.c["num_hidden_layers"]):
            name = f"model.layers.{i}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x, eps))
            ffn = self.swiglu if i < self.c["first_k_dense_replace"] else self.moe
            x = x + ffn(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x, eps))
        head = "model.embed_tokens" if self.c.get("tie_word_embeddings") else "lm_head"
        return self.linear(head, self.norm("model.norm", x, eps))


_model = lru_cache(maxsize=4)(Dense)
