"""timm's ``VisionTransformer`` with its positions resampled by ``vitkernels.ops.resample_pos_embed``, at every call.

There is no cache: it could serve stale values, since an edit of ``p.data`` leaves no trace.
"""

import functools

import timm
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import pos_embed as timm_pos_embed
from timm.layers import resample_abs_pos_embed  # noqa: F401  a name in timm's source, for TorchScript
from timm.models import vision_transformer as timm_vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..ops._leaves import resample_pos_embed
from . import _guard

torch.fx.wrap("resample_pos_embed")

_SHIPPED_RESAMPLING = _guard.shipped((timm_vit, "resample_abs_pos_embed"), (timm_pos_embed, "F"), (F, "interpolate"))
_SHIPPED = _SHIPPED_RESAMPLING + _guard.shipped((VisionTransformer, "_pos_embed"))
_SHIPPED_RESIZE = _SHIPPED_RESAMPLING + _guard.shipped((VisionTransformer, "set_input_size"))
# timm before 1.0.29 leaves a table of 2x8 positions as it is for 4x4 patches, another grid of as many tokens.
_FORGETS_THE_GRID = tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 29)


class FusedPositions(VisionTransformer):
    """``timm.models.vision_transformer.VisionTransformer``; swapped in by ``vitkernels.fuse`` for that class exactly."""

    stock = VisionTransformer  # unannotated: TorchScript reads timm's annotations through the instance
    fused_from_the_start = False

    # wraps: inspect and TorchScript, which compiles source, see timm's methods. Replaced ones may take other arguments.
    @functools.wraps(VisionTransformer._pos_embed)
    def _pos_embed(self, x, *args, **kwargs):
        if not isinstance(self, FusedPositions):  # unfused since this method was bound
            return VisionTransformer._pos_embed(self, x, *args, **kwargs)
        apart = _guard.traced_as_timms(self, x) or not self.dynamic_img_size or self.pos_embed is None or args or kwargs
        if apart or self.why_not_resampled() or _guard.patched(_SHIPPED):
            return super()._pos_embed(x, *args, **kwargs)
        batch, height, width, channels = x.shape
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        pos_embed = resample_pos_embed(self.pos_embed, height, width, *self.patch_embed.grid_size, prefix)
        x = x.view(batch, -1, channels)
        tokens = [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.no_embed_class:
            x = torch.cat([*tokens, x + pos_embed], dim=1) if tokens else x + pos_embed
        else:
            x = (torch.cat([*tokens, x], dim=1) if tokens else x) + pos_embed
        return self.pos_drop(x)

    @functools.wraps(VisionTransformer.set_input_size)
    def set_input_size(self, *args, **kwargs):
        if not isinstance(self, FusedPositions):  # as above
            return VisionTransformer.set_input_size(self, *args, **kwargs)
        if self.pos_embed is None or self.why_not_resampled() or _guard.patched(_SHIPPED_RESIZE):
            return super().set_input_size(*args, **kwargs)
        pos_embed, old_size = self.pos_embed, self.patch_embed.grid_size
        self.pos_embed = None  # timm then resizes all else
        try:
            super().set_input_size(*args, **kwargs)
        finally:
            self.pos_embed = pos_embed
        new_size = self.patch_embed.grid_size
        if new_size != old_size:
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            with torch.no_grad():
                resampled = resample_pos_embed(pos_embed, *new_size, *old_size, prefix)
            self.pos_embed = nn.Parameter(resampled, requires_grad=pos_embed.requires_grad)

    def why_not_resampled(self) -> list[str]:
        """Reasons why timm resamples the positions; empty when ``vitkernels.ops`` does: ``grid_size`` says what they are."""
        positions, grid = _guard.attribute(self, "pos_embed"), getattr(self.patch_embed, "grid_size", None)
        if own := _guard.why_not_own(self, "pos_embed"):
            return own
        num_positioned = 0 if self.no_embed_class else self.num_prefix_tokens
        if grid is None or positions.dim() != 3 or positions.shape[:2] != (1, num_positioned + grid[0] * grid[1]):
            return [f"pos_embed of shape {tuple(positions.shape)} is not {num_positioned} tokens and a grid of {grid}"]
        if _FORGETS_THE_GRID and grid[0] != grid[1]:
            return [f"this timm does not resample a table of {grid} to a square grid of as many tokens"]
        return _guard.function_modes() + _guard.patched(_SHIPPED_RESAMPLING)
