"""Counts what a forward and a backward move and compute, by running them on ``meta`` tensors.

PyTorch's operators are seen by a dispatch mode: each tensor argument counts once as read, each result once as written, views
and allocations are free. ``scaled_dot_product_attention`` is one operator, as on a GPU, where its output has the query's
layout. Of our operators every launch counts, scratch included, with the FLOPs that its kernel file declares, and what the
launcher asks of PyTorch besides (``kernels/_recorder.py``). Bytes are those of perfect caching within one operator:
LayerNorm's backward in PyTorch reads its inputs twice and is counted once, so the eager side is, if anything, too good.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from .. import _env, _select
from ._chips import Chip

_OVERWRITES = ("copy_", "fill_", "zero_")  # in-place operators that do not read what they write
# Operators that copy these arguments first where they are not contiguous, inside, in CUDA code (layer_norm_kernel.cu).
_PACKS = {"native_layer_norm": (0,), "native_layer_norm_backward": (0, 1)}
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def _bytes(t: Tensor) -> int:
    """Of the distinct elements: an expanded dimension counts once."""
    sizes = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(sizes) * t.element_size()


@dataclass
class Operator:
    """One operator of PyTorch, or one launch of ours.

    Attributes:
        name: PyTorch's name for it, or the kernel's; shape: of its first result.
        flops: of matrix products only; everything else is below 1%.
        reads, writes: (storage, bytes) of each tensor.
        launched_by: the operator of ours whose launch this is; empty for PyTorch's.
        parameter_bytes: of weights read and weight gradients written, their casts too: independent of the batch.
    """

    name: str
    shape: tuple[int, ...]
    flops: int
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    launched_by: str = ""
    parameter_bytes: int = 0

    @property
    def ours(self) -> bool:
        return bool(self.launched_by)

    @property
    def read_bytes(self) -> int:
        return sum(size for _, size in self.reads)

    @property
    def written_bytes(self) -> int:
        return sum(size for _, size in self.writes)

    @property
    def kind(self) -> str:
        """``attention``, ``matrix products``, ``LayerNorm``, or ``elementwise``, which copies and sums are too."""
        if "attention" in f"{self.name} {self.launched_by}":
            return "attention"
        if self.flops:
            return "matrix products"
        return "LayerNorm" if "layer_norm" in f"{self.name} {self.launched_by}" else "elementwise"

    @property
    def activation_bytes(self) -> int:
        """What units count: all but parameters and their gradients."""
        return self.read_bytes + self.written_bytes - self.parameter_bytes


@dataclass
class Count:
    """Operators in order, and the bytes that autograd kept for backward (distinct storages, parameters excluded)."""

    forward: list[Operator]
    backward: list[Operator] = field(default_factory=list)
    saved_bytes: int = 0


class _Ledger(TorchDispatchMode):
    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.launched_by = ""  # inside a launcher: its operator
        self._chip = chip
        self._alive: dict[int, Any] = {}  # storages by address: kept, so that no address names two

    def storage(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        self._alive.setdefault(storage._cdata, storage)
        return storage._cdata

    def add(self, name: str, flops: int, reads: Sequence[Tensor], writes: Sequence[Tensor], launched_by: str = "") -> None:
        distinct = {(self.storage(t), t.storage_offset(), t.shape, t.stride()): t for t in reads}.values()
        operator = Operator(name, tuple(writes[0].shape), flops, self._sized(distinct), self._sized(writes), launched_by)
        if operator.read_bytes + operator.written_bytes > 0:
            self.operators.append(operator)

    def _sized(self, tensors: Any) -> list[tuple[int, int]]:
        return [(self.storage(t), _bytes(t)) for t in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "vitkernels":
            return self._launches(func, name, args, kwargs)
        with self:  # what a launcher calls arrives here before PyTorch has taken it apart
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        if name in _ALLOCATIONS:
            return out
        for t in (args[position] for position in _PACKS.get(name, ())):
            if not t.is_contiguous():
                self.add("contiguous", 0, [t], [t.new_empty(t.shape)])
        if name == "addmm" and args[0].dim() == 2 and _env.ADDMM_COPIES:
            self.add("copy", 0, [args[0]], [out])
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        changed = [t for t in _changed(func, args, kwargs) if isinstance(t, Tensor)]
        known = {self.storage(t) for t in inputs}
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and self.storage(t) not in known]
        if fresh or changed:
            reads = [t for t in inputs if name not in _OVERWRITES or all(t is not c for c in changed)]
            self.add(name, _flops(func, args, kwargs, out), reads, [*changed, *fresh])
        return out

    def _launches(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        from ..kernels import _recorder  # imports Triton

        launcher = _recorder.launcher(name)
        if launcher is None:  # one kernel of the extension
            out = func(*args, **kwargs)
            self.add(name, 0, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], [out], launched_by=name)
            return out

        def launch(kernel: str, reads: list[Tensor], writes: list[Tensor], flops: int) -> None:
            self.add(kernel.strip("_").removesuffix("_kernel"), flops, reads, writes, launched_by=name)

        architecture = int(self._chip.arch.removeprefix("sm_"))
        before, self.launched_by = self.launched_by, name
        try:
            with _recorder.recording(launch, self._chip.multiprocessors, architecture), self:
                return launcher(*args, **kwargs)
        finally:
            self.launched_by = before


def _changed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an in-place or out= operator writes."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def _flops(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    formula = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten._addmm_activation else packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


class _Attention(torch.autograd.Function):
    """``scaled_dot_product_attention`` as fused kernels do it: logits stay on the chip, backward computes them again."""

    @staticmethod
    def forward(ctx: Any, ledger: _Ledger, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
        trains = any(ctx.needs_input_grad)
        lse = [q.new_empty(q.shape[:-1], dtype=torch.float32)] if trains else []
        inputs = [t for t in (q, k, v, bias) if t is not None]
        ledger.add("scaled_dot_product_attention", 2 * _product(q, k), inputs, [out, *lse])
        ctx.ledger = ledger
        ctx.save_for_backward(*inputs, out, *lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        ctx.ledger.add("scaled_dot_product_attention_backward", 5 * _product(q, k), [dout, *ctx.saved_tensors], grads)
        return None, *grads, None


def _product(q: Tensor, k: Tensor) -> int:
    """FLOPs of one product between queries and keys (..., N, Dh) and (..., M, Dh)."""
    return 2 * q.numel() * k.shape[-2]


# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior: those that a ViT calls.
_TO_BFLOAT16 = (F.linear, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_TO_FLOAT32 = (F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.group_norm)


class _Functions(TorchFunctionMode):
    """Attention as one operator and, if asked for, the casts of CUDA autocast to bfloat16, which are not made on ``meta``."""

    def __init__(self, ledger: _Ledger, autocast: bool) -> None:
        super().__init__()
        self._ledger, self._autocast = ledger, autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        attention = func is F.scaled_dot_product_attention
        casts = self._autocast and not self._ledger.launched_by  # an operator's implementation runs below autocast
        if casts and (attention or func in _TO_BFLOAT16 or func in _TO_FLOAT32):
            dtype = torch.float32 if func in _TO_FLOAT32 else torch.bfloat16
            args, kwargs = tree_map(lambda t: _cast(t, dtype), (args, kwargs))
        return self._attend(*args, **kwargs) if attention else func(*args, **kwargs)

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return _Attention.apply(self._ledger, query, key, value, attn_mask)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """CUDA's autocast state, as our public functions see it; ``torch.autocast`` refuses it on a machine without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def count(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    chip: Chip,
    *,
    train: bool = False,
    autocast: bool = False,
) -> Count:
    """Run ``module`` on ``meta`` tensors as on ``chip``.

    Args:
        module: on ``meta``, its mode (eval or train) as it is.
        args, kwargs: of its forward.
        train: also run backward, to the parameters and to those inputs that require a gradient; else without gradients.
        autocast: cast as CUDA autocast to bfloat16 would.
    """
    from ..models import copies_of  # imports timm

    ledger = _Ledger(chip)
    held = (*module.parameters(), *module.buffers(), *copies_of(module).values())
    parameters = {ledger.storage(t) for t in held}
    functions = _Functions(ledger, autocast)
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[ledger.storage(t)] = t.untyped_storage().nbytes()
        return t

    backward: list[Operator] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_select.targeting(chip.arch))
        stack.enter_context(_select.backend("auto"))
        stack.enter_context(torch.set_grad_enabled(train))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
        with ledger, functions, _autocast(autocast):
            out = module(*args, **kwargs)
        forward, ledger.operators = ledger.operators, backward
        if train:
            inputs = [t for t in (*module.parameters(), *tree_leaves((args, kwargs))) if _trains(t)]
            outputs = [t for t in tree_leaves(out) if _trains(t)]
            starts = [torch.empty_like(t) for t in outputs]
            with ledger:
                grads = torch.autograd.grad(outputs, inputs, starts, allow_unused=True)
            trained = len(list(filter(_trains, module.parameters())))
            parameters |= {ledger.storage(g) for g in grads[:trained] if g is not None}
    operators = (*forward, *backward)
    _follow_casts(operators, parameters)
    for operator in operators:
        operator.parameter_bytes = sum(size for key, size in (*operator.reads, *operator.writes) if key in parameters)
    return Count(forward, backward, sum(size for key, size in saved.items() if key not in parameters))


def _follow_casts(operators: Sequence[Operator], parameters: set[int]) -> None:
    """What is made of parameters alone, a cast or ``cat``, is one too, and so is what a parameter's gradient was cast from."""
    for operator in (o for o in operators if o.name in ("_to_copy", "cat")):
        if all(key in parameters for key, _ in operator.reads):
            parameters.add(operator.writes[0][0])
    for operator in (o for o in reversed(operators) if o.name == "_to_copy"):
        if operator.writes[0][0] in parameters:
            parameters.add(operator.reads[0][0])


def _trains(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
