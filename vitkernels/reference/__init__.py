"""What is computed: each operator as a composition of PyTorch's own, on any device, up to float64.

These functions are the fallback that ``auto`` takes (so they are what eager PyTorch and timm compute, bit for bit) and, in
float64, the oracle of every test. Arguments are those of ``vitkernels.ops``, which validates them first.
"""

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
