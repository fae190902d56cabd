"""What is asserted of every compiled kernel, whichever Triton compiled it, and what is expected of a version by name.

``compiled.json`` has the versions that were read, 3.6 and 3.8, and is written by the command that the tests run:

    vitkernels inspect --workload B/16 --record tests/compiled.json

with each Triton in turn, then for attention and attention_backward with --arch 90 and all --head-dims. Of everything else
that the slow tests compile (all workloads, head dims and architectures, and what no workload launches) it has the launches
that spill or fit fewer blocks on one of the two, merged from the rows that those tests look at.
"""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from vitkernels.cli import _compiled

TABLE = Path(__file__).with_name("compiled.json")
MOST_SPILLED = 64  # bytes of a thread, on any Triton, at the workloads


def assert_sound(
    rows: Iterable[dict[str, Any]],
    *,
    workloads: bool = True,
    recorded: bool = False,
    table: _compiled.Table | None = None,
    triton: str | None = None,
) -> None:
    """Everywhere: each row fits its chip, uses tensor cores where it multiplies matrices, and spills little.

    On a version that the table has: it spills no more bytes than the table says (none, where the table says nothing of it), and
    no fewer blocks fit an SM. Not exactly as many: a kernel that became better is no fault, and an edit that moves a register
    count without losing a block is none either, so registers are in the table to be read, not to be compared.

    Args:
        rows: of ``inspect --json``.
        workloads: they are launches of the workloads, where at most 64 bytes are spilled.
        recorded: the table has to have each of them, for the versions that it has.
        table, triton: ``compiled.json`` and the installed version, unless a test has others.
    """
    table = _compiled.read(TABLE) if table is None else table
    version = _compiled.version(metadata.version("triton") if triton is None else triton)
    listed = any(version in entry for entry in table.values())
    wrong = []
    for row in rows:
        entry = next((table[name][version] for name in _compiled.launches(row) if version in table.get(name, ())), None)
        found = _everywhere(row, MOST_SPILLED if workloads else None)
        if listed:
            found += _of_this_version(row, entry, recorded)
        wrong += [f"{_compiled.launches(row)[0]}: {what}" for what in found]
    assert not wrong, f"Triton {version}:\n" + "\n".join(wrong)


def _everywhere(row: dict[str, Any], most_spilled: int | None) -> list[str]:
    found, spilled = [], _compiled.spilled(row)
    if row["blocks_per_sm"] < 1 or row["shared_bytes"] > row["shared_limit"]:
        found.append(f"does not fit: {row['shared_bytes']} bytes of shared memory, {row['registers']} registers")
    if row["has_dot"] and not any(row["mma"].values()):
        found.append("multiplies matrices without tensor cores")
    if most_spilled is not None and spilled > most_spilled:
        found.append(f"spills {spilled} bytes, more than {most_spilled}")
    return found


def _of_this_version(row: dict[str, Any], entry: dict[str, int] | None, recorded: bool) -> list[str]:
    spilled, found = _compiled.spilled(row), []
    if entry is None and recorded:
        found.append("is not in tests/compiled.json: see tests/compiled.py")
    allowed = 0 if entry is None else entry["spilled"]
    if spilled > allowed:
        found.append(f"spills {spilled} bytes, the table says {allowed}")
    if entry is not None and row["blocks_per_sm"] < entry["blocks"]:
        found.append(f"{row['blocks_per_sm']} blocks fit an SM, the table says {entry['blocks']}")
    return found
