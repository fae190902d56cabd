"""timm's ``PatchEmbed`` on the fused operator: tokens leave it contiguous, and the whole trunk stays tokens-major.

timm's convolution is flattened and transposed as a view, so without a class token 68 of its 310 ViTs run every block on
a channel-major stream.
"""

import functools

import torch.fx
from timm.layers import PatchEmbed
from timm.layers.patch_embed import F, Format, _assert, nchw_to  # noqa: F401  names in timm's source, for TorchScript
from torch import nn

from ..ops import patch_embed
from . import _guard

torch.fx.wrap("patch_embed")

_PARTS: _guard.Parts = (("proj", (nn.Conv2d,)),)
_SHIPPED_FORWARDS = _guard.shipped_forwards(PatchEmbed, *_PARTS)


class FusedPatchEmbed(PatchEmbed):
    """``timm.layers.PatchEmbed`` with its forward on ``vitkernels.ops.patch_embed``; same shapes, contiguous tokens."""

    stock = PatchEmbed  # unannotated: TorchScript reads timm's annotations through the instance

    # wraps: inspect and TorchScript, which compiles source, see timm's forward.
    @functools.wraps(PatchEmbed.forward)
    def forward(self, x):
        if self.why_not():
            return super().forward(x)
        height, width = x.shape[-2], x.shape[-1]
        if self.strict_img_size:
            _assert(height == self.img_size[0], f"Input height ({height}) doesn't match model ({self.img_size[0]}).")
            _assert(width == self.img_size[1], f"Input width ({width}) doesn't match model ({self.img_size[1]}).")
            (patch_h, patch_w), (grid_h, grid_w) = self.patch_size, self.grid_size
            if (grid_h * patch_h, grid_w * patch_w) != self.img_size:
                # timm's convolution leaves the rest out: vit_so400m_patch14_siglip_384 uses 378 of 384 pixels.
                x = x[..., : grid_h * patch_h, : grid_w * patch_w]
        tokens = patch_embed(x, self.proj.weight, self.proj.bias)  # (B, Gh*Gw, D)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, (height // self.patch_size[0], width // self.patch_size[1]))
        return self.norm(tokens)

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
