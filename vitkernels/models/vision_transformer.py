"""timm's ``VisionTransformer`` on the fused modules, with the parts of the paper that timm left out, and the paper's sizes.

A. Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929
"""

import inspect
import logging
import math
from collections import OrderedDict
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from ..ops import resample_pos_embed
from ._swap import fuse_classes
from .patch_embed import FusedVisionTransformer

_logger = logging.getLogger("vitkernels")

_INIT = inspect.signature(timm_vit.VisionTransformer.__init__)
_POS_EMBED = ("learn", "sincos2d", "none", "")


class VisionTransformer(FusedVisionTransformer):
    """``timm.models.vision_transformer.VisionTransformer`` with its blocks and patch embedding fused from the start.

    Every argument and method of timm's, and its state dicts load with ``strict=True``, also those of another square resolution:
    their positions are resampled as timm does at loading. images (B, C, H, W) -> logits (B, classes). What it adds:

    Args:
        pos_embed: ``"learn"``, ``"none"`` (or ``""``) as in timm, or ``"sincos2d"``: fixed sinusoids
            (``timm.layers.build_sincos2d_pos_embed``) as the parameter ``pos_embed``, which does not train and is zero for
            class and register tokens. ``set_input_size`` and ``dynamic_img_size`` resample it like a learned one, because
            the paper keeps positions at their place in the image (section 3.2).
        representation_size: width R of the paper's pre-training head Linear(D, R), tanh, Linear(R, classes), under old
            timm's names ``pre_logits.fc`` and ``head``; None for the single Linear. ``forward_head(x, pre_logits=True)``
            returns (B, R), after the tanh. ``num_features`` stays D, ``head_hidden_size`` is R. timm's ``load_pretrained`` of
            an ``.npz`` file fills all but ``pre_logits``.

    ``reset_classifier`` attaches the paper's fine-tuning head: no ``pre_logits``, and a Linear(D, classes) of zeros.

    Raises:
        TypeError: an argument that timm's class does not have.
        ValueError: a wrong ``pos_embed`` or ``representation_size``, or an ``embed_dim`` that sinusoids cannot fill. timm
            asserts the rest.
    """

    # No annotated class attributes: TorchScript reads timm's through the instance, and ours would hide them.
    fixed_pos_embed = False
    fused_from_the_start = True  # unfuse leaves this class alone

    def __init__(self, *args, representation_size=None, **kwargs):
        bound = _INIT.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        _check(arguments, representation_size)
        fixed = arguments["pos_embed"] == "sincos2d"
        if fixed:
            arguments["pos_embed"] = "learn"  # a parameter of the same shape
        super().__init__(*bound.args[1:], **bound.kwargs)
        self.pre_logits = nn.Identity()
        if representation_size is not None:
            self._add_pre_logits(representation_size, arguments["device"], arguments["dtype"])
            if arguments["weight_init"] != "skip":
                self.init_weights(needs_reset=False)
        if fixed:
            self._fix_pos_embed()
        fuse_classes(self)

    def _add_pre_logits(self, width: int, device: Any, dtype: Any) -> None:
        fc = nn.Linear(self.embed_dim, width, device=device, dtype=dtype)
        self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head_hidden_size = width
        if self.num_classes > 0:
            self.head = nn.Linear(width, self.num_classes, device=device, dtype=dtype)

    @torch.no_grad()
    def _fix_pos_embed(self) -> None:
        table = build_sincos2d_pos_embed(list(self.patch_embed.grid_size), self.embed_dim, device=self.pos_embed.device)
        self.pos_embed.zero_()
        self.pos_embed[0, -table.shape[0] :] = table  # (Gh*Gw, D), after the prefix rows
        self.pos_embed.requires_grad_(False)
        self.fixed_pos_embed = True

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's; fixed positions are left as they were made."""
        super().init_weights(mode, needs_reset)
        if self.fixed_pos_embed:
            self._fix_pos_embed()

    def set_input_size(self, img_size=None, patch_size=None) -> None:  # type: ignore[override]  # wraps is no method to mypy
        """timm's; positions are resampled, and fixed ones stay fixed."""
        trains = self.pos_embed is not None and self.pos_embed.requires_grad
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[call-arg]
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(trains)  # timm < 1.0.29 forgets

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Positions of another square grid are resampled to this one's; the state dict itself is left as it is."""
        name = f"{prefix}pos_embed"
        resampled = self._resampled_from(state_dict.get(name))
        if resampled is not None:
            state_dict = {**state_dict, name: resampled}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    @torch.no_grad()
    def _resampled_from(self, posemb: Any) -> Tensor | None:
        if not isinstance(posemb, Tensor) or self.pos_embed is None or posemb.dim() != 3:
            return None
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        tokens, grid = posemb.shape[1] - prefix, self.patch_embed.grid_size
        same_kind = posemb.shape[::2] == self.pos_embed.shape[::2] and posemb.is_floating_point()
        if not same_kind or posemb.shape == self.pos_embed.shape or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            return None  # it fits, or PyTorch's error says why not
        _logger.info("Resized position embedding: %d tokens to a grid of %s.", tokens, grid)
        return resample_pos_embed(posemb, grid, None, prefix)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's, then the fine-tuning head of section 3.2: the whole pre-training head goes, the new layer is zero."""
        super().reset_classifier(num_classes, global_pool)
        self.pre_logits = nn.Identity()
        self.head_hidden_size = self.embed_dim
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        arguments = getattr(self, "_model_args", {})  # what timm would rebuild the model with
        if "representation_size" in arguments:
            self._model_args = {name: value for name, value in arguments.items() if name != "representation_size"}

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """timm's, with ``pre_logits`` before the dropout, as in timm's other heads: (B, N, D) -> (B, classes)."""
        x = self.pool(x)
        x = self.fc_norm(x)
        x = self.pre_logits(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


# What help() and inspect show: timm's arguments, then ours.
vars(VisionTransformer.__init__)["__signature__"] = _INIT.replace(
    parameters=[
        *_INIT.parameters.values(),
        inspect.Parameter("representation_size", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
)


def _check(arguments: dict[str, Any], representation_size: Any) -> None:
    pos_embed, width = arguments["pos_embed"], arguments["embed_dim"]
    if not isinstance(pos_embed, str) or pos_embed not in _POS_EMBED:
        raise ValueError(f"pos_embed must be one of {_POS_EMBED}, got {pos_embed!r}")
    if pos_embed == "sincos2d" and width % 4:
        raise ValueError(f"pos_embed='sincos2d' needs an embed_dim divisible by 4 (sine and cosine, two axes), got {width}")
    if representation_size is not None and (not isinstance(representation_size, int) or representation_size < 1):
        raise ValueError(f"representation_size must be a positive int or None, got {representation_size!r}")


def _named(defaults: dict[str, int], overrides: dict[str, Any]) -> VisionTransformer:
    return VisionTransformer(**{**defaults, **overrides})


def vit_tiny(**kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16 (DeiT, https://arxiv.org/abs/2012.12877): 5.7M parameters. Every argument of the class can be overridden."""
    return _named({"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}, kwargs)


def vit_small(**kwargs: Any) -> VisionTransformer:
    """ViT-S/16 (DeiT, https://arxiv.org/abs/2012.12877): 22M parameters. Every argument of the class can be overridden."""
    return _named({"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}, kwargs)


def vit_base(**kwargs: Any) -> VisionTransformer:
    """ViT-B/16 of the paper: 86M parameters. Every argument of the class can be overridden."""
    return _named({"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}, kwargs)


def vit_large(**kwargs: Any) -> VisionTransformer:
    """ViT-L/16 of the paper: 307M parameters. Every argument of the class can be overridden."""
    return _named({"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}, kwargs)


def vit_huge(**kwargs: Any) -> VisionTransformer:
    """ViT-H/14 of the paper: 632M parameters. Every argument of the class can be overridden."""
    return _named({"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}, kwargs)
