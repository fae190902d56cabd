"""A pytest plugin for the tests of ``gpu_round.py``: results are written one by one, and a run that is cut has seen every file.

``pytest -p round_pytest`` with ``VITKERNELS_ROUND_ROWS=tests.jsonl`` appends a JSON line for each test to that file. It leaves
out the tests that stand in ``tests.known``, which does not grow meanwhile: a worker of xdist that replaces a crashed one has to
collect the same tests. The others are taken in turns, one of each test file, those of the operators first.
"""

import itertools
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
from gpu_round import read_rows

OPERATORS = ("linear", "mlp", "attention", "layer_norm", "patch_embed", "fold", "pos_embed", "registration")  # of test files
ROWS = Path(os.environ["VITKERNELS_ROUND_ROWS"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = {row["id"] for row in read_rows(ROWS.with_suffix(".known"))}
    files: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.nodeid not in known:
            files[item.path.stem].append(item)
    first = [file for file in files if file.startswith(tuple(f"test_{name}" for name in OPERATORS))]
    later = [file for file in files if file not in first]
    items[:] = [item for group in (first, later) for item in _in_turns([files[file] for file in group])]


def _in_turns(files: list[list[pytest.Item]]) -> list[pytest.Item]:
    turns = itertools.zip_longest(*files)
    return [item for turn in turns for item in turn if item is not None]


@pytest.hookimpl(trylast=True)  # a worker of xdist sends the report first
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of a test's own call; of setting it up and taking it down only what fails or skips. With xdist, in the main process."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        if report.failed and _gpu_is_in_error():
            os._exit(1)  # every test after an invalid access would fail in this process: xdist starts another
        return
    if report.when != "call" and report.passed:
        return
    row = {"id": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        row["wrong"] = str(report.longrepr if crash is None else crash.message).strip()[:1000]
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _gpu_is_in_error() -> bool:
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
