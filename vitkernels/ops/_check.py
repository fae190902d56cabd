"""Argument checks shared by the public operators. Each error names the argument, what came and what is accepted."""

import numbers
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INT64 = (-(2**63), 2**63 - 1)


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
    if not broadcasts(tuple(value.shape), full):
        raise ValueError(f"{op}: {name} must broadcast to {full}, got {tuple(value.shape)}")


def broadcasts(sizes: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Does shape ``sizes`` broadcast to ``full`` without enlarging it?"""
    return len(sizes) <= len(full) and all(
        size in (1, want) for size, want in zip(reversed(sizes), reversed(full), strict=False)
    )


def last_dim(op: str, name: str, value: Tensor) -> int:
    """The size of the last dimension; a 0-d tensor has none."""
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a 0-d tensor")
    return value.shape[-1]


def number(op: str, name: str, value: Any) -> Any:
    """``value`` as a float: of any real number; also, as PyTorch has it, of a 0-d tensor, which would get no gradient.

    What stands for a number while a graph is recorded stays as it is.
    """
    if type(value) is float:
        return value
    if not isinstance(value, (int, numbers.Real)):  # int first: it is known at once
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return value
        got, fits = type(value).__name__, False
        if isinstance(value, Tensor) and value.dim() == 0:
            fits = not (value.is_complex() or value.requires_grad)
            if fits and torch.compiler.is_compiling():
                return value
            got = f"one of {value.dtype}" if value.is_complex() else "one that requires a gradient"
        if not fits:
            raise TypeError(f"{op}: {name} must be a number, got {got}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a number that a float can hold, got a larger one") from None


def integer(op: str, name: str, value: Any) -> Any:
    """``value`` as an int of 64 bits: of what has ``__index__`` and is no bool; as PyTorch has it, of a tensor of one element.

    What stands for an integer while a graph is recorded stays as it is: a tensor, too, which ``torch.jit.trace`` makes of a
    size. While compiling no int is compared with a limit, since that would become a condition on the input's sizes.
    """
    if type(value) is int and (torch.compiler.is_compiling() or _INT64[0] <= value <= _INT64[1]):
        return value
    if isinstance(value, torch.SymInt):
        return value
    fits = not isinstance(value, bool)
    if isinstance(value, Tensor):
        fits = value.numel() == 1 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if fits and (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None):
            return value
    try:
        found = operator.index(value) if fits else None
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if not _INT64[0] <= found <= _INT64[1]:
        raise ValueError(f"{op}: {name} must be an integer of 64 bits, got a larger one")
    return found


def flag(op: str, name: str, value: Any) -> None:
    """``value`` is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{op}: {name} must be one of True, False, got {value!r}")


def choice(op: str, name: str, value: Any, accepted: Collection[str | None]) -> None:
    """``value`` is one of the names ``accepted``."""
    # Only names are compared: an array would compare its elements.
    if (isinstance(value, str) or value is None) and value in accepted:
        return
    raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
