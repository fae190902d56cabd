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

_SHIPPED_FORWARDS = ((PatchEmbed, PatchEmbed.forward),)


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
        tokens = patch_embed(x, self.proj.weight, self.proj.bias)  # (B, Gh*Gw, D)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, (height // self.patch_size[0], width // self.patch_size[1]))
        return self.norm(tokens)

    def why_not(self) -> list[str]:
        """Reasons why a call would run timm's forward now; empty when the fused one runs. Also works on a stock module."""
        reasons = _guard.global_hooks() + _guard.patched(_SHIPPED_FORWARDS)
        reasons += _guard.children(self, "", (("proj", (nn.Conv2d,)),))
        if not self.flatten and self.output_fmt not in (Format.NHWC, Format.NLC):
            reasons.append(f"output format {self.output_fmt} is not tokens-major")
        if self.img_size is None:
            reasons.append("there is no image size to check the input against")
        if self.dynamic_img_pad:
            reasons.append("dynamic_img_pad pads the image first")
        return reasons
