"""timm's ``PatchEmbed`` and the stem of its ``VisionTransformer`` on the fused operator.

Tokens leave it contiguous, and the whole trunk stays tokens-major.

timm's convolution is flattened and transposed as a view, so without a class token 68 of its 310 ViTs run every block on
a channel-major stream.
"""

import functools
from collections.abc import Sequence
from typing import Any, Optional  # noqa: F401  Optional: a name in timm's source, for TorchScript

import torch
import torch.fx
from timm.layers import PatchEmbed
from timm.layers.patch_embed import F, Format, _assert, nchw_to  # noqa: F401  names in timm's source, for TorchScript
from timm.models import vision_transformer as timm_vit
from timm.models.vision_transformer import checkpoint_seq  # noqa: F401  as above
from torch import Tensor, nn

from ..ops._leaves import float_pixels, patch_embed, resample_pos_embed
from . import _guard
from ._positions import FusedPositions

for _leaf in ("float_pixels", "patch_embed", "resample_pos_embed"):
    torch.fx.wrap(_leaf)

_PARTS: _guard.Parts = (("proj", (nn.Conv2d,)),)
_SHIPPED_FORWARDS = _guard.shipped_forwards(PatchEmbed, *_PARTS)
_STATISTICS = "pixel_statistics"


class FusedPatchEmbed(PatchEmbed):
    """``timm.layers.PatchEmbed`` with its forward on ``vitkernels.ops.patch_embed``; same shapes, contiguous tokens."""

    stock = PatchEmbed  # unannotated: TorchScript reads timm's annotations through the instance

    # wraps: inspect and TorchScript, which compiles source, see timm's forward.
    @functools.wraps(PatchEmbed.forward)
    def forward(self, x):
        if self.why_not():
            statistics = self._buffers.get(_STATISTICS)
            return super().forward(x if statistics is None else float_pixels(x, statistics, next(self.proj.parameters()).dtype))
        tokens = self.embed(x, None, None, True)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, self.grid_of(x))
        return self.norm(tokens)

    def embed(self, x: Tensor, prefix_tokens: Tensor | None, pos_embed: Tensor | None, pos_embed_prefix: bool) -> Tensor:
        """images (B, C, H, W) -> (B, P + Gh*Gw, D), the arguments being those of ``vitkernels.ops.patch_embed``."""
        height, width = x.shape[-2], x.shape[-1]
        if self.strict_img_size:
            _assert(height == self.img_size[0], f"Input height ({height}) doesn't match model ({self.img_size[0]}).")
            _assert(width == self.img_size[1], f"Input width ({width}) doesn't match model ({self.img_size[1]}).")
            (patch_h, patch_w), (grid_h, grid_w) = self.patch_size, self.grid_size
            if (grid_h * patch_h, grid_w * patch_w) != self.img_size:
                # timm's convolution leaves the rest out: vit_so400m_patch14_siglip_384 uses 378 of 384 pixels.
                x = x[..., : grid_h * patch_h, : grid_w * patch_w]
        statistics, proj = self._buffers.get(_STATISTICS), self.proj
        return patch_embed(x, proj.weight, proj.bias, statistics, prefix_tokens, pos_embed, pos_embed_prefix)

    def _apply(self, fn, recurse=True):
        """``model.bfloat16()`` moves and rounds every floating-point buffer; mean and std are only moved."""
        statistics = self._buffers.get(_STATISTICS)
        super()._apply(fn, recurse)
        if statistics is not None and self._buffers[_STATISTICS].dtype != statistics.dtype:
            self._buffers[_STATISTICS] = statistics.to(self._buffers[_STATISTICS].device)
        return self

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """(Gh, Gw) of these images."""
        return x.shape[-2] // self.patch_size[0], x.shape[-1] // self.patch_size[1]

    def why_not(self) -> list[str]:
        """Reasons why a call would run timm's forward now; empty when the fused one runs. Also works on a stock module."""
        reasons = _guard.global_hooks() + _guard.patched(_SHIPPED_FORWARDS)
        reasons += _guard.children(self, "", _PARTS)
        proj = self._modules.get("proj")
        if type(proj) is nn.Conv2d and (proj.stride, proj.padding, proj.dilation, proj.groups) != (
            proj.kernel_size,
            (0, 0),
            (1, 1),
            1,
        ):
            reasons.append("proj is not a plain convolution whose stride is its kernel size")
        if not self.flatten and self.output_fmt not in (Format.NHWC, Format.NLC):
            reasons.append(f"output format {self.output_fmt} is not tokens-major")
        if self.img_size is None:
            reasons.append("there is no image size to check the input against")
        if self.dynamic_img_pad:
            reasons.append("dynamic_img_pad pads the image first")
        return reasons


# uint8 pixels. mean and std are a float32 buffer that no state dict has.


def set_pixel_statistics(stem: FusedPatchEmbed, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let ``stem`` take uint8 images too, whose pixels in 0..1 have this mean and std per channel."""
    statistics = torch.tensor([mean, std], dtype=torch.float32, device=stem.proj.weight.device)  # (2, C)
    stem.register_buffer(_STATISTICS, statistics, persistent=False)


def takes_uint8(module: nn.Module) -> bool:
    """Has ``set_pixel_statistics`` been here?"""
    return _STATISTICS in module._buffers


def clear_pixel_statistics(module: nn.Module) -> None:
    """The reverse. Harmless on a module that has none."""
    if takes_uint8(module):
        delattr(module, _STATISTICS)
        module._non_persistent_buffers_set.discard(_STATISTICS)


_SHIPPED_POS_EMBED = timm_vit.VisionTransformer._pos_embed


class FusedVisionTransformer(FusedPositions):
    """timm's ``VisionTransformer`` with patch embedding, prefix tokens and positions as one operator.

    That holds inside ``forward_features`` and ``forward_intermediates``; ``model.patch_embed(x)`` keeps timm's shapes. A model
    whose stem is not a fused ``PatchEmbed`` alone (``why_not_merged``) runs timm's two steps.
    """

    @functools.wraps(timm_vit.VisionTransformer.forward_features)
    def forward_features(self, x, attn_mask=None, is_causal=False):
        model = self if self.why_not_merged() else _Embedded(self, x)
        return timm_vit.VisionTransformer.forward_features(model, x, attn_mask=attn_mask, is_causal=is_causal)

    @functools.wraps(timm_vit.VisionTransformer.forward_intermediates)
    def forward_intermediates(self, x, *args, **kwargs):
        model = self if self.why_not_merged() else _Embedded(self, x)
        return timm_vit.VisionTransformer.forward_intermediates(model, x, *args, **kwargs)

    def why_not_merged(self) -> list[str]:
        """Reasons why a call would add prefix tokens and positions in timm's own steps; empty when one operator does."""
        stem = self._modules.get("patch_embed")
        if not isinstance(stem, FusedPatchEmbed):
            return [f"patch_embed is a {type(stem).__name__}"]
        reasons = stem.why_not()
        reasons += _guard.children(self, "", (("patch_embed", (type(stem),)),))
        if type(stem).forward is not FusedPatchEmbed.forward:
            reasons.append("patch_embed overrides forward")
        reasons += _guard.children(stem, "patch_embed.", (("norm", (nn.Identity,)),))
        replaced = type(self)._pos_embed is not FusedVisionTransformer._pos_embed or "_pos_embed" in self.__dict__
        if replaced or timm_vit.VisionTransformer._pos_embed is not _SHIPPED_POS_EMBED:
            reasons.append("_pos_embed was replaced")
        return reasons

    def embed(self, x: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, P + Gh*Gw, D): timm's ``patch_embed`` and ``_pos_embed``."""
        prefix = [t for t in (self.cls_token, self.reg_token) if t is not None]
        positions, stem = self.pos_embed, self.patch_embed
        if positions is not None and self.dynamic_img_size:
            num_positioned = 0 if self.no_embed_class else self.num_prefix_tokens
            positions = resample_pos_embed(positions, *stem.grid_of(x), *stem.grid_size, num_positioned)
        prefix_tokens = torch.cat(prefix, dim=1) if len(prefix) > 1 else prefix[0] if prefix else None
        tokens = stem.embed(x, prefix_tokens, positions, not self.no_embed_class)
        return tokens if positions is None else self.pos_drop(tokens)


class _Embedded:
    """A model whose stem has run: timm's methods take it for ``self``, so that nothing of them has to be copied here."""

    def __init__(self, model: FusedVisionTransformer, x: Tensor) -> None:
        self._model = model
        self.patch_embed = _Stem(model.patch_embed, model.embed(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return x


class _Stem:
    def __init__(self, stem: FusedPatchEmbed, tokens: Tensor) -> None:
        self._stem, self._tokens = stem, tokens

    def __call__(self, x: Tensor) -> Tensor:
        return self._tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stem, name)


def linear_as_convolution(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Weight (D, p_h*p_w*C) of an ``nn.Linear`` patchifier (NaFlexVit's, vit-pytorch's) as a convolution's, (D, C, p_h, p_w).

    A view of the same memory, in the order that the kernel uses for channels_last images.

    Raises:
        ValueError: the inputs are no whole patches.
    """
    pixels = patch_size[0] * patch_size[1]
    if weight.shape[1] % pixels:
        raise ValueError(f"{weight.shape[1]} inputs are no patches of {patch_size}")
    return weight.unflatten(1, (*patch_size, -1)).permute(0, 3, 1, 2)
