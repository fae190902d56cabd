"""Whole models: throughput and memory per size, inference and training. ``pytest benchmarks/ --benchmark-only -k models``."""

from typing import Any

import torch
from protocol import Outcome, report
from providers import MODEL_PROVIDERS, ModelContest, dtype_on
from workloads import Case, cases

from vitkernels.cli import _floor

PROVIDERS = MODEL_PROVIDERS


def CASES(size: str, device: str) -> list[Case]:
    return cases("model", size, device)


def DTYPE(device: torch.device) -> str:
    return str(dtype_on(device)).removeprefix("torch.")


def contest(case: Case, device: torch.device, size: str) -> ModelContest:
    return ModelContest(case, device, size)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """Images per second at the roofline; None in training, on a CPU and on an unknown GPU."""
    chip = _floor.chip_of(device) if case.mode == "infer" else None
    found = _floor.inference(case.workload.timm_name, case.batch, chip) if chip else None
    return {"ideal_images_per_s": found["ideal_images_per_s"] if found else None}


def test_model(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
