"""The operators as blocks and stems call them: what ``torch.fx`` keeps as one node each of a traced model.

They are positional functions of TorchScript's types, so that the graph of a fused model can be scripted wherever the graph of
timm's can. Of each, TorchScript compiles the first branch alone: the reference's composition of PyTorch's operators, which is
what timm computes, and which a saved script runs where there is no vitkernels.

``torch.fx.wrap`` looks names up in the file that calls them, so each file that calls a leaf wraps it there.

No leaf has the name of a block's child. Feature extractors name a node by the path of the module and the name of the function:
a leaf ``mlp`` would pass for the output of ``blocks.0.mlp``.
"""

import torch
from torch import Tensor

from .._recording import cast
from ..reference.attention import dense
from ..reference.linear import Norm, scriptable_linear
from ..reference.mlp import Parameters, scriptable_mlp
from ..reference.patch_embed import normalise, scriptable_patch_embed
from ..reference.pos_embed import resample_pos_embed as reference_resample_pos_embed
from . import mlp as mlp_operator
from . import patch_embed as patch_embed_operator
from . import resample_pos_embed as resample_pos_embed_operator
from .attention import attention as attention_operator
from .attention import attention_qkv as attention_qkv_operator
from .attention import masked_as_in_pytorch, takes_mask
from .linear import linear as linear_operator
from .mlp import projected_mlp as projected_mlp_operator
from .patch_embed import convolves, positions_fit


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    drop_path: Tensor | None,
) -> Tensor:
    if torch.jit.is_scripting():
        return scriptable_linear(x, weight, bias, None, layer_scale, residual, norm, drop_path)
    else:
        return linear_operator(x, weight, bias, layer_scale=layer_scale, residual=residual, norm=norm, drop_path=drop_path)


def attention_packed(qkv: Tensor, num_heads: int, head_dim: int, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """(B, N, 3*H*Dh) -> (B, N, H*Dh)."""
    batch, tokens, _ = qkv.shape
    qkv = qkv.view(batch, tokens, 3, num_heads, head_dim)
    if torch.jit.is_scripting():
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return dense(q, k, v, None, attn_mask, is_causal).flatten(2)
    else:
        if is_causal or attn_mask is not None:
            q, k, v = qkv.unbind(2)
            if is_causal or not takes_mask(q, k, attn_mask):
                return attention(q, k, v, attn_mask, is_causal)
        return attention_qkv_operator(qkv, bias=attn_mask).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """(B, N, H, Dh), and (B, M, H, Dh) twice -> (B, N, H*Dh)."""
    # No ViT's own forward asks for a causal mask, so no kernel has one.
    if torch.jit.is_scripting() or is_causal:
        return dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, attn_mask, is_causal).flatten(2)
    else:
        if not takes_mask(q, k, attn_mask):
            return masked_as_in_pytorch(q, k, v, attn_mask).flatten(2)
        return attention_operator(q, k, v, bias=attn_mask).flatten(2)


def projected_mlp(
    heads: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: Parameters,
    eps: float,
    act: str | None,
    recompute: bool,
) -> Tensor:
    if torch.jit.is_scripting():
        x = scriptable_linear(heads, weight, bias, None, None, x, None, None)
        return scriptable_mlp(x, parameters, eps, act, None, None)
    else:
        return projected_mlp_operator(heads, x, weight, bias, parameters, eps, act, recompute)


def residual_mlp(
    x: Tensor,
    parameters: Parameters,
    eps: float,
    act: str | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    recompute: bool,
) -> Tensor:
    if torch.jit.is_scripting():
        return scriptable_mlp(x, parameters, eps, act, layer_scale, drop_path)
    else:
        return mlp_operator(x, *parameters, eps=eps, act=act, layer_scale=layer_scale, drop_path=drop_path, recompute=recompute)


def ones(branch: Tensor, gamma: Tensor | None) -> Tensor:
    """(B, 1, 1) for a branch of (B, N, D), of the dtype that it has after LayerScale."""
    mask = branch.new_ones([branch.shape[0]] + [1] * (branch.dim() - 1))
    return mask if gamma is None else cast(mask, torch.promote_types(branch.dtype, gamma.dtype))


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed: Tensor | None,
    pos_embed_prefix: bool,
) -> Tensor:
    """``statistics``: mean and std of uint8 images, (2, C); None for a stem that takes float images alone."""
    mean, std = statistics_of(images, statistics)
    if torch.jit.is_scripting():
        return scriptable_patch_embed(images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std)
    else:
        # PyTorch's operators say what is wrong, as in timm, or broadcast.
        if not convolves(images, weight) or not positions_fit(images, weight, prefix_tokens, pos_embed, pos_embed_prefix):
            return scriptable_patch_embed(images, weight, bias, prefix_tokens, pos_embed, pos_embed_prefix, mean, std)
        return patch_embed_operator(
            images,
            weight,
            bias,
            prefix_tokens=prefix_tokens,
            pos_embed=pos_embed,
            pos_embed_prefix=pos_embed_prefix,
            mean=mean,
            std=std,
        )


def float_pixels(images: Tensor, statistics: Tensor, weight: Tensor) -> Tensor:
    """uint8 images normalised, in ``weight``'s dtype; others as they are."""
    mean, std = statistics_of(images, statistics)
    if mean is None or std is None:
        return images
    pixels = normalise(images, mean, std)
    # A recorded type_as names no dtype; but it would move the pixels to where the weight lies, which is offloaded perhaps.
    return pixels.type_as(weight) if weight.device == images.device else pixels.to(weight.dtype)


def statistics_of(images: Tensor, statistics: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """mean and std, (C,) each, of images that have to be normalised."""
    if statistics is None or images.dtype != torch.uint8:
        return None, None
    return statistics[0], statistics[1]


def resample_pos_embed(
    posemb: Tensor, height: int, width: int, old_height: int, old_width: int, num_prefix_tokens: int
) -> Tensor:
    if height < 1 or width < 1:
        return posemb  # for an image that is smaller than a patch, which the stem refuses next
    if torch.jit.is_scripting():
        return reference_resample_pos_embed(posemb, (height, width), (old_height, old_width), num_prefix_tokens)
    else:
        return resample_pos_embed_operator(posemb, (height, width), (old_height, old_width), num_prefix_tokens)
