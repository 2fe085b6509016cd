"""`cmx eval`: quality of a model, alone or compared with another one."""

import argparse
from typing import Any

from cmx_jax.cli.common import add_engine_options, add_json, engine_options, progress, show


def add(verbs: Any) -> None:
    """Adds the verb and its flags."""
    verb = verbs.add_parser("eval", help="measure the quality of a model, alone or compared with another one")
    verb.set_defaults(run=_eval)
    verb.add_argument("model", metavar="MODEL", help="Hugging Face or Orbax directory, or tiny")
    verb.add_argument(
        "--against", metavar="OTHER", help="second model, compared with MODEL on the same items"
    )
    quants = "quantization of OTHER: auto, int8 or none; without --against, MODEL is compared with itself"
    verb.add_argument("--against-quant", help=quants)
    suites = (
        "tests to run: skills, text, all (default: both), or lm-eval:TASK[,TASK] of lm-evaluation-harness"
    )
    verb.add_argument("--suite", default="all", help=suites)
    verb.add_argument("--items", type=int, default=200, help="items per skill or task (default 200)")
    verb.add_argument("--seed", type=int, default=0, help="seed of the skills' items (default 0)")
    verb.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text to score (default: documentation that tiny was not trained on)",
    )
    verb.add_argument("--window", type=int, help="tokens per window of the text (default 256)")
    add_engine_options(verb, "model", "exchange")
    add_json(verb)


def _eval(args: argparse.Namespace) -> None:
    from cmx_jax.analysis.eval import evaluate, evaluation_text
    from cmx_jax.serving.deploy.llm import from_pretrained

    tell, chosen = progress(), {name: getattr(args, name) for name in ("suite", "items", "seed")}
    chosen |= {"text": args.text, "window": args.window}
    evaluate.check(**chosen)
    options = engine_options(args)
    if not args.suite.startswith(evaluate.HARNESS):  # the built-in suites generate nothing and need no cache
        options |= {"max_num_seqs": 1, "max_model_len": 1}
    tell("loading")
    models = [from_pretrained(args.model, **options)]
    if args.against is not None or args.against_quant is not None:
        quant = args.against_quant or args.quant
        models.append(from_pretrained(args.against or args.model, **{**options, "quant": quant}))
    result = evaluate.evaluate(*models, **chosen, progress=tell)
    show(result.as_dict(), args.json, lambda _: evaluation_text.render(result))
