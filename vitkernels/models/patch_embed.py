"""timm's ``PatchEmbed`` and the stem of its ``VisionTransformer`` on the fused operator.

Tokens leave it contiguous, and the whole trunk stays tokens-major.

timm's convolution is flattened and transposed as a view, so without a class token 68 of its 310 ViTs run every block on
a channel-major stream.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional  # noqa: F401  Optional: a name in timm's source, for TorchScript

import torch
import torch.fx
from timm.layers import PatchEmbed, resample_abs_pos_embed  # noqa: F401  a name in timm's source, for TorchScript
from timm.layers import patch_embed as timm_patch_embed
from timm.layers.patch_embed import F, Format, _assert, nchw_to  # noqa: F401  names in timm's source, for TorchScript
from timm.models.vision_transformer import (
    VisionTransformer,
    checkpoint_seq,  # noqa: F401  as above
)
from torch import Tensor, nn

from ..ops import _availability
from ..ops._leaves import float_pixels, patch_embed, resample_pos_embed
from . import _guard
from ._positions import FusedPositions

for _leaf in ("float_pixels", "patch_embed", "resample_pos_embed"):
    torch.fx.wrap(_leaf)

_PARTS: _guard.Parts = (("proj", (nn.Conv2d,)),)
_SHIPPED = _guard.shipped_forwards(PatchEmbed, *_PARTS) + _guard.shipped(
    (nn.Conv2d, "_conv_forward"), (F, "conv2d"), (timm_patch_embed, "nchw_to")
)
_STATISTICS = "_vk_pixel_statistics"


class FusedPatchEmbed(PatchEmbed):
    """``timm.layers.PatchEmbed`` with its forward on ``vitkernels.ops.patch_embed``; same shapes, contiguous tokens.

    timm's are a view of the convolution's (B, D, Gh, Gw), and what draws in the order of memory (``F.dropout``,
    ``torch.randn_like``) draws other numbers for them under one seed. Inside the model the two agree.
    """

    stock = PatchEmbed  # unannotated: TorchScript reads timm's annotations through the instance

    # wraps: inspect and TorchScript, which compiles source, see timm's forward. A replaced one may take other arguments.
    @functools.wraps(PatchEmbed.forward)
    def forward(self, x, *args, **kwargs):
        if not isinstance(self, FusedPatchEmbed):  # unfused since this method was bound
            return PatchEmbed.forward(self, x, *args, **kwargs)
        if type(x) is _Images:
            return _Embedded(x.model._vk_embed(x.pixels))
        if _guard.traced_as_timms(self, x) or args or kwargs or _guard.acts(x) or self.why_not():
            return self._vk_timms(x, *args, **kwargs)
        tokens = self._vk_embed(x, None, None, True)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, self.grid_of(x))
        return self.norm(tokens)

    def _vk_timms(self, x, *args, **kwargs):
        """timm's forward, which takes uint8 images too where ours does."""
        statistics = self._statistics()
        pixels = x if statistics is None else float_pixels(x, statistics, _weight_of(self.proj))
        return super().forward(pixels, *args, **kwargs)

    def _vk_embed(self, x: Tensor, prefix_tokens: Tensor | None, pos_embed: Tensor | None, pos_embed_prefix: bool) -> Tensor:
        """images (B, C, H, W) -> (B, P + Gh*Gw, D), the arguments being those of ``vitkernels.ops.patch_embed``."""
        _, _, height, width = x.shape
        if self.strict_img_size:
            timm_patch_embed._assert(
                height == self.img_size[0], f"Input height ({height}) doesn't match model ({self.img_size[0]})."
            )
            timm_patch_embed._assert(
                width == self.img_size[1], f"Input width ({width}) doesn't match model ({self.img_size[1]})."
            )
            patch_h, patch_w = self._patch()
            if self.img_size[0] % patch_h or self.img_size[1] % patch_w:
                # timm's convolution leaves the rest out: vit_so400m_patch14_siglip_384 uses 378 of 384 pixels.
                x = x[..., : self.img_size[0] // patch_h * patch_h, : self.img_size[1] // patch_w * patch_w]
        proj = self.proj
        return patch_embed(x, proj.weight, proj.bias, self._statistics(), prefix_tokens, pos_embed, pos_embed_prefix)

    def _apply(self, fn, recurse=True):
        """``model.bfloat16()`` rounds every buffer and ``to_empty`` leaves it unwritten; mean and std are only moved."""
        before = self._statistics()
        super()._apply(fn, recurse)
        moved = self._buffers.get(_STATISTICS)
        if moved is not None and moved is not before:
            self._buffers[_STATISTICS] = _mean_and_std(self, moved.device)
        return self

    def _statistics(self) -> Tensor | None:
        """(2, C), mean and std; None for a stem that takes float images only."""
        statistics, weight = _guard.attribute(self, _STATISTICS), _guard.attribute(self._modules["proj"], "weight")
        if statistics is None or not statistics.is_meta or weight is None or weight.is_meta:
            return statistics
        # load_state_dict(assign=True) has given a model on meta its parameters
        self._buffers[_STATISTICS] = _mean_and_std(self, weight.device)
        return self._buffers[_STATISTICS]

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """(Gh, Gw) of these images."""
        patch_h, patch_w = self._patch()
        return x.shape[-2] // patch_h, x.shape[-1] // patch_w

    def _patch(self) -> tuple[int, int]:
        """The convolution's, which cuts the patches. ``patch_size`` and ``grid_size`` are numbers that a user may have set."""
        return _guard.attribute(self._modules["proj"], "weight").shape[2:]

    def why_not(self) -> list[str]:
        """Reasons why a call would run timm's forward now; empty when the fused one runs. Also works on a stock module."""
        reasons = _guard.global_hooks() + _guard.patched(_SHIPPED)
        reasons += _guard.children(self, "", _PARTS)
        proj = self._modules.get("proj")
        if type(proj) is nn.Conv2d:
            reasons += why_not_plain(proj)
            patch = tuple(_guard.attribute(proj, "weight").shape[2:])
            if not self.strict_img_size and self.patch_size != patch:
                reasons.append(f"images are to divide into patches of {self.patch_size}, and proj takes {patch}")
        if not self.flatten and self.output_fmt not in (Format.NHWC, Format.NLC):
            reasons.append(f"output format {self.output_fmt} is not tokens-major")
        if self.img_size is None:
            reasons.append("there is no image size to check the input against")
        elif not isinstance(self.img_size, tuple):
            reasons.append(f"img_size is {self.img_size!r}, not (height, width)")
        if self.dynamic_img_pad:
            reasons.append("dynamic_img_pad pads the image first")
        return reasons


def why_not_plain(proj: nn.Conv2d) -> list[str]:
    """A reason if ``proj`` does more than multiply patches."""
    weight, bias = _guard.attribute(proj, "weight"), _guard.attribute(proj, "bias")
    settings = (proj.stride, proj.padding, proj.padding_mode, proj.dilation, proj.groups)
    plain = settings == (weight.shape[2:], (0, 0), "zeros", (1, 1), 1) and not _guard.has_own(proj, "_conv_forward")
    if plain and (bias is None or bias.shape == weight.shape[:1]):
        return []
    return ["proj is not a plain convolution whose stride is its kernel size"]


# uint8 pixels. mean and std are a float32 buffer that no state dict has, and numbers, of which it is made anew.


def set_pixel_statistics(stem: FusedPatchEmbed, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let ``stem`` take uint8 images too, whose pixels in 0..1 have this mean and std per channel."""
    stem._vk_mean_and_std = (tuple(map(float, mean)), tuple(map(float, std)))
    stem.register_buffer(_STATISTICS, _mean_and_std(stem, stem.proj.weight.device), persistent=False)


def _mean_and_std(stem: FusedPatchEmbed, device: torch.device) -> Tensor:
    """The buffer, (2, C), of the numbers that ``stem`` keeps; an inference tensor could not be saved for backward."""
    with torch.inference_mode(False):
        return torch.tensor(stem._vk_mean_and_std, dtype=torch.float32, device=device)


def takes_uint8(module: nn.Module) -> bool:
    """Has ``set_pixel_statistics`` been here?"""
    return _STATISTICS in module._buffers


def clear_pixel_statistics(module: nn.Module) -> None:
    """The reverse. Harmless on a module that has none."""
    if takes_uint8(module):
        delattr(module, _STATISTICS)
        module.__dict__.pop("_vk_mean_and_std", None)
        module._non_persistent_buffers_set.discard(_STATISTICS)


def _weight_of(proj: nn.Module) -> Tensor:
    """A tensor that ``proj`` multiplies with, whatever module it is, or an empty one."""
    return next((t for module in proj.modules() for t in _guard.tensors(module)), torch.empty(0))


class FusedVisionTransformer(FusedPositions):
    """timm's ``VisionTransformer`` with patch embedding, prefix tokens and positions as one operator.

    That holds inside timm's own ``forward_features`` and ``forward_intermediates``; called from elsewhere, the model's
    ``patch_embed`` and ``_pos_embed`` do what timm's do. A model whose stem is not a fused ``PatchEmbed`` alone
    (``why_not_merged``) runs timm's two steps.
    """

    # Not super(): timm's method of the moment, which may have been replaced, and take other arguments, on the model itself.

    @functools.wraps(VisionTransformer.forward_features)
    def forward_features(self, x, *args, **kwargs):
        return VisionTransformer.forward_features(self, _to_merge(self, x), *args, **kwargs)

    @functools.wraps(VisionTransformer.forward_intermediates)
    def forward_intermediates(self, x, *args, **kwargs):
        return VisionTransformer.forward_intermediates(self, _to_merge(self, x), *args, **kwargs)

    @functools.wraps(VisionTransformer._pos_embed)
    def _pos_embed(self, x, *args, **kwargs):
        if not isinstance(self, FusedVisionTransformer):  # unfused since this method was bound
            return VisionTransformer._pos_embed(self, x, *args, **kwargs)
        return x.tokens if type(x) is _Embedded else super()._pos_embed(x, *args, **kwargs)

    def why_not_merged(self) -> list[str]:
        """Reasons why a call would add prefix tokens and positions in timm's own steps; empty when one operator does."""
        stem = self._modules.get("patch_embed")
        if not isinstance(stem, FusedPatchEmbed):
            return [f"patch_embed is a {type(stem).__name__}"]
        reasons = stem.why_not()
        reasons += _guard.children(self, "", (("patch_embed", (type(stem),)),))
        if type(stem).forward is not _STEM_FORWARD or stem._compiled_call_impl is not None:
            reasons.append("patch_embed overrides forward")
        reasons += _guard.children(stem, "patch_embed.", (("norm", (nn.Identity,)),))
        if type(self)._pos_embed is not _POS_EMBED or _guard.has_own(self, "_pos_embed"):
            reasons.append("_pos_embed was replaced")
        reasons += _guard.patched(_SHIPPED_STEPS)
        return reasons or self._why_not_of_shape(stem)

    def _why_not_of_shape(self, stem: FusedPatchEmbed) -> list[str]:
        """What timm would broadcast, resample by another rule, or refuse."""
        positions, weight = _guard.attribute(self, "pos_embed"), _guard.attribute(stem._modules["proj"], "weight")
        width = weight.shape[0]
        reasons = _guard.why_not_prefix(self, width) + _guard.why_not_own(self, "pos_embed")
        if reasons:
            return reasons
        grid = not stem.flatten and stem.output_fmt == Format.NHWC
        if positions is not None and grid != bool(self.dynamic_img_size):
            layout = "a grid" if grid else "a row"
            reasons.append(f"patch_embed gives {layout} of tokens, and dynamic_img_size is {self.dynamic_img_size}")
        elif positions is not None and self.dynamic_img_size:
            reasons += self.why_not_resampled()
            if positions.shape[-1] != width:
                reasons.append(f"pos_embed has {positions.shape[-1]} channels, tokens have {width}")
        elif positions is not None:
            patches = (stem.img_size[0] // weight.shape[2]) * (stem.img_size[1] // weight.shape[3])
            prefix = [t for t in (_guard.attribute(self, name) for name in ("cls_token", "reg_token")) if t is not None]
            num_positioned = 0 if self.no_embed_class else sum(token.shape[1] for token in prefix)
            shape = (1, patches + num_positioned, width)
            if positions.shape != shape:
                reasons.append(f"pos_embed has shape {tuple(positions.shape)}, not {shape}")
        return reasons

    def _vk_embed(self, x: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, P + Gh*Gw, D): timm's ``patch_embed`` and ``_pos_embed``."""
        prefix = [t for t in (self.cls_token, self.reg_token) if t is not None]
        positions, stem = self.pos_embed, self.patch_embed
        if positions is not None and not prefix and _guard.active_dropout("pos_drop", self.pos_drop):
            # Dropout draws in the order of memory, and timm's convolution leaves its tokens channel by channel there.
            return VisionTransformer._pos_embed(self, stem._vk_timms(x))
        if positions is not None and self.dynamic_img_size:
            num_positioned = 0 if self.no_embed_class else self.num_prefix_tokens
            (height, width), (old_height, old_width) = stem.grid_of(x), stem.grid_size
            positions = resample_pos_embed(positions, height, width, old_height, old_width, num_positioned)
        prefix_tokens = torch.cat(prefix, dim=1) if len(prefix) > 1 else prefix[0] if prefix else None
        tokens = stem._vk_embed(x, prefix_tokens, positions, not self.no_embed_class)
        return tokens if positions is None else self.pos_drop(tokens)


# As they are here: somebody may replace them on ``type(model)``, which is the fused class.
_STEM_FORWARD, _POS_EMBED = FusedPatchEmbed.forward, FusedVisionTransformer._pos_embed

# What timm's methods carry from `forward_features(x)` through `x = self.patch_embed(x)` to `x = self._pos_embed(x)`. The type
# tells the stem and the model that they are called from there, in whatever thread and however nested.


class _Images(NamedTuple):
    """Images whose tokens are to have prefix tokens and positions, for the stem of ``model``."""

    pixels: Tensor
    model: FusedVisionTransformer

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape


class _Embedded(NamedTuple):
    """Tokens that have them."""

    tokens: Tensor


def _to_merge(model, x):
    # In a graph of torch.fx the output of patch_embed is a node that a feature extractor may ask for, and what export records
    # is cut at the calls of modules (torch.distributed.pipelining). A model may have been unfused since its method was bound.
    cut = isinstance(x, torch.fx.Proxy) or _availability.exporting() or _guard.traced_as_timms(model, x) or _guard.acts(x)
    return x if cut or not isinstance(model, FusedVisionTransformer) or model.why_not_merged() else _Images(x, model)


_SHIPPED_STEPS = _guard.shipped(
    *((VisionTransformer, name) for name in ("forward_features", "forward_intermediates", "_pos_embed")),
    (nn.Identity, "forward"),  # of patch_embed.norm
)


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
