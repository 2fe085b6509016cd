"""The `cmx` command: every verb calls one library function.

Results go to stdout, progress and errors to stderr. A user's mistake ends with one line and exit code 2.
"""

import argparse
import os
import sys

from cmx_jax import __version__
from cmx_jax.cli import (
    bench,
    cache,
    calc,
    checkpoints,
    compare,
    evaluate,
    generate,
    plan,
    pools,
    predict,
    serve,
    simulate,
    trace,
)
from cmx_jax.cli.common import Parser
from cmx_jax.errors import CmxError


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cmx", description="CloudMatrix-Infer in JAX, on a virtual supernode.")
    parser.add_argument("--version", action="version", version=f"cmx_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for group in (
        generate,
        serve,
        pools,
        cache,
        bench,
        evaluate,
        trace,
        compare,
        predict,
        plan,
        simulate,
        calc,
        checkpoints,
    ):
        group.add(verbs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except CmxError as error:
        text = " ".join(str(error).split())
        print(f"{chr(13) + chr(27) + '[K' if sys.stderr.isatty() else ''}cmx: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        sys.stderr.flush()
        os._exit(130)  # XLA may be compiling in threads that crash at an orderly exit
    except BrokenPipeError:  # the reader of the output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code or 0
