"""`cmx demo` and `cmx generate`: text of a model on this machine."""

import argparse
import sys
from dataclasses import asdict
from typing import Any

from cmx_jax.cli.common import add_engine_options, add_json, engine_options, progress, show
from cmx_jax.cli.recipes import add_recipe, recipe_of


def add(verbs: Any) -> None:
    """Adds the verbs and their flags."""
    demo = verbs.add_parser("demo", help="serve built-in prompts on the whole 384-device mesh")
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", default="tiny", help="checkpoint directory, or tiny (default)")
    demo.add_argument(
        "--max-tokens", type=int, default=16, help="tokens to generate for each prompt (default 16)"
    )
    add_recipe(demo)
    add_engine_options(demo, "exchange", "decode", of_recipe=True)
    add_json(demo)

    generate = verbs.add_parser("generate", help="continue prompts")
    generate.set_defaults(run=_generate)
    generate.add_argument("model", metavar="MODEL", help="Hugging Face directory, or tiny")
    generate.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be given several times"
    )
    generate.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default 64)")
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature, 0 is greedy (default 0)"
    )
    generate.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="number of most likely tokens to sample from, 0 for all (default 0)",
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass to sample from (default 1)"
    )
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampler (default 0)")
    add_engine_options(generate, "model", "exchange", "decode")
    add_json(generate)


def _demo(args: argparse.Namespace) -> None:
    from cmx_jax.serving.deploy import demo

    result = demo.run(
        name_or_path=args.model, recipe=recipe_of(args), max_tokens=args.max_tokens, progress=progress()
    )
    show(result, args.json, demo.render)


def _generate(args: argparse.Namespace) -> None:
    from cmx_jax.serving.deploy.llm import from_pretrained

    tell = progress()
    tell("loading")
    llm = from_pretrained(args.model, **engine_options(args))
    tell("generating (the first time compiles)")
    completions = llm.generate(
        args.prompt,
        max_new_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    rows = [
        {
            "prompt": prompt,
            "text": c.text,
            "prompt_tokens": len(c.prompt_tokens),
            "output_tokens": len(c.tokens),
            "tokens": c.tokens,
            "finish_reason": c.finish_reason,
            "ttft_s": round(c.ttft_s, 4),
            "tpot_s": round(c.tpot_s, 4),
        }
        for prompt, c in zip(args.prompt, completions, strict=True)
    ]
    notes = {"mtp": "named in the config, not stored"} if llm.model.mtp_missing else {}
    if notes:
        print(f"cmx: {args.model}: MTP layers are {notes['mtp']}; loaded without", file=sys.stderr)
    result = {"model": args.model, "runner": args.runner, "ranks": args.ranks, "requests": rows, **notes}
    result |= {"exchange": llm.instance.exchange_bytes(), "rebalanced": [asdict(move) for move in llm.moves]}
    show(result, args.json, lambda r: "\n\n".join(row["prompt"] + row["text"] for row in r["requests"]))
