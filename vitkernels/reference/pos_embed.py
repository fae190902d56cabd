"""Resampling of learned position embeddings to another grid, by the rules of timm's ``resample_abs_pos_embed``.

    (1)  the P prefix rows pass through, the h*w others form an image of D channels
    (2)  that image is interpolated in float32 (float64 stays) and cast back once

Interpolation is separable: with a matrix R_h (h', h) of weights along an axis, and the gradient is its transpose,

    (3)  y[i, j] = sum over r of R_h[i, r] * (sum over c of R_w[j, c] * x[r, c])
    (4)  dx[r, c] = sum over i of R_h[i, r] * (sum over j of R_w[j, c] * dy[i, j])

Bicubic kernels differ: a = -0.5 with antialiasing and a = -0.75 without (PyTorch's ``interpolate``).
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._recording import holds

_logger = logging.getLogger("vitkernels")


def resample_pos_embed(
    posemb: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
    verbose: bool = False,
    align_corners: bool | None = None,
) -> Tensor:
    """Equations (1) and (2). See ``vitkernels.ops.resample_pos_embed``. TorchScript can compile it."""
    if unchanged(posemb, new_size, old_size, num_prefix_tokens):
        return posemb
    old_size = grid_of(posemb, old_size, num_prefix_tokens)
    if verbose and not torch.jit.is_scripting():
        log_resizing(old_size, new_size)
    corners = align_corners is not None and align_corners
    return copies(posemb, [new_size], old_size, num_prefix_tokens, interpolation, antialias, corners)[None]


def resample_pos_embed_many(
    posemb: Tensor,
    sizes: Sequence[tuple[int, int]],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    interpolation: str = "bicubic",
    antialias: bool = True,
    *,
    align_corners: bool = False,
    preserve_aspect_ratio: bool = False,
    pad_to: int | None = None,
) -> Tensor:
    """Equations (1) and (2) for each size. See ``vitkernels.ops.resample_pos_embed_many``."""
    arguments = (posemb, list(sizes), grid_of(posemb, old_size, num_prefix_tokens), num_prefix_tokens)
    rows = copies(*arguments, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to)
    return rows if pad_to is None else rows.reshape(len(sizes), pad_to, posemb.shape[-1])


def copies(
    posemb: Tensor,
    sizes: list[tuple[int, int]],
    old_size: tuple[int, int],
    num_prefix_tokens: int,
    interpolation: str,
    antialias: bool,
    align_corners: bool,
    preserve_aspect_ratio: bool = False,
    pad_to: int | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Rows (total, D): a copy for each size, prefix rows included; with ``pad_to``, each cut or padded with zeros to it.

    ``compute`` is the dtype of equation (2), by default the promotion of float32 and ``posemb``'s.
    """
    prefix, grid = posemb[0, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    if compute is None:
        compute = torch.promote_types(torch.float32, grid.dtype)
    # In timm's layout, channels innermost: in others F.interpolate with antialias is wrong for outputs of width 1 (torch 2.15).
    image = grid.to(compute).contiguous().reshape(1, old_size[0], old_size[1], posemb.shape[-1])
    image = image.permute(0, 3, 1, 2)  # (1, D, h, w)
    found: list[Tensor] = []
    for height, width in sizes:
        # timm's NaFlex: the square, upper left kept
        full = [max(height, width), max(height, width)] if preserve_aspect_ratio else [height, width]
        copy = grid[0]
        if not (holds(height == old_size[0]) and holds(width == old_size[1])):
            resampled = F.interpolate(image, size=full, mode=interpolation, antialias=antialias, align_corners=align_corners)
            resampled = resampled[:, :, :height, :width].permute(0, 2, 3, 1)
            copy = resampled.reshape(-1, posemb.shape[-1]).type_as(posemb)  # of a traced program, too, that is cast later
        if num_prefix_tokens > 0:
            copy = torch.cat([prefix, copy])
        if pad_to is not None:
            copy = F.pad(copy[:pad_to], [0, 0, 0, pad_to - min(copy.shape[0], pad_to)])
        found.append(copy)
    if len(found) == 0:
        return posemb[0, :0].clone()
    return torch.cat(found)  # of one, too: a table of its own size stays no view of posemb


def resampling_matrix(old: int, new: int, interpolation: str, antialias: bool, align_corners: bool) -> Tensor:
    """R (new, old) of equation (3), in float32 on the CPU."""
    image = torch.eye(old, device="cpu", dtype=torch.float32)[None, None]
    # A second axis of the same size stays as it is: on one of size 1, F.interpolate with antialias is wrong on CPUs (2.15).
    return F.interpolate(image, size=(new, old), mode=interpolation, antialias=antialias, align_corners=align_corners)[0, 0]


def grid_of(posemb: Tensor, old_size: tuple[int, int] | None, num_prefix_tokens: int) -> tuple[int, int]:
    """(h, w): the given one, or the square of as many tokens."""
    if old_size is not None:
        return old_size
    side = int(math.sqrt(posemb.shape[1] - num_prefix_tokens))  # Dynamo cannot trace isqrt; exact for squares up to 2^52
    return side, side


def log_resizing(old_size: tuple[int, int], new_size: tuple[int, int]) -> None:
    """What timm logs when asked to be verbose. A compiled graph cannot."""
    if not torch.compiler.is_compiling():
        _logger.info("Resized position embedding: %s to %s.", tuple(old_size), tuple(new_size))


def unchanged(posemb: Tensor, new_size: tuple[int, int], old_size: tuple[int, int] | None, num_prefix_tokens: int) -> bool:
    """Whether timm would return ``posemb`` itself: nothing changes, at any size that a program is exported for."""
    if not holds(posemb.shape[1] == new_size[0] * new_size[1] + num_prefix_tokens):
        return False
    if old_size is None:
        return holds(new_size[0] == new_size[1])
    return holds(old_size[0] == new_size[0]) and holds(old_size[1] == new_size[1])
