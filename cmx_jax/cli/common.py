"""Common parts of the verbs: errors, progress, results, options of models and layouts."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# parameters of from_pretrained that are flags of every verb that calls it
OPTIONS = ("runner", "ranks", "dtype", "quant", "kv_cache_dtype", "wire", "exchange")
# flags of a layout, for verbs that generate: name, default, help
SPREAD = (
    ("--num-speculative-tokens", 0, "MTP drafts verified in each decode step"),
    ("--microbatches", 1, "microbatches per step"),
    ("--redundant-slots", 0, "slots for additional replicas of busy experts"),
    ("--shared-slots", 0, "slots for copies of the shared expert"),
    ("--eplb-interval", 0, "decode steps between two rebalancings of the experts, 0 for none"),
)


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def progress() -> Callable[[str], None]:
    """Returns a function that shows progress on one line of stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return lambda _: None

    def tell(text: str) -> None:
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()

    return tell


def show(result: T, as_json: bool, render: Callable[[T], str]) -> None:
    """Prints a result, as JSON or as the text that `render` makes of it."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else render(result))


def add_json(verb: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    verb.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_model_options(verb: argparse.ArgumentParser) -> None:
    """Adds the flags for `OPTIONS` that `add_exchange_options` does not add."""
    verb.add_argument(
        "--runner", default="lanes", help="execution of ranks on this machine: lanes (default) or devices"
    )
    verb.add_argument("--ranks", type=int, default=8, help="number of expert-parallel ranks (default 8)")
    verb.add_argument(
        "--dtype",
        default="float32",
        help="dtype of weights, cache and arithmetic: float32 (default) or bfloat16",
    )
    verb.add_argument(
        "--quant", default="auto", help="quantization of weights: auto (as stored, the default), int8 or none"
    )


def add_exchange_options(verb: argparse.ArgumentParser, exchange: str = "flat") -> None:
    """Adds the flags for the exchange of tokens with experts and for the format of the KV cache."""
    verb.add_argument(
        "--wire", help="dtype of tokens sent to experts: float32, bfloat16 or int8 (default: the model's)"
    )
    verb.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help="dtype of KV cache rows: auto (the model's, default), int8, bfloat16 or float32",
    )
    methods = "exchange of tokens with experts: flat, hierarchical, allgather, or ragged (accelerators only)"
    verb.add_argument("--exchange", default=exchange, help=f"{methods} (default {exchange})")


def add_spread_options(verb: argparse.ArgumentParser, **defaults: int) -> None:
    """Adds the flags of `SPREAD`; `defaults` replace their defaults, by name of the destination."""
    for flag, value, meaning in SPREAD:
        default = defaults.get(flag.removeprefix("--").replace("-", "_"), value)
        verb.add_argument(flag, type=int, default=default, help=f"{meaning} (default {default})")


def parallelism(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the flags of `add_exchange_options` and `add_spread_options`."""
    names = ("wire", "exchange", "num_speculative_tokens", "microbatches", "redundant_slots", "shared_slots")
    return {name: getattr(args, name) for name in (*names, "eplb_interval", "kv_cache_dtype")}
