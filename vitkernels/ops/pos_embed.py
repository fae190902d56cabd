"""Resampling of position embeddings. Parts as in ``layer_norm.py``; the kernel is the CUDA C++ extension's."""

import math

import torch
from torch import Tensor

from .. import _select, reference
from ..reference.pos_embed import unchanged
from . import _check

INTERPOLATIONS = ("bicubic", "bilinear")


def why_not(posemb: Tensor) -> list[str]:
    """Reasons why the resampling kernel cannot take this tensor; empty when it can."""
    return ["this version's extension has no resampling kernel"]


def resample_pos_embed(
    posemb: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Resample a position embedding to another grid, exactly as ``timm.layers.resample_abs_pos_embed``.

    Args:
        posemb: (1, P + h*w, D), any float dtype; computed in float32 and cast back once.
        new_size: (h', w') of the new grid.
        old_size: (h, w); default: the square of as many tokens.
        num_prefix_tokens: P, rows that pass through untouched.
        interpolation: ``"bicubic"`` (a = -0.5 with antialias, -0.75 without) or ``"bilinear"``.
        antialias: widen the filter when downsampling.

    Returns:
        (1, P + h'*w', D); ``posemb`` itself when nothing changes.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "resample_pos_embed"
    _check.tensor(op, "posemb", posemb)
    _check.shape(op, "posemb", posemb, (1, "P + h*w", "D"))
    _check.choice(op, "interpolation", interpolation, INTERPOLATIONS)
    tokens = posemb.shape[1] - num_prefix_tokens
    if num_prefix_tokens < 0 or tokens < 1:
        raise ValueError(f"{op}: num_prefix_tokens must leave at least one of {posemb.shape[1]} rows, got {num_prefix_tokens}")
    if len(new_size) != 2 or min(new_size) < 1:
        raise ValueError(f"{op}: new_size must be two positive integers, got {tuple(new_size)}")
    if old_size is None:
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{op}: old_size is needed, since {tokens} tokens are not a square grid")
    elif len(old_size) != 2 or old_size[0] * old_size[1] != tokens:
        raise ValueError(f"{op}: old_size must be two integers with product {tokens}, got {tuple(old_size)}")
    _select.use_kernel(op, posemb, lambda: why_not(posemb))  # raises under "fused", never True yet
    args = (new_size, old_size)
    if posemb.dtype != torch.float64 or unchanged(posemb, *args, num_prefix_tokens):
        return reference.resample_pos_embed(posemb, *args, num_prefix_tokens, interpolation, antialias)
    # timm computes in float32 whatever the dtype; the reference keeps float64 for being the oracle.
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:].float()
    grid = reference.resample_pos_embed(grid, *args, 0, interpolation, antialias)
    return torch.cat([prefix, grid.to(posemb.dtype)], dim=1)
