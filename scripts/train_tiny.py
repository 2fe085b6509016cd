"""Trains the model that ships as `tiny`: a small DeepSeek-V3 on English about Python.

    python scripts/train_tiny.py --out cmx_jax/model/checkpoints/tiny --work /tmp/tiny

It runs on whatever JAX has (two CPU cores do), from one seed, in three stages, each of which writes the
Hugging Face directory and `training.json` (held-out loss, load of the experts, acceptance of drafts, skills):

* `--stage main` trains all layers, the MTP layer by the text; it resumes from the last Orbax checkpoint in
  `--work` when started again.
* `--stage skills` goes on with the model in `--out`, all but its MTP layer, on the corpus mixed with
  questions that `cmx_jax/analysis/eval/skills.py` draws, none of its evaluation; it resumes likewise. Of the
  corpus it is held to what it said before, since it has read it often enough. There are two cycles of the
  learning rate; the second one asks most what is hard.
* `--stage mtp` trains the MTP layer of the model in `--out` once more and nothing else, by what the model
  itself would say: that is what a draft is held against. The text is the corpus and what the model writes.

Without `--stage` it does all of them.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import tiny_corpus
import tiny_skills
from tiny_model import (
    CONFIG,
    accepts,
    distillation_loss,
    forward,
    init,
    losses,
    main_states,
    mixture_loss,
    packed_states,
    training_loss,
)
from tokenizers import Tokenizer

from cmx_jax.analysis.eval.skills import EVAL_ITEMS, SKILLS
from cmx_jax.model.checkpoint import read_weights, write_weights
from cmx_jax.model.config import ModelConfig
from cmx_jax.model.decoder import logits
from cmx_jax.model.families import parse_config
from cmx_jax.model.weights import Weights, weight_tree
from cmx_jax.serving.deploy.llm import LLM, from_pretrained

PROMPT = 16  # tokens that the model continues with text of its own


def trainable(c: ModelConfig) -> Weights:
    """True where gradients apply; placement and correction bias are set otherwise."""
    return weight_tree(c, c.n_routed_experts, lambda leaf: leaf.kind not in ("slots", "router_bias"))


def of_mtp(c: ModelConfig, outside: bool = False) -> Weights:
    """`trainable` of the MTP layer alone, or of everything but it."""
    chosen = weight_tree(c, c.n_routed_experts, lambda leaf: (leaf.stack == "mtp") is not outside)
    return jax.tree.map(lambda a, b: a and b, chosen, trainable(c))


def decayed(c: ModelConfig) -> Weights:
    """True where weight decay applies: matrices."""
    return weight_tree(c, c.n_routed_experts, lambda leaf: leaf.kind in ("matrix", "router"))


def pick(mask: Weights, weights: Weights, keep: bool) -> Weights:
    """The leaves where `mask` is `keep`, None elsewhere."""
    return jax.tree.map(lambda m, w: w if m is keep else None, mask, weights)


def merge(a: Weights, b: Weights) -> Weights:
    """Two halves of `pick` as one again."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def balance(weights: Weights, load: Any, speed: Any) -> Weights:
    """Moves each correction bias one step towards even load (DeepSeek-V3's auxiliary-loss-free balancing).

    load: of all MoE layers, the MTP layer behind them [L, E], or of the MTP layer alone [1, E].
    """
    mean = jnp.mean(load.astype(jnp.float32), axis=-1, keepdims=True)
    step = speed * jnp.sign(mean - load.astype(jnp.float32))
    ffn, extra = weights.moe.ffn, weights.mtp.layer.ffn
    layer = weights.mtp.layer.replace(ffn=extra.replace(router_bias=extra.router_bias + step[-1:]))
    weights = weights.replace(mtp=weights.mtp.replace(layer=layer))
    if len(load) == 1:
        return weights
    return weights.replace(moe=weights.moe.replace(ffn=ffn.replace(router_bias=ffn.router_bias + step[:-1])))


def optimizer(
    c: ModelConfig, mask: Weights, rate: float, steps: int, decay: float
) -> optax.GradientTransformation:
    """AdamW of the leaves in `mask`, warm-up then cosine, clipped at global norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 20)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=decay, mask=pick(mask, decayed(c), True))
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def bias_speed(step: int, steps: int, first: float = 0.02) -> np.float32:
    """DeepSeek-V3's 0.001, reached from 0.02: a short training cannot wait for slow biases."""
    return np.float32(max(0.001, first * (1 - 2 * step / steps)))


def make_step(opt: optax.GradientTransformation, mask: Weights, objective: Any) -> Any:
    """One jitted training step: `(weights, opt state, batch, bias speed) -> (weights, state, metrics)`.

    mask: the leaves to be trained.
    objective: `(weights, batch) -> (loss, metrics)`, the load last among them.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Weights, state: Any, batch: Any, speed: Any) -> tuple[Weights, Any, Any]:
        free, frozen = pick(mask, weights, True), pick(mask, weights, False)
        grads, metrics = jax.grad(lambda w: objective(merge(w, frozen), batch), has_aux=True)(free)
        updates, state = opt.update(grads, state, free)
        weights = merge(optax.apply_updates(free, updates), frozen)
        return balance(weights, metrics[-1], speed), state, metrics

    return step


def batch_of(stream: np.ndarray, step: int, args: argparse.Namespace) -> np.ndarray:
    """Random windows of the token stream; a function of seed and step alone, so that resuming is exact."""
    rng = np.random.default_rng((args.seed, step))
    starts = rng.integers(0, len(stream) - args.length, args.batch)
    return np.stack([stream[s : s + args.length] for s in starts])


def encode(texts: list[str], tokenizer: Any) -> np.ndarray:
    """Documents as one stream, each behind an end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([tiny_corpus.END + t for t in texts]):
        ids.extend(encoding.ids)
    return np.asarray([*ids, tokenizer.token_to_id(tiny_corpus.END)], np.int32)


def evaluate(weights: Weights, c: ModelConfig, stream: np.ndarray, length: int) -> dict[str, Any]:
    """Held-out loss (nats a token), MTP acceptance, and the experts' load: busiest over mean, by layer."""
    sums, counts, loads = np.zeros(3), np.zeros(3), 0

    @jax.jit
    def run(weights: Weights, tokens: Any) -> tuple[Any, ...]:
        main, draft, load = forward(weights, c, tokens, 8.0)
        return *losses(main, draft, tokens), accepts(main, draft), load

    rows = stream[: len(stream) // (4 * length) * 4 * length].reshape(-1, 4, length)
    for tokens in rows:
        *results, load = run(weights, tokens)
        sums += [float(r.sum()) for r in results]
        counts += [r.size for r in results]
        loads = loads + np.asarray(load)
    means = sums / counts
    loads = np.asarray(loads)
    return {
        "held_out_loss": means[0],
        "held_out_perplexity": float(np.exp(means[0])),
        "mtp_held_out_loss": means[1],
        "mtp_acceptance": means[2],
        "expert_load_max_over_mean": (loads.max(-1) / loads.mean(-1)).round(2).tolist(),
        "experts_never_chosen": (loads == 0).sum(-1).tolist(),
        "held_out_tokens": int(counts[0]),
    }


def quality(
    weights: Weights, c: ModelConfig, streams: tuple[np.ndarray, np.ndarray], length: int
) -> dict[str, Any]:
    """`evaluate` on the held-out stream, with the loss on the beginning of the training stream."""
    seen = evaluate(weights, c, streams[0][: 64 * length + 1], length)
    return evaluate(weights, c, streams[1], length) | {"training_loss": seen["held_out_loss"]}


@dataclass(frozen=True)
class Course:
    """What a resumable training goes through."""

    folder: str  # in `--work`, for checkpoints
    steps: int
    rate: float
    mask: Weights  # what is trained
    objective: Any  # as `make_step` takes it
    batch: Callable[[int], Any]  # of a step
    speed: Callable[[int], np.float32]  # of the biases at a step
    check: Callable[[Weights], str]  # what is said of the weights now and then


def train(args: argparse.Namespace, c: ModelConfig, streams: tuple[np.ndarray, np.ndarray]) -> Weights:
    """Trains a new model on the text; returns the weights."""
    course = Course(
        folder="checkpoints",
        steps=args.steps,
        rate=args.rate,
        mask=trainable(c),
        objective=lambda w, tokens: training_loss(w, c, tokens, args.capacity),
        batch=lambda step: batch_of(streams[0], step, args),
        speed=lambda step: bias_speed(step, args.steps),
        check=lambda w: f"held out {evaluate(w, c, streams[1], args.length)['held_out_loss']:.3f}",
    )
    return follow(args, c, jax.tree.map(jnp.asarray, init(c, args.seed)), course)


def follow(args: argparse.Namespace, c: ModelConfig, weights: Weights, course: Course) -> Weights:
    """Trains up to the end of the course, saving and resuming; returns the weights."""
    opt = optimizer(c, course.mask, course.rate, course.steps, args.decay)
    state = opt.init(pick(course.mask, weights, True))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=args.save_every)
    step_fn = make_step(opt, course.mask, course.objective)
    with ocp.CheckpointManager(args.work.absolute() / course.folder, options=options) as manager:
        first, began = 0, time.time()
        if manager.latest_step() is not None:
            first = manager.latest_step() + 1
            saved = manager.restore(first - 1, args=ocp.args.StandardRestore((weights, state)))
            weights, state = jax.tree.map(jnp.asarray, saved)
            print(f"resuming behind step {first - 1}", flush=True)
        for step in range(first, course.steps):
            weights, state, metrics = step_fn(weights, state, course.batch(step), course.speed(step))
            if step % args.log_every == 0 or step == course.steps - 1:
                *found, load = (np.asarray(x) for x in metrics)
                print(
                    f"step {step} losses {' '.join(f'{x:.3f}' for x in found)} "
                    f"load {load.max() / load.mean():.2f} {(time.time() - began) / (step + 1 - first):.2f} s",
                    flush=True,
                )
            if args.eval_every and step % args.eval_every == args.eval_every - 1:
                print(f"step {step} {course.check(weights)}", flush=True)
            last = step + 1 in (args.until, course.steps)
            manager.save(step, args=ocp.args.StandardSave((weights, state)), force=last)
            if step + 1 == args.until:
                manager.wait_until_finished()
                raise SystemExit(f"stopped behind step {step}; the same command goes on from there")
        manager.wait_until_finished()
    return weights


def own_text(
    model: LLM, stream: np.ndarray, count: int, length: int, temperature: float, seed: int
) -> np.ndarray:
    """The model's continuations of random places in a token stream: int [count, length], prompts included."""
    starts = np.random.default_rng(seed).integers(0, len(stream) - PROMPT, count)
    completions = model.generate(
        [stream[s : s + PROMPT] for s in starts],
        max_new_tokens=length - PROMPT,
        temperature=temperature,
        ignore_eos=True,
        seed=seed,
    )
    return np.asarray([x.prompt_tokens + x.tokens for x in completions], np.int32)


def own_texts(args: argparse.Namespace, model: LLM, stream: np.ndarray) -> np.ndarray:
    """Sampled text in parts of 256 rows, half of it bolder: int [N, length].

    Kept in `--work`, as the checkpoints are: a folder is for one model.
    """
    parts = []
    for i in range(args.own_parts):
        path = args.work / f"own_text_{i}.npy"
        if not path.exists():
            args.work.mkdir(parents=True, exist_ok=True)
            np.save(path, own_text(model, stream, 256, args.length, (0.7, 1.0)[i % 2], seed=i))
            print(f"wrote {path}", flush=True)
        parts.append(np.load(path))
    return np.concatenate([np.zeros((0, args.length), np.int32), *parts])


def own_acceptance(weights: Weights, c: ModelConfig, rows: np.ndarray) -> float:
    """Share of accepted drafts in what the model wrote behind the prompts of `rows` [N, T]."""
    main, draft, _ = forward(weights, c, jnp.asarray(rows), 8.0)
    return float(jnp.mean(accepts(main, draft)[:, PROMPT - 2 :]))  # the draft at i is of token i + 2


def states_of(weights: Weights, c: ModelConfig, rows: np.ndarray, batch: int) -> np.ndarray:
    """The model's hidden states on `rows` [N, T]: float32 [N, T, D]."""
    run = jax.jit(lambda w, tokens: main_states(w, c, tokens, 8.0)[0])
    return np.concatenate([run(weights, rows[i : i + batch]) for i in range(0, len(rows), batch)])


def distil(args: argparse.Namespace, c: ModelConfig, weights: Weights, rows: np.ndarray) -> Weights:
    """Trains the MTP layer alone, on `rows` [N, T]; returns the weights, all others as they were.

    The model's hidden states are computed once, since it does not change.
    """
    mask = of_mtp(c)
    opt = optimizer(c, mask, args.mtp_rate, args.mtp_steps, args.decay)
    state = opt.init(pick(mask, weights, True))
    step_fn = make_step(opt, mask, lambda w, batch: distillation_loss(w, c, batch, args.capacity))
    hidden, began, epoch = states_of(weights, c, rows, args.batch), time.time(), len(rows) // args.batch
    for step in range(args.mtp_steps):
        order = np.random.default_rng((args.seed, step // epoch)).permutation(len(rows))
        chosen = order[step % epoch * args.batch :][: args.batch]
        weights, state, (loss, accepted, load) = step_fn(
            weights, state, (rows[chosen], hidden[chosen]), bias_speed(step, args.mtp_steps, first=0.004)
        )
        if step % args.log_every == 0 or step == args.mtp_steps - 1:
            busy, done = np.asarray(load), (step + 1) * rows[chosen].size
            print(
                f"mtp step {step} loss {float(loss):.3f} accepted {float(accepted):.3f} "
                f"load {busy.max() / busy.mean():.2f} {done / (time.time() - began):.0f} tokens/s",
                flush=True,
            )
    return weights


def rounded(weights: Weights) -> Weights:
    """As they are shipped: what is measured is what is shipped."""
    return jax.tree.map(
        lambda w: w if w.dtype == jnp.int32 else w.astype(ml_dtypes.bfloat16).astype(jnp.float32), weights
    )


def main_stage(args: argparse.Namespace, c: ModelConfig, texts: list[str]) -> None:
    """Trains all layers and writes `--out`, with its report."""
    training, held_out = tiny_corpus.split(texts)
    tokenizer = tiny_corpus.train_tokenizer(training, c.vocab_size)
    streams = encode(training, tokenizer), encode(held_out, tokenizer)
    print(f"{len(streams[0])} training tokens, {len(streams[1])} held out", flush=True)
    began = time.time()
    shipped = rounded(train(args, c, streams))
    report = quality(shipped, c, streams, args.length) | {
        "training_tokens": len(streams[0]),
        "corpus_sha256": tiny_corpus.fingerprint(texts),
        "documents": len(texts),
        "jax": jax.__version__,
        "backend": jax.devices()[0].device_kind,
        "seconds_of_last_run": round(time.time() - began),
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("out", "work", "corpus")},
    }
    write_weights(args.out, c, shipped)
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def skill_accuracy(
    weights: Weights, c: ModelConfig, tokenizer: Tokenizer, length: int, count: int = EVAL_ITEMS
) -> dict[str, float]:
    """Share of right answers to `count` evaluation questions of each skill, in percent."""

    @jax.jit
    def run(weights: Weights, packed: tiny_skills.Packed) -> tuple[Any, Any]:
        found = logits(packed_states(weights, c, packed, 8.0)[0], weights)[:, :-1]
        after = packed.tokens[:, 1:]
        entropy = optax.softmax_cross_entropy_with_integer_labels(found, after)
        return entropy, jnp.argmax(found, -1) == after

    return {
        skill.name: tiny_skills.accuracy(
            functools.partial(run, weights), skill.items(count=count), tokenizer, batch=4, length=length
        )
        for skill in SKILLS
    }


def skills_stage(args: argparse.Namespace, c: ModelConfig, texts: list[str]) -> None:
    """Trains the model in `--out` on the mixture, all but its MTP layer."""
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    training, held_out = (encode(part, tokenizer) for part in tiny_corpus.split(texts))
    drawn = tiny_skills.Mixture(
        training, tokenizer, args.seed, args.skill_batch, args.length, args.prose_rows
    )
    weights = jax.tree.map(jnp.asarray, read_weights(args.out, c, np.float32))
    before, began = evaluate(weights, c, held_out, args.length), time.time()
    given = jax.tree.map(jnp.copy, weights)  # `weights` are given away to the first step
    says = jax.jit(lambda w, rows: jax.nn.log_softmax(logits(main_states(w, c, rows, 4.0)[0], w)))

    def batch(step: int, cycle: int) -> tuple[tiny_skills.Packed, Any]:
        packed = drawn.batch(step, cycle)
        return packed, says(given, packed.tokens[: args.prose_rows])

    def check(weights: Weights) -> str:
        loss = evaluate(weights, c, held_out, args.length)["held_out_loss"]
        return f"held out {loss:.3f} {skill_accuracy(weights, c, tokenizer, args.length, 100)}"

    for cycle, steps in enumerate(args.skill_steps):
        course = Course(
            folder=f"checkpoints_skills_{cycle}",
            steps=steps,
            rate=args.skill_rate,
            mask=of_mtp(c, outside=True),
            objective=lambda w, batch: mixture_loss(w, c, batch, args.skill_capacity),
            batch=functools.partial(batch, cycle=cycle),
            speed=functools.partial(bias_speed, steps=steps, first=0.004),
            check=check,
        )
        weights = follow(args, c, weights, course)
    shipped = rounded(weights)
    accuracy = skill_accuracy(shipped, c, tokenizer, args.length)
    report = json.loads((args.out / "training.json").read_text())
    report |= quality(shipped, c, (training, held_out), args.length)
    report["skills"] = {
        "accuracy_percent": accuracy,
        "items_each": EVAL_ITEMS,
        "held_out_perplexity_before": before["held_out_perplexity"],
        "tokens": sum(args.skill_steps) * args.skill_batch * args.length,
        "prose_rows": f"{args.prose_rows} of {args.skill_batch}",
        "seconds_of_last_run": round(time.time() - began),
        "steps": args.skill_steps,
        "rate": args.skill_rate,
    }
    write_weights(args.out, c, shipped)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def mtp_stage(args: argparse.Namespace, c: ModelConfig, texts: list[str]) -> None:
    """Trains the MTP layer of the model in `--out`, on its training text and on text of its own."""
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    training, held_out = (encode(part, tokenizer) for part in tiny_corpus.split(texts))
    weights = jax.tree.map(jnp.asarray, read_weights(args.out, c, np.float32))
    began, length = time.time(), args.length
    model = from_pretrained(args.out, ranks=1, max_num_seqs=64, max_model_len=length)
    sampled = own_texts(args, model, training)
    greedy = own_text(model, held_out, 128, PROMPT + 64, 0.0, args.seed)
    rows = np.concatenate([training[: len(training) // length * length].reshape(-1, length), sampled])
    before = evaluate(weights, c, held_out, length)["mtp_acceptance"], own_acceptance(weights, c, greedy)
    shipped = rounded(distil(args, c, weights, rows))
    report = json.loads((args.out / "training.json").read_text()) | evaluate(shipped, c, held_out, length)
    report["mtp"] = {
        "trained_by": "distillation of the frozen model: its predictions, on its training and its own text",
        "acceptance_held_out_before": before[0],
        "acceptance_held_out": report["mtp_acceptance"],
        "acceptance_own_text_before": before[1],
        "acceptance_own_text": own_acceptance(shipped, c, greedy),
        "own_text": "greedy continuations of held-out prompts",
        "own_text_tokens": 64 * len(greedy),
        "training_tokens_corpus": int(rows.size - sampled.size),
        "training_tokens_sampled": int(sampled.size),
        "tokens": args.mtp_steps * args.batch * length,
        "seconds_of_last_run": round(time.time() - began),
        "steps": args.mtp_steps,
        "rate": args.mtp_rate,
    }
    write_weights(args.out, c, shipped)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument(
        "--corpus", type=Path, help="documents as JSON, by tiny_corpus.py (default: this Python's)"
    )
    parser.add_argument(
        "--stage",
        choices=("all", "main", "skills", "mtp"),
        default="all",
        help="skills, mtp: of the model that is in --out",
    )
    parser.add_argument("--skill-steps", type=int, nargs="+", default=[750, 350], help="of each cycle")
    parser.add_argument("--skill-rate", type=float, default=1.2e-3)
    parser.add_argument("--skill-batch", type=int, default=8)
    parser.add_argument("--skill-capacity", type=float, default=2.0, help="questions load experts unevenly")
    parser.add_argument("--prose-rows", type=int, default=3, help="rows of --skill-batch that are prose")
    parser.add_argument("--mtp-steps", type=int, default=600)
    parser.add_argument("--mtp-rate", type=float, default=2e-3)
    parser.add_argument("--own-parts", type=int, default=8, help="parts (of 256 rows) of sampled text")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--capacity", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--until", type=int, help="stop (resumably) behind so many steps")
    args = parser.parse_args()

    c = parse_config(CONFIG)
    texts = json.loads(args.corpus.read_text()) if args.corpus else tiny_corpus.documents()
    if args.stage in ("all", "main"):
        main_stage(args, c, texts)
    if args.stage in ("all", "skills"):
        skills_stage(args, c, texts)
    if args.stage in ("all", "mtp"):
        mtp_stage(args, c, texts)


if __name__ == "__main__":
    main()
