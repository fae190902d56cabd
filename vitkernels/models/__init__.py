"""Who calls the operators: subclasses of timm's modules that own no parameters and override ``forward``."""

from .block import FusedBlock
from .patch_embed import FusedPatchEmbed

# What fuse() swaps, by exact class. Each fused class has `stock`, its timm class, and `why_not(module)`.
FUSED_CLASSES = {cls.stock: cls for cls in (FusedBlock, FusedPatchEmbed)}

__all__ = ["FUSED_CLASSES", "FusedBlock", "FusedPatchEmbed"]
