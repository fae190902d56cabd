"""Weights of the ViT of lucidrains' ``vit-pytorch`` (https://github.com/lucidrains/vit-pytorch) in a ``VisionTransformer``."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention, LayerNorm, PatchEmbed, to_2tuple
from timm.layers.format import nchw_to
from timm.layers.trace_utils import _assert
from torch import Tensor, nn

from .patch_embed import linear_as_convolution
from .vision_transformer import VisionTransformer

_NORM = functools.partial(LayerNorm, eps=1e-5)  # nn.LayerNorm's default, which that library uses; timm's is 1e-6

# Names in that library -> names here, without ".weight" and ".bias".
_PLAIN_STEM = {"to_patch_embedding.1": "patch_embed.proj"}
_NORMED_STEM = {
    "to_patch_embedding.1": "patch_embed.norm_in",
    "to_patch_embedding.2": "patch_embed.proj",
    "to_patch_embedding.3": "patch_embed.norm",
}
_LAYER = {
    "0.norm": "norm1",
    "0.to_qkv": "attn.qkv",
    "0.to_out.0": "attn.proj",
    "1.net.0": "norm2",
    "1.net.1": "mlp.fc1",
    "1.net.4": "mlp.fc2",
}
_WRAPPED_LAYER = {  # before August 2023 a PreNorm module wrapped each of the two
    "0.norm": "norm1",
    "0.fn.to_qkv": "attn.qkv",
    "0.fn.to_out.0": "attn.proj",
    "1.norm": "norm2",
    "1.fn.net.0": "mlp.fc1",
    "1.fn.net.3": "mlp.fc2",
}
_NORM_THEN_POOL = {"transformer.norm": "norm", "mlp_head": "head"}
_POOL_THEN_NORM = {"mlp_head.0": "fc_norm", "mlp_head.1": "head"}


class DualPatchNormEmbed(PatchEmbed):
    """timm's ``PatchEmbed`` with a LayerNorm before the projection too (https://arxiv.org/abs/2302.01327).

    Same arguments, attributes and output formats. The projection is a Linear over the flattened patch in the order
    (p_h, p_w, C), as in vit-pytorch. Neither the patch size nor the padding can change: the first norm runs over the pixels.
    """

    # No annotated class attributes: TorchScript reads timm's through the instance, and ours would hide them.

    def __init__(self, *args, norm_layer=LayerNorm, device=None, dtype=None, **kwargs):
        super().__init__(*args, norm_layer=norm_layer, device=device, dtype=dtype, **kwargs)
        if self.dynamic_img_pad:
            raise ValueError("DualPatchNormEmbed does not pad: give images that divide into patches, dynamic_img_pad=False")
        conv = self.proj
        pixels = conv.weight[0].numel()  # p_h * p_w * C
        self.norm_in = norm_layer(pixels, device=device, dtype=dtype)
        self.proj = nn.Linear(pixels, conv.out_channels, bias=conv.bias is not None, device=device, dtype=dtype)

    def set_input_size(self, img_size=None, patch_size=None):
        """timm's, for the image size alone.

        Raises:
            ValueError: ``patch_size`` is another one than the model's.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"a LayerNorm over the pixels of a patch has one patch size, {self.patch_size}, got {patch_size}")
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, Gh*Gw, D), or as ``output_fmt`` says."""
        batch, channels, height, width = x.shape
        p_h, p_w = self.patch_size
        if self.strict_img_size and self.img_size is not None:
            _assert(height == self.img_size[0], f"Input height ({height}) doesn't match model ({self.img_size[0]}).")
            _assert(width == self.img_size[1], f"Input width ({width}) doesn't match model ({self.img_size[1]}).")
        _assert(height % p_h == 0, f"Input height ({height}) should be divisible by patch size ({p_h}).")
        _assert(width % p_w == 0, f"Input width ({width}) should be divisible by patch size ({p_w}).")
        x = x.reshape(batch, channels, height // p_h, p_h, width // p_w, p_w)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (B, Gh, Gw, p_h*p_w*C)
        x = self.norm(self.proj(self.norm_in(x)))
        if self.flatten:
            return x.flatten(1, 2)
        return nchw_to(x.permute(0, 3, 1, 2), self.output_fmt)


def load_vit_pytorch(state_dict: Mapping[str, Tensor], *, num_heads: int | None = None, **overrides: Any) -> VisionTransformer:
    """A ``VisionTransformer`` with the weights of ``vit_pytorch.ViT``, whose outputs it reproduces.

    Accepts the state dicts of that class (file ``vit.py``) since version 0.10. Their names say which it is:

    - around the Linear of ``to_patch_embedding``: LayerNorms (since 1.0) or none (loaded into timm's convolution);
    - in the layers: ``0.to_qkv`` and ``1.net.4`` (since 1.4), or wrapped as ``0.fn.to_qkv`` and ``1.fn.net.3``;
    - at the end: ``transformer.norm`` and ``mlp_head`` (since 1.4), ``transformer.norm`` alone (since 1.17.3 with
      ``num_classes=0``: tokens come out, not pooled), or ``mlp_head.0`` and ``mlp_head.1``, both after pooling;
    - ``cls_token`` and ``pos_embedding`` with a leading 1 or without (since 1.16.1). An empty ``cls_token`` means
      ``pool="mean"`` over the patches (since 1.16);
    - no ``to_out`` in a layer of one head of width D.

    Args:
        state_dict: tensors by name. The model has their dtype and device.
        num_heads: heads of each layer. By default that library's ``dim_head=64`` gives it.
        overrides: arguments of ``VisionTransformer``. Needed where weights do not tell: ``in_chans`` (default 3),
            ``patch_size`` and ``img_size`` (default square), ``global_pool="avg"`` for ``pool="mean"`` before 1.16, which
            averages the class token too and so does this model, and dropout rates.

    Raises:
        ValueError: names are missing or unexpected (the message lists them), or sizes do not fit together.
    """
    weights = _renamed(state_dict)
    arguments, head_dim = _arguments(weights, num_heads, overrides)
    width, heads = arguments["embed_dim"], arguments["num_heads"]
    odd = heads * head_dim != width
    if odd:
        arguments["num_heads"] = 1  # any that divides the width: these attentions are replaced
    model = VisionTransformer(**arguments)
    if odd:  # timm's attention can do this, its VisionTransformer has no argument for it
        like = {"device": arguments["device"], "dtype": arguments["dtype"]}
        for block in model.blocks:
            drops = {"attn_drop": block.attn.attn_drop.p, "proj_drop": block.attn.proj_drop.p}
            block.attn = Attention(width, heads, attn_head_dim=head_dim, **drops, **like)
    _reshape(weights, arguments)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the sizes in this state dict do not fit together: {error}") from error
    return model


def _renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by our names; ValueError if theirs are no layout of vit-pytorch's."""
    found = [re.match(r"transformer\.layers\.(\d+)\.", name) for name in state_dict]
    depth = 1 + max((int(match[1]) for match in found if match), default=0)
    layer = _WRAPPED_LAYER if any(".fn." in name for name in state_dict) else _LAYER
    modules = {
        **(_NORMED_STEM if "to_patch_embedding.2.weight" in state_dict else _PLAIN_STEM),
        **(_POOL_THEN_NORM if "mlp_head.1.weight" in state_dict else _NORM_THEN_POOL),
        **{f"transformer.layers.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(depth) for theirs, ours in layer.items()},
    }
    for optional in ("mlp_head", "to_out"):
        if not any(optional in name for name in state_dict):
            modules = {theirs: ours for theirs, ours in modules.items() if optional not in theirs}
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
    names = {theirs: ours for theirs, ours in names.items() if not theirs.endswith("to_qkv.bias")}
    names |= {"cls_token": "cls_token", "pos_embedding": "pos_embed"}
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(f"not a state dict of vit_pytorch.ViT: missing {missing or 'none'}, unexpected {unexpected or 'none'}")
    return {ours: state_dict[theirs] for theirs, ours in names.items()}


def _arguments(
    weights: Mapping[str, Tensor], num_heads: int | None, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Arguments of ``VisionTransformer`` from the shapes, and the head dim."""
    stem, head = weights["patch_embed.proj.weight"], weights.get("head.weight")
    width, pixels = stem.shape  # pixels: p_h * p_w * C
    class_tokens = weights["cls_token"].numel() // width
    if class_tokens > 1:
        raise ValueError(f"vit_pytorch.ViT has at most one class token, got {class_tokens}")
    channels = overrides.get("in_chans", 3)
    patch = to_2tuple(overrides.get("patch_size") or _side("patch_size", pixels / channels))
    if patch[0] * patch[1] * channels != pixels:
        raise ValueError(f"patches of {patch} with in_chans={channels} do not have the {pixels} values of the patch Linear")
    grid = weights["pos_embed"].numel() // width - class_tokens
    image = overrides.get("img_size") or [_side("img_size", grid) * p for p in patch]
    inner = weights["blocks.0.attn.qkv.weight"].shape[0] // 3
    if num_heads is None:
        num_heads = inner // 64 if "blocks.0.attn.proj.weight" in weights else 1
        if inner % 64 and num_heads != 1:
            raise ValueError(f"{inner} attention channels are not heads of 64: pass num_heads=")
    if num_heads < 1 or inner % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the {inner} attention channels")
    arguments = {
        "img_size": to_2tuple(image),
        "patch_size": patch,
        "embed_dim": width,
        "depth": sum(name.endswith("attn.qkv.weight") for name in weights),
        "num_heads": num_heads,
        "mlp_ratio": (weights["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / width,  # timm takes int(width * ratio)
        "qkv_bias": False,
        "class_token": class_tokens == 1,
        "num_classes": 0 if head is None else head.shape[0],
        "global_pool": "" if head is None else "token" if class_tokens else "avg",
        "pool_include_prefix": True,  # pool="mean" averages the class token too
        "fc_norm": "fc_norm.weight" in weights,
        "norm_layer": _NORM,
        "weight_init": "skip",
        "device": stem.device,
        "dtype": stem.dtype,
    }
    if "patch_embed.norm_in.weight" in weights:
        arguments |= {"embed_layer": DualPatchNormEmbed, "embed_norm_layer": _NORM}
    return {**arguments, **overrides}, inner // num_heads


def _side(argument: str, area: float) -> int:
    side = math.isqrt(int(area))
    if side < 1 or side * side != area:
        raise ValueError(f"{area:g} is no square, so {argument} does not follow from the weights: pass {argument}=")
    return side


def _reshape(weights: dict[str, Tensor], arguments: Mapping[str, Any]) -> None:
    """From their shapes to ours, in place."""
    width, stem = arguments["embed_dim"], weights["patch_embed.proj.weight"]
    weights["pos_embed"] = weights["pos_embed"].reshape(1, -1, width)
    token = weights.pop("cls_token")
    if arguments["class_token"]:
        weights["cls_token"] = token.reshape(1, 1, width)
    if "patch_embed.norm_in.weight" not in weights:
        weights["patch_embed.proj.weight"] = linear_as_convolution(stem, to_2tuple(arguments["patch_size"]))
    if "blocks.0.attn.proj.weight" not in weights:  # one head of width D goes out as it is
        for i in range(arguments["depth"]):
            weights[f"blocks.{i}.attn.proj.weight"] = torch.eye(width, dtype=stem.dtype, device=stem.device)
            weights[f"blocks.{i}.attn.proj.bias"] = stem.new_zeros(width)
