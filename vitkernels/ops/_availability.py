"""Which operators would run a kernel on a device: what ``vitkernels info`` and ``explain`` print, and what blocks ask."""

import torch

from .. import _select
from .._recording import cast as cast  # these for models, which ask here alone
from .._recording import exporting as exporting
from .._select import acts as acts
from .._select import run_by_dynamo as run_by_dynamo
from .attention import why_not as attention_why_not
from .layer_norm import why_not as layer_norm_why_not
from .linear import why_not as linear_why_not
from .mlp import why_not as mlp_why_not
from .patch_embed import why_not as patch_embed_why_not
from .pos_embed import why_not as pos_embed_why_not


def availability(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, list[str]]:
    """For each public operator the reasons why its kernel cannot run on small tensors of this device and dtype."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    rows, weight, heads = empty(2, 64), empty(64, 64), empty(1, 2, 1, 64)
    attention, resampling = attention_why_not(heads, heads, heads), pos_embed_why_not(rows[None])
    return {
        "patch_embed": patch_embed_why_not(empty(1, 3, 16, 16), empty(64, 3, 16, 16)),
        "layer_norm": layer_norm_why_not(rows),
        "add_layer_norm": layer_norm_why_not(rows, residual=rows),
        "attention": attention,
        "attention_qkv": attention,
        "linear": linear_why_not(rows, weight),
        "mlp": mlp_why_not(rows, weight, weight),
        "resample_pos_embed": resampling,
        "resample_pos_embed_many": resampling,
    }


def leaves_to_pytorch(x: object) -> bool:
    """Will ``auto`` run PyTorch's operators for all of a block's work, whatever it is?"""
    return _select.policy() == "auto" and isinstance(x, torch.Tensor) and not _select.takes_kernels(x)
