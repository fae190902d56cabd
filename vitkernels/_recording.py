"""What a program that records this call makes us ask in another way, and leave undone."""

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor


def exporting() -> bool:
    """Is this call recorded by ``torch.export`` (and so for ONNX and AOTInductor)?"""
    # Not torch.compiler.is_exporting(): Dynamo of torch 2.11 takes it for True under torch.compile, too.
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler._is_exporting_flag


def fx_tracing() -> bool:
    """Does ``make_fx`` record? Also for ``aot_module``, but not under ``torch.compile``, whose graphs stay in this process."""
    # make_fx is a mode of one kind or of the other. Without any, which is quickly seen, nothing is asked.
    watched = not torch.compiler.is_compiling() and (
        torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0
    )
    return watched and proxy_tensor.get_proxy_mode() is not None


def holds(condition: bool) -> bool:
    """``condition``, about sizes. While ``torch.export`` records: does it hold for all sizes that the program is made for?

    Asked in any other way, it would become a condition of the program, which refuses the sizes on the other side.
    """
    if torch.jit.is_scripting():
        return condition
    else:
        return _always(condition) if exporting() else bool(condition)


def _always(condition: bool | torch.SymBool) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # sympy

    return statically_known_true(condition)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``. A cast that changes nothing is not recorded: it would tie the program to this dtype and device."""
    return x if x.dtype == dtype else x.to(dtype)
