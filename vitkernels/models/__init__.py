"""Who calls the operators: subclasses of timm's modules that own no parameters and override ``forward``.

What they keep on a module, and methods that a user may have one of by the same name, start with ``_vk_``: neither hides nor
deletes the user's own ``model.embed``, say.
"""

from ._fold import copies_of
from ._swap import FUSED_CLASSES, fuse_classes, set_inference, set_recompute_mlp, undone_on_error, unfuse_classes
from .attention_pool import FusedAttentionPool
from .block import FusedBlock, FusedBlocks, InnerBlock
from .naflexvit import FusedNaFlexEmbeds
from .patch_embed import FusedPatchEmbed, FusedVisionTransformer, clear_pixel_statistics, set_pixel_statistics, takes_uint8
from .vision_transformer import VisionTransformer, vit_base, vit_huge, vit_large, vit_small, vit_tiny
from .vit_pytorch import load_vit_pytorch

__all__ = [
    "FUSED_CLASSES",
    "FusedAttentionPool",
    "FusedBlock",
    "FusedBlocks",
    "FusedNaFlexEmbeds",
    "FusedPatchEmbed",
    "FusedVisionTransformer",
    "InnerBlock",
    "VisionTransformer",
    "clear_pixel_statistics",
    "copies_of",
    "fuse_classes",
    "load_vit_pytorch",
    "set_inference",
    "set_pixel_statistics",
    "set_recompute_mlp",
    "takes_uint8",
    "undone_on_error",
    "unfuse_classes",
    "vit_base",
    "vit_huge",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
