"""``.ci/run`` with programs that do nothing: which commands run, in what order, in which virtual environment."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands for every program of a virtual environment: writes down its environment, name and arguments. FAILS fails, once called.
PROGRAM = """#!/usr/bin/env bash
folder=$(dirname "$(dirname "$0")")
echo "$(basename "$folder"): $(basename "$0") $(sed "s/ *$//" <<<"$*")" >>"$LOG"
[ "$(basename "$folder"): $(basename "$0") $*" != "$FAILS" ]
"""
# The machine's Python makes virtual environments of such programs; what else it is asked, it does.
PYTHON3 = """#!/usr/bin/env bash
if [ "$1 $2" != "-m venv" ]; then exec "$PYTHON" "$@"; fi
mkdir -p "$3/bin"
for name in pip pytest python ruff mypy vitkernels; do cp "$PROGRAM" "$3/bin/$name"; done
"""


@pytest.fixture
def checkout(tmp_path):
    """What .ci/run reads, in a folder of its own."""
    for name in (".ci/run", "README.md", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def ci(checkout: Path, fails: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
    """The finished script, and the commands that it ran."""
    programs, log = checkout / "programs", checkout / "log"
    programs.mkdir()
    for path, text in ((programs / "python3", PYTHON3), (checkout / "program", PROGRAM)):
        path.write_text(text)
        path.chmod(0o755)
    log.touch()
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "PYTHON": sys.executable, "FAILS": fails}
    env["PROGRAM"] = str(checkout / "program")
    result = subprocess.run(["bash", ".ci/run"], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    return result, log.read_text().splitlines()


def lower_bound(package: str) -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(found[1] for line in dependencies if (found := re.match(rf"{package}>=([\d.]+),", line)))


def test_both_stacks_run_the_whole_suite_and_the_benchmark_and_todays_the_linters(checkout):
    result, ran = ci(checkout)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(".ci/run: both stacks are green\n")
    floor = " ".join(f"{package}=={lower_bound(package)}" for package in ("torch", "triton", "timm"))
    assert ran == [
        "today: pip install -e .[test]",
        "today: pytest ",
        "today: python - today's stack",
        "today: pip install -e .[bench]",
        "today: vitkernels bench --models vit_tiny_patch16_224 --batch-sizes 1 --rounds 3",
        "today: pip install -e .[dev]",
        "today: ruff check",
        "today: ruff format --check",
        "today: mypy ",
        f"floor: pip install {floor}",
        "floor: pip install -e .[test]",
        "floor: python - the floor",
        "floor: pytest ",
        "floor: pip install -e .[bench]",
        "floor: vitkernels bench --models vit_tiny_patch16_224 --batch-sizes 1 --rounds 3",
    ]


@pytest.mark.parametrize("fails", ["today: pytest ", "today: ruff format --check", "today: mypy ", "floor: pytest "])
def test_what_fails_ends_it(fails, checkout):
    result, ran = ci(checkout, fails)
    assert result.returncode != 0
    assert ran[-1] == fails
    assert "green" not in result.stdout


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("README.md", 'pip install -e ".[dev]" && ruff check', "ruff check", "expected one fenced line in README.md"),
        ("pyproject.toml", "triton>=", "triton~=", "expected one lower bound of triton in pyproject.toml, found: none"),
    ],
)
def test_nothing_runs_where_a_command_or_a_floor_is_not_found(file, old, new, message, checkout):
    text = (checkout / file).read_text()
    assert text.count(old) == 1
    (checkout / file).write_text(text.replace(old, new))
    result, ran = ci(checkout)
    assert result.returncode != 0
    assert message in result.stderr
    assert ran == []


def test_versions_are_shown_where_the_extension_was_built():
    pytest.importorskip("vitkernels._C")
    script = re.search(r"show_stack\(\) \{\n    python - .*<<'EOF'\n(.*?)\nEOF", (ROOT / ".ci/run").read_text(), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-", "the floor"],
        input=script[1], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = ("python", "torch", "torchvision", "triton", "timm", "numpy")
    assert re.fullmatch("the floor: " + ", ".join(rf"{name} [\w.+]+" for name in names), result.stdout.splitlines()[0])
