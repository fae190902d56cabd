"""Argument checks shared by the public operators. Each error names the argument, what came and what is accepted."""

import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """``value`` is a tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be of dtype {accepted}, got {str(value.dtype).removeprefix('torch.')}")


def shape(op: str, name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """``value`` has the expected shape; a letter stands for any size (``("B", "N", 768)``)."""
    sizes = value.shape
    if len(sizes) == len(expected):
        for size, want in zip(sizes, expected, strict=True):
            if size != want and not isinstance(want, str):
                break
        else:
            return
    wanted = ", ".join(str(want) for want in expected)
    raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(sizes)}")


def vector(op: str, name: str, value: Tensor | None, size: int) -> None:
    """``value`` is None or a float vector of ``size`` elements."""
    # The first line says the same as the two below, in a quarter of their time: a block checks nine vectors a call.
    if value is None or (isinstance(value, Tensor) and value.dtype in FLOATS and value.shape == (size,)):
        return
    tensor(op, name, value)
    shape(op, name, value, (size,))


def broadcastable(op: str, name: str, value: Tensor, full: tuple[int, ...]) -> None:
    """``value`` broadcasts to shape ``full`` without enlarging it."""
    sizes = tuple(value.shape)
    if len(sizes) > len(full) or any(
        size not in (1, want) for size, want in zip(reversed(sizes), reversed(full), strict=False)
    ):
        raise ValueError(f"{op}: {name} must broadcast to {full}, got {sizes}")


def last_dim(op: str, name: str, value: Tensor) -> int:
    """The size of the last dimension; a 0-d tensor has none."""
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a 0-d tensor")
    return value.shape[-1]


def number(op: str, name: str, value: Any, kind: type = numbers.Real) -> None:
    """``value`` is a number of ``kind``; also, as PyTorch has it, a 0-d tensor of one, which would get no gradient."""
    if type(value) is float and kind is numbers.Real:
        return
    if isinstance(value, (kind, torch.SymInt) if kind is numbers.Integral else (kind, torch.SymInt, torch.SymFloat)):
        return
    got = type(value).__name__
    if isinstance(value, Tensor) and value.dim() == 0:
        fits = not value.is_complex() if kind is numbers.Real else not (value.is_complex() or value.is_floating_point())
        if fits and not value.requires_grad:
            return
        got = "one that requires a gradient" if fits else f"one of {value.dtype}"
    raise TypeError(f"{op}: {name} must be {'an integer' if kind is numbers.Integral else 'a number'}, got {got}")


def choice(op: str, name: str, value: Any, accepted: Collection[Any]) -> None:
    """``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
