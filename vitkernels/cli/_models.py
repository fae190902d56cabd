"""Models, devices and dtypes as the command line names them."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._output import CommandError

SIZES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}
DTYPES = ("float32", "bfloat16", "float16")


def check_name(name: str) -> str:
    """timm's name for a model or a size, or an error that proposes similar names."""
    import timm

    name = SIZES.get(name, name)
    architecture = name.partition(".")[0]
    if timm.is_model(architecture):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            raise CommandError(f"unknown weights tag in {name!r}: {error}") from error
        return name
    near = difflib.get_close_matches(architecture, [*SIZES, *timm.list_models("*vit*")], n=3)
    raise CommandError(f"unknown model {name!r}" + (f", did you mean {' or '.join(near)}?" if near else ""))


def create(name: str, **options: Any) -> nn.Module:
    """timm's model in evaluation mode; ``options`` go to ``timm.create_model``."""
    import timm

    try:
        return timm.create_model(name, **options).eval()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise CommandError(f"timm cannot create {name}: {error}") from error


def fuse(model: nn.Module, name: str) -> nn.Module:
    """``vitkernels.fuse``, with a model that it cannot take reported as an error of the command."""
    import vitkernels

    try:
        return vitkernels.fuse(model)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"{name} cannot be fused: {error}") from error


def pick_device(text: str | None) -> torch.device:
    """The device asked for, else the GPU if there is one, else the CPU."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"unknown device {text!r}; accepted: cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"device {text} was asked for, but PyTorch finds no usable NVIDIA GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"device {text} was asked for, but there are only {torch.cuda.device_count()} GPUs here")
    return device


def listed(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: comma-separated items without repeats."""

    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
