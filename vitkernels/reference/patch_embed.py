"""Patch embedding (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 1).

(1)  pixels = images, or (images / 255 - mean) / std per channel for uint8 images
(2)  t      = weight applied to each p x p patch + bias         a stride-p convolution, (B, Gh*Gw, D)
(3)  out    = [prefix_tokens ; t] + pos_embed                   pos_embed_prefix: positions cover the prefix as well
     out    = [prefix_tokens ; t + pos_embed]                   otherwise

Backward, with g the rows of dout that are patches and X the patches, (B*Gh*Gw, C*p*p):

(4)  dweight = g^T X,   dbias = sum of g's rows
(5)  dimages = g weight, each row put back in its patch (none for uint8)
(6)  dprefix_tokens, dpos_embed = sums over the batch of the rows of dout that they were added to
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._recording import cast


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prefix_tokens: Tensor | None = None,
    pos_embed: Tensor | None = None,
    pos_embed_prefix: bool = True,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Equations (1) to (3). See ``vitkernels.ops.patch_embed``."""
    mean, std = pixel_statistics(mean, std, images, weight)
    if images.dtype != torch.uint8:
        images = cast(images, weight.dtype)
    return scriptable_patch_embed(images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std)


def scriptable_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed: Tensor | None,
    pos_embed_prefix: bool,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """``patch_embed`` for TorchScript, which compiles no function with keyword-only arguments; float images as they are."""
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("patch_embed: uint8 images need mean and std")
        images = normalise(images, mean, std).type_as(weight)
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)  # (B, Gh*Gw, D)
    if pos_embed is not None and not pos_embed_prefix:
        tokens = tokens + pos_embed
    if prefix_tokens is not None:
        tokens = torch.cat([prefix_tokens.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if pos_embed is not None and pos_embed_prefix:
        tokens = tokens + pos_embed
    return tokens.contiguous()


def pixel_statistics(mean: Any, std: Any, images: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``mean`` and ``std`` as tensors on the device of ``images``: what is a tensor already, or None, as it is.

    Numbers become float32, or float64 where the weight is.

    Raises:
        TypeError, ValueError: no numbers, not one for each channel, not finite, or a ``std`` of 0.
    """
    channels, dtype = weight.shape[1], torch.promote_types(torch.float32, weight.dtype)
    found = []
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and not isinstance(value, Tensor):
            value = torch.tensor(_numbers(name, value, channels, dtype), dtype=dtype, device=images.device)
        found.append(value)
    return found[0], found[1]


def _numbers(name: str, value: Any, channels: int, dtype: torch.dtype) -> list[float]:
    accepted = f"patch_embed: {name} must be a Tensor, or a list or tuple of {channels} numbers"
    values = value.tolist() if hasattr(type(value), "tolist") else value  # an array of NumPy
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{accepted}, got {type(value).__name__}")
    values = [v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for v in values]
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{accepted}, got {value!r}")
    if len(values) != channels:
        raise ValueError(f"{accepted}, got {len(values)}")
    limits = torch.finfo(dtype)
    if not all(-limits.max <= v <= limits.max for v in values):
        raise ValueError(f"{accepted}, all finite, got {value!r}")
    if name == "std" and not all(abs(v) >= limits.tiny for v in values):
        raise ValueError(f"{accepted}, none of them 0, got {value!r}")
    return [float(v) for v in values]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Equation (1) of uint8 images, in float32 (float64 for a float64 ``mean``). Both are constants."""
    # Divided by a tensor instead of cast: an exported cast asserts the device, too.
    largest = mean.new_full([1], 255.0, dtype=torch.promote_types(torch.float32, mean.dtype))
    return (images / largest - mean.detach().view(-1, 1, 1)) / std.detach().view(-1, 1, 1)
