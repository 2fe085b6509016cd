"""The `cmx` command: every verb calls one library function.

Results go to stdout, progress and errors to stderr. A user's mistake is one line and exit code 2.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

from cmx_jax import __version__
from cmx_jax.errors import CmxError

# of from_pretrained, for every verb that calls it
OPTIONS = ("runner", "ranks", "dtype", "quant", "kv_cache_dtype", "wire", "exchange")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _progress() -> Callable[[str], None]:
    """Overwrites one line of stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return lambda _: None

    def show(text: str) -> None:
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()

    return show


def _print(result: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], str]) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else render(result))


def _demo(args: argparse.Namespace) -> None:
    from cmx_jax.serving import demo

    result = demo.run(
        name_or_path=args.model,
        max_tokens=args.max_tokens,
        prefill=args.prefill_instances,
        progress=_progress(),
        **_parallelism(args),
    )
    _print(result, args.json, demo.render)


def _parallelism(args: argparse.Namespace) -> dict[str, Any]:
    """What `demo` and `generate` have in common."""
    names = ("wire", "exchange", "num_speculative_tokens", "microbatches", "redundant_slots", "shared_slots")
    return {name: getattr(args, name) for name in (*names, "eplb_interval", "kv_cache_dtype")}


def _generate(args: argparse.Namespace) -> None:
    from cmx_jax.serving.llm import from_pretrained

    show = _progress()
    show("loading")
    llm = from_pretrained(
        args.model,
        runner=args.runner,
        ranks=args.ranks,
        dtype=args.dtype,
        quant=args.quant,
        **_parallelism(args),
    )
    show("generating (the first time compiles)")
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
    _print(result, args.json, lambda r: "\n\n".join(row["prompt"] + row["text"] for row in r["requests"]))


def _eval(args: argparse.Namespace) -> None:
    from cmx_jax.serving.eval import evaluate, report
    from cmx_jax.serving.llm import from_pretrained

    show, chosen = _progress(), {name: getattr(args, name) for name in ("suite", "items", "seed")}
    chosen |= {"text": args.text, "window": args.window}
    evaluate.check(**chosen)
    options = {name: getattr(args, name) for name in OPTIONS}
    if not args.suite.startswith(evaluate.HARNESS):  # nothing is generated: no cache is needed
        options |= {"max_num_seqs": 1, "max_model_len": 1}
    show("loading")
    models = [from_pretrained(args.model, **options)]
    if args.against is not None or args.against_quant is not None:
        quant = args.against_quant or args.quant
        models.append(from_pretrained(args.against or args.model, **{**options, "quant": quant}))
    result = evaluate.evaluate(*models, **chosen, progress=show)
    _print(result, args.json, report.render)


def _trace(args: argparse.Namespace) -> None:
    from cmx_jax.mesh.trace.table import render
    from cmx_jax.model.trace import ready, trace_model
    from cmx_jax.serving.model import config_of

    c, found = config_of(args.model), ready(args.layout)
    layout, step = found.make(c.n_routed_experts), args.step or found.step
    batch = found.batch if args.batch is None else args.batch
    result = trace_model(
        c,
        layout,
        step,
        batch=batch,
        context=args.context,
        drafts=args.num_speculative_tokens,
        ranks_per_npu=found.ranks_per_npu,
    )
    given = {"model": args.model, "layout": args.layout, "about": found.about, "step": step, "batch": batch}
    document = given | {"context": args.context, "ranks": layout.ranks, "source": "jaxpr", **asdict(result)}
    _print(document, args.json, lambda _: render(result))


def _inspect(args: argparse.Namespace) -> None:
    from cmx_jax.model.checkpoint import inspect
    from cmx_jax.serving.model import located

    result = inspect.inspect(located(args.model))
    _print(result, args.json, inspect.render)
    if result["problems"]:
        more = f" (and {len(result['problems']) - 1} more)" if len(result["problems"]) > 1 else ""
        raise CmxError(f"{args.model}: {result['problems'][0]}{more}")


def _convert(args: argparse.Namespace) -> None:
    from cmx_jax.model.checkpoint.convert import convert
    from cmx_jax.serving.model import locate

    result = convert(
        locate(args.source),
        args.destination,
        format=args.format,
        dtype=args.dtype,
        ranks=args.layout,
        progress=_progress(),
    )
    _print(result, args.json, _render_conversion)


def _quantize(args: argparse.Namespace) -> None:
    from cmx_jax.mesh import enable_compilation_cache
    from cmx_jax.model.quantize.command import PARTS, quantize
    from cmx_jax.serving.model import Model, locate

    enable_compilation_cache()
    names = {"full": ",".join(PARTS), "plain": ""}.get(args.scheme, args.scheme)
    parts, show, tokens = frozenset(filter(None, names.split(","))), _progress(), None
    if parts:
        from cmx_jax.serving.calibration import calibration

        show("reading the calibration text")
        tokens = calibration(Model.read(args.source), args.calibration, args.calibration_tokens)
    source = locate(args.source)
    result = quantize(source, args.destination, tokens=tokens, parts=parts, budget=args.budget, progress=show)
    _print(result, args.json, _render_quantization)


def _render_quantization(r: dict[str, Any]) -> str:
    rows = [
        f"{unit:<12} {matrix:<22} {errors['plain']:9.3%} {errors['written']:9.3%} {errors['clipped']:9.1%}"
        for unit, found in r["layers"].items()
        for matrix, errors in found.items()
    ]
    titles = f"{'':<12} {'error of products':<22} {'rounding':>9} {'written':>9} {'clipped':>9}"
    head = [titles] if rows else []
    parts = ", ".join(r["parts"]) or "rounding alone"
    before = f" ({r['units_resumed']} were there already)" if r["units_resumed"] else ""
    kept = ", ".join(r["kept"]) or "what always is"
    last = (
        f"{r['destination']}: INT8 by {parts}, {r['calibration_tokens']:,} calibration tokens, {r['units']} "
        f"units{before}, {r['bytes']:,} bytes; in floats: {kept}"
    )
    return "\n".join([*head, *rows, last])


def _render_conversion(r: dict[str, Any]) -> str:
    before = f" ({r['units_resumed']} were there already)" if r["units_resumed"] else ""
    return (
        f"{r['destination']}: {r['format']}, {r['dtype']}: {r['tensors']:,} tensors in {r['units']} units"
        f"{before}, {r['bytes']:,} bytes; every tensor was read again and its sha256 is right"
    )


def _layout(text: str) -> int:
    """`ep320` to 320 ranks."""
    if not (text.startswith("ep") and text[2:].isdecimal()):
        raise argparse.ArgumentTypeError(f"layout {text!r}, expected ep and a number of ranks, such as ep320")
    return int(text[2:])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cmx", description="CloudMatrix-Infer in JAX, on a virtual supernode.")
    parser.add_argument("--version", action="version", version=f"cmx_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="serve built-in prompts on the whole 384-device mesh")
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", default="tiny", help="a directory, or tiny (default)")
    demo.add_argument("--max-tokens", type=int, default=32, help="tokens to generate for each prompt")
    demo.add_argument("--prefill-instances", type=int, default=6, help="how many of the six to start")

    generate = verbs.add_parser("generate", help="continue prompts")
    generate.set_defaults(run=_generate)
    generate.add_argument("model", metavar="MODEL", help="a Hugging Face directory, or tiny")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)

    evaluation = verbs.add_parser("eval", help="how well a model does, and what another one changes")
    evaluation.set_defaults(run=_eval)
    evaluation.add_argument("model", metavar="MODEL", help="a Hugging Face or Orbax directory, or tiny")
    evaluation.add_argument("--against", metavar="OTHER", help="compared with MODEL on the same items")
    quants = "how OTHER is computed: auto, int8 or none; alone it compares MODEL with itself"
    evaluation.add_argument("--against-quant", help=quants)
    suites = "skills, text, all (default: both), or lm-eval:TASK[,TASK] of lm-evaluation-harness"
    evaluation.add_argument("--suite", default="all", help=suites)
    evaluation.add_argument("--items", type=int, default=200, help="of each skill or task (default 200)")
    evaluation.add_argument("--seed", type=int, default=0, help="of the skills' items (default 0)")
    evaluation.add_argument("--text", metavar="FILE", help="UTF-8 (default: documentation held out of tiny)")
    evaluation.add_argument("--window", type=int, help="tokens of a window of text (default 256)")
    for verb in (generate, evaluation):
        verb.add_argument("--runner", default="lanes", help="lanes (default) or devices")
        verb.add_argument("--ranks", type=int, default=8, help="expert-parallel ranks (default 8)")
        verb.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
        verb.add_argument("--quant", default="auto", help="auto (as stored, the default), int8 or none")

    inspect = verbs.add_parser("inspect", help="what a checkpoint holds, and what is wrong with it")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", metavar="SRC", help="a directory, tiny, or a preset such as deepseek-r1")

    trace = verbs.add_parser("trace", help="what a step's collectives move, at full size, without weights")
    trace.set_defaults(run=_trace)
    trace.add_argument("model", metavar="MODEL", help="a directory, tiny, or a preset such as deepseek-r1")
    trace.add_argument(
        "--layout", default="ep320", help="ep320 and ep32 (the paper's), or epN (default ep320)"
    )
    trace.add_argument("--step", choices=("decode", "prefill"), help="default: what the layout is for")
    trace.add_argument("--batch", type=int, help="sequences of an NPU (default: the paper's)")
    trace.add_argument("--context", type=int, default=4096, help="tokens of a sequence (default 4096)")
    trace.add_argument("--num-speculative-tokens", type=int, default=0, help="MTP drafts (default 0)")

    convert = verbs.add_parser("convert", help="to safetensors or Orbax, resuming what stopped")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC", help="a Hugging Face or Orbax directory, or tiny")
    convert.add_argument("destination", metavar="DST", help="a new directory, or one that was begun")
    convert.add_argument("--format", default="safetensors", help="safetensors (default) or orbax")
    convert.add_argument("--dtype", help="bfloat16, float32 or int8 (default: as stored)")
    convert.add_argument("--layout", type=_layout, help="whose slots an Orbax directory has, such as ep320")
    quantize = verbs.add_parser("quantize", help="to INT8 (W8A8), layer by layer, resuming what stopped")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("source", metavar="SRC", help="a checkpoint, or tiny")
    quantize.add_argument("destination", metavar="DST", help="a new directory, or one that was begun")
    quantize.add_argument(
        "--calibration", metavar="FILE", help="UTF-8 text (default: Python's documentation)"
    )
    quantize.add_argument("--calibration-tokens", type=int, default=4096, help="how many (default 4096)")
    quantize.add_argument(
        "--scheme",
        default="full",
        help="full (default), plain, or some of precision,scales,rotation,clipping,compensation",
    )
    quantize.add_argument(
        "--budget", type=float, default=0.08, help="of the bytes, for precision (default 0.08)"
    )
    for verb in (inspect, trace, convert, quantize):
        verb.add_argument("--json", action="store_true", help="one JSON document on stdout")

    for verb, exchange in ((demo, "hierarchical"), (generate, "flat"), (evaluation, "flat")):
        verb.add_argument(
            "--wire", help="dispatched tokens: float32, bfloat16 or int8 (default: the model's)"
        )
        verb.add_argument(
            "--kv-cache-dtype",
            default="auto",
            help="rows in pages: auto (the model's, default), int8, bfloat16 or float32",
        )
        methods = "flat, hierarchical, allgather, or ragged (accelerators only)"
        verb.add_argument("--exchange", default=exchange, help=f"{methods} (default {exchange})")
        verb.add_argument("--json", action="store_true", help="one JSON document on stdout")
    for verb in (demo, generate):
        for flag, default, meaning in (
            ("--num-speculative-tokens", 0, "MTP drafts verified in each decode step"),
            ("--microbatches", 1, "streams of a step"),
            ("--redundant-slots", 0, "further replicas of busy experts"),
            ("--shared-slots", 0, "slots for copies of the shared expert"),
            ("--eplb-interval", 0, "decode steps between rebalancings of the experts, 0: never"),
        ):
            default = 1 if verb is demo and flag == "--num-speculative-tokens" else default
            verb.add_argument(flag, type=int, default=default, help=f"{meaning} (default {default})")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except CmxError as error:
        text = " ".join(str(error).split())
        print(f"{chr(13) + chr(27) + '[K' if sys.stderr.isatty() else ''}cmx: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        sys.stderr.flush()
        os._exit(130)  # XLA may be compiling in threads that do not survive an orderly end
    except BrokenPipeError:  # whoever read us has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
