"""Custom kernels for Vision Transformers: ``model = vitkernels.fuse(model)`` makes a timm ViT faster.

Importing this package imports torch and nothing heavier. timm and Triton are imported on first use, and no GPU is touched.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops, reference
from ._select import backend
from ._version import __version__
from .fuse import FusionReport, explain, fuse, unfuse

if TYPE_CHECKING:
    from . import models
    from .models import VisionTransformer

__all__ = [
    "FusionReport",
    "VisionTransformer",
    "__version__",
    "backend",
    "explain",
    "fuse",
    "models",
    "ops",
    "reference",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    # models/ subclasses timm's modules, and importing timm takes seconds.
    if name in ("models", "VisionTransformer"):
        models = importlib.import_module(".models", __name__)
        return models if name == "models" else models.VisionTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
