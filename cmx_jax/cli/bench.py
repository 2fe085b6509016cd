"""`cmx bench serve`: a load generator for servers of OpenAI's API, with vLLM's flags."""

import argparse
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from cmx_jax.cli.common import add_json, progress, show
from cmx_jax.errors import CmxError

# flags of each data set: name, default, help; a flag without a default is required
Flags = tuple[tuple[str, Any, str], ...]
DATASETS: dict[str, Flags] = {
    "random": (
        ("--random-input-len", 1024, "tokens per prompt"),
        ("--random-output-len", 128, "tokens per answer"),
        (
            "--random-range-ratio",
            0.0,
            "spread R of the lengths: they are drawn from (1 - R, 1 + R) times the flags' values",
        ),
        ("--random-prefix-len", 0, "tokens of a prefix that all prompts share"),
    ),
    "shared-prefix": (
        ("--num-prefixes", 10, "number of prefixes that prompts share"),
        ("--prefix-len", 256, "tokens per shared prefix"),
        ("--suffix-len", 256, "tokens per prompt after the shared prefix"),
        ("--output-len", 128, "tokens per answer"),
    ),
    "mooncake": (
        ("--dataset-path", None, "trace to replay, JSONL in Mooncake's format"),
        ("--input-scale", 1.0, "factor on the trace's prompt lengths, for models with a short context"),
        ("--output-scale", 1.0, "factor on the trace's answer lengths"),
        ("--time-scale", 1.0, "factor on the trace's timestamps"),
    ),
}


def add(verbs: Any) -> None:
    """Adds the verb, its subverb and their flags."""
    verb = verbs.add_parser("bench", help="load a server and measure the latencies of its clients")
    kinds = verb.add_subparsers(dest="kind", required=True, metavar="WHAT")
    serve = kinds.add_parser("serve", help="benchmark a server of OpenAI's API")
    serve.set_defaults(run=_serve)
    _add_server(serve.add_argument_group("server"))
    _add_traffic(serve.add_argument_group("traffic"))
    for name, flags in DATASETS.items():
        group = serve.add_argument_group(f"only with --dataset-name {name}")
        for flag, default, meaning in flags:
            suffix = "" if default is None else f" (default {default:g})"
            kind = str if default is None else type(default)
            group.add_argument(flag, type=kind, help=meaning + suffix)
    _add_results(serve.add_argument_group("results"))
    add_json(serve)


def _add_server(group: Any) -> None:
    group.add_argument("--base-url", metavar="URL", help="URL of the server, instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="host of the server (default 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="port of the server (default 8000)")
    endpoints = "path to ask: /v1/completions (default; prompts are token ids) or /v1/chat/completions"
    group.add_argument("--endpoint", default="/v1/completions", help=endpoints)
    group.add_argument("--model", help="model to ask for (default: the first one listed at /v1/models)")
    group.add_argument(
        "--tokenizer", metavar="DIR", help="directory of the tokenizer, or tiny (default: the model's name)"
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="API key of the server (default: CMX_API_KEY or OPENAI_API_KEY)"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="sampling temperature (default 0)")
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        help="ignore end tokens, so that answers have the requested length",
    )
    limit = "time limit of a request in seconds (default 600)"
    group.add_argument("--request-timeout-s", type=float, default=600.0, help=limit)


def _add_traffic(group: Any) -> None:
    group.add_argument(
        "--dataset-name", choices=DATASETS, default="random", help="prompts to send (default random)"
    )
    group.add_argument(
        "--num-prompts", type=int, default=1000, help="requests to send (default 1000); of a trace, at most"
    )
    group.add_argument(
        "--request-rate", type=float, default=math.inf, help="requests per second (default inf: all at once)"
    )
    burstiness = "shape of the arrivals: 1 is Poisson (default), less is burstier"
    group.add_argument("--burstiness", type=float, default=1.0, help=burstiness)
    group.add_argument(
        "--max-concurrency", type=int, help="most requests at once; the wait for a free place is not measured"
    )
    group.add_argument(
        "--num-warmups", type=int, default=0, help="requests sent first that are not measured (default 0)"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of prompts, lengths and arrivals (default 0)"
    )


def _add_results(group: Any) -> None:
    goodput = "limits in ms of a good request: ttft:MS, tpot:MS, e2el:MS"
    group.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help=goodput)
    names = "ttft,tpot,itl,e2el"
    group.add_argument(
        "--percentile-metrics",
        default=names,
        help=f"metrics with percentiles in the report (default {names})",
    )
    group.add_argument(
        "--metric-percentiles", default="99", help="percentiles to report, such as 50,90,99.9 (default 99)"
    )
    group.add_argument("--save-result", action="store_true", help="write the result to a file, as JSON")
    group.add_argument(
        "--result-dir", metavar="DIR", help="folder of the result file (default: the current folder)"
    )
    group.add_argument(
        "--result-filename",
        metavar="FILE",
        help="name of the result file (default: made of the settings and the date)",
    )
    group.add_argument(
        "--plot-timeline",
        type=Path,
        metavar="FILE",
        help="plot each request over time, as FILE.png or FILE.svg",
    )
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress on stderr")


def _serve(args: argparse.Namespace) -> int:
    from cmx_jax.analysis.bench import (
        Client,
        LoadGenerator,
        OutputFiles,
        ReportOptions,
        Target,
        measure,
        render,
        summary,
    )

    _check(args)
    options = ReportOptions(args.percentile_metrics, args.metric_percentiles, args.goodput)
    files = OutputFiles(args.save_result, args.result_dir, args.result_filename, args.plot_timeline)
    arrivals = _arrivals(args)
    url = args.base_url or f"http://{args.host}:{args.port}"
    target = Target(url, args.endpoint, args.api_key, args.model)
    requests, warmups = _requests(args, arrivals, target)
    tell = (lambda _: None) if args.disable_tqdm else progress()
    load = LoadGenerator(requests, warmups, args.max_concurrency, tell)
    finished = measure(load, Client(target, args.temperature, args.ignore_eos, args.request_timeout_s))
    settings, result = _settings(args, target, len(requests)), summary(load, options)
    try:
        files.write(settings, result)
    finally:  # even if a file cannot be written, the numbers are not lost
        show(settings.as_dict() | result.as_dict(), args.json, lambda _: render(result))
    return 130 if not finished else 0 if result.completed else 1


def _check(args: argparse.Namespace) -> None:
    """Sets defaults of the data set's flags; refuses flags of other data sets and numbers out of range."""
    for name, least in (("temperature", 0), ("num_warmups", 0), ("seed", 0), ("num_prompts", 1)):
        if not least <= getattr(args, name) < math.inf:
            raise CmxError(f"{name} is {getattr(args, name):g}, expected at least {least}")
    if not 0 < args.request_timeout_s < math.inf:
        raise CmxError(f"request_timeout_s is {args.request_timeout_s:g}, expected above zero")
    for dataset, flags in DATASETS.items():
        for flag, default, _ in flags:
            value = getattr(args, name := flag.removeprefix("--").replace("-", "_"))
            if dataset != args.dataset_name and value is not None:
                raise CmxError(f"{flag} is for --dataset-name {dataset}: leave it out")
            setattr(args, name, default if value is None else value)
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


def _requests(args: argparse.Namespace, arrivals: list[Any], target: Any) -> tuple[list[Any], list[Any]]:
    """Requests and warm-up requests."""
    from cmx_jax.analysis.bench import Words, check_lengths, prefixed, replayed

    words = Words(args.tokenizer or target.model)
    if args.dataset_name == "mooncake":
        scales = args.input_scale, args.output_scale, args.time_scale
        requests = replayed(words, arrivals, *scales, args.seed)
    else:
        random = args.dataset_name == "random"
        prefixes = 1 if random else args.num_prefixes
        tokens = args.random_prefix_len if random else args.prefix_len
        requests = prefixed(words, arrivals, prefixes, tokens, args.seed)
    check_lengths(requests, target.max_model_len)
    warmups = words.warmups(requests, args.num_warmups, args.seed)
    return (words.as_text(requests), words.as_text(warmups)) if target.chat else (requests, warmups)


def _settings(args: argparse.Namespace, target: Any, count: int) -> Any:
    """Description of the measurement."""
    from cmx_jax.analysis.bench import Settings

    return Settings(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        backend="openai-chat" if target.chat else "openai",
        model_id=target.model,
        tokenizer_id=args.tokenizer or target.model,
        dataset_name=args.dataset_name,
        num_prompts=count,
        request_rate=None if args.dataset_name == "mooncake" else args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
    )
