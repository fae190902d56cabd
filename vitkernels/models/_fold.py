"""``fuse(model, inference=True)``: each block keeps copies of its parameters with LayerNorm and LayerScale multiplied in.

The copies are one attribute of the block, ``_vk_folded``, in no state dict and no list of buffers, and the parameters stay as
they are, so that everything can be undone and every call that the copies do not serve (gradients, autocast) runs on the
parameters. A call compares where the parameters lie and how often they were written with what was folded: after
``load_state_dict``, ``.half()``, ``copy_`` or an optimizer's step the copies are made again. They are replaced in whole, by
one assignment: of the threads that share a model each finds the old set or the new one. What PyTorch counts as no write is
not seen: in place through ``p.data``, NumPy or DLPack, by another process, to a tensor made under ``inference_mode``. The
comparison costs 7 us a block; a compiled graph makes it once, when it is traced, so what it needs to see later (``_apply``,
``_load_from_state_dict``, ``train``) is also told by the block.
"""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch._dynamo  # timm has loaded it
from timm.layers import LayerScale
from torch import Tensor, nn

from ..ops import _availability
from ..ops.folded_linear import Folded, fold_norm
from ..ops.linear import compute_dtype
from . import _guard

_WITH_NORM = (("qkv", "norm1"), ("fc1", "norm2"))
_WITH_SCALE = (("proj", "ls1"), ("fc2", "ls2"))


State = list[tuple[int, int, torch.Size, tuple[int, ...]]]  # of tensors: address, number of writes, shape, strides


class FoldedBlock(NamedTuple):
    """What a block multiplies with, each None where nothing is folded. proj, fc2: weight and bias with LayerScale in them."""

    qkv: Folded | None = None
    fc1: Folded | None = None
    proj: tuple[Tensor, Tensor | None] | None = None
    fc2: tuple[Tensor, Tensor | None] | None = None


class Copies:
    """The copies, and what they were made from: where and how each parameter lay, and how often it was written.

    ``block`` is None where nothing folds. That memory is kept: a new parameter must not come to lie there. A copied or
    unpickled block folds again.
    """

    def __init__(self, block: FoldedBlock | None, state: State | None, memory: list[Tensor]) -> None:
        self.block, self.state, self.memory = block, state, memory

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return _left_out, ()


def _left_out() -> None:
    """What a pickle has in the place of copies: a function of ours, which ``torch.load(weights_only=True)`` can be told of."""


def fold(block: nn.Module) -> Copies:
    """Make the copies, for a block whose parts are those that the fused forward knows; else it keeps none."""
    sources = [] if block.why_not() else _parameters(block)
    with torch.inference_mode(False), torch.no_grad():
        # State first: what another thread writes while these are made is newer than it, and has them made again.
        memory = [t.detach() for t in sources]
        state = _state(memory)
        copies = Copies(_folded(block) if sources else None, state, memory)
        for _, tensor in _tensors(copies):
            torch._dynamo.mark_static(tensor)  # as a parameter: a second model's widths are no reason for symbolic ones
        if state and _on_gpu(sources[0]):  # the next call may come from another stream, which would not wait for this one
            torch.cuda.current_stream(sources[0].device).synchronize()
    block._vk_folded = copies
    _BLOCKS[id(block)] = block
    return copies


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_initialized()  # a fake tensor may be on a GPU that is not there


_BLOCKS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # those with copies, by id


def _folded(block: nn.Module) -> FoldedBlock | None:
    layers = _layers(block)
    found: dict[str, Any] = {}
    dtype = _guard.attribute(layers["qkv"], "weight").dtype
    if dtype in (torch.float16, torch.bfloat16):  # in float32 there is no rounding of LN(x) to save, and a mean to lose
        for name, norm in _WITH_NORM:
            found[name] = fold_norm(*_weights(layers[norm]), *_weights(layers[name]))
    for name, scale in _WITH_SCALE:
        if type(layers[scale]) is not LayerScale or dtype == torch.float16:  # which loses a gamma of 1e-5 times a weight
            continue
        gamma, (weight, bias) = _guard.attribute(layers[scale], "gamma"), _weights(layers[name])
        if any(t is not None and t.dtype != dtype for t in (gamma, weight, bias)):
            continue  # the branch has the dtype that promotion gives, or timm refuses it
        gamma = gamma.float()
        found[name] = (weight.float() * gamma[:, None]).to(dtype), None if bias is None else (bias.float() * gamma).to(dtype)
    return FoldedBlock(**found) if found else None


def copies_of(model: nn.Module) -> dict[str, Tensor]:
    """The copies that the blocks of ``model`` hold now, by names such as ``blocks.0.qkv.weight``."""
    found = {}
    for path, block in model.named_modules():
        copies = block.__dict__.get("_vk_folded")
        for name, tensor in () if copies is None else _tensors(copies):
            found[f"{path}.{name}".lstrip(".")] = tensor
    return found


def _tensors(copies: Copies) -> Iterator[tuple[str, Tensor]]:
    """Each by name, such as ``qkv.weight``."""
    for name, value in () if copies.block is None else copies.block._asdict().items():
        fields = value._fields if isinstance(value, Folded) else ("weight", "bias")
        for field, tensor in () if value is None else zip(fields, value, strict=True):
            if tensor is not None:
                yield f"{name}.{field}", tensor


def _layers(block: nn.Module) -> dict[str, nn.Module]:
    modules, attn, mlp = block._modules, block._modules["attn"]._modules, block._modules["mlp"]._modules
    return {
        "norm1": modules["norm1"],
        "qkv": attn["qkv"],
        "proj": attn["proj"],
        "ls1": modules["ls1"],
        "norm2": modules["norm2"],
        "fc1": mlp["fc1"],
        "fc2": mlp["fc2"],
        "ls2": modules["ls2"],
    }


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    return _guard.attribute(layer, "weight"), _guard.attribute(layer, "bias")


def _parameters(block: nn.Module) -> list[Tensor]:
    return [t for layer in _layers(block).values() for t in _guard.tensors(layer)]


def drop(block: nn.Module) -> None:
    """Leave nothing of ours on the block."""
    block.__dict__.pop("_vk_inference", None)
    block.__dict__.pop("_vk_folded", None)


def _state(tensors: list[Tensor]) -> State | None:
    """Where and how each lies, and how often it was written; None where that cannot be read."""
    try:
        return [(t.data_ptr(), t._version, t.shape, t.stride()) for t in tensors]
    except RuntimeError:
        pass
    try:  # tensors of inference_mode count no writes
        return [(t.data_ptr(), 0 if t.is_inference() else t._version, t.shape, t.stride()) for t in tensors]
    except RuntimeError:  # fake tensors, and those of torch.func
        return None


def current(block: nn.Module) -> FoldedBlock | None:
    """What ``block`` may multiply with in this call instead of its parameters; None for those."""
    # What leaves Python keeps the parameters, which can be loaded and cast. A trace is made twice, with gradients and without.
    if torch.is_grad_enabled() or torch.jit.is_tracing() or _availability.exporting():
        return None
    compiling = torch.compiler.is_compiling()
    if compiling:
        _refresh()  # before anything reads the copies: Dynamo would not read them again
    copies = block._vk_folded
    if copies is None and compiling:  # the block was copied or unpickled, and not called since; or its parameters are fake
        return None
    if copies is not None and copies.block is None:
        return None
    weight = _guard.attribute(block._modules["attn"]._modules["qkv"], "weight")  # not the input, which may be FX's proxy
    if compute_dtype(weight) != weight.dtype:
        return None
    if compiling:
        return copies.block
    state = _state(_parameters(block))
    if state is None:
        return None
    if copies is None or state != copies.state:
        if _on_gpu(weight) and torch.cuda.is_current_stream_capturing():  # what a graph records does not run yet
            return None
        copies = fold(block)
    return copies.block


@_availability.run_by_dynamo
def _refresh() -> None:
    """Before a graph is made: every block that has copies gets those of its parameters as they are now.

    It asks for no block in particular: a graph with such a constant in it would serve one block alone.
    """
    for reference in _BLOCKS.valuerefs():
        block = reference()
        copies = None if block is None else block.__dict__.get("_vk_folded")
        if block is None or copies is None or block.why_not():
            continue
        state = _state(_parameters(block))
        if state is None:  # its parameters are fake
            block._vk_folded = None
        elif state != copies.state:
            fold(block)
