"""Tuned tables: which plan and configuration was measured to be fastest, by GPU.

One JSON file a GPU's name, since an H100 and an H200 are both sm_90 and differ: the user's (``vitkernels tune`` writes it,
``_env.tuned_dir``) is asked first, the one shipped in ``tuned/`` second. ``nvidia_h100_80gb_hbm3.json``:

    {"format": 2, "linear": {"act/bfloat16/3072/768/65536": {"plan": "triton", "config": {...}}, ...}, "attention": ...}

Each key has the dtype of the product. Tables of format 1, one an architecture, had none; they are ignored, with a warning.
"""

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import _env

FORMAT = 2
_SHIPPED = Path(__file__).parent / "tuned"
_logger = logging.getLogger("vitkernels")
_tried: tuple[str, str, dict[str, Any]] | None = None  # stem, key and entry inside trying()


def file_name(gpu: str) -> str:
    """Of the table of the GPU that CUDA calls ``gpu``. Letters beyond ASCII stand there by their numbers."""
    plain = "".join(c if c.isascii() else f"_{ord(c):x}_" for c in gpu.lower())
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_") + ".json"


def bucket(rows: int) -> int:
    """The M of a table's key: the power of two at or above ``rows``, from 64 on."""
    return max(64, 1 << max(rows - 1, 0).bit_length())


@functools.cache  # formatting one takes as long as a look-up
def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, as keys have it."""
    return str(dtype).removeprefix("torch.")


def gemm_key(kind: str, dtype: torch.dtype, N: int, K: int, rows: int) -> str:
    """Key of the GEMM (rows, K) x (K, N) of ``dtype`` in the table of stem ``linear``.

    Args:
        kind: ``plain`` (bias only), ``act`` or ``residual``: what the epilogue can save. ``gelu_tanh``: ``act`` of that form,
            whose entry may be ``cublaslt``. ``norm`` and ``norm_act``: with a LayerNorm folded in; an entry ``cublas`` stands
            for LayerNorm, then whatever runs ``plain``, ``act`` or ``gelu_tanh``.
    """
    return f"{kind}/{dtype_name(dtype)}/{N}/{K}/{bucket(rows)}"


def lookup(gpu: str, stem: str, key: str) -> dict[str, Any] | None:
    """The entry of ``key`` for ``_device.gpu_of(x, arch)``, of the user's table or else the shipped one.

    After writing a table call ``forget``.
    """
    if _tried is not None and _tried[:2] == (stem, key):
        return _tried[2]
    return _found(gpu, stem, key)


@functools.lru_cache
def _found(gpu: str, stem: str, key: str) -> dict[str, Any] | None:
    entries = (table.get(stem, {}).get(key) for table in _tables(gpu))
    return next((entry for entry in entries if entry is not None), None)


def any_gemm(gpu: str, kind: str, dtype: torch.dtype, N: int, K: int) -> bool:
    """Whether ``gemm_key(kind, dtype, N, K, rows)`` has a fused GEMM for some number of rows."""
    start = f"{kind}/{dtype_name(dtype)}/{N}/{K}/"
    entries = (item for table in _tables(gpu) for item in table.get("linear", {}).items())
    return any(key.startswith(start) and entry["plan"] != "cublas" for key, entry in entries)


def _tables(gpu: str) -> Iterator[dict[str, Any]]:
    folder = _env.tuned_dir()
    if folder is None:
        _go_without("there is no home folder, and neither VITKERNELS_CACHE nor XDG_CACHE_HOME is set")
    elif _can_be_read(folder):
        yield read(folder / file_name(gpu))
    yield read(_SHIPPED / file_name(gpu))


@functools.cache
def _can_be_read(folder: Path) -> bool:
    """Whether one can look into this user's folder, or there is none yet. Warns of old tables in it."""
    try:
        files = os.listdir(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        _go_without(str(error))
        return False
    if any(re.fullmatch(r"sm_.*\.json", file) for file in files):
        why = "a table has its GPU's name now, and the dtype in its keys: `vitkernels tune` writes the new one"
        _ignore(f"every sm_*.json in {folder}", why)
    return True


@functools.cache  # once a process
def _go_without(why: str) -> None:
    _logger.info("no tuned tables of this user are read: %s", why)


@functools.lru_cache
def read(path: Path) -> dict[str, Any]:
    """A table file; empty if there is none or, with a warning, if it is not one of this format."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # the latter where the package is imported from a zip
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _ignore(path, str(error))
        return {}
    found = table.get("format") if isinstance(table, dict) else None
    if found == FORMAT and all(_is_stem(entries) for stem, entries in table.items() if stem != "format"):
        return table
    old = "it has format 1, whose keys lack the dtype: move it away, and `vitkernels tune` writes the new one"
    _ignore(path, old if found == 1 else f"it is not a table of format {FORMAT}")
    return {}


def _is_stem(entries: Any) -> bool:
    """Entries by key, each of which names its plan."""
    return isinstance(entries, dict) and all(isinstance(e, dict) and isinstance(e.get("plan"), str) for e in entries.values())


@functools.cache  # once a process, however often tables are read again
def _ignore(what: Path | str, why: str) -> None:
    _logger.warning("%s is ignored: %s", what, why)


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
        unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
        forget()
