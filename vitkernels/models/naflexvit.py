"""timm's ``NaFlexEmbeds`` on the operators: whole images in one, learned positions of a mixed batch in one launch.

timm copies an image into patches, projects, adds positions and concatenates prefix tokens, each a pass of its own. For a
mixed batch it loops over the grid sizes, five launches each, after two host synchronisations per image.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import disable_compiler
from timm.models import naflexvit as timm_naflex
from timm.models.naflexvit import NaFlexEmbeds
from torch import nn

from ..ops import _availability, patch_embed, resample_pos_embed_many
from ..ops.linear import compute_dtype
from ..ops.patch_embed import convolves
from . import _guard
from .patch_embed import linear_as_convolution, why_not_plain

_MODES = ("bicubic", "bilinear")
_PARTS: _guard.Parts = (("proj", (nn.Linear, nn.Conv2d)), ("norm", (nn.Identity,)))
_SHIPPED_POSITIONS = _guard.shipped(
    (NaFlexEmbeds, "_apply_learned_naflex_pos_embed"),
    (NaFlexEmbeds, "_apply_learned_pos_embed"),
    (timm_naflex, "calculate_naflex_grid_sizes"),
    (F, "interpolate"),
)
_SHIPPED = _guard.shipped_forwards(NaFlexEmbeds, *_PARTS) + _guard.shipped(
    (timm_naflex, "batch_patchify"), (F, "linear"), (nn.Conv2d, "_conv_forward"), (F, "conv2d")
)
_OPTIONS = frozenset(field.removeprefix("patchify_") for field in timm_naflex.NaFlexVitCfg.__dataclass_fields__)


def _option(embeds: NaFlexEmbeds, name: str, default: bool) -> Any:
    """An attribute that not every timm from 1.0.26 on reads; the others do what ``default`` says, whatever it is set to."""
    return getattr(embeds, name, default) if name in _OPTIONS else default


class FusedNaFlexEmbeds(NaFlexEmbeds):
    """``timm.models.naflexvit.NaFlexEmbeds``; patches that come cut out already are projected by timm's layer.

    On a CPU with AVX2 the positions of a mixed batch are timm's very numbers with antialias, timm's default; otherwise, and on
    a GPU, they are within what ``vitkernels.ops.resample_pos_embed`` says.
    """

    stock = NaFlexEmbeds

    # wraps: inspect sees timm's methods.
    @functools.wraps(NaFlexEmbeds.forward)
    def forward(self, x, patch_coord=None, patch_valid=None):
        if not isinstance(self, FusedNaFlexEmbeds):  # unfused since this method was bound
            return NaFlexEmbeds.forward(self, x, patch_coord=patch_coord, patch_valid=patch_valid)
        # Sizes are looked at last: an exported program that runs timm's forward must not depend on them.
        apart = patch_coord is not None or _availability.leaves_to_pytorch(x) or _guard.acts(x) or self.why_not_merged()
        if apart or not self._cuts_into_patches(x):
            return super().forward(x, patch_coord=patch_coord, patch_valid=patch_valid)
        patch_h, patch_w = self.patch_size
        proj, grid = self.proj, (x.shape[2] // patch_h, x.shape[3] // patch_w)
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        tokens = patch_embed(
            x,
            self._convolution(),
            proj.bias,
            prefix_tokens=torch.cat(prefix, dim=1) if prefix else None,
            pos_embed=self._resampled([grid], None, compute_dtype(proj.weight))[None],
            pos_embed_prefix=False,
        )
        return self.pos_drop(tokens), grid

    def _cuts_into_patches(self, x):
        patch_h, patch_w = self.patch_size
        whole = x.dim() == 4 and x.shape[2] % patch_h == 0 and x.shape[3] % patch_w == 0
        return whole and convolves(x, self._convolution())

    def _convolution(self):
        if type(self.proj) is nn.Conv2d:
            return self.proj.weight
        if _option(self, "channels_last", True):
            return linear_as_convolution(self.proj.weight, self.patch_size)
        return self.proj.weight.unflatten(1, (self.in_chans, *self.patch_size))

    @disable_compiler
    @functools.wraps(NaFlexEmbeds._apply_learned_naflex_pos_embed)
    def _apply_learned_naflex_pos_embed(self, x, patch_coord):
        # Other coordinates (of fewer images, with a third column) timm takes in its own way, or refuses.
        if self.why_not() or patch_coord.shape[::2] != (x.shape[0], 2) or x.shape[2:] != self.pos_embed.shape[3:]:
            return super()._apply_learned_naflex_pos_embed(x, patch_coord)
        # (B, 2), the one synchronisation. Coordinates may be floats, of a batch that was cast as a whole.
        sizes = [(int(height), int(width)) for height, width in (patch_coord.amax(dim=1) + 1).tolist()]
        if any(min(size) < 1 for size in sizes):
            return super()._apply_learned_naflex_pos_embed(x, patch_coord)
        if len(set(sizes)) == 1:
            sizes = sizes[:1]  # and the copy is broadcast
        x += self._resampled(sizes, x.shape[1], x.dtype)

    @functools.wraps(NaFlexEmbeds._apply_learned_pos_embed)
    def _apply_learned_pos_embed(self, x, grid_size):
        if self._why_not_resampled():
            return super()._apply_learned_pos_embed(x, grid_size)
        x.add_(self._resampled([grid_size], None, x.dtype))

    def _resampled(self, sizes, pad_to, dtype):
        """Rows in ``dtype``, rounded once: bfloat16 parameters meet a float16 stream under autocast."""
        table = self.pos_embed.flatten(1, 2)
        if table.dtype != dtype:
            table = table.to(torch.promote_types(table.dtype, torch.float32))
        rows = resample_pos_embed_many(
            table,
            sizes,
            self.pos_embed.shape[1:3],
            0,
            self.pos_embed_interp_mode,
            bool(_option(self, "pos_embed_antialias", True)),
            align_corners=_option(self, "pos_embed_align_corners", False),
            preserve_aspect_ratio=bool(self.pos_embed_ar_preserving),
            pad_to=pad_to,
        )
        return _availability.cast(rows, dtype)

    def why_not_merged(self) -> list[str]:
        """Reasons why a call with whole images would take timm's steps; empty when one operator does it."""
        reasons = self._why_not_resampled() + _guard.global_hooks() + _guard.patched(_SHIPPED)
        reasons += _guard.children(self, "", _PARTS)
        if self.norm_input is not None:
            reasons.append("norm_input comes before proj")
        if type(self.proj) is nn.Conv2d and self.cls_token is None and self.reg_token is None:
            reasons += _guard.active_dropout("pos_drop", self.pos_drop)  # in the order of memory: see FusedVisionTransformer
        return reasons or self._why_not_of_shape()  # weights that ZeRO-3 gathers for hooks have no shape outside of these

    def why_not(self) -> list[str]:
        """Reasons why timm would make the positions of a mixed batch now; empty when ours does. Works on a stock module too."""
        reasons = FusedNaFlexEmbeds._why_not_resampled(self)
        if self.pos_embed_use_grid_sample:
            reasons.append("pos_embed_use_grid_sample: timm samples the positions of mixed batches (whole images run fused)")
        return reasons

    def _why_not_resampled(self) -> list[str]:
        reasons = _guard.function_modes() + _guard.patched(_SHIPPED_POSITIONS)
        replaced = [name for owner, name, *_ in _SHIPPED_POSITIONS if owner is NaFlexEmbeds and _guard.has_own(self, name)]
        replaced += [
            n for n, ours in _METHODS.items() if isinstance(self, FusedNaFlexEmbeds) and getattr(type(self), n) is not ours
        ]
        reasons += [f"{name} was replaced" for name in replaced]
        positions = _guard.attribute(self, "pos_embed")
        if self.pos_embed_type != "learned":
            reasons.append(f"position embeddings are {self.pos_embed_type}, not learned")
        elif own := _guard.why_not_own(self, "pos_embed"):
            reasons += own
        elif positions.dim() != 4 or positions.shape[0] != 1:
            reasons.append(f"pos_embed has shape {tuple(positions.shape)}, not (1, h, w, D)")
        aligned = _option(self, "pos_embed_align_corners", False)
        if aligned is not True and aligned is not False:
            reasons.append(f"pos_embed_align_corners is {aligned!r}")
        if self.pos_embed_interp_mode not in _MODES:
            reasons.append(f"interpolation is {self.pos_embed_interp_mode}, not {' or '.join(_MODES)}")
        return reasons

    def _why_not_of_shape(self) -> list[str]:
        """What timm would broadcast or refuse."""
        proj, patch = self._modules["proj"], self.patch_size
        if type(proj) not in (nn.Linear, nn.Conv2d):
            return []
        if not isinstance(patch, tuple) or len(patch) != 2:
            return [f"patch_size is {patch!r}, not (height, width)"]
        patch_h, patch_w = patch
        weight, bias, reasons = _guard.attribute(proj, "weight"), _guard.attribute(proj, "bias"), []
        if self.is_linear != (type(proj) is nn.Linear):
            reasons.append(f"is_linear is {self.is_linear}, and proj is a {type(proj).__name__}")
        elif not self.is_linear and not self.flatten:
            reasons.append("flatten is False")
        if bias is not None and bias.shape != weight.shape[:1]:
            reasons.append(f"proj.bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},)")
        if type(proj) is nn.Conv2d:
            reasons += why_not_plain(proj)
            fits = weight.shape[2:] == (patch_h, patch_w)
        else:
            fits = weight.shape[1] == patch_h * patch_w * self.in_chans
        if not fits:
            reasons.append(f"proj.weight has shape {tuple(weight.shape)}, and patches are {patch_h}x{patch_w}")
        reasons += _guard.why_not_prefix(self, weight.shape[0])
        positions = _guard.attribute(self, "pos_embed")
        if positions is not None and positions.shape[-1] != weight.shape[0]:
            reasons.append(f"pos_embed has {positions.shape[-1]} channels, tokens have {weight.shape[0]}")
        return reasons


# As they are here: somebody may replace them on ``type(embeds)``, which is the fused class, or in a subclass of it.
_METHODS = {name: getattr(FusedNaFlexEmbeds, name) for owner, name, *_ in _SHIPPED_POSITIONS if owner is NaFlexEmbeds}
