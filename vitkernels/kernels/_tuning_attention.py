"""Candidates of attention, forward and backward, at which ``vitkernels tune`` measures them: 16-bit, no bias."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_configs import BackwardConfig, ForwardConfig, entry, key, why_not_backward, why_not_forward
from ._tuning import Case, Problem, Shape
from .attention import launch_attention_fwd
from .attention_backward import launch_attention_qkv_bwd

# Queries a tile, keys a block, warps, stages; then K and V resident. What does not fit a shape or chip is not measured.
_FORWARD = (
    *(
        ForwardConfig(False, *config)
        for config in (
            (128, 64, 8, 3),
            (128, 64, 8, 2),
            (128, 64, 4, 2),
            (128, 128, 8, 2),
            (128, 32, 8, 3),
            (64, 64, 4, 3),
            (64, 64, 4, 2),
            (64, 128, 4, 2),
            (64, 32, 4, 3),
        )
    ),
    *(ForwardConfig(True, m, 0, warps, 1, online) for m, warps in ((64, 4), (128, 8)) for online in (False, True)),
)
# One program a head, or two launches; rows of a block, queries and keys a step, warps, stages.
_BACKWARD = (
    *(
        BackwardConfig(True, *config)
        for config in (
            (64, 32, 32, 4, 1),
            (64, 16, 32, 4, 1),
            (64, 32, 64, 4, 1),
            (64, 32, 32, 4, 2),
            (128, 32, 32, 8, 1),
            (64, 32, 32, 8, 1),
        )
    ),
    *(
        BackwardConfig(False, *config)
        for config in (
            (64, 32, 64, 4, 2),
            (64, 32, 32, 4, 2),
            (64, 16, 32, 4, 1),
            (64, 64, 64, 4, 2),
            (64, 32, 64, 4, 3),
            (128, 32, 64, 8, 2),
            (128, 64, 64, 8, 2),
            (32, 16, 32, 8, 1),
        )
    ),
)


def candidates(direction: str, arch: int, N: int, Dh: int) -> tuple[ForwardConfig | BackwardConfig, ...]:
    """Those that the launcher would take from a table."""
    if direction == "forward":
        return tuple(c for c in _FORWARD if not why_not_forward(c, arch, N, Dh))
    return tuple(c for c in _BACKWARD if not why_not_backward(c, arch, Dh) and (N <= 320 or not c.one_program))


def cases(shape: Shape, batch: int, arch: str, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward of a block's attention in ``dtype``, bfloat16 or float16."""
    N, H = shape.tokens, shape.num_heads
    Dh = shape.width // H
    for direction in ("forward", "backward"):
        found = candidates(direction, int(arch.removeprefix("sm_")), N, Dh)
        entries = {"default": {"plan": "default"}, **{_name(c): entry(c) for c in found}}
        title = f"{direction} {N} tokens, {H} heads of {Dh}, {batch} images"
        problem = partial(_problem, direction, batch, N, H, Dh, dtype)
        yield Case("attention", key(direction, dtype, N, Dh), direction, title, batch * N * H, entries, problem)


def _name(config: ForwardConfig | BackwardConfig) -> str:
    options = f"w{config.num_warps} s{config.num_stages}"
    if isinstance(config, BackwardConfig):
        form = "one program" if config.one_program else "two launches"
        return f"{form} {config.block}/{config.query_step}/{config.key_step} {options}"
    if config.resident:
        return f"resident {config.block_m} {'online ' if config.online else ''}{options}"
    return f"streamed {config.block_m}x{config.block_n} {options}"


def _problem(direction: str, B: int, N: int, H: int, Dh: int, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, N, 3, H, Dh, generator=generator, device=device)
    qkv[:, :, 0] *= 3  # logits of std 3
    dout = torch.randn(B, N, H, Dh, generator=generator, device=device).to(dtype)
    qkv, scale = qkv.to(dtype), Dh**-0.5
    q, k, v = qkv.unbind(2)
    if direction == "forward":
        run = lambda: launch_attention_fwd(q, k, v, None, None, N, scale, False)[0]  # noqa: E731
        return Problem(run, *(partial(_by_images, _forward, precision, qkv) for precision in (dtype, torch.float64)))
    if device.type == "meta":
        out, row_max, log_sum = torch.empty_like(dout), *(torch.empty(B, H, N, device=device) for _ in range(2))
    else:
        out, row_max, log_sum = launch_attention_fwd(q, k, v, None, None, N, scale, False)
    saved = qkv, out, row_max, log_sum
    run = lambda: launch_attention_qkv_bwd(dout, *saved, None, None, N, scale, False, False)[0]  # noqa: E731
    return Problem(run, *(partial(_by_images, _backward, precision, qkv, dout) for precision in (dtype, torch.float64)))


def _by_images(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """Eight images at a time: float64 keeps logits in memory, 180 MB for each image of 1370 tokens and 12 heads."""
    return torch.cat([function(*(t.to(dtype) for t in images)) for images in zip(*(t.split(8) for t in tensors), strict=True)])


def _forward(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _backward(qkv: Tensor, dout: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():  # tune runs in inference mode, whose tensors have no gradient
        leaf = qkv.clone().requires_grad_()
        return torch.autograd.grad(_forward(leaf), leaf, dout.clone())[0]
