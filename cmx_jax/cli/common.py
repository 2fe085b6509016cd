"""Shared by all verbs: errors in one line, progress, results, and the flags of engine options."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from cmx_jax.serving.deploy.engine_args import EngineArgs
from cmx_jax.serving.deploy.recipe import Recipe

T = TypeVar("T")


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


def add_engine_options(verb: Any, *groups: str, of_recipe: bool = False, **defaults: Any) -> None:
    """Adds a flag for each field of `EngineArgs` in these groups.

    Args:
      verb: Parser or group of arguments.
      groups: Groups of options; see `engine_args`.
      of_recipe: True for flags that change a recipe: they have no default, and `--help` names the recipe's.
      defaults: Defaults by field, where they are not those of `EngineArgs`.
    """
    if of_recipe:
        defaults = asdict(Recipe().engine)
    types = get_type_hints(EngineArgs)
    for f in fields(EngineArgs):
        if f.metadata["group"] not in groups:
            continue
        default, about = defaults.get(f.name, f.default), f.metadata["help"]
        if default is not None:
            about = f"{about} (default {default})"
        kind = next(t for t in (int, str) if t is types[f.name] or t in get_args(types[f.name]))
        given = None if of_recipe else default
        verb.add_argument(f"--{f.name.replace('_', '-')}", type=kind, default=given, help=about)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `EngineArgs` that have a value."""
    values = {f.name: getattr(args, f.name, None) for f in fields(EngineArgs)}
    return {name: value for name, value in values.items() if value is not None}
