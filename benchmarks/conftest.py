"""``--size``, one measurement per case, and pytest-benchmark's timer replaced by the clock that replays it."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from protocol import CLOCK, Outcome, describe, measure

from vitkernels.cli import _environment

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # helpers.py: the error budget is the tests'


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "how much the benchmarks measure: a first look, or every model and batch (default: small)"
    parser.addoption("--size", choices=("small", "full"), default="small", help=text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark asks for ``outcomes`` and ``provider``; its module has CASES(size, device) and PROVIDERS."""
    if "outcomes" not in metafunc.fixturenames:
        return
    cases = metafunc.module.CASES(metafunc.config.getoption("--size"), _device().type)
    metafunc.parametrize("outcomes", cases, ids=str, indirect=True, scope="module")
    metafunc.parametrize("provider", metafunc.module.PROVIDERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "outcomes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))


@functools.cache
def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def environment() -> dict[str, Any]:
    return {**_environment.environment(), "device": str(_device()), "input": "random", "weights": "random"}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, environment: dict[str, Any]) -> dict[str, Outcome]:
    """What became of each selected provider of one case, all measured interleaved."""
    case, module, device = request.param, request.module, _device()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # its limit on recompilations counts across models, and beyond it eager would run silently
    contest = module.contest(case, device, request.config.getoption("--size"))
    found = measure(_selected(request, case), contest.build, device, case.batch, kernel=case.subject != "model")
    describe(found, module, case, device, environment)
    return found


def _selected(request: pytest.FixtureRequest, case: object) -> list[str]:
    """The providers of the case that -k left, and eager."""
    items: list[Any] = list(request.session.items)
    mine = [i for i in items if getattr(i, "callspec", None) and i.callspec.params.get("outcomes") == case]
    return list(dict.fromkeys(["eager", *(item.callspec.params["provider"] for item in mine)]))
