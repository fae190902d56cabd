"""Patch embedding: pixels to tokens, with prefix tokens and positions. Parts as in ``layer_norm.py``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _select, reference
from .._recording import cast, holds
from ..reference.patch_embed import normalise, pixel_statistics
from . import _check
from ._autograd import first_order
from ._register import register
from .layer_norm import KERNEL_DTYPES

# No smallest size under `auto`, as layer_norm has one: eager launches a convolution, a concatenation and an addition (about
# 45 us of the host's time), this operator one kernel (about 25 us), so it is ahead where the launch is what costs, too.


PLANS = ("cublas", "triton")  # "auto": what the tuned table says
MAX_PATCHES = 2**30  # of a batch: what the kernels number with 32 bits. Offsets have 64.

# 1. Registration. Bytes as in kernels/patch_embed.py.


def _num_patches(images: Tensor, weight: Tensor) -> int:
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


def _patch_embed_fwd_fake(
    images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std, out_dtype, allow_tf32, plan, arch
) -> Tensor:
    num_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    shape = images.shape[0], num_prefix + _num_patches(images, weight), weight.shape[0]
    return images.new_empty(shape, dtype=out_dtype)


def _patch_embed_fwd_reference(
    images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std, out_dtype, allow_tf32, plan, arch
) -> Tensor:
    compute = torch.promote_types(torch.float32, weight.dtype)
    bias, prefix_tokens, pos_embed = (None if t is None else t.to(compute) for t in (bias, prefix_tokens, pos_embed))
    out = reference.patch_embed(
        _pixels(images, weight, mean, std).to(compute),
        weight.to(compute),
        bias,
        prefix_tokens=prefix_tokens,
        pos_embed=pos_embed,
        pos_embed_prefix=pos_embed_prefix,
    )
    return out.to(out_dtype)


def _pixels(images: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Equation (1), rounded to the weight's dtype."""
    return (images if mean is None or std is None else normalise(images, mean, std)).to(weight.dtype)


register(
    "patch_embed_fwd(Tensor images, Tensor weight, Tensor? bias, Tensor? prefix_tokens, Tensor? pos_embed,"
    " bool pos_embed_prefix, Tensor? mean, Tensor? std, ScalarType out_dtype, bool allow_tf32, str plan, str arch) -> Tensor",
    fake=_patch_embed_fwd_fake,
    stem="patch_embed",
    reference=_patch_embed_fwd_reference,
)


def _patch_embed_bwd_fake(
    dout, images, weight, mean, std, need_dimages, need_dweight, allow_tf32, plan, arch
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(images) if need_dimages else images.new_empty(0),
        weight.new_empty(weight.shape if need_dweight else 0),
    )


def _patch_embed_bwd_reference(
    dout, images, weight, mean, std, need_dimages, need_dweight, allow_tf32, plan, arch
) -> tuple[Tensor, Tensor]:
    dimages, dweight = _patch_embed_bwd_fake(
        dout, images, weight, mean, std, need_dimages, need_dweight, allow_tf32, plan, arch
    )
    compute = torch.promote_types(torch.float32, weight.dtype)
    grid = (images.shape[2] // weight.shape[2], images.shape[3] // weight.shape[3])
    g = dout[:, dout.shape[1] - _num_patches(images, weight) :].to(weight.dtype).to(compute)
    g = g.transpose(1, 2).unflatten(2, grid)  # (B, D, Gh, Gw)
    pixels = _pixels(images, weight, mean, std).to(compute)
    no_padding = (0, 0)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, pixels, weight.to(compute), None, weight.shape[2:], no_padding, (1, 1), False, no_padding, 1,
        [need_dimages, need_dweight, False],
    )  # fmt: skip
    if need_dimages:
        dimages.copy_(dx)
    if need_dweight:
        dweight.copy_(dw)
    return dimages, dweight


register(
    "patch_embed_bwd(Tensor dout, Tensor images, Tensor weight, Tensor? mean, Tensor? std, bool need_dimages,"
    " bool need_dweight, bool allow_tf32, str plan, str arch) -> (Tensor dimages, Tensor dweight)",
    fake=_patch_embed_bwd_fake,
    stem="patch_embed_backward",
    reference=_patch_embed_bwd_reference,
)


# 2. Why not.


def why_not(images: Tensor, weight: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the patch-embedding kernel cannot take these tensors (``others``: whatever else goes in)."""
    tensors = [t for t in (images, weight, *others) if t is not None]
    reasons = _select.why_not_here(*tensors)
    unsupported = sorted({str(t.dtype) for t in tensors if t.dtype not in (*KERNEL_DTYPES, torch.uint8)})
    if unsupported:
        reasons.append(f"the patch_embed kernel takes float32, float16, bfloat16 and uint8, got {', '.join(unsupported)}")
    if 0 in weight.shape:
        reasons.append(f"a weight of shape {tuple(weight.shape)} has no elements")
    elif holds(images.shape[0] * _num_patches(images, weight) > MAX_PATCHES):
        reasons.append(f"a batch of more than {MAX_PATCHES} patches")
    return reasons


def convolves(images: Tensor, weight: Tensor) -> bool:
    """Would PyTorch's convolution take these images and this weight now? ``patch_embed`` itself rounds the images."""
    if not isinstance(images, Tensor) or images.shape[-2] < weight.shape[2] or images.shape[-1] < weight.shape[3]:
        return False
    if images.dtype in (weight.dtype, torch.uint8):
        return True
    return _select.autocast_dtype(images) is not None and torch.float64 not in (images.dtype, weight.dtype)


def positions_fit(
    images: Tensor, weight: Tensor, prefix_tokens: Tensor | None, pos_embed: Tensor | None, pos_embed_prefix: bool
) -> bool:
    """Is there one position for each patch, and for each prefix token with ``pos_embed_prefix``?"""
    if pos_embed is None:
        return True
    num_prefix = prefix_tokens.shape[1] if prefix_tokens is not None and pos_embed_prefix else 0
    return pos_embed.shape[1] == num_prefix + _num_patches(images, weight)


# 3. Autograd.


class _PatchEmbed(torch.autograd.Function):
    """Saves the images as they came (uint8: a byte a pixel) and the weight; no images where the weight and they are frozen."""

    @staticmethod
    def forward(
        ctx: Any, images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std, out_dtype, allow_tf32, plan, arch
    ):
        out = torch.ops.vitkernels.patch_embed_fwd(
            images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std, out_dtype, allow_tf32, plan, arch
        )
        ctx.save_for_backward(images if any(ctx.needs_input_grad[:2]) else None, weight, mean, std)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (bias, prefix_tokens, pos_embed))
        ctx.num_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
        ctx.first_position = 0 if pos_embed_prefix else ctx.num_prefix
        ctx.settings = allow_tf32, plan, arch
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dout):
        images, weight, mean, std = saved
        need_dimages, need_dweight, need_dbias, need_dprefix, need_dpos = ctx.needs_input_grad[:5]
        bias_dtype, prefix_dtype, pos_dtype = ctx.dtypes
        dimages = dweight = None
        dtokens: Any = None
        if need_dimages or need_dweight:
            dimages, dweight = torch.ops.vitkernels.patch_embed_bwd(
                dout, images, weight, mean, std, need_dimages, need_dweight, *ctx.settings
            )
        if need_dbias or need_dprefix or need_dpos:  # (P + Gh*Gw, D)
            dtokens = dout.sum(0, dtype=torch.promote_types(torch.float32, dout.dtype))
        return (
            dimages if need_dimages else None,
            dweight if need_dweight else None,
            dtokens[ctx.num_prefix :].sum(0).to(bias_dtype) if need_dbias else None,
            # A copy: the positions of the prefix tokens have the same gradient. With strides as new: DDP's buckets have those.
            dtokens[: ctx.num_prefix].to(prefix_dtype, copy=True)[None] if need_dprefix else None,
            dtokens[ctx.first_position :].to(pos_dtype)[None] if need_dpos else None,
            *(None,) * 7,
        )


# 4. The public function.


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
    """Patches projected, prefix tokens prepended, positions added (https://arxiv.org/abs/2010.11929, equation 1).

    Args:
        images: (B, C, H, W) float, any strides (contiguous and channels_last are fast), or uint8 together with ``mean`` and
            ``std``; H and W multiples of the patch. Rounded to the dtype in which is multiplied. uint8 gets no gradient.
        weight: (D, C, p_h, p_w), the weight of timm's ``patch_embed.proj``; bias: (D,) or None, of its dtype outside autocast.
        prefix_tokens: (1, P, D), class and register tokens, or None.
        pos_embed: (1, P + Gh*Gw, D), or (1, Gh*Gw, D) when ``pos_embed_prefix`` is False, or None.
        pos_embed_prefix: whether the positions cover the prefix tokens (timm: ``not no_embed_class``).
        mean, std: (C,), of pixels in 0..1, for uint8 images: ``(x / 255 - mean) / std`` in float32. Constants: no gradient.
            A tensor, or a list or tuple of C numbers (timm's ``IMAGENET_DEFAULT_MEAN``), which each call copies to the device.

    Returns:
        (B, P + Gh*Gw, D), contiguous, of the dtype that PyTorch's promotion gives: the weight's, or autocast's, with those of
        prefix tokens and positions. Twice differentiable only through the reference; kernels raise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape; numbers that are not finite, a ``std`` of 0 among
            them (not looked for in a tensor, which would have to be read back).
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "patch_embed"
    _check.tensor(op, "images", images, (*_check.FLOATS, torch.uint8))
    _check.tensor(op, "weight", weight)
    _check.shape(op, "weight", weight, ("D", "C", "p_h", "p_w"))
    width, channels, patch_h, patch_w = weight.shape
    _check.shape(op, "images", images, ("B", channels, "H", "W"))
    height, image_width = images.shape[-2:]
    if not (channels and patch_h and patch_w):
        raise ValueError(f"{op}: weight must have channels and a patch of at least 1x1, got {tuple(weight.shape)}")
    if not (height and image_width):
        raise ValueError(f"{op}: images must have at least one patch, got {tuple(images.shape)}")
    if height % patch_h or image_width % patch_w:
        raise ValueError(
            f"{op}: images of {height}x{image_width} do not divide into patches of {patch_h}x{patch_w}"
            " (timm's dynamic_img_pad pads them)"
        )
    _check.vector(op, "bias", bias, width)
    _check.flag(op, "pos_embed_prefix", pos_embed_prefix)
    _check_prefix_and_positions(
        prefix_tokens, pos_embed, pos_embed_prefix, (height // patch_h) * (image_width // patch_w), width
    )
    _check_both_or_neither(images, mean, std)
    mean, std = pixel_statistics(mean, std, images, weight)
    _check.vector(op, "mean", mean, channels)
    _check.vector(op, "std", std, channels)
    if mean is not None and std is not None:
        mean, std = mean.detach(), std.detach()
    dtype = _select.autocast_dtype(images) or weight.dtype
    casts = _select.autocast_dtype(images) is not None and bias is not None and torch.float64 not in (bias.dtype, weight.dtype)
    if bias is not None and bias.dtype != weight.dtype and not casts:
        _check.tensor(op, "bias", bias, (weight.dtype,))
    others = (bias, prefix_tokens, pos_embed, mean, std)
    if not _select.use_kernel(op, images, lambda: why_not(images, weight, *others)):
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
    out_dtype = dtype
    for t in (prefix_tokens, pos_embed):
        out_dtype = out_dtype if t is None else torch.promote_types(out_dtype, t.dtype)
    allow_tf32 = dtype == torch.float32 and _allows_tf32()
    settings = (out_dtype, allow_tf32, _select.choose_plan(PLANS, lambda: "auto"), _select.target(images) or "")
    return _PatchEmbed.apply(
        images, cast(weight, dtype), bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std, *settings
    )


@_select.run_by_dynamo
def _allows_tf32() -> bool:
    # The convolution's switch, since that is what this replaces. Not allow_tf32: reading that raises once a program has used
    # the newer setting.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # made when torch loads


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


def _check_both_or_neither(images: Tensor, mean: Any, std: Any) -> None:
    if (images.dtype == torch.uint8) != (mean is not None and std is not None) or (mean is None) != (std is None):
        raise ValueError(
            "patch_embed: mean and std belong to uint8 images: give both with uint8 and neither with float"
            " (a model takes uint8 after vitkernels.fuse(model, input='uint8'))"
        )
