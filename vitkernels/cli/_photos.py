"""Real photographs as model input: scikit-learn's two samples for measurements, the user's own for classification."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ._output import CommandError, optional

if TYPE_CHECKING:
    from PIL.Image import Image


def open_photo(text: str) -> "Image":
    """Read an image file as RGB, upright."""
    image_module = optional("PIL.Image", "pillow", "reading a photo")
    ops = optional("PIL.ImageOps", "pillow", "reading a photo")
    path = Path(text)
    if not path.is_file():
        raise CommandError(f"photo {text}: no such file")
    try:
        return ops.exif_transpose(image_module.open(path)).convert("RGB")
    except image_module.UnidentifiedImageError:
        raise CommandError(f"photo {text}: not an image") from None
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise CommandError(f"photo {text}: cannot be read: {error}") from error


def sample_batch(config: dict[str, Any], count: int) -> tuple[Tensor, str]:
    """A batch for measurements: crops of scikit-learn's sample photographs, no two the same, normalised for the model.

    Args:
        config: timm's data config of the model (``input_size``, ``mean``, ``std``).
        count: batch size B.

    Returns:
        float32 (B, 3, H, W), and ``"photographs"``, or ``"random"`` without scikit-learn and pillow.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_images

        photos = [Image.fromarray(array) for array in load_sample_images().images]
    except ImportError:
        noise = torch.randn((count, *config["input_size"]), generator=torch.Generator().manual_seed(0))
        return noise, "random"
    size = config["input_size"][1:]
    crops = []
    for index, box, flip in _crops([photo.size for photo in photos], size[1] / size[0], count):
        crop = photos[index].resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
    return normalise(crops, config), "photographs"


def normalise(images: "list[Image]", config: dict[str, Any]) -> Tensor:
    """RGB images of one size as float32 (B, 3, H, W) with the model's mean and std taken out."""
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return ((pixels - mean) / std).contiguous()


def _crops(sizes: list[tuple[int, int]], aspect: float, count: int) -> list[tuple[int, tuple[int, int, int, int], bool]]:
    """``count`` different choices of (photo, box as left, top, right, bottom, flip); aspect is width / height."""
    generator = random.Random(0)
    chosen: dict[tuple[int, tuple[int, int, int, int], bool], None] = {}
    while len(chosen) < count:
        index = len(chosen) % len(sizes)
        width, height = sizes[index]
        crop_height = int(min(height, width / aspect) * generator.uniform(0.4, 1.0))
        crop_width = int(crop_height * aspect)
        left, top = generator.randint(0, width - crop_width), generator.randint(0, height - crop_height)
        chosen[index, (left, top, left + crop_width, top + crop_height), generator.random() < 0.5] = None
    return list(chosen)
