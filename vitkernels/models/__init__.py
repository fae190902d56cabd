"""Who calls the operators: subclasses of timm's modules that own no parameters and override ``forward``."""

from ._swap import FUSED_CLASSES, fuse_classes, set_inference, set_recompute_mlp, unfuse_classes
from .block import FusedBlock
from .patch_embed import FusedPatchEmbed
from .vision_transformer import VisionTransformer, vit_base, vit_huge, vit_large, vit_small, vit_tiny
from .vit_pytorch import load_vit_pytorch

__all__ = [
    "FUSED_CLASSES",
    "FusedBlock",
    "FusedPatchEmbed",
    "VisionTransformer",
    "fuse_classes",
    "load_vit_pytorch",
    "set_inference",
    "set_recompute_mlp",
    "unfuse_classes",
    "vit_base",
    "vit_huge",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
