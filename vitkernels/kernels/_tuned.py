"""Tuned tables: which plan and configuration was measured to be fastest, by architecture.

One JSON file an architecture: the user's (``vitkernels tune`` writes it, ``_env.tuned_dir``) is asked first, the one shipped
in ``tuned/`` second.

    {"format": 1, "linear": {"act/3072/768/65536": {"plan": "triton", "config": {...}}, "plain/...": {"plan": "cublas"}}}
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import _env

FORMAT = 1
_SHIPPED = Path(__file__).parent / "tuned"
_logger = logging.getLogger("vitkernels")
_tried: tuple[str, str, dict[str, Any]] | None = None  # stem, key and entry inside trying()


def bucket(rows: int) -> int:
    """The M of a table's key: the power of two at or above ``rows``, from 64 on."""
    return max(64, 1 << max(rows - 1, 0).bit_length())


def gemm_key(kind: str, N: int, K: int, rows: int) -> str:
    """Key of the GEMM (rows, K) x (K, N) in the table of stem ``linear``.

    Args:
        kind: ``plain`` (bias only), ``act`` or ``residual``: what the epilogue can save. ``gelu_tanh``: ``act`` of that form,
            whose entry may be ``cublaslt``. ``norm`` and ``norm_act``: with a LayerNorm folded in; an entry ``cublas`` stands
            for LayerNorm, then whatever runs ``plain``, ``act`` or ``gelu_tanh``.
    """
    return f"{kind}/{N}/{K}/{bucket(rows)}"


def lookup(arch: str, stem: str, key: str) -> dict[str, Any] | None:
    """The entry of ``key``, of the user's table or else the shipped one. After writing a table call ``forget``."""
    if _tried is not None and _tried[:2] == (stem, key):
        return _tried[2]
    return _found(arch, stem, key)


@functools.lru_cache
def _found(arch: str, stem: str, key: str) -> dict[str, Any] | None:
    for folder in (_env.tuned_dir(), _SHIPPED):
        entry = read(folder / f"{arch}.json").get(stem, {}).get(key)
        if entry is not None:
            return entry
    return None


def any_gemm(arch: str, kind: str, N: int, K: int) -> bool:
    """Whether ``gemm_key(kind, N, K, rows)`` has a fused GEMM for some number of rows."""
    tables = (read(folder / f"{arch}.json").get("linear", {}) for folder in (_env.tuned_dir(), _SHIPPED))
    start = f"{kind}/{N}/{K}/"
    return any(key.startswith(start) and entry["plan"] != "cublas" for table in tables for key, entry in table.items())


@functools.lru_cache
def read(path: Path) -> dict[str, Any]:
    """A table file; empty if there is none or, with a warning, if it is not one of this format."""
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning("%s is ignored: %s", path, error)
        return {}
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        _logger.warning("%s is ignored: it is not a table of format %d", path, FORMAT)
        return {}
    return table


def forget() -> None:
    """Read the files again at the next lookup."""
    _found.cache_clear()
    read.cache_clear()


@contextlib.contextmanager
def trying(stem: str, key: str, entry: dict[str, Any]) -> Iterator[None]:
    """Launchers find ``entry`` under ``key`` inside, whatever the tables hold: how ``vitkernels tune`` runs a candidate."""
    global _tried
    before, _tried = _tried, (stem, key, entry)
    try:
        yield
    finally:
        _tried = before


def write(path: Path, stem: str, key: str, entry: dict[str, Any]) -> None:
    """Add an entry to the table in ``path``, or replace it. Who reads meanwhile, or is interrupted, finds a whole table.

    Raises:
        OSError: the file cannot be written.
    """
    forget()
    table = {"format": FORMAT, **read(path)}
    table[stem] = dict(sorted({**table.get(stem, {}), key: entry}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(table, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
        forget()
