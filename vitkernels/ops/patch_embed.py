"""Patch embedding: pixels to tokens, with prefix tokens and positions. Parts as in ``layer_norm.py``."""

import torch
from torch import Tensor

from .. import _select, reference
from . import _check


def why_not(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """Reasons why the patch-embedding kernel cannot take these tensors; empty when it can."""
    return ["this version has no patch_embed kernel", *_select.why_not_here(images, weight, bias)]


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prefix_tokens: Tensor | None = None,
    pos_embed: Tensor | None = None,
    pos_embed_prefix: bool = True,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Patches projected, prefix tokens prepended, positions added (https://arxiv.org/abs/2010.11929, equation 1).

    Args:
        images: (B, C, H, W) float, or uint8 together with ``mean`` and ``std``; H and W multiples of the patch.
        weight: (D, C, p_h, p_w), the weight of timm's ``patch_embed.proj``; bias: (D,) or None.
        prefix_tokens: (1, P, D), class and register tokens, or None.
        pos_embed: (1, P + Gh*Gw, D), or (1, Gh*Gw, D) when ``pos_embed_prefix`` is False, or None.
        pos_embed_prefix: whether the positions cover the prefix tokens (timm: ``not no_embed_class``).
        mean, std: (C,), of pixels in 0..1, for uint8 images.

    Returns:
        (B, P + Gh*Gw, D), contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "patch_embed"
    _check.tensor(op, "images", images, (*_check.FLOATS, torch.uint8))
    _check.tensor(op, "weight", weight)
    _check.shape(op, "weight", weight, ("D", "C", "p_h", "p_w"))
    width, channels, patch_h, patch_w = weight.shape
    _check.shape(op, "images", images, ("B", channels, "H", "W"))
    height, image_width = images.shape[-2:]
    if height % patch_h or image_width % patch_w:
        raise ValueError(
            f"{op}: images of {height}x{image_width} do not divide into patches of {patch_h}x{patch_w}"
            " (timm's dynamic_img_pad pads them)"
        )
    _check.vector(op, "bias", bias, width)
    _check_prefix_and_positions(
        prefix_tokens, pos_embed, pos_embed_prefix, (height // patch_h) * (image_width // patch_w), width
    )
    _check_normalisation(images, mean, std, channels)
    _select.use_kernel(op, images, lambda: why_not(images, weight, bias))  # raises under "fused", never True yet
    return reference.patch_embed(
        images,
        weight,
        bias,
        prefix_tokens=prefix_tokens,
        pos_embed=pos_embed,
        pos_embed_prefix=pos_embed_prefix,
        mean=mean,
        std=std,
    )


def _check_prefix_and_positions(
    prefix_tokens: Tensor | None, pos_embed: Tensor | None, pos_embed_prefix: bool, patches: int, width: int
) -> None:
    num_prefix = 0
    if prefix_tokens is not None:
        _check.tensor("patch_embed", "prefix_tokens", prefix_tokens)
        _check.shape("patch_embed", "prefix_tokens", prefix_tokens, (1, "P", width))
        num_prefix = prefix_tokens.shape[1]
    if pos_embed is not None:
        _check.tensor("patch_embed", "pos_embed", pos_embed)
        rows = patches + (num_prefix if pos_embed_prefix else 0)
        _check.shape("patch_embed", "pos_embed", pos_embed, (1, rows, width))


def _check_normalisation(images: Tensor, mean: Tensor | None, std: Tensor | None, channels: int) -> None:
    if (images.dtype == torch.uint8) != (mean is not None and std is not None) or (mean is None) != (std is None):
        raise ValueError("patch_embed: mean and std belong to uint8 images: give both with uint8 and neither with float")
    _check.vector("patch_embed", "mean", mean, channels)
    _check.vector("patch_embed", "std", std, channels)
