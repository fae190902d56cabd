"""The table of what kernels compiled to, by Triton version: ``inspect --record`` writes it and the tests read it.

A line for each launch (stem, architecture, kernel, configuration), and in it for each ``major.minor`` of Triton the registers
and spilled bytes of a thread and the blocks an SM: of the worst, where a launch has several binaries of one kernel.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Table = dict[str, dict[str, dict[str, int]]]  # launch -> version -> counts


def version(text: str) -> str:
    """``3.6`` of ``3.6.0``: what a table tells apart."""
    return ".".join(text.split(".")[:2])


def launches(row: dict[str, Any]) -> list[str]:
    """The names of the launches that have this row's binary."""
    return [f"{row['stem']} sm_{row['arch']} {row['kernel']} {config}" for config in row["configs"]]


def spilled(row: dict[str, Any]) -> int:
    """Bytes of a thread that registers did not hold: stored or loaded, whichever are more; else of an array that lies there."""
    return max(row["spill_bytes"], row["spill_load_bytes"]) or row["stack_bytes"]


def read(path: Path) -> Table:
    """The table; an empty one where there is no file.

    Raises:
        OSError, ValueError: the file cannot be read as a table.
    """
    if not path.exists():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError("it is no table of launches")
    return table


def merge(table: Table, rows: Iterable[dict[str, Any]], triton: str) -> None:
    """Put what was compiled with this version in place of what the table says of the same launches."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = {"registers": row["registers"], "spilled": spilled(row), "blocks": row["blocks_per_sm"]}
        for name in launches(row):
            found[name] = _worst(found.get(name, counts), counts)
    for name, counts in found.items():
        table.setdefault(name, {})[version(triton)] = counts


def _worst(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Of each count the one that is harder on the chip."""
    return {name: (min if name == "blocks" else max)(one[name], other[name]) for name in one}


def write(path: Path, table: Table) -> None:
    """A line for each launch, in an order that does not depend on the run.

    Raises:
        OSError: the file cannot be written.
    """
    lines = (f"  {json.dumps(name)}: {json.dumps(dict(sorted(entry.items())))}" for name, entry in sorted(table.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
