"""``fuse(model, inference=True)``: each block keeps copies of its parameters with LayerNorm and LayerScale multiplied in.

The copies are non-persistent buffers of the block and the parameters stay as they are, so that everything can be undone and
every call that the copies do not serve (gradients, autocast) runs on the parameters. A call compares where the parameters lie
and how often they were written with what was folded: after ``load_state_dict``, ``.half()``, ``copy_`` or an optimizer's step
the copies are made again. What is written in place through ``p.data`` counts as no write, and is not seen. The comparison
costs 5 us a block; a compiled graph cannot make it, so what it needs to see (``_apply``, ``_load_from_state_dict``, ``train``)
is also told by the block.
"""

from typing import NamedTuple

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from ..ops.folded_linear import Folded, fold_norm
from ..ops.linear import compute_dtype

_PREFIX = "folded_"
_WITH_NORM = (("qkv", "norm1"), ("fc1", "norm2"))
_WITH_SCALE = (("proj", "ls1"), ("fc2", "ls2"))


class _Origin:
    """What was folded: where each parameter lay and how often it was written, no entries where nothing folds.

    It keeps that memory: a new parameter must not come to lie there. A copied or unpickled block folds again.
    """

    def __init__(self, state: list[tuple[int, int]] | None, tensors: list[Tensor]) -> None:
        self.state, self.memory = state, [t.detach() for t in tensors]

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class FoldedBlock(NamedTuple):
    """What a block multiplies with, each None where nothing is folded. proj, fc2: weight and bias with LayerScale in them."""

    qkv: Folded | None
    fc1: Folded | None
    proj: tuple[Tensor, Tensor | None] | None
    fc2: tuple[Tensor, Tensor | None] | None


def fold(block: nn.Module) -> None:
    """Make the buffers, for a block whose parts are those that the fused forward knows; else it keeps none."""
    drop(block)
    block.inference = True
    if block.why_not():
        return
    tensors = _parameters(block)
    with torch.inference_mode(False), torch.no_grad():
        folded = _folded(block)
        block.folded_of = _Origin(_state(tensors), tensors) if folded else _Origin([], [])
    for name, tensor in folded.items():
        block.register_buffer(_PREFIX + name, tensor, persistent=False)


def _folded(block: nn.Module) -> dict[str, Tensor]:
    layers = _layers(block)
    found: dict[str, Tensor] = {}
    dtype = layers["qkv"].weight.dtype
    if dtype in (torch.float16, torch.bfloat16):  # in float32 there is no rounding of LN(x) to save, and a mean to lose
        for name, norm in _WITH_NORM:
            layer, norm = layers[name], getattr(block, norm)
            folded = fold_norm(norm.weight, norm.bias, layer.weight, layer.bias)
            found |= {f"{name}_{field}": tensor for field, tensor in zip(Folded._fields, folded, strict=True)}
    for name, scale in _WITH_SCALE:
        layer, scale = layers[name], getattr(block, scale)
        if type(scale) is not LayerScale or dtype == torch.float16:  # which loses a gamma of 1e-5 times a weight
            continue
        gamma = scale.gamma.float()
        found[f"{name}_weight"] = (layer.weight.float() * gamma[:, None]).to(dtype)
        if layer.bias is not None:
            found[f"{name}_bias"] = (layer.bias.float() * gamma).to(dtype)
    return found


def _layers(block: nn.Module) -> dict[str, nn.Linear]:
    return {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}


def drop(block: nn.Module) -> None:
    """Leave nothing of ours on the block."""
    for name in [name for name in block._buffers if name.startswith(_PREFIX)]:
        delattr(block, name)
    block.__dict__.pop("inference", None)
    block.__dict__.pop("folded_of", None)


def _parameters(block: nn.Module) -> list[Tensor]:
    modules, attn, mlp = block._modules, block._modules["attn"]._modules, block._modules["mlp"]._modules
    owners = (
        modules["norm1"],
        attn["qkv"],
        attn["proj"],
        modules["ls1"],
        modules["norm2"],
        mlp["fc1"],
        mlp["fc2"],
        modules["ls2"],
    )
    return [t for owner in owners for t in owner._parameters.values() if t is not None]


def _state(tensors: list[Tensor]) -> list[tuple[int, int]] | None:
    """Where each lies and how often it was written; None where that cannot be read."""
    try:
        return [(t.data_ptr(), t._version) for t in tensors]
    except RuntimeError:
        pass
    try:  # tensors of inference_mode count no writes
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    except RuntimeError:  # fake tensors, and those of torch.func
        return None


def current(block: nn.Module) -> FoldedBlock | None:
    """What ``block`` may multiply with in this call instead of its parameters; None for those."""
    origin = block.folded_of
    if not block.inference or torch.is_grad_enabled() or (origin is not None and origin.state == []):
        return None
    weight = block._modules["attn"]._modules["qkv"]._parameters["weight"]  # not the input: torch.fx traces this with a proxy
    if compute_dtype(weight) != weight.dtype:
        return None
    if torch.compiler.is_compiling():
        return None if origin is None else _tensors(block)
    state = _state(_parameters(block))
    if state is None:
        return None
    if origin is None or state != origin.state:
        fold(block)
    return _tensors(block)


def _tensors(block: nn.Module) -> FoldedBlock:
    find = block._buffers.get
    qkv, fc1 = find("folded_qkv_weight"), find("folded_fc1_weight")
    proj, fc2 = find("folded_proj_weight"), find("folded_fc2_weight")
    return FoldedBlock(
        None if qkv is None else Folded(qkv, find("folded_qkv_colsum"), find("folded_qkv_bias")),
        None if fc1 is None else Folded(fc1, find("folded_fc1_colsum"), find("folded_fc1_bias")),
        None if proj is None else (proj, find("folded_proj_bias")),
        None if fc2 is None else (fc2, find("folded_fc2_bias")),
    )
