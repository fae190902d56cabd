"""The ``vitkernels`` command: one file per subcommand, each with ``add_parser``, ``run`` and ``show``.

``run`` computes and returns a JSON-ready dictionary, ``show`` prints that same dictionary as tables. While ``run`` works,
standard output is redirected to standard error: under ``--json`` nothing but the document can reach it.
timm, rich and matplotlib are imported inside functions, so that ``--help`` waits for torch only, which ``vitkernels`` imports.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import _env, _select
from .._text import Encodable
from .._version import __version__
from . import bench, classify, info, inspect, roofline, tune
from ._output import CommandError

_COMMANDS = (info, bench, classify, inspect, roofline, tune)


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments the way every other error is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``vitkernels`` command.

    Args:
        argv: the arguments; ``sys.argv[1:]`` when None.

    Returns:
        The exit code: 0 done, 1 the work failed (a result that does not match, out of memory), 2 a request that cannot be
        served (arguments, files, devices). Each error is one line on standard error.
    """
    try:
        args = _parser().parse_args(argv)
        _check_environment()
    except CommandError as error:
        return _fail(error)
    except SystemExit as stop:  # --help and --version have printed
        return int(stop.code or 0)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            document = args.run(args)
        _print(args, document)
    except CommandError as error:
        return _fail(error)
    except BrokenPipeError:  # `vitkernels info | head`: nobody reads the rest
        return 1
    except KeyboardInterrupt:
        return 130
    for message in document.get("errors", ()):
        _fail(CommandError(message))
    return 1 if document.get("errors") else 0


def _print(args: argparse.Namespace, document: dict[str, Any]) -> None:
    try:
        if args.json:
            print(json.dumps(document, indent=2, allow_nan=False), file=Encodable(sys.stdout))
        else:
            args.show(document)
        Encodable(sys.stdout).flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(f"cannot write standard output: {error.strerror or error}", 1) from error


def _check_environment() -> None:
    try:
        _env.check_backend(_select.policy())
    except ValueError as error:
        raise CommandError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vitkernels", description="Custom kernels for Vision Transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = command.add_parser(subparsers)
        subparser.add_argument("--json", action="store_true", help="JSON on standard output, nothing else there")
        subparser.set_defaults(run=command.run, show=command.show)
    return parser


def _fail(error: CommandError) -> int:
    print(f"vitkernels: error: {' '.join(str(error).split())}", file=Encodable(sys.stderr))
    return error.exit_code
