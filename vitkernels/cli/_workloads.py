"""The one table of models and shapes that inspect, roofline and ``benchmarks/`` work on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A ViT and the batches at which it is measured.

    Attributes:
        name: short, as the literature writes it.
        timm_name: the model of timm, at its own image size.
        tokens: T, prefix tokens included; width: D; depth: L; num_heads: H; hidden: F, of the MLP.
        patch: p; image: pixels a side.
        infer_batch, train_batch: images, chosen to fill one H200.
        act: of the MLP.
    """

    name: str
    timm_name: str
    tokens: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    patch: int
    image: int
    infer_batch: int
    train_batch: int
    act: str = "gelu"

    @property
    def head_dim(self) -> int:
        """Dh."""
        return self.width // self.num_heads


WORKLOADS = (
    Workload("Ti/16", "vit_tiny_patch16_224", 197, 192, 12, 3, 768, 16, 224, 256, 256),
    Workload("S/16", "vit_small_patch16_224", 197, 384, 12, 6, 1536, 16, 224, 256, 256),
    Workload("B/16", "vit_base_patch16_224", 197, 768, 12, 12, 3072, 16, 224, 256, 128),
    Workload("B/16@384", "vit_base_patch16_384", 577, 768, 12, 12, 3072, 16, 384, 64, 32),
    Workload("L/16", "vit_large_patch16_224", 197, 1024, 24, 16, 4096, 16, 224, 256, 64),
    Workload("H/14", "vit_huge_patch14_224", 257, 1280, 32, 16, 5120, 14, 224, 64, 32),
    Workload("So400m/14", "vit_so400m_patch14_siglip_224", 256, 1152, 27, 16, 4304, 14, 224, 64, 32),
    Workload("SigLIP-B/16@256", "vit_base_patch16_siglip_256", 256, 768, 12, 12, 3072, 16, 256, 128, 64),
    Workload("DINOv2-B/14@518", "vit_base_patch14_dinov2", 1370, 768, 12, 12, 3072, 14, 518, 32, 16),
    Workload("DINOv3-B/16@256", "vit_base_patch16_dinov3", 261, 768, 12, 12, 3072, 16, 256, 128, 64),
)
