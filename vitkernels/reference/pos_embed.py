"""Resampling of learned position embeddings to another grid, by the rules of timm's ``resample_abs_pos_embed``.

    (1)  the P prefix rows pass through, the h*w others form an image of D channels
    (2)  that image is interpolated in float32 (float64 stays) and cast back once

Bicubic kernels differ: a = -0.5 with antialiasing and a = -0.75 without (PyTorch's ``interpolate``).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_pos_embed(
    posemb: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Equations (1) and (2). See ``vitkernels.ops.resample_pos_embed``."""
    if unchanged(posemb, new_size, old_size, num_prefix_tokens):
        return posemb
    if old_size is None:
        side = math.isqrt(posemb.shape[1] - num_prefix_tokens)
        old_size = (side, side)
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    image = grid.to(torch.promote_types(torch.float32, grid.dtype))
    image = image.reshape(1, *old_size, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image, size=tuple(new_size), mode=interpolation, antialias=antialias)
    grid = image.permute(0, 2, 3, 1).reshape(1, -1, posemb.shape[-1]).to(posemb.dtype)
    return torch.cat([prefix, grid], dim=1) if num_prefix_tokens else grid


def unchanged(posemb: Tensor, new_size: tuple[int, int], old_size: tuple[int, int] | None, num_prefix_tokens: int) -> bool:
    """Whether timm would return ``posemb`` itself: nothing changes, and the graph is not being exported for all sizes."""
    if torch.compiler.is_exporting() or posemb.shape[1] != new_size[0] * new_size[1] + num_prefix_tokens:
        return False
    if old_size is None:
        return new_size[0] == new_size[1]
    return tuple(old_size) == tuple(new_size)
