"""What each part of the INT8 scheme (section 4.5) is worth on a model whose activations have outliers.

    python scripts/compare_schemes.py [--model tiny] [--factor 100] [--tokens 2048] [--text 40000] [--json]

A few channels of every norm, and of every FFN's `up`, are made up to `factor` times as large, and what reads
them as much smaller: the function stays, as the line of floats shows, but plain INT8 breaks. Then each
part is added to those before it. Perplexity is of held-out text; divergence and agreement of the next token
are from the original model.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import cmx_jax
from cmx_jax.analysis.eval.calibration import calibration
from cmx_jax.analysis.eval.heldout_text import Text, evaluate_text, read_text
from cmx_jax.model.checkpoint import read_weights
from cmx_jax.model.checkpoint.resume import written_config
from cmx_jax.model.checkpoint.writer import write_weights
from cmx_jax.model.families import read_config
from cmx_jax.model.fields import read_json
from cmx_jax.model.quantize.command import quantize
from cmx_jax.model.weights import FFN, Layer
from cmx_jax.serving.deploy.model import Model, locate

ADDED = ("scales", "rotation", "clipping", "compensation", "precision")
CHANNELS = 4  # outliers of each norm and FFN


def outliers(width: int, factor: float, rng: np.random.Generator) -> np.ndarray:
    """One everywhere but in a few channels."""
    s = np.ones(width, np.float32)
    few = rng.choice(width, CHANNELS, replace=False)
    s[few] = np.exp(rng.uniform(np.log(factor) / 2, np.log(factor), CHANNELS))
    return s


def plant(stack: Layer, factor: float, rng: np.random.Generator) -> None:
    """Outliers in every norm's output and every FFN's hidden width, `w` being changed in place."""
    width, attn = stack.attn_norm.shape[-1], stack.attn
    s = outliers(width, factor, rng)
    stack.attn_norm[...] *= s
    first = ("q" if hasattr(attn, "q") else "q_b" if attn.q_a is None else "q_a", "kv_a", "k", "v")
    for name in first:
        if (reader := getattr(attn, name, None)) is not None:
            reader[...] /= s.reshape(-1, *[1] * (reader.ndim - 2))
    s = outliers(width, factor, rng)
    stack.ffn_norm[...] *= s
    dense = isinstance(stack.ffn, FFN)
    if not dense:
        stack.ffn.router[...] /= s
    for ffn in [stack.ffn] if dense else [f for f in (stack.ffn.experts, stack.ffn.shared) if f is not None]:
        ffn.gate_up[...] /= s[:, None, None]
        h = outliers(ffn.down.shape[-2], factor, rng)
        ffn.gate_up[..., 1, :] *= h
        ffn.down[...] /= h[:, None]


def planted(source: Path, out: Path, factor: float) -> Path:
    """A float32 copy with outliers in it."""
    c = read_config(source)
    weights, rng = read_weights(source, c, np.float32), np.random.default_rng(0)
    for stack in (weights.dense, weights.moe):
        if stack is not None:
            plant(stack, factor, rng)
    write_weights(out, c, weights, "float32")
    config = written_config(read_json(source / "config.json"), "float32")
    (out / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "tokenizer.json", out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--factor", type=float, default=100.0, help="of the largest outlier")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration")
    parser.add_argument("--text", type=int, default=40_000, help="characters of held-out text")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    held_out = read_text(None)
    text = Text(held_out.name, ["\n\n".join(held_out.documents)[: args.text]])
    small: dict[str, Any] = {"ranks": 1, "max_num_seqs": 1, "max_model_len": 1}
    original, table = cmx_jax.from_pretrained(args.model, **small), []

    def row(name: str, directory: Path, quant: str = "auto") -> None:
        llm = cmx_jax.from_pretrained(directory, quant=quant, **small)
        change = evaluate_text(original, llm, text).against
        perplexity, kl, agreement = change.perplexity, change.kl_divergence.value, change.top1_agreement
        table.append({"scheme": name, "perplexity": perplexity, "kl": kl, "agreement": agreement})
        print(f"{name:<18} {perplexity:>11.3f} {kl:>12.6f} {agreement:>10.2%}", file=out)

    out = sys.stderr if args.json else sys.stdout
    print(f"{'scheme':<18} {'perplexity':>11} {'KL in nats':>12} {'same token':>10}", file=out)
    with tempfile.TemporaryDirectory() as folder:
        row("INT8, no outliers", locate(args.model), "int8")
        source = planted(locate(args.model), Path(folder) / "planted", args.factor)
        tokens = calibration(Model.read(source), None, args.tokens)
        row("float", source)
        assert table[-1]["kl"] < 1e-4, "the outliers changed the function"
        for number in range(len(ADDED) + 1):
            parts, to = frozenset(ADDED[:number]), Path(folder) / str(number)
            quantize(source, to, tokens=tokens if parts else None, parts=parts)
            row(f"+ {ADDED[number - 1]}" if parts else "plain rounding", to)
    if args.json:
        print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
