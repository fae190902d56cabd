"""What the commands share in talking to people: errors, tables, progress and picture files."""

import importlib
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from .._text import Encodable

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress

_PICTURES = (".png", ".pdf", ".svg")
_WIDTH_WITHOUT_TERMINAL = 140


class CommandError(Exception):
    """Ends the command with one line on standard error.

    Args:
        message: what is wrong and what to do about it.
        exit_code: 2 when the request cannot be served, 1 when the work was done and failed.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def optional(module: str, package: str, purpose: str) -> "ModuleType":
    """Import a module of the ``bench`` extra, or say what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        message = f'{purpose} needs {package}, which is not installed: pip install "vitkernels[bench]"'
        raise CommandError(message) from None


def console() -> "Console":
    """Standard output for tables; wide enough to keep rows whole when it is a file or a pipe.

    Text is printed as it is: ``[red]`` and ``:dog:`` may be parts of a user's path.
    """
    from rich.console import Console

    out = Encodable(sys.stdout)
    width = None if out.isatty() else _WIDTH_WITHOUT_TERMINAL
    return _with_a_width(Console(file=cast(IO[str], out), width=width, markup=False, emoji=False, highlight=False))


def progress() -> "Progress":
    """A progress bar on standard error that disappears when done; silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = _with_a_width(Console(file=cast(IO[str], Encodable(sys.stderr))))
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def _with_a_width(console: "Console") -> "Console":
    if console.width < 1:  # COLUMNS=0
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


def picture_path(text: str, purpose: str) -> Path:
    """Check before any work that a picture can be written there, and that there is something to draw it with."""
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise CommandError(f"{purpose}: {text} must end in {', '.join(_PICTURES)}")
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = "its folder does not exist"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "permission denied"
    else:
        reason = None
    if reason:
        raise CommandError(f"{purpose}: cannot write {text}: {reason}")
    optional("matplotlib", "matplotlib", purpose)
    return path


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a figure; the format is the suffix."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
