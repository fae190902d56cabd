"""The roofline of a model on the GPU at hand: what ``vitkernels bench`` and ``benchmarks/`` show beside their measurements.

Counted as ``vitkernels roofline`` does, on a model of its own without data: what is measured is not touched.
"""

import functools
import itertools
import re
from typing import Any

import torch
from torch import nn

from . import roofline
from ._chips import CHIPS
from ._output import CommandError

# In the names of variants whose rates are not those of the table: other memory, fewer multiprocessors, a lower clock.
_OTHER_VARIANTS = {"PCIE", "NVL", "40GB", "MIG", "LAPTOP", "D"}


def chip_of(device: torch.device) -> str | None:
    """The name of the GPU in ``CHIPS``; None on a CPU and for a GPU that is not there."""
    gpu = _gpu_name(device)
    return chip_named(gpu) if gpu else None


def _gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def chip_named(gpu: str) -> str | None:
    """The name in ``CHIPS`` for what the driver calls a GPU, word by word: a GH200 is not an H200."""
    words = re.findall(r"[A-Z0-9]+", gpu.upper())
    if _OTHER_VARIANTS & set(words):
        return None
    joined = {*words, *(a + b for a, b in itertools.pairwise(words))}  # "RTX 5090" is two words
    return next((name for name in CHIPS if name.upper() in joined), None)


@functools.lru_cache(maxsize=64)  # one count for all providers of a case
def inference(name: str, batch: int, chip: str) -> dict[str, float] | None:
    """Of the stock model's forward in bfloat16; None for a model that does not run without data.

    Returns:
        ``floor_ms``: every operator of timm's model at the chip's rates; ``ideal_images_per_s``: matrix products at the full
        rate, and nothing moved but images, weights and logits.
    """
    try:
        model = _stock(name)
        counts: dict[str, Any] = {"eager": {batch: roofline._forward(model, batch, CHIPS[chip])}}
    except (CommandError, RuntimeError, NotImplementedError, AssertionError):
        return None
    floor_us = roofline._sums(counts["eager"][batch].forward, 1, CHIPS[chip])["floor_us"]
    return {
        "floor_ms": floor_us / 1000,
        "ideal_images_per_s": roofline._predicted(model, batch, counts, CHIPS[chip])["ideal"],
    }


@functools.lru_cache(maxsize=1)
def _stock(name: str) -> nn.Module:
    return roofline._on_meta(name).to(torch.bfloat16)
