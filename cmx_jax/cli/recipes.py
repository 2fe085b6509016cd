"""Flags that change the recipe of the pools, for every command that starts them."""

import argparse
from dataclasses import replace
from typing import Any

from cmx_jax.cli.common import engine_options
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.recipe import MECHANISMS, Recipe, parse_mechanisms, plain

COUNTS = ("prefill_instances", "decode_instances")


def add_recipe(group: Any) -> None:
    """Adds the flags."""
    recipe = Recipe()
    for name in COUNTS:
        about = f"number of {name.split('_')[0]} instances of the pools (default {getattr(recipe, name)})"
        group.add_argument(f"--{name.replace('_', '-')}", type=int, help=about)
    names = "; ".join(f"{name}: {mechanism.about}" for name, mechanism in MECHANISMS.items())
    without = f"mechanisms of the paper to switch off in the pools, separated by commas. {names}"
    group.add_argument("--without", action="append", metavar="NAMES", default=[], help=without)
    about = "switch all of them off: floats, one rank per NPU, prefill ranks with sequences of their own"
    group.add_argument("--plain", action="store_true", help=about)


def changes_recipe(args: argparse.Namespace) -> str | None:
    """Returns the first flag that was given of those that change a recipe only, or None."""
    given = [name for name in (*COUNTS, "without", "plain") if getattr(args, name)]
    return f"--{given[0].replace('_', '-')}" if given else None


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Returns the recipe that the flags describe: the paper's, with their changes.

    Raises:
      CmxError: A mechanism is unknown, or a value is invalid.
    """
    recipe = Recipe().without(*parse_mechanisms(args.without))
    recipe = plain(recipe) if args.plain else recipe
    options = engine_options(args)
    if "ranks" in options:
        raise CmxError("--ranks is for one instance: leave it out, pools have the ranks of the paper")
    sequences = options.pop("max_num_seqs", None)
    counts = {name: value for name in COUNTS if (value := getattr(args, name)) is not None}
    recipe = replace(recipe, **counts).with_engine(**options)
    ranks = recipe.decode_npus * recipe.engine.ranks_per_npu
    wanted = recipe.sequences if sequences is None else -(-sequences // ranks)
    parts = recipe.engine.microbatches
    return replace(recipe, sequences=-(-wanted // parts) * parts)
