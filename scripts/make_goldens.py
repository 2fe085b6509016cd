"""Write the reference outputs ("goldens") that the tests compare against.

Needs what makes the reference, which the tests themselves do without:

    pip install torch==2.13.0 transformers==5.23.0

Small random models, one directory for each case of each row of FAMILIES, by default in
tests/goldens:

    python scripts/make_goldens.py [--out DIR] [--case NAME ...]

Each holds config.json and model.safetensors as `save_pretrained` writes them, and golden.npz
with tokens_<T> int32 [B, T], logits_<T> float32 [B, T, vocab], prompt int32 [6] and generated
int32 [64], its greedy continuation with the cache on and no end-of-sequence token; a forward
pass over the whole without a cache has to choose the same tokens.

A real checkpoint, a Hugging Face directory of any dtype, computed in float32:

    python scripts/make_goldens.py --checkpoint DIR --out FILE.npz

Everything is drawn from fixed seeds: a second run writes the same numbers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import DeepseekV3Config, Llama4Config, Llama4TextConfig, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
BATCH, LENGTHS, PROMPT, NEW = 2, (1, 7, 40), 6, 64
CHECKPOINT_LENGTHS = (1, 2, 17, 64, 150, 300)  # every second one is text
CHECKPOINT_NEW = 24
# The least lead of a greedy token and of a chosen expert or group over the next one: with
# less, the rounding of another implementation could choose differently.
TOKEN_LEAD, EXPERT_LEAD = 5e-3, 1e-4

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = LINEAR | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
# attention_factor is not 1, and the ramp has a value strictly between 0 and 1
YARN_MSCALE = YARN | {"rope_theta": 10.0, "beta_fast": 2.0, "mscale": 0.707, "mscale_all_dim": 1.3}
# The same of a config that leaves mscale, mscale_all_dim and beta_slow out
YARN_SHORT = LINEAR | {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "beta_fast": 2.0}
YARN_SHORT |= {"original_max_position_embeddings": 32}
# Of 5 frequencies one stays, two are blended and two are divided by the factor.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 48}
# As published: nothing between the two factors, so that a blend would divide by zero
LLAMA3_EQUAL = LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0}

# Sizes that can meet in one contraction all differ, so that a swapped dimension cannot pass.
SHARED = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 21, "moe_intermediate_size": 8}
SHARED |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "max_position_embeddings": 128}
SHARED |= {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 10}
SHARED |= {"q_lora_rank": 24, "kv_lora_rank": 18, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
SHARED |= {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}

QWEN3 = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 21, "moe_intermediate_size": 9}
QWEN3 |= {"num_hidden_layers": 3, "max_position_embeddings": 128, "norm_topk_prob": True}
QWEN3 |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
QWEN3 |= {"num_experts": 12, "num_experts_per_tok": 4}
QWEN3 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

# The 40 tokens, and the generated ones, cross chunks of 16 and grow hotter every 8.
LLAMA4 = {"vocab_size": 64, "hidden_size": 28, "intermediate_size": 7, "intermediate_size_mlp": 21}
LLAMA4 |= {"num_hidden_layers": 5, "max_position_embeddings": 128}
LLAMA4 |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
LLAMA4 |= {"num_local_experts": 8, "attention_chunk_size": 16, "floor_scale": 8, "attn_scale": 0.5}

VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
VISION |= {"intermediate_size": 64, "patch_size": 2, "vision_output_dim": 12}
VISION |= {"projector_input_dim": 12, "projector_output_dim": 12}

# What each case changes in the sizes of its family. Four keys are not the config's own: `seed`;
# `correction_bias`, the range of e_score_correction_bias; `lengths`, the ones of the logits;
# `style4`, which writes config.json as transformers 4 had it.
DEEPSEEK_CASES = {
    "base": {"seed": 300},
    "norm_eps": {"seed": 400, "rms_norm_eps": 0.3},
    "no_q_lora": {"seed": 1, "q_lora_rank": None},
    "yarn": {"seed": 302, "rope_parameters": YARN},
    "yarn_mscale": {"seed": 204, "rope_parameters": YARN_MSCALE},
    "negative_bias": {"seed": 104, "correction_bias": (-3.0, -1.0)},
    "one_group": {"seed": 5, "n_group": 1, "topk_group": 1},
    "no_shared": {"seed": 6, "n_shared_experts": 0},
    "two_dense": {
        "seed": 8,
        "first_k_dense_replace": 2,
        "num_hidden_layers": 4,
        "n_routed_experts": 12,
    },
    "all_dense": {"seed": 108, "first_k_dense_replace": 3},
    "no_norm_topk": {"seed": 11, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "two_shared": {"seed": 10, "n_shared_experts": 2},
    "attention_bias": {"seed": 11, "attention_bias": True},
    "half_rope": {"seed": 515, "rope_interleave": False},
    "tied": {"seed": 513, "tie_word_embeddings": True},
    "linear_rope": {"seed": 114, "rope_parameters": LINEAR},
}
DEEPSEEK_CASES["style4"] = DEEPSEEK_CASES["yarn"] | {"style4": True}
QWEN3_CASES = {
    "qwen3_base": {"seed": 2006},
    "qwen3_no_norm_topk": {"seed": 2111, "norm_topk_prob": False},
    "qwen3_sparse_step": {"seed": 2200, "decoder_sparse_step": 2, "num_hidden_layers": 5},
    "qwen3_mlp_only": {"seed": 2302, "mlp_only_layers": [1], "num_hidden_layers": 4},
    "qwen3_bias": {"seed": 2429, "attention_bias": True},
    "qwen3_tied": {"seed": 2514, "tie_word_embeddings": True},
    "qwen3_yarn": {"seed": 2601, "rope_parameters": YARN_SHORT},
    "qwen3_sliding": {"seed": 2704, "use_sliding_window": True, "sliding_window": 9},
    "qwen3_mha": {"seed": 2800, "num_key_value_heads": 6},
    "qwen3_mqa": {"seed": 2910, "num_key_value_heads": 1},
    "qwen3_linear_rope": {"seed": 3000, "rope_parameters": LINEAR},
    "qwen3_eps": {"seed": 3102, "rms_norm_eps": 0.3},
}
QWEN3_CASES["qwen3_style4"] = QWEN3_CASES["qwen3_base"] | {"style4": True}
LLAMA4_CASES = {
    "llama4_base": {"seed": 4001, "lengths": (*LENGTHS, 70)},
    "llama4_interleave": {
        "seed": 4101,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
    },
    "llama4_top2": {"seed": 4201, "num_experts_per_tok": 2},
    "llama4_moe_layers": {"seed": 4303, "moe_layers": [1, 2]},
    "llama4_no_rope_list": {"seed": 4400, "no_rope_layers": [1, 0, 0, 1, 0]},
    "llama4_layer_types": {
        "seed": 4503,  # the fourth layer is the one without rope
        "layer_types": [f"{kind}_attention" for kind in ("full", "chunked", "chunked", "chunked", "full")],
    },
    "llama4_rope_scaling": {"seed": 4600, "rope_parameters": LLAMA3},
    "llama4_bias": {"seed": 4700, "attention_bias": True},
    "llama4_tied": {"seed": 4804, "tie_word_embeddings": True},
    "llama4_no_chunk": {"seed": 4900, "attention_chunk_size": 1000},
    "llama4_all_dense": {"seed": 5000, "moe_layers": []},
    "llama4_eps": {"seed": 5101, "rms_norm_eps": 0.3},
}
CONDITIONAL_CASES = {"llama4_conditional": {"seed": 5200, "rope_parameters": LLAMA3_EQUAL}}
CONDITIONAL_CASES["llama4_style4"] = CONDITIONAL_CASES["llama4_conditional"] | {"style4": True}


def lead(values, k):
    """The smallest lead of the k-th largest of float [..., n] over the next, inf if k = n."""
    top = values.topk(min(k + 1, values.shape[-1])).values
    return float((top[..., k - 1] - top[..., k]).min()) if top.shape[-1] > k else float("inf")


def grouped_leads(router, logits):
    """The leads of the groups and of the experts that a router of DeepSeek-V3 chooses."""
    scores = logits.sigmoid() + router.e_score_correction_bias
    groups = scores.unflatten(-1, (router.num_group, -1))
    sums = groups.topk(2).values.sum(-1)
    out = sums < sums.topk(router.topk_group).values[..., -1:]
    left = groups.masked_fill(out[..., None], float("-inf")).flatten(-2)
    return lead(sums, router.topk_group), lead(left, router.top_k)


def plain_leads(router, logits):
    """The lead of the experts with the largest logits."""
    return (lead(logits, router.top_k),)


def conditional_config(**options):
    """The config of a Llama 4 with a tower for images around the model for text of `options`."""
    return Llama4Config(text_config=Llama4TextConfig(**options), vision_config=VISION, **PLAIN)


class Family(NamedTuple):
    """What the cases of one architecture share."""

    config: Callable[..., Any]
    sizes: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    router: str  # how the names of its routers end
    logits: int  # where their output has the logits
    leads: Callable[..., tuple[float, ...]]
    contracted: int  # the axis of the stacked experts' matrices that meets the activations
    # In transformers 4: what config.json calls the kind of its rope, what it lacks, what it adds
    style4: tuple[str, tuple[str, ...], dict[str, Any]] | None = None


DEEPSEEK_STYLE4 = {"ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0}
DEEPSEEK_STYLE4 |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "transformers_version": "4.33.1"}
QWEN3_STYLE4 = {"num_experts": QWEN3["num_experts"], "max_window_layers": 3}
QWEN3_STYLE4 |= {"transformers_version": "4.51.0"}
LLAMA4_STYLE4 = {"no_rope_layers": [], "for_llm_compressor": False}
LLAMA4_ROUTER = (".feed_forward.router", 1, plain_leads, -2)
FAMILIES = {
    "DeepseekV3ForCausalLM": Family(
        *(DeepseekV3Config, SHARED, DEEPSEEK_CASES, ".mlp.gate", 0, grouped_leads, -1),
        ("type", ("head_dim", "qk_head_dim", "output_router_logits", "rope_interleave"), DEEPSEEK_STYLE4),
    ),
    "Qwen3MoeForCausalLM": Family(
        *(Qwen3MoeConfig, QWEN3, QWEN3_CASES, ".mlp.gate", 0, plain_leads, -1),
        ("rope_type", ("num_local_experts", "pad_token_id"), QWEN3_STYLE4),
    ),
    "Llama4ForCausalLM": Family(Llama4TextConfig, LLAMA4, LLAMA4_CASES, *LLAMA4_ROUTER),
    "Llama4ForConditionalGeneration": Family(
        *(conditional_config, LLAMA4, CONDITIONAL_CASES, *LLAMA4_ROUTER),
        ("rope_type", ("layer_types", "no_rope_layer_interval", "moe_layers"), LLAMA4_STYLE4),
    ),
}
CASES = {case: name for name, family in FAMILIES.items() for case in family.cases}


def random_weights(model, seed, bias_range, contracted):
    """Fill `model` in place, so that its activations and logits have a spread of 1 to 3."""
    rng, tied = np.random.default_rng(seed), model.config.tie_word_embeddings
    for name, tensor in sorted(model.state_dict().items()):
        noise = rng.standard_normal(tensor.shape)
        if name.endswith("e_score_correction_bias"):
            value = rng.uniform(*bias_range, tensor.shape)
        elif "norm" in name:
            value = 1 + 0.2 * noise
        elif name.endswith(".bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name and not tied:
            value = noise
        else:
            axis = contracted if tensor.ndim == 3 else -1
            value = 1.5 * noise / np.sqrt(max(1, tensor.shape[axis]))
        tensor.copy_(torch.from_numpy(value))


def load(directory):
    """The model of a Hugging Face directory, in float32, and the row of its architecture."""
    [name] = json.loads((directory / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **PLAIN
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{directory} does not fit the model: {info}")
    return model.eval(), FAMILIES[name]


def watch_routers(model, family):
    """A list that every later run of `model` extends by the leads of its routers' choices."""
    leads = []

    def hook(router, _, output):
        leads.extend(family.leads(router, output[family.logits]))

    for name, module in model.named_modules():
        if name.endswith(family.router):
            module.register_forward_hook(hook)
    return leads


def logits_of(model, tokens):
    """Logits float32 [B, T, vocab] of tokens int [B, T]."""
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def greedy(model, prompt, count):
    """The greedy tokens after prompt int [T], as int32 [count], and their smallest lead."""
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompt).long()[None]
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": count}
    options |= {"do_sample": False, "use_cache": True}
    out = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    tokens = out.sequences[0, len(prompt) :].numpy().astype(np.int32)
    uncached = logits_of(model, out.sequences.numpy())[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(uncached.argmax(-1), tokens)
    return tokens, lead(torch.stack(out.logits), 1)


def write_style4(path, family):
    """Rewrite a config.json in the form that the published ones of its family have."""
    (rope_type, without, added), whole = family.style4, json.loads(path.read_text())
    whole["torch_dtype"] = whole.pop("dtype")
    config = whole.get("text_config", whole)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {rope_type: kind} | scaling
    for name in without:
        config.pop(name)
    config |= added
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def make_case(name, directory):
    """Write one case and return a line about it."""
    architecture, family = CASES[name], FAMILIES[CASES[name]]
    options = family.sizes | family.cases[name]
    seed, bias_range = options.pop("seed"), options.pop("correction_bias", (-0.3, 0.3))
    lengths, style4 = options.pop("lengths", LENGTHS), options.pop("style4", False)
    model = getattr(transformers, architecture)(family.config(**options, **PLAIN)).eval()
    random_weights(model, seed, bias_range, family.contracted)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    if style4:
        write_style4(directory / "config.json", family)

    reloaded, _ = load(directory)
    leads = watch_routers(reloaded, family)
    rng, vocab, golden = np.random.default_rng(1000 + seed), options["vocab_size"], {}
    for length in lengths:
        tokens = rng.integers(0, vocab, (BATCH, length), dtype=np.int32)
        logits = logits_of(reloaded, tokens)
        np.testing.assert_array_equal(logits_of(model, tokens), logits)
        golden |= {f"tokens_{length}": tokens, f"logits_{length}": logits}
    golden["prompt"] = rng.integers(0, vocab, PROMPT, dtype=np.int32)
    golden["generated"], token_lead = greedy(reloaded, golden["prompt"], NEW)
    np.savez_compressed(directory / "golden.npz", **golden)

    size, expert_lead = sum(f.stat().st_size for f in directory.iterdir()), min(leads, default=1)
    line = f"{name:20}{size} bytes, logits std {logits.std():.2f}"
    line += f", {len(set(golden['generated'].tolist()))} different tokens"
    line += f", leads {token_lead:.1e} (tokens) {expert_lead:.1e} (experts)"
    if token_lead < TOKEN_LEAD or expert_lead < EXPERT_LEAD:
        raise SystemExit(f"{line}: too small, take another seed")
    return line


def make_checkpoint(directory, file):
    """Write to one npz file, for one sequence of each length L in CHECKPOINT_LENGTHS:

    tokens_<L> int32 [L], positions_<L> int32 [P] (8 evenly spaced ones and the last, fewer if
    L is small), logits_<L> float32 [P, vocab] and, for texts, generated_<L> int32 [CHECKPOINT_NEW].
    Without a tokenizer.json in `directory` the texts are random tokens too.
    """
    (model, _), rng, text, golden = load(directory), np.random.default_rng(0), None, {}
    if (directory / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        text = tokenizer.encode(json.__doc__, add_special_tokens=False).ids
    for index, length in enumerate(CHECKPOINT_LENGTHS):
        tokens = rng.integers(0, model.config.vocab_size, length, dtype=np.int32)
        if index % 2 and text:
            tokens = np.resize(np.array(text, np.int32), length)  # repeated as needed
        positions = np.unique(np.linspace(0, length - 1, 9).round().astype(np.int32))
        golden |= {f"tokens_{length}": tokens, f"positions_{length}": positions}
        golden[f"logits_{length}"] = logits_of(model, tokens[None])[0, positions]
        if index % 2:
            golden[f"generated_{length}"], token_lead = greedy(model, tokens, CHECKPOINT_NEW)
            print(f"length {length}: greedy tokens lead by at least {token_lead:.1e}")
    np.savez_compressed(file, **golden)
    print(f"{file}: {file.stat().st_size} bytes")


def main():
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", metavar="NAME", choices=CASES, default=list(CASES))
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory")
    parser.add_argument("--out", type=Path, help="directory for the cases, or FILE.npz")
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if args.checkpoint:
        if args.out is None or args.out.suffix != ".npz":
            parser.error("--checkpoint needs --out FILE.npz")
        return make_checkpoint(args.checkpoint, args.out)
    for name in args.case:
        print(make_case(name, (args.out or GOLDENS) / name), flush=True)


if __name__ == "__main__":
    main()
