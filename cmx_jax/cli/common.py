"""What verbs have in common: one line for a mistake, progress, results, options of models and layouts."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

# of from_pretrained, for every verb that calls it
OPTIONS = ("runner", "ranks", "dtype", "quant", "kv_cache_dtype", "wire", "exchange")
# further ones of a layout, for verbs that generate
SPREAD = (
    ("--num-speculative-tokens", 0, "MTP drafts verified in each decode step"),
    ("--microbatches", 1, "streams of a step"),
    ("--redundant-slots", 0, "further replicas of busy experts"),
    ("--shared-slots", 0, "slots for copies of the shared expert"),
    ("--eplb-interval", 0, "decode steps between rebalancings of the experts, 0: never"),
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def progress() -> Callable[[str], None]:
    """Overwrites one line of stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return lambda _: None

    def tell(text: str) -> None:
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()

    return tell


def show(result: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], str]) -> None:
    """Prints a result, as JSON or rendered for people."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else render(result))


def add_json(verb: argparse.ArgumentParser) -> None:
    """`--json`."""
    verb.add_argument("--json", action="store_true", help="one JSON document on stdout")


def add_model_options(verb: argparse.ArgumentParser) -> None:
    """How `MODEL` is computed: `OPTIONS`, without those of `add_exchange_options`."""
    verb.add_argument("--runner", default="lanes", help="lanes (default) or devices")
    verb.add_argument("--ranks", type=int, default=8, help="expert-parallel ranks (default 8)")
    verb.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    verb.add_argument("--quant", default="auto", help="auto (as stored, the default), int8 or none")


def add_exchange_options(verb: argparse.ArgumentParser, exchange: str = "flat") -> None:
    """How tokens reach experts, and how rows lie in pages."""
    verb.add_argument("--wire", help="dispatched tokens: float32, bfloat16 or int8 (default: the model's)")
    verb.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help="rows in pages: auto (the model's, default), int8, bfloat16 or float32",
    )
    methods = "flat, hierarchical, allgather, or ragged (accelerators only)"
    verb.add_argument("--exchange", default=exchange, help=f"{methods} (default {exchange})")


def add_spread_options(verb: argparse.ArgumentParser, **defaults: int) -> None:
    """`SPREAD`; `defaults` by destination."""
    for flag, usual, meaning in SPREAD:
        default = defaults.get(flag.removeprefix("--").replace("-", "_"), usual)
        verb.add_argument(flag, type=int, default=default, help=f"{meaning} (default {default})")


def parallelism(args: argparse.Namespace) -> dict[str, Any]:
    """Values of `add_exchange_options` and `add_spread_options`."""
    names = ("wire", "exchange", "num_speculative_tokens", "microbatches", "redundant_slots", "shared_slots")
    return {name: getattr(args, name) for name in (*names, "eplb_interval", "kv_cache_dtype")}
