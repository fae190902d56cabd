"""timm's ``NaFlexEmbeds`` with its learned positions resampled by the operators: all sizes of a batch in one launch.

timm loops over the grid sizes of a batch, five launches each, after two host synchronisations per image.
"""

import functools

import torch
from timm.layers import disable_compiler
from timm.models.naflexvit import NaFlexEmbeds

from ..ops import resample_pos_embed_many
from . import _guard

torch.fx.wrap("resample_pos_embed_many")

_MODES = ("bicubic", "bilinear")
_SHIPPED = tuple(
    (name, getattr(NaFlexEmbeds, name)) for name in ("_apply_learned_naflex_pos_embed", "_apply_learned_pos_embed")
)


class FusedNaFlexEmbeds(NaFlexEmbeds):
    """``timm.models.naflexvit.NaFlexEmbeds``: projection and prefix tokens are timm's, learned positions ours."""

    stock = NaFlexEmbeds  # unannotated: TorchScript reads timm's annotations through the instance

    # wraps: inspect and TorchScript, which compiles source, see timm's methods.
    @disable_compiler
    @functools.wraps(NaFlexEmbeds._apply_learned_naflex_pos_embed)
    def _apply_learned_naflex_pos_embed(self, x, patch_coord):
        if self.why_not():
            return super()._apply_learned_naflex_pos_embed(x, patch_coord)
        sizes = [tuple(size) for size in (patch_coord.amax(dim=1) + 1).tolist()]  # (B, 2), the one synchronisation
        if len(set(sizes)) == 1:
            sizes = sizes[:1]  # and the copy is broadcast
        x += self._resampled(sizes, x.shape[1]).to(x.dtype)

    @functools.wraps(NaFlexEmbeds._apply_learned_pos_embed)
    def _apply_learned_pos_embed(self, x, grid_size):
        if self.why_not():
            return super()._apply_learned_pos_embed(x, grid_size)
        x.add_(self._resampled([grid_size], None).to(x.dtype))

    def _resampled(self, sizes, pad_to):
        return resample_pos_embed_many(
            self.pos_embed.flatten(1, 2),
            sizes,
            self.pos_embed.shape[1:3],
            0,
            self.pos_embed_interp_mode,
            getattr(self, "pos_embed_antialias", True),  # timm < 1.0.28 has neither choice
            align_corners=getattr(self, "pos_embed_align_corners", False),
            preserve_aspect_ratio=self.pos_embed_ar_preserving,
            pad_to=pad_to,
        )

    def why_not(self) -> list[str]:
        """Reasons why positions would be resampled by timm now; empty when ours runs. Also works on a stock module."""
        reasons = [
            f"NaFlexEmbeds.{name} was replaced" for name, method in _SHIPPED if getattr(NaFlexEmbeds, name) is not method
        ]
        if self.pos_embed_type != "learned":
            reasons.append(f"position embeddings are {self.pos_embed_type}, not learned")
        elif not _guard._plain(self._parameters.values()):
            reasons.append("pos_embed is a tensor subclass")
        if self.pos_embed_interp_mode not in _MODES:
            reasons.append(f"interpolation is {self.pos_embed_interp_mode}, not {' or '.join(_MODES)}")
        return reasons
