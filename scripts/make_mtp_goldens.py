"""Write the goldens of DeepSeek-V3's multi-token-prediction (MTP) layer, to tests/goldens_mtp.

Needs what make_goldens.py needs:

    python scripts/make_mtp_goldens.py [--out DIR] [--case NAME ...]

The oracle is transformers' MtpModel, which reads the layer by DeepSeek's names. From the hidden state of
position i behind the main model's final norm and from token i + 1 it computes, at position i,

    x = eh_proj([enorm(embedding of token i + 1); hnorm(hidden state i)])
    m = post_norm(DecoderLayer(x)), which sees positions 0 to i

and the main model's head on m says token i + 2. One layer drafts further tokens when it is given its own m as
the hidden state of the next position and the draft as its token. Each case holds config.json,
model.safetensors and golden.npz with

    prompt int32 [T]
    logits float32 [T, vocab]            of the main model
    draft_logits float32 [T - 1, vocab]  row i: from hidden state i and token i + 1
    generated int32 [64]                 the main model's greedy tokens behind the prompt
    drafts int32 [64, 3]                 row g: greedy drafts of the three tokens behind generated[g], all
                                         tokens up to that one being the true ones
    accepted_1 float32                   how often the first draft is the next generated token

transformers' own speculative decoding, with its cache, has to choose the same tokens and first drafts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from make_goldens import (
    EXPERT_LEAD,
    FAMILIES,
    GOLDENS,
    NEW,
    PLAIN,
    TOKEN_LEAD,
    YARN_MSCALE,
    greedy,
    lead,
    load,
    logits_of,
    random_weights,
    watch_routers,
)
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel
from transformers.utils.logging import disable_progress_bar

FAMILY = FAMILIES["DeepseekV3ForCausalLM"]
OUT = GOLDENS.with_name("goldens_mtp")
PROMPT, DRAFTS = 24, 3
LAYERS = 2  # a dense and a MoE layer before the MTP layer
MTP = f"model.layers.{LAYERS}."

# As DEEPSEEK_CASES, and `calm`, which multiplies the outputs of attention and FFN: the smaller it is,
# the more the newest token alone decides what follows, and the more drafts are right.
CASES = {
    "base": {"seed": 30, "calm": 0.08},
    "no_q_lora": {"seed": 7, "calm": 0.12, "q_lora_rank": None, "n_shared_experts": 2},
    "yarn": {"seed": 9, "calm": 0.12, "rope_parameters": YARN_MSCALE},
    "one_group": {"seed": 2, "calm": 0.18, "n_group": 1, "topk_group": 1, "rms_norm_eps": 0.3},
}


def write_model(directory, seed, calm, options):
    """Write config.json and model.safetensors of random weights.

    An MTP layer's decoder layer has the name and the tensors of one more layer of the main model.
    """
    config = FAMILY.config(**options | {"num_hidden_layers": LAYERS + 1}, **PLAIN)
    model = DeepseekV3ForCausalLM(config)
    random_weights(model, seed, (-0.3, 0.3), FAMILY.contracted)
    for name, tensor in model.state_dict().items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            tensor *= calm
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()

    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": LAYERS}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    rng, width = np.random.default_rng(2000 + seed), config["hidden_size"]
    tensors = load_file(directory / "model.safetensors")
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{MTP}{name}.weight"] = torch.from_numpy(1 + 0.2 * rng.standard_normal(width)).float()
    mixed = 0.15 * rng.standard_normal((width, 2 * width)) / np.sqrt(width) + np.eye(width, 2 * width)
    tensors[f"{MTP}eh_proj.weight"] = torch.from_numpy(mixed).float()
    tensors[f"{MTP}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{MTP}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def mtp_states(mtp, hidden, next_tokens):
    """What the MTP layer makes of hidden [T, D] and next_tokens int [T] at positions 0 to T - 1, [T, D]."""
    positions = torch.arange(len(hidden))[None]
    return mtp.forward_layer(0, hidden[None], positions, None, input_ids=next_tokens[None])[0]


def draft(mtp, hidden, tokens):
    """DRAFTS greedy tokens behind tokens int [n + 1], of which the last has no hidden [n, D]; their lead."""
    chosen = []
    for _ in range(DRAFTS):
        states = mtp_states(mtp, hidden, tokens[1:])
        chosen.append(mtp.shared_head(states[-1]))
        hidden, tokens = torch.cat([hidden, states[-1:]]), torch.cat([tokens, chosen[-1].argmax()[None]])
    return tokens[-DRAFTS:].numpy(), lead(torch.stack(chosen), 1)


def assisted(model, prompt):
    """Tokens of transformers' speculative decoding, and its first drafts by index of the newest token."""
    drafts, get = {}, MTPCandidateGenerator.get_candidates

    def recorded(self, input_ids, *args, **options):
        ids, logits = get(self, input_ids, *args, **options)
        if ids.shape[1] > input_ids.shape[1]:
            drafts[input_ids.shape[1] - len(prompt) - 1] = int(ids[0, -1])
        return ids, logits

    MTPCandidateGenerator.get_candidates = recorded
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}
    ids = torch.from_numpy(prompt).long()[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), use_mtp=True, **options)
    MTPCandidateGenerator.get_candidates = get
    return out[0, len(prompt) :].numpy(), drafts


def make_case(name, directory):
    """Write one case and return a line about it."""
    options = FAMILY.sizes | CASES[name]
    seed, calm = options.pop("seed"), options.pop("calm")
    write_model(directory, seed, calm, options)
    model, _ = load(directory)
    mtp = MtpModel.from_pretrained(model).eval()
    expert_leads = [watch_routers(model, FAMILY), watch_routers(mtp, FAMILY)]

    prompt = np.random.default_rng(1000 + seed).integers(0, options["vocab_size"], PROMPT, dtype=np.int32)
    generated, token_lead = greedy(model, prompt, NEW)
    tokens = torch.from_numpy(np.concatenate([prompt, generated])).long()
    hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0]
    draft_logits = mtp.shared_head(mtp_states(mtp, hidden[: PROMPT - 1], tokens[1:PROMPT]))
    drafts, draft_leads = zip(
        *(draft(mtp, hidden[:n], tokens[: n + 1]) for n in range(PROMPT, PROMPT + NEW)), strict=True
    )
    drafts = np.array(drafts, np.int32)
    again, first = assisted(model, prompt)
    np.testing.assert_array_equal(again, generated)
    np.testing.assert_array_equal([drafts[g, 0] for g in first], list(first.values()))

    golden = {"prompt": prompt, "logits": logits_of(model, prompt[None])[0], "generated": generated}
    golden |= {"draft_logits": draft_logits.numpy(), "drafts": drafts}
    golden["accepted_1"] = np.float32((drafts[:-1, 0] == generated[1:]).mean())
    np.savez_compressed(directory / "golden.npz", **golden)

    size = sum(f.stat().st_size for f in directory.iterdir())
    token_lead, expert_lead = min(token_lead, *draft_leads), min(map(min, expert_leads))
    line = f"{name:12}{size} bytes, {len(set(generated.tolist()))} different tokens"
    line += f", {golden['accepted_1']:.2f} of first drafts accepted ({len(first)} also in generate)"
    line += f", leads {token_lead:.1e} (tokens) {expert_lead:.1e} (experts)"
    if token_lead < TOKEN_LEAD or expert_lead < EXPERT_LEAD:
        raise SystemExit(f"{line}: too small, take another seed")
    return line


def main():
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", metavar="NAME", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=OUT, help="directory for the cases")
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # What transformers takes for MTP layers in a file: by default only those of the published sizes.
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\..*"]
    for name in args.case:
        print(make_case(name, args.out / name), flush=True)


if __name__ == "__main__":
    main()
