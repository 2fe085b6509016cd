"""Largest sizes that a config may have, and the refusal of a config's value."""

from cmx_jax.errors import CmxError

MAX_LAYERS = 10_000
MAX_EXPERTS = 200_000  # in all layers together; each has names and tensors of its own

# Far beyond any model: a larger value is a mistake, and would exhaust memory before the mistake showed.
LARGEST = {
    "num_hidden_layers": MAX_LAYERS,
    "num_nextn_predict_layers": 100,
    "n_routed_experts": 100_000,
    "n_shared_experts": 1_000,
    "num_attention_heads": 100_000,
    "vocab_size": 100_000_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "moe_intermediate_size": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
    "kv_lora_rank": 10_000_000,
    "q_lora_rank": 10_000_000,
    "qk_nope_head_dim": 1_000_000,
    "qk_rope_head_dim": 1_000_000,
    "v_head_dim": 1_000_000,
    "head_dim": 1_000_000,
    "num_key_value_heads": 100_000,
}


def expect(ok: bool, field: str, value: object, expected: str) -> None:
    """Refuses the value of a config's field unless `ok`.

    Raises:
      CmxError: `ok` is False; the field is named.
    """
    if not ok:
        raise CmxError(f"config: {field} is {value!r}, expected {expected}")
