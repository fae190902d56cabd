"""The public operators: validation, the choice between kernel and reference, autograd.

Every function here is a leaf for ``torch.fx`` and traces through ``torch.compile(fullgraph=True)`` and ``torch.export``; with
``cu_seqlens`` only where the kernel runs, since PyTorch's operators need the lengths as numbers.
"""

import torch.fx

from . import folded_linear as _folded_linear  # noqa: F401  registers its operator
from .attention import attention, attention_qkv
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear
from .mlp import mlp
from .patch_embed import patch_embed
from .pos_embed import resample_pos_embed, resample_pos_embed_many

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "layer_norm",
    "linear",
    "mlp",
    "patch_embed",
    "resample_pos_embed",
    "resample_pos_embed_many",
]

# Without this, symbolic tracing would enter the functions and fail at the first decision on a dtype or a shape.
for _name in __all__:
    torch.fx.wrap(_name)
