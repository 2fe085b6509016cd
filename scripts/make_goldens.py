"""Write the reference outputs ("goldens") that the DeepSeek-V3 tests compare against.

Needs what makes the reference, which the tests themselves do without:

    pip install torch==2.13.0 transformers==5.23.0

Small random models, one directory for each row of CASES, by default in tests/goldens:

    python scripts/make_goldens.py [--out DIR] [--case NAME ...]

Each holds config.json and model.safetensors as `save_pretrained` writes them, and golden.npz
with tokens_<T> int32 [B, T], logits_<T> float32 [B, T, vocab], prompt int32 [6] and generated
int32 [24], its greedy continuation with the cache on and no end-of-sequence token.

A real checkpoint, a Hugging Face directory of any dtype, computed in float32:

    python scripts/make_goldens.py --checkpoint DIR --out FILE.npz

Everything is drawn from fixed seeds: a second run writes the same numbers.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils.logging import disable_progress_bar

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
BATCH, LENGTHS, PROMPT, NEW = 2, (1, 7, 40), 6, 24
CHECKPOINT_LENGTHS = (1, 2, 17, 64, 150, 300)  # every second one is text
# The least lead of a greedy token and of a chosen expert or group over the next one: with
# less, the rounding of another implementation could choose differently.
TOKEN_LEAD, EXPERT_LEAD = 5e-3, 1e-4

# Sizes that can meet in one contraction all differ, so that a swapped dimension cannot pass.
SHARED = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 21, "moe_intermediate_size": 8}
SHARED |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "max_position_embeddings": 64}
SHARED |= {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 10}
SHARED |= {"q_lora_rank": 24, "kv_lora_rank": 18, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
SHARED |= {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = LINEAR | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
# attention_factor is not 1, and the ramp has a value strictly between 0 and 1
YARN_MSCALE = YARN | {"original_max_position_embeddings": 32, "rope_theta": 10.0, "beta_fast": 2.0}
YARN_MSCALE |= {"mscale": 0.707, "mscale_all_dim": 1.3}

# What each case changes in SHARED. Two keys are not the config's own: `seed`, and
# `correction_bias`, the range of e_score_correction_bias.
CASES = {
    "base": {"seed": 300},
    "norm_eps": {"seed": 400, "rms_norm_eps": 0.3},
    "no_q_lora": {"seed": 1, "q_lora_rank": None},
    "yarn": {"seed": 302, "rope_parameters": YARN},
    "yarn_mscale": {"seed": 203, "rope_parameters": YARN_MSCALE, "max_position_embeddings": 128},
    "negative_bias": {"seed": 104, "correction_bias": (-3.0, -1.0)},
    "one_group": {"seed": 5, "n_group": 1, "topk_group": 1},
    "no_shared": {"seed": 6, "n_shared_experts": 0},
    "two_dense": {
        "seed": 7,
        "first_k_dense_replace": 2,
        "num_hidden_layers": 4,
        "n_routed_experts": 12,
    },
    "all_dense": {"seed": 108, "first_k_dense_replace": 3},
    "no_norm_topk": {"seed": 9, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "two_shared": {"seed": 10, "n_shared_experts": 2},
    "attention_bias": {"seed": 11, "attention_bias": True},
    "half_rope": {"seed": 512, "rope_interleave": False},
    "tied": {"seed": 513, "tie_word_embeddings": True},
    "linear_rope": {"seed": 114, "rope_parameters": LINEAR},
}
CASES["style4"] = CASES["yarn"]  # the same weights, config.json as transformers 4 had it


def random_weights(model, seed, bias_range):
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
            value = 1.5 * noise / np.sqrt(max(1, tensor.shape[-1]))
        tensor.copy_(torch.from_numpy(value))


def load(directory):
    """The model of a Hugging Face directory, in float32."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **PLAIN
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{directory} does not fit the model: {info}")
    return model.eval()


def lead(values, k):
    """The smallest lead of the k-th largest of float [..., n] over the next, inf if k = n."""
    top = values.topk(min(k + 1, values.shape[-1])).values
    return float((top[..., k - 1] - top[..., k]).min()) if top.shape[-1] > k else float("inf")


def watch_routers(model):
    """A list that every later run of `model` extends by the leads of its routers' choices."""
    leads = []

    def hook(router, _, output):
        scores = output[0].sigmoid() + router.e_score_correction_bias
        groups = scores.unflatten(-1, (router.num_group, -1))
        sums = groups.topk(2).values.sum(-1)
        out = sums < sums.topk(router.topk_group).values[..., -1:]
        left = groups.masked_fill(out[..., None], float("-inf")).flatten(-2)
        leads.extend((lead(sums, router.topk_group), lead(left, router.top_k)))

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(hook)
    return leads


def logits_of(model, tokens):
    """Logits float32 [B, T, vocab] of tokens int [B, T]."""
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def greedy(model, prompt):
    """The NEW greedy tokens after prompt int [T], as int32 [NEW], and their smallest lead."""
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompt).long()[None]
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": NEW}
    options |= {"do_sample": False, "use_cache": True}
    out = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    tokens = out.sequences[0, len(prompt) :].numpy().astype(np.int32)
    return tokens, lead(torch.stack(out.logits), 1)


def write_style4(path):
    """Rewrite a config.json in the form of DeepSeek-V3's own."""
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {"type": scaling.pop("rope_type")} | scaling
    config["torch_dtype"] = config.pop("dtype")
    for name in ("head_dim", "qk_head_dim", "output_router_logits", "rope_interleave"):
        del config[name]
    config |= {"ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0}
    config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    config |= {"transformers_version": "4.33.1"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_case(name, directory):
    """Write one case and return a line about it."""
    options = SHARED | CASES[name]
    seed, bias_range = options.pop("seed"), options.pop("correction_bias", (-0.3, 0.3))
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**options, **PLAIN)).eval()
    random_weights(model, seed, bias_range)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    if name == "style4":
        write_style4(directory / "config.json")

    reloaded = load(directory)
    leads = watch_routers(reloaded)
    rng, vocab, golden = np.random.default_rng(1000 + seed), options["vocab_size"], {}
    for length in LENGTHS:
        tokens = rng.integers(0, vocab, (BATCH, length), dtype=np.int32)
        logits = logits_of(reloaded, tokens)
        np.testing.assert_array_equal(logits_of(model, tokens), logits)
        golden |= {f"tokens_{length}": tokens, f"logits_{length}": logits}
    golden["prompt"] = rng.integers(0, vocab, PROMPT, dtype=np.int32)
    golden["generated"], token_lead = greedy(reloaded, golden["prompt"])
    np.savez_compressed(directory / "golden.npz", **golden)

    size, expert_lead = sum(f.stat().st_size for f in directory.iterdir()), min(leads, default=1)
    line = f"{name:15}{size} bytes, logits std {logits.std():.2f}"
    line += f", leads {token_lead:.1e} (tokens) {expert_lead:.1e} (experts)"
    if token_lead < TOKEN_LEAD or expert_lead < EXPERT_LEAD:
        raise SystemExit(f"{line}: too small, take another seed")
    return line


def make_checkpoint(directory, file):
    """Write to one npz file, for one sequence of each length L in CHECKPOINT_LENGTHS:

    tokens_<L> int32 [L], positions_<L> int32 [P] (8 evenly spaced ones and the last, fewer if
    L is small), logits_<L> float32 [P, vocab] and, for texts, generated_<L> int32 [NEW].
    Without a tokenizer.json in `directory` the texts are random tokens too.
    """
    model, rng, text, golden = load(directory), np.random.default_rng(0), None, {}
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
            golden[f"generated_{length}"], token_lead = greedy(model, tokens)
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
