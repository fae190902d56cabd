"""The transformer block on the fused operators: timm's pre-norm ``Block`` with four operator calls.

x -> [LN, qkv] -> [attention] -> [proj, LayerScale, + x] -> [LN, fc1, act, fc2, LayerScale, + x]
"""

import functools
from typing import Optional  # noqa: F401  a name in the source of timm's forward, for TorchScript

import torch.fx
import torch.nn.functional as F
from timm.layers import (
    GELU,
    Attention,
    DropPath,
    GELUTanh,
    LayerNorm,
    LayerScale,
    Mlp,
    QuickGELU,
    RmsNorm,
    activations,
)
from timm.layers import drop as timm_drop
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops import _availability
from ..ops._leaves import attention, attention_packed, linear, ones, projected_mlp, residual_mlp
from ..ops.folded_linear import Folded, Statistics, folded_linear
from ..ops.mlp import folded_mlp
from . import _fold, _guard

for _leaf in ("attention", "attention_packed", "linear", "ones", "projected_mlp", "residual_mlp"):
    torch.fx.wrap(_leaf)

_NORMS = (LayerNorm, nn.LayerNorm)
_ACTIVATIONS = {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.SiLU: "silu"}

_BLOCK_PARTS: _guard.Parts = (
    ("norm1", _NORMS),
    ("attn", (Attention,)),
    ("ls1", (LayerScale, nn.Identity)),
    ("drop_path1", (DropPath, nn.Identity)),
    ("norm2", _NORMS),
    ("mlp", (Mlp,)),
    ("ls2", (LayerScale, nn.Identity)),
    ("drop_path2", (DropPath, nn.Identity)),
)
_ATTENTION_PARTS: _guard.Parts = (
    ("qkv", (nn.Linear,)),
    ("q_norm", (*_NORMS, RmsNorm, nn.Identity)),
    ("k_norm", (*_NORMS, RmsNorm, nn.Identity)),
    ("attn_drop", (nn.Dropout,)),
    ("norm", (nn.Identity,)),
    ("proj", (nn.Linear,)),
    ("proj_drop", (nn.Dropout,)),
)
_MLP_PARTS: _guard.Parts = (
    ("fc1", (nn.Linear,)),
    ("act", (nn.GELU, *_ACTIVATIONS)),
    ("drop1", (nn.Dropout,)),
    ("norm", (nn.Identity,)),
    ("fc2", (nn.Linear,)),
    ("drop2", (nn.Dropout,)),
)
# With the functions that these forwards call and the fused one does not.
_SHIPPED = _guard.shipped_forwards(Block, *_BLOCK_PARTS, *_ATTENTION_PARTS, *_MLP_PARTS) + _guard.shipped(
    *((F, name) for name in ("linear", "layer_norm", "scaled_dot_product_attention", "gelu", "silu", "dropout")),
    (activations, "quick_gelu"),
    (timm_drop, "drop_path"),
)


class FusedBlock(Block):
    """``timm.models.vision_transformer.Block`` with its forward on ``vitkernels.ops``; swapped in by ``vitkernels.fuse``.

    It owns nothing of its own. A call that the fused forward does not cover (``why_not``) runs timm's.
    """

    stock = Block  # unannotated: TorchScript reads timm's annotations through the instance
    _vk_recompute_mlp = False  # a switch of fuse(): an attribute of the instance, so that it is copied and pickled with it
    _vk_inference, _vk_folded = False, None  # as well: _fold.py

    # wraps: inspect and TorchScript, which compiles source, see timm's forward. A replaced one may take other arguments.
    @functools.wraps(Block.forward)
    def forward(self, x, *args, **kwargs):
        if not isinstance(self, FusedBlock):  # this method outlives unfuse in a wrapper that has bound it, as accelerate's does
            return Block.forward(self, x, *args, **kwargs)
        # Where there is no kernel to win with, timm's own forward is as fast as timm: the guard alone costs ViT-Ti at batch 1
        # 2.5% of a CPU's time, in cache misses. A promise to save memory is kept, where there is a place for it.
        left = _availability.leaves_to_pytorch(_guard.example(self, x))
        recomputes = self._vk_recompute_mlp and isinstance(x, Tensor) and not torch.jit.is_tracing()
        apart = (left and not recomputes) or _guard.acts(x, *args, *kwargs.values())
        if apart or self.why_not():
            return super().forward(x, *args, **kwargs)
        # A graph of torch.fx, which traces with a proxy, runs on the parameters: it could not see that they changed.
        folded = _fold.current(self) if self._vk_inference and isinstance(x, Tensor) else None
        return self._vk_fused(x, folded, None, None, *args, **kwargs)[0]

    def _vk_fused(
        self,
        x: Tensor,
        folded: _fold.FoldedBlock | None,
        statistics: Statistics | None = None,
        follower: tuple[Folded, float] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Statistics | None]:
        """The fused forward, for callers that have asked ``why_not`` and ``_fold.current``.

        Args:
            statistics: of ``x``'s rows, with norm1's eps; follower: as ``folded_mlp``.

        Returns:
            The block's output, and its rows' statistics for the follower.
        """
        attn, feed_forward, norm2 = self.attn, self.mlp, self.norm2  # each lookup on a module costs 0.4 us
        qkv, fc1, fc2, act = attn.qkv, feed_forward.fc1, feed_forward.fc2, activation_name(feed_forward.act)

        if folded is None or folded.qkv is None:
            packed = linear(x, qkv.weight, qkv.bias, None, None, _norm(self.norm1), None)  # (B, N, 3*H*Dh)
        else:
            packed = folded_linear(x, qkv.weight, qkv.bias, _norm(self.norm1), folded.qkv, None, statistics)
        q_norm, k_norm = attn.q_norm, attn.k_norm
        if type(q_norm) is nn.Identity and type(k_norm) is nn.Identity:
            heads = attention_packed(packed, attn.num_heads, attn.head_dim, attn_mask, is_causal)
            del packed
        else:
            q, k, v = packed.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)  # (B, N, H, Dh) each
            # Not called as modules: in a graph of torch.fx the last one would pass for the output of attn.
            heads = attention(q_norm.forward(q), k_norm.forward(k), v, attn_mask, is_causal)
        weight, bias, gamma = _scaled(attn.proj, self.ls1, folded and folded.proj)
        fc2_weight, fc2_bias, fc2_gamma = _scaled(fc2, self.ls2, folded and folded.fc2)
        dropped, fc2_dropped = _draw(self.drop_path1, heads, gamma), _draw(self.drop_path2, heads, fc2_gamma)
        parameters = (norm2.weight, norm2.bias, fc1.weight, fc1.bias, fc2_weight, fc2_bias)
        undropped = dropped is None and fc2_dropped is None
        if undropped and folded is not None and folded.fc1 is not None:
            projection = (weight, bias, gamma)
            return folded_mlp(heads, x, projection, parameters, fc2_gamma, norm2.eps, act, folded.fc1, follower)
        if undropped and gamma is None and fc2_gamma is None:
            return projected_mlp(heads, x, weight, bias, parameters, norm2.eps, act, self._vk_recompute_mlp), None
        x = linear(heads, weight, bias, gamma, x, None, dropped)
        return residual_mlp(x, parameters, norm2.eps, act, fc2_gamma, fc2_dropped, self._vk_recompute_mlp), None

    def train(self, mode=True):
        if mode and self._vk_inference:
            _fold.drop(self)
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self._vk_inference:
            _fold.fold(self)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self._vk_inference:
            self._vk_folded = None  # the next call folds again

    def why_not(self) -> list[str]:
        """Reasons why a call would run timm's forward now; empty when the fused one runs. Also works on a stock ``Block``."""
        reasons = _guard.global_hooks() + _guard.patched(_SHIPPED)
        reasons += _guard.children(self, "", _BLOCK_PARTS)
        attn, feed_forward = self._modules.get("attn"), self._modules.get("mlp")
        if type(attn) is Attention:
            reasons += _guard.children(attn, "attn.", _ATTENTION_PARTS)
            reasons += _attention_state(attn)
        if type(feed_forward) is Mlp:
            reasons += _guard.children(feed_forward, "mlp.", _MLP_PARTS)
            for name in ("drop1", "drop2"):
                reasons += _guard.active_dropout(f"mlp.{name}", feed_forward._modules.get(name))
            act = feed_forward._modules.get("act")
            if type(act) is nn.GELU and act.approximate not in ("none", "tanh"):
                reasons.append(f"mlp.act approximates by {act.approximate!r}")
        for name in ("norm1", "norm2"):
            norm = self._modules.get(name)
            if type(norm) is LayerNorm and getattr(norm, "_fast_norm", False):
                reasons.append(f"{name} is a fast norm, which changes autocast")
        return reasons or _shapes(self)


class FusedBlocks(nn.Sequential):
    """Blocks in a row, of which each tells the next the statistics of its output's rows; ``fuse(model, inference=True)``.

    They are handed over here, and not on the tensor, because here nobody can have written to the tensor in between. A block
    with hooks, or that runs timm's forward, is called as ever and gets and hands on none.
    """

    stock = nn.Sequential

    @functools.wraps(nn.Sequential.forward)
    def forward(self, input):
        ours = isinstance(self, FusedBlocks) and isinstance(input, Tensor)  # unfused since it was bound; a proxy of torch.fx
        if not ours or _availability.leaves_to_pytorch(input) or _guard.acts(input) or _guard.patched(_SHIPPED_SEQUENTIAL):
            return nn.Sequential.forward(self, input)
        x, statistics, folded = input, None, None
        del input
        blocks = list(self._modules.values())
        for block, follower in zip(blocks, [*blocks, None][1:], strict=True):
            folded = folded or _folded_for_us(block)
            if folded is None:
                x = block(x)
                continue
            following = None if follower is None else _folded_for_us(follower)
            told = None if following is None else (following.qkv, follower.norm1.eps)
            x, statistics = block._vk_fused(x, folded, statistics, told)
            folded = following
        return x


class InnerBlock(nn.Module):
    """A block that is told the statistics of its input and hands on its own: what ``vitkernels roofline`` counts."""

    def __init__(self, block: FusedBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        folded = _folded_for_us(self.block)
        if folded is None or folded.qkv is None:
            return self.block(x)
        statistics = Statistics(*(x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2)))
        return self.block._vk_fused(x, folded, statistics, (folded.qkv, self.block.norm1.eps))[0]


def _folded_for_us(block: nn.Module) -> _fold.FoldedBlock | None:
    """What ``block`` multiplies with if LayerNorm is in it and all that calling the block does is its fused forward."""
    if type(block) is not FusedBlock or not block._vk_inference or block._compiled_call_impl is not None:
        return None
    state = block.__dict__
    hooked = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
    patched = type(block).forward is not _SHIPPED_FORWARD or type(block).__call__ is not nn.Module.__call__
    if hooked or _guard.has_own(block, "forward") or patched or block.why_not():
        return None
    folded = _fold.current(block)
    return None if folded is None or folded.qkv is None or folded.fc1 is None else folded


_SHIPPED_FORWARD = FusedBlock.forward
_SHIPPED_SEQUENTIAL = _guard.shipped((nn.Sequential, "forward"))


def _shapes(block: nn.Module) -> list[str]:
    """Reasons why the layers of a block that has all of them do not fit each other; timm may broadcast, or raise."""
    modules, attn = block._modules, block._modules["attn"]
    layers, mlp = attn._modules, modules["mlp"]._modules
    width, hidden = _guard.attribute(layers["qkv"], "weight").shape[-1], _guard.attribute(mlp["fc1"], "weight").shape[0]
    heads, reasons = attn.num_heads * attn.head_dim, []
    for name, layer, shape in (
        ("attn.qkv", layers["qkv"], (3 * heads, width)),
        ("attn.proj", layers["proj"], (width, heads)),
        ("mlp.fc1", mlp["fc1"], (hidden, width)),
        ("mlp.fc2", mlp["fc2"], (width, hidden)),
        ("norm1", modules["norm1"], (width,)),
        ("norm2", modules["norm2"], (width,)),
    ):
        weight, bias = _guard.attribute(layer, "weight"), _guard.attribute(layer, "bias")
        if (weight is not None and weight.shape != shape) or (bias is not None and bias.shape != shape[:1]):
            reasons.append(f"weight and bias of {name} are not of shapes {shape} and {shape[:1]}")
        elif layer.__dict__.get("normalized_shape", shape) != shape:
            reasons.append(f"{name} normalises {layer.normalized_shape}, not {shape}")
    for name, layer in (("ls1", layers["proj"]), ("ls2", mlp["fc2"])):
        scale = modules[name]
        if type(scale) is not LayerScale:
            continue
        gamma = _guard.attribute(scale, "gamma")
        if gamma.shape != (width,) or not gamma.is_floating_point():
            reasons.append(f"{name}.gamma is a {gamma.dtype} tensor of {tuple(gamma.shape)}, not one of ({width},) floats")
        elif scale.inplace and gamma.dtype != _guard.attribute(layer, "weight").dtype:
            reasons.append(f"{name} multiplies in place, by a gamma of another dtype")
    for name in ("q_norm", "k_norm"):
        norm = layers[name]
        if type(norm) is not nn.Identity and norm.normalized_shape != (attn.head_dim,):
            reasons.append(f"attn.{name} normalises {norm.normalized_shape}, not {(attn.head_dim,)}")
    return reasons


def _attention_state(attn: nn.Module) -> list[str]:
    reasons = []
    if not attn.fused_attn:
        reasons.append("attn.fused_attn is False")
    if getattr(attn, "attn_dim", attn.num_heads * attn.head_dim) != attn.num_heads * attn.head_dim:
        reasons.append("attn.attn_dim is not num_heads * head_dim")
    if getattr(attn, "gate", None) is not None:  # timm >= 1.0.28
        reasons.append("attn.gate is not supported")
    attn_drop, proj_drop = attn._modules.get("attn_drop"), attn._modules.get("proj_drop")
    if attn.training and getattr(attn_drop, "p", 0.0) > 0.0:  # timm gives p to attention by the state of attn
        reasons.append("attn.attn_drop is active")
    return reasons + _guard.active_dropout("attn.proj_drop", proj_drop)


def _draw(drop_path: nn.Module, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """(B, 1, 1) of what drop path multiplies each sample's branch with; None where it does nothing.

    The module draws, in the branch's dtype, so that the random stream is timm's.
    """
    if type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob > 0.0:
        return drop_path.forward(ones(branch, gamma))  # not called as a module: its output is another than timm's
    return None


def _norm(module: nn.LayerNorm) -> tuple[Tensor | None, Tensor | None, float]:
    return module.weight, module.bias, module.eps


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale.gamma if type(scale) is LayerScale else None


def _scaled(
    layer: nn.Linear, scale: nn.Module, folded: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and what is left of LayerScale."""
    return (layer.weight, layer.bias, _gamma(scale)) if folded is None else (*folded, None)


def activation_name(module: nn.Module) -> str:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS[type(module)]
