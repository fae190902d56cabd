"""Every timm ViT of plain blocks, two blocks deep: fused equals stock, outputs and all gradients. ``pytest -m slow``.

``timm_vits.txt`` lists the names of timm 1.0.31 whose blocks all are the plain ``Block``: any head_dim, LayerScale, the three
GELUs, NaFlex masks.
"""

from pathlib import Path

import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit
from torch import nn

import vitkernels as vk

NAMES = Path(__file__).with_name("timm_vits.txt").read_text().split()


def build(name):
    """Two blocks, a small image, and no parameter left at zero or tiny."""
    try:
        model = timm.create_model(name, depth=2, img_size=4 * patch_size(name))
    except (TypeError, AssertionError, RuntimeError):  # NaFlexVit has no image size, some stems need their own
        model = timm.create_model(name, depth=2)
    for p in model.parameters():
        if p.abs().max() < 1e-3 or p.unique().numel() == 1:
            nn.init.normal_(p, mean=p.mean().item(), std=0.1)
    return model.eval()


def patch_size(name):
    patch = next((part for part in name.split("_") if part.startswith("patch")), "patch16")
    return int(patch.removeprefix("patch"))


def inputs(model):
    if not isinstance(model, NaFlexVit):
        return torch.randn(2, 3, *getattr(model.patch_embed, "img_size", (224, 224)))
    height, width = 3, 5  # the second image of the batch is smaller: its padding is masked
    size = model.embeds.patch_size[0]
    valid = torch.ones(2, height * width, dtype=torch.bool)
    valid[1, 9:] = False
    coordinates = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).view(1, -1, 2)
    return {
        "patches": torch.randn(2, height * width, 3 * size * size),
        "patch_coord": coordinates.repeat(2, 1, 1),
        "patch_valid": valid,
    }


def outputs_and_gradients(model, batch):
    model.zero_grad()
    out = model(batch)
    out.square().mean().backward()
    return {"output": out.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_stock(name):
    model = build(name)
    batch = inputs(model)
    stock = outputs_and_gradients(model, batch)
    vk.fuse(model)
    blocks = [m for m in vk.explain(model).modules if m.kind.endswith("Block")]
    assert len(blocks) == 2
    assert all(m.fused for m in blocks), vk.explain(model)
    fused = outputs_and_gradients(model, batch)
    assert fused.keys() == stock.keys()
    for key, want in stock.items():
        error = (fused[key] - want).norm() / want.norm().clamp_min(1e-20)
        assert error < 1e-5, f"{key}: relative error {error:.1e}"
