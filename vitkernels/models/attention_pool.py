"""timm's ``AttentionPoolLatent`` (SigLIP's head: one learned query, M keys) on the fused attention.

Only what lies between its children changes: timm's permute, unbind and transpose copies go. The children are still called,
so hooks, adapters and replaced layers work as in timm.
"""

import functools
from typing import Optional  # noqa: F401  a name in the source of timm's forward, for TorchScript

import torch
import torch.fx
from timm.layers import AttentionPoolLatent
from timm.layers.attention_pool import F, maybe_add_mask  # noqa: F401  names in timm's source, for TorchScript
from torch import Tensor

from ..ops._leaves import attention
from . import _guard

torch.fx.wrap("attention")

_SHIPPED = _guard.shipped_forwards(AttentionPoolLatent) + _guard.shipped((F, "scaled_dot_product_attention"))


class FusedAttentionPool(AttentionPoolLatent):
    """``timm.layers.AttentionPoolLatent`` with its attention on ``vitkernels.ops``; swapped in by ``vitkernels.fuse``.

    A call that the fused forward does not cover (``why_not``) runs timm's.
    """

    stock = AttentionPoolLatent  # unannotated: TorchScript reads timm's annotations through the instance

    # wraps: inspect and TorchScript, which compiles source, see timm's forward. A replaced one may take other arguments.
    @functools.wraps(AttentionPoolLatent.forward)
    def forward(self, x, *args, **kwargs):
        if not isinstance(self, FusedAttentionPool):  # unfused since this method was bound
            return AttentionPoolLatent.forward(self, x, *args, **kwargs)
        if _guard.traced_as_timms(self, x) or _guard.acts(x, *args, *kwargs.values()) or self.why_not():
            return super().forward(x, *args, **kwargs)
        return self._vk_fused(x, *args, **kwargs)

    def _vk_fused(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The fused forward, for callers that have asked ``why_not``."""
        batch, keys, width = x.shape
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        # timm's shapes, so that sizes set by hand are refused as in timm.
        queries, heads = self.latent_len, (self.num_heads, self.head_dim)
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, queries, *heads)  # (B, L, H, Dh)
        k, v = self.kv(x).reshape(batch, keys, 2, *heads).unbind(2)  # (B, M, H, Dh) each
        # The norms see heads first, as in timm.
        q = self.q_norm(q.transpose(1, 2)).transpose(1, 2)
        k = self.k_norm(k.transpose(1, 2)).transpose(1, 2)
        x = attention(q, k, v, attn_mask, False).reshape(batch, queries, width)
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x

    def why_not(self) -> list[str]:
        """Reasons why a call would run timm's forward now; empty when the fused one runs. Also works on a stock module."""
        reasons = _guard.function_modes() + _guard.patched(_SHIPPED)
        if not self.fused_attn:
            reasons.append("fused_attn is False")
        return reasons
