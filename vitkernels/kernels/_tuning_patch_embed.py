"""Candidates of the patch embedding's forward and weight gradient, for pixels of every form."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._patch_tiles import PatchConfig, table_key
from ._tuning import Case, Problem, Shape
from .patch_embed import launch_patch_embed_fwd
from .patch_embed_backward import launch_patch_embed_bwd

_CONFIGS = tuple(
    PatchConfig(*tile, num_warps=warps, num_stages=stages)
    for tile, warps, stages in (
        ((128, 128, 64), 8, 3),
        ((128, 128, 64), 4, 3),
        ((128, 128, 32), 8, 4),
        ((128, 256, 64), 8, 3),
        ((256, 128, 64), 8, 3),
        ((128, 64, 64), 4, 4),
        ((64, 128, 64), 4, 4),
        ((64, 64, 64), 4, 4),
    )
)
_CHANNELS = 3


def cases(shape: Shape, batch: int, arch: str, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and d weight in ``dtype``, bfloat16 or float16, beside the configuration that runs without an entry."""
    if not shape.patch:
        return
    grid = shape.image // shape.patch
    D, K, rows = shape.width, _CHANNELS * shape.patch**2, batch * grid**2
    entries: dict[str, dict[str, Any]] = {"default": {"plan": "triton"}, "cublas": {"plan": "cublas"}}
    entries |= {_name(config): {"plan": "triton", "config": asdict(config)} for config in _CONFIGS}
    for kind in ("fwd", "dweight"):
        for pixel in (dtype, torch.uint8, torch.float32):  # as they are, with their normalisation, autocast's
            key = table_key(kind, pixel, dtype, D, K, rows)
            title = f"{key.partition('/')[0]} {D} x {K}, {rows} rows"
            problem = partial(_problem, kind, pixel, batch, grid, shape, arch, dtype)
            yield Case("patch_embed", key, key.partition("/")[0], title, rows, entries, problem)


def _name(config: PatchConfig) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"


def _problem(
    kind: str, pixel: torch.dtype, batch: int, grid: int, shape: Shape, arch: str, compute: torch.dtype, device: torch.device
) -> Problem:
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(compute)

    D, patch, side = shape.width, shape.patch, grid * shape.patch
    K, num_prefix = _CHANNELS * patch**2, shape.tokens - grid**2
    images = draw(batch, _CHANNELS, side, side, scale=64.0).add(128).clamp(0, 255).to(pixel)
    mean, std = (draw(_CHANNELS, scale=0.1).float().add(0.5) for _ in range(2)) if pixel == torch.uint8 else (None, None)
    weight, bias = draw(D, _CHANNELS, patch, patch, scale=K**-0.5), draw(D)
    prefix, positions = draw(1, num_prefix, D) if num_prefix else None, draw(1, shape.tokens, D)
    # Small, as a mean loss makes it: in float16 the sum over all patches would overflow. Autocast's stream is float32.
    dout = draw(batch, shape.tokens, D, scale=(batch * grid**2) ** -0.5)
    dout = dout.float() if pixel == torch.float32 else dout
    settings = (False, "auto", arch)

    def patches(dtype: torch.dtype) -> Tensor:
        x = images
        if mean is not None and std is not None:
            wide = torch.promote_types(torch.float32, dtype)
            x = (x.to(wide) / 255 - mean.to(wide).view(-1, 1, 1)) / std.to(wide).view(-1, 1, 1)
        # Float pixels are rounded before they are multiplied, as autocast does: that is no error. Normalised ones are judged.
        x = x.to(dtype) if mean is not None else x.to(compute).to(dtype)
        x = x.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch * grid**2, K)

    def forward() -> Tensor:
        return launch_patch_embed_fwd(images, weight, bias, prefix, positions, True, mean, std, bias.dtype, *settings)

    def forward_by_pytorch(dtype: torch.dtype) -> Tensor:
        tokens = (patches(dtype) @ weight.flatten(1).to(dtype).t() + bias.to(dtype)).view(batch, -1, D)
        if prefix is not None:
            tokens = torch.cat([prefix.to(dtype).expand(batch, -1, -1), tokens], dim=1)
        return tokens + positions.to(dtype)

    def dweight() -> Tensor:
        return launch_patch_embed_bwd(dout, images, weight, mean, std, False, True, *settings)[1]

    def dweight_by_pytorch(dtype: torch.dtype) -> Tensor:
        g = dout[:, num_prefix:].to(dtype).reshape(-1, D)
        return (g.t() @ patches(dtype)).view(weight.shape)

    run, by_pytorch = (forward, forward_by_pytorch) if kind == "fwd" else (dweight, dweight_by_pytorch)
    return Problem(run, partial(by_pytorch, compute), partial(by_pytorch, torch.float64))
