"""`cmx bench serve`: load on a server of OpenAI's API, with vLLM's flags."""

import argparse
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, progress, show
from cmx_jax.errors import CmxError

# flags of each data set: name, default, meaning; what has no default is required
Flags = tuple[tuple[str, Any, str], ...]
DATASETS: dict[str, Flags] = {
    "random": (
        ("--random-input-len", 1024, "tokens of a prompt"),
        ("--random-output-len", 128, "tokens of an answer"),
        ("--random-range-ratio", 0.0, "lengths are within (1 - R, 1 + R) of that"),
        ("--random-prefix-len", 0, "tokens before it that all prompts share"),
    ),
    "shared-prefix": (
        ("--num-prefixes", 10, "beginnings that prompts share"),
        ("--prefix-len", 256, "tokens of each"),
        ("--suffix-len", 256, "tokens behind it"),
        ("--output-len", 128, "tokens of an answer"),
    ),
    "mooncake": (
        ("--dataset-path", None, "JSONL in Mooncake's format"),
        ("--input-scale", 1.0, "times the trace's prompts, for models of a short context"),
        ("--output-scale", 1.0, "times its answers"),
        ("--time-scale", 1.0, "times its timestamps"),
    ),
}


def add(verbs: Any) -> None:
    """The verb, its subverb and their flags."""
    verb = verbs.add_parser("bench", help="load a server and measure what its users see")
    kinds = verb.add_subparsers(dest="kind", required=True, metavar="WHAT")
    serve = kinds.add_parser("serve", help="of a server of OpenAI's API")
    serve.set_defaults(run=_serve)
    _add_server(serve.add_argument_group("server"))
    _add_traffic(serve.add_argument_group("traffic"))
    for name, flags in DATASETS.items():
        group = serve.add_argument_group(f"of --dataset-name {name}")
        for flag, default, meaning in flags:
            usual = "" if default is None else f" (default {default:g})"
            kind = str if default is None else type(default)
            group.add_argument(flag, type=kind, help=meaning + usual)
    _add_results(serve.add_argument_group("results"))
    add_json(serve)


def _add_server(group: Any) -> None:
    group.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    group.add_argument("--port", type=int, default=8000, help="default 8000")
    endpoints = "/v1/completions (default; prompts are token ids) or /v1/chat/completions"
    group.add_argument("--endpoint", default="/v1/completions", help=endpoints)
    group.add_argument("--model", help="its name there (default: the first one listed at /v1/models)")
    group.add_argument("--tokenizer", metavar="DIR", help="a directory or tiny (default: the model's name)")
    group.add_argument("--api-key", metavar="KEY", help="default: CMX_API_KEY or OPENAI_API_KEY")
    group.add_argument("--temperature", type=float, default=0.0, help="default 0")
    group.add_argument("--ignore-eos", action="store_true", help="answers are as long as asked for")
    limit = "that a request may take (default 600)"
    group.add_argument("--request-timeout-s", type=float, default=600.0, help=limit)


def _add_traffic(group: Any) -> None:
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="default random")
    group.add_argument("--num-prompts", type=int, default=1000, help="default 1000; of a trace at most")
    group.add_argument("--request-rate", type=float, default=math.inf, help="a second (default inf: at once)")
    burstiness = "1: Poisson (default); below: burstier"
    group.add_argument("--burstiness", type=float, default=1.0, help=burstiness)
    group.add_argument("--max-concurrency", type=int, help="requests at once; waiting for it is not measured")
    group.add_argument("--num-warmups", type=int, default=0, help="requests before, not measured (default 0)")
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default 0)")


def _add_results(group: Any) -> None:
    goodput = "most ms of a good request: ttft:MS, tpot:MS, e2el:MS"
    group.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help=goodput)
    names = "ttft,tpot,itl,e2el"
    group.add_argument("--percentile-metrics", default=names, help=f"which to report (default {names})")
    group.add_argument("--metric-percentiles", default="99", help="such as 50,90,99.9 (default 99)")
    group.add_argument("--save-result", action="store_true", help="as JSON")
    group.add_argument("--result-dir", metavar="DIR", help="default: here")
    group.add_argument("--result-filename", metavar="FILE", help="default: what was measured, and when")
    group.add_argument("--plot-timeline", type=Path, metavar="FILE", help="a picture: FILE.png or FILE.svg")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress on stderr")


def _serve(args: argparse.Namespace) -> int:
    from cmx_jax.analysis.bench import Client, Files, Load, Target, Wanted, measure, render, summary

    _check(args)
    wanted = Wanted(args.percentile_metrics, args.metric_percentiles, args.goodput)
    files = Files(args.save_result, args.result_dir, args.result_filename, args.plot_timeline)
    arrivals = _arrivals(args)
    url = args.base_url or f"http://{args.host}:{args.port}"
    target = Target(url, args.endpoint, args.api_key, args.model)
    asks, warmups = _asks(args, arrivals, target)
    load = Load(asks, warmups, args.max_concurrency, (lambda _: None) if args.disable_tqdm else progress())
    finished = measure(load, Client(target, args.temperature, args.ignore_eos, args.request_timeout_s))
    result = {**_settings(args, target, len(asks)), **summary(load, wanted)}
    try:
        files.write(result)
    finally:  # whatever happened to the files, the numbers are not lost
        show(result, args.json, render)
    return 130 if not finished else 0 if result["completed"] else 1


def _check(args: argparse.Namespace) -> None:
    """Flags of the data set get their defaults, those of another one and wrong numbers are refused."""
    for name, least in (("temperature", 0), ("num_warmups", 0), ("seed", 0), ("num_prompts", 1)):
        if not least <= getattr(args, name) < math.inf:
            raise CmxError(f"{name} is {getattr(args, name):g}, expected at least {least}")
    if not 0 < args.request_timeout_s < math.inf:
        raise CmxError(f"request_timeout_s is {args.request_timeout_s:g}, expected above zero")
    for dataset, flags in DATASETS.items():
        for flag, default, _ in flags:
            given = getattr(args, name := flag.removeprefix("--").replace("-", "_"))
            if dataset != args.dataset_name and given is not None:
                raise CmxError(f"{flag} is of --dataset-name {dataset}: leave it out")
            setattr(args, name, default if given is None else given)
    if args.dataset_name == "mooncake":
        if args.dataset_path is None:
            raise CmxError("--dataset-name mooncake needs --dataset-path FILE, a trace in Mooncake's format")
        if args.request_rate != math.inf:
            raise CmxError(
                "--request-rate is given, but a trace has its own times: scale them by --time-scale"
            )


def _arrivals(args: argparse.Namespace) -> list[Any]:
    from cmx_jax.analysis.bench import drawn
    from cmx_jax.analysis.simulate import mooncake

    if args.dataset_name == "mooncake":
        return mooncake(Path(args.dataset_path), "--dataset-path")[: args.num_prompts]
    if args.dataset_name == "random":
        lengths = args.random_input_len, args.random_output_len, args.random_range_ratio
    else:
        lengths = args.suffix_len, args.output_len, 0.0
    return drawn(args.num_prompts, args.request_rate, args.burstiness, *lengths, args.seed)


def _asks(args: argparse.Namespace, arrivals: list[Any], target: Any) -> tuple[list[Any], list[Any]]:
    """Requests, and those to warm up with."""
    from cmx_jax.analysis.bench import Words, check_lengths, prefixed, replayed

    words = Words(args.tokenizer or target.model)
    if args.dataset_name == "mooncake":
        scales = args.input_scale, args.output_scale, args.time_scale
        asks = replayed(words, arrivals, *scales, args.seed)
    else:
        of_random = args.dataset_name == "random"
        prefixes = 1 if of_random else args.num_prefixes
        tokens = args.random_prefix_len if of_random else args.prefix_len
        asks = prefixed(words, arrivals, prefixes, tokens, args.seed)
    check_lengths(asks, target.max_model_len)
    warmups = words.others(asks, args.num_warmups, args.seed)
    return (words.as_text(asks), words.as_text(warmups)) if target.chat else (asks, warmups)


def _settings(args: argparse.Namespace, target: Any, count: int) -> dict[str, Any]:
    """What was measured."""
    names = ("max_concurrency", "seed", "ignore_eos", "temperature")
    rate = None if args.dataset_name == "mooncake" else args.request_rate
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if target.chat else "openai",
        "model_id": target.model,
        "tokenizer_id": args.tokenizer or target.model,
        "dataset_name": args.dataset_name,
        "num_prompts": count,
        "request_rate": "inf" if rate == math.inf else rate,
        "burstiness": args.burstiness,
        **{name: getattr(args, name) for name in names},
    }
