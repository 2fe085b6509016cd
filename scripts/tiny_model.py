"""The model that ships as `tiny`, as it is trained: config, first weights, graph, and what it is held to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_skills

from cmx_jax.mesh.exchange import ExchangeStats
from cmx_jax.mesh.exchange.ordering import rank_in_group
from cmx_jax.model.attention import TokenPositions, data_parallel_attention
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import Stream, decoder, logits, mtp_hidden
from cmx_jax.model.leaf import Leaf, leaf_dtype
from cmx_jax.model.weights import Weights, weight_tree

CONFIG = {  # as a config.json says it
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 160,
    "initializer_range": 0.02,
    "intermediate_size": 640,
    "kv_lora_rank": 64,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 24,
    "vocab_size": 2048,
}
MTP_LOSS = 0.3
PROSE_LOSS = 2.0


def init(c: ModelConfig, seed: int) -> Weights:
    """Random weights: normal with 0.02 at the embedding, `1/sqrt(fan in)` in matrices, ones in norms."""
    rng = np.random.default_rng(seed)

    def make(leaf: Leaf) -> np.ndarray:
        if leaf.kind == "slots":
            return np.broadcast_to(np.arange(leaf.shape[-1], dtype=np.int32), leaf.shape).copy()
        if leaf.kind in ("norm", "router_bias", "bias"):
            fill = 1.0 if leaf.kind == "norm" else 0.0
            return np.full(leaf.shape, fill, leaf_dtype(leaf, np.float32))
        shape = leaf.shape
        if leaf.experts:  # drawn layer by layer, as everything else
            shape = (shape[1], shape[0], *shape[2:])
        values = (rng.standard_normal(shape) * _std(leaf, c)).astype(np.float32)
        return values.swapaxes(0, 1).copy() if leaf.experts else values

    return weight_tree(c, c.n_routed_experts, make)


def _std(leaf: Leaf, c: ModelConfig) -> float:
    name = leaf.path.rsplit(".", 1)[-1]
    fan_in = {
        "embed": 2500,
        "q_b": c.attention.q_lora_rank or c.hidden_size,
        "k_b": c.attention.kv_lora_rank,
        "v_b": c.attention.kv_lora_rank,
        "o": c.num_attention_heads * c.attention.v_head_dim * 2 * c.num_hidden_layers,
        "eh_proj": 2 * c.hidden_size,
        "down": leaf.shape[-2] * 2 * c.num_hidden_layers,
    }.get(name, c.hidden_size)
    return fan_in**-0.5


@jax.custom_vjp
def permuted(x: Any, take: Any, give: Any) -> Any:
    """`x[take]`, zeros where `take` is out of range; `give` is the inverse: the rows to which each row of
    `x` goes (`[rows of x, copies]`). So the gradient is a gather too: scatter-adds are slow on CPU."""
    return x.at[take].get(mode="fill", fill_value=0)


def _permuted_backward(give: Any, grad: Any) -> Any:
    return jnp.sum(grad.at[give].get(mode="fill", fill_value=0), axis=1), None, None


permuted.defvjp(lambda x, take, give: (permuted(x, take, give), give), _permuted_backward)


def capacity_experts(capacity: float) -> Any:
    """Experts run in batches of `capacity` times their mean load: differentiable, and fast on CPU.

    What overflows is dropped, as usual in training; with the load balanced there is little.
    """

    def run(x: Any, slots: Any, weights: Any, w: Any, experts: Any, layer: Any) -> Any:
        del w  # expert e lies in slot e
        (tokens, top_k), count = slots.shape, experts.down.shape[0]
        room = max(8, int(capacity * tokens * top_k / count))
        flat = jnp.where(slots < 0, count, slots).reshape(-1)  # padding goes to no expert
        messages, nowhere = flat.shape[0], count * room
        turn, _ = rank_in_group(flat, count + 1)
        place = jnp.where((turn < room) & (flat < count), flat * room + turn, nowhere)
        message = jnp.full(nowhere, messages, flat.dtype)
        message = message.at[place].set(jnp.arange(messages, dtype=flat.dtype), mode="drop")
        source = jnp.where(message < messages, message // top_k, tokens)
        rows = permuted(x, source, place.reshape(tokens, top_k)).reshape(count, room, -1)
        h = jnp.einsum("xcd,xdgf->xcgf", rows, experts.gate_up[:, layer])
        y = jnp.einsum("xcf,xfd->xcd", jax.nn.silu(h[:, :, 0]) * h[:, :, 1], experts.down[:, layer])
        back = permuted(y.reshape(nowhere, -1), place, message[:, None])
        out = jnp.einsum("tk,tkd->td", weights, back.reshape(tokens, top_k, -1))
        zero = jnp.zeros((), jnp.int32)
        return out, ExchangeStats(zero, zero, zero)

    return run


def whole(c: ModelConfig, tokens: Any) -> Stream:
    """Whole sequences `[B, T]`, each token attending to what lies before it."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    attend = data_parallel_attention(TokenPositions(positions), length, c)
    return Stream(tokens, jnp.ones((batch, length), bool), attend)


def main_states(weights: Weights, c: ModelConfig, tokens: Any, capacity: float) -> tuple[Any, Any]:
    """The model's hidden states behind the final norm `[B, T, D]`, its expert loads `[L - 1, E]`."""
    [done] = decoder(weights, c, [whole(c, tokens)], capacity_experts(capacity))
    return done.hidden, done.stats.load


def draft_states(
    weights: Weights, c: ModelConfig, tokens: Any, hidden: Any, capacity: float
) -> tuple[Any, Any]:
    """The MTP layer's hidden states `[B, T, D]` from the model's, its expert loads `[1, E]`."""
    stream = whole(c, jnp.roll(tokens, -1, axis=1))
    done = mtp_hidden(weights, c, hidden, stream, capacity_experts(capacity))
    return done.hidden, done.stats.load


def forward(weights: Weights, c: ModelConfig, tokens: Any, capacity: float) -> tuple[Any, Any, Any]:
    """Logits of the model and of its MTP layer `[B, T, O]`, expert loads `[L, E]`.

    tokens: int [B, T].
    """
    hidden, load = main_states(weights, c, tokens, capacity)
    drafted, extra = draft_states(weights, c, tokens, hidden, capacity)
    return logits(hidden, weights), logits(drafted, weights), jnp.concatenate([load, extra])


def losses(main: Any, draft: Any, tokens: Any) -> tuple[Any, Any]:
    """Cross-entropy of the next token `[B, T-1]` and of the one behind it `[B, T-2]`, nats."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(main[:, :-1], tokens[:, 1:]), entropy(draft[:, :-2], tokens[:, 2:])


def training_loss(weights: Weights, c: ModelConfig, tokens: Any, capacity: float) -> tuple[Any, Any]:
    """What the model is trained on, `tokens` [B, T]; with both losses and the loads."""
    main, draft, load = forward(weights, c, tokens, capacity)
    loss, mtp_loss = (jnp.mean(x) for x in losses(main, draft, tokens))
    return loss + MTP_LOSS * mtp_loss, (loss, mtp_loss, load)


def packed_states(
    weights: Weights, c: ModelConfig, packed: tiny_skills.Packed, capacity: float
) -> tuple[Any, Any]:
    """`main_states` where several sequences lie behind each other in a row and do not see each other."""
    positions = TokenPositions(packed.positions, packed.begin)
    attend = data_parallel_attention(positions, packed.tokens.shape[1], c)
    stream = Stream(packed.tokens, packed.positions >= 0, attend)
    [done] = decoder(weights, c, [stream], capacity_experts(capacity))
    return done.hidden, done.stats.load


def mixture_loss(
    weights: Weights, c: ModelConfig, batch: tuple[tiny_skills.Packed, Any], capacity: float
) -> tuple[Any, Any]:
    """Cross-entropy of answers, and how far the rest lies from what the model said of prose before: its
    distributions are held, not the text, which it has read often enough. With both parts (nats), the load.

    batch: rows [B, T], of which the first R are prose, and the log-probabilities to be held there [R, T, O].
    """
    packed, before = batch
    hidden, load = packed_states(weights, c, packed, capacity)
    found, prose = logits(hidden, weights), len(before)
    held = jnp.mean(optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(found[:prose]), before))
    entropy = optax.softmax_cross_entropy_with_integer_labels(found[prose:, :-1], packed.tokens[prose:, 1:])
    answers = jnp.mean(entropy, where=packed.asked[prose:, 1:])
    load = jnp.concatenate([load, jnp.zeros_like(load[:1])])  # of the MTP layer, which does not run
    return answers + PROSE_LOSS * held, (held, answers, load)


def accepts(main: Any, draft: Any) -> Any:
    """Whether each draft is what the model itself says behind the true token: bool [B, T-1] of [B, T, O]."""
    return jnp.argmax(draft[:, :-1], -1) == jnp.argmax(main[:, 1:], -1)


def distillation_loss(
    weights: Weights, c: ModelConfig, batch: tuple[Any, Any], capacity: float
) -> tuple[Any, Any]:
    """How far the drafts' distributions lie from the model's own (Kullback-Leibler, nats), not from the text:
    a draft is accepted where the two agree. With the share accepted and the load.

    batch: tokens [B, T] and the model's hidden states [B, T, D].
    """
    tokens, hidden = batch
    drafted, load = draft_states(weights, c, tokens, hidden, capacity)
    main, draft = logits(hidden, weights), logits(drafted, weights)
    targets, found = jax.nn.log_softmax(main[:, 1:]), jax.nn.log_softmax(draft[:, :-1])
    loss = jnp.mean(optax.losses.kl_divergence_with_log_targets(found, targets))
    return loss, (loss, jnp.mean(accepts(main, draft)), load)
