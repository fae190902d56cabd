"""Patch embedding (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 1).

(1)  pixels = images, or (images / 255 - mean) / std per channel for uint8 images
(2)  t      = weight applied to each p x p patch + bias         a stride-p convolution, (B, Gh*Gw, D)
(3)  out    = [prefix_tokens ; t] + pos_embed                   pos_embed_prefix: positions cover the prefix as well
     out    = [prefix_tokens ; t + pos_embed]                   otherwise

Backward, with g the rows of dout that are patches and X the patches, (B*Gh*Gw, C*p*p):

(4)  dweight = g^T X,   dbias = sum of g's rows
(5)  dimages = g weight, each row put back in its patch (none for uint8)
(6)  dprefix_tokens, dpos_embed = sums over the batch of the rows of dout that they were added to
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prefix_tokens: Tensor | None = None,
    pos_embed: Tensor | None = None,
    pos_embed_prefix: bool = True,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Equations (1) to (3). See ``vitkernels.ops.patch_embed``."""
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("patch_embed: uint8 images need mean and std")
        images = normalise(images, mean, std)
    images = images.to(weight.dtype)
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)  # (B, Gh*Gw, D)
    if pos_embed is not None and not pos_embed_prefix:
        tokens = tokens + pos_embed
    if prefix_tokens is not None:
        tokens = torch.cat([prefix_tokens.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if pos_embed is not None and pos_embed_prefix:
        tokens = tokens + pos_embed
    return tokens.contiguous()


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Equation (1) of uint8 images, in float32 (float64 for a float64 ``mean``). Both are constants."""
    compute = torch.promote_types(torch.float32, mean.dtype)
    mean, std = (t.detach().to(compute).view(-1, 1, 1) for t in (mean, std))
    return (images.to(compute) / 255 - mean) / std
