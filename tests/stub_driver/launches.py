"""``python tests/stub_driver/launches.py``: launches of each call, as JSON lines on standard output.

A line has ``room`` and ``case``, and ``launches``, which reached the driver, and ``recorded``, which ``kernels/_recorder.py``
counts for the same call; or ``error``. Rooms, forward and backward: ``operators``, every registered one by itself;
``functions``, every public one through autograd; ``models``, fused ones.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import stub_driver

STUB = stub_driver.install()  # before anything imports Triton

import timm
import torch
from torch import Tensor, nn

import vitkernels as vk
from vitkernels import _select
from vitkernels.kernels import _recorder

Case = tuple[str, Callable[[], object]]
BF16 = torch.bfloat16


def operators() -> Iterator[Case]:
    """Each registered operator at the arguments of ``tests/test_registration.py``."""
    import test_registration

    for name, calls in test_registration.arguments().items():
        for index, arguments in enumerate(calls):
            yield f"{name} {index}", partial(getattr(torch.ops.vitkernels, name), *arguments)


def functions() -> Iterator[Case]:
    """Each public function, forward and backward, under each plan that it has."""
    B, N, H, D, F = 2, 50, 2, 32, 64
    x, residual, w, b, scale = leaf(B, N, D), leaf(B, N, D), leaf(D), leaf(D), leaf(D)
    qkv, packed, bias = leaf(B, N, 3, H, 16), leaf(B * N, 3, H, 16), leaf(1, H, N, N)
    cu_seqlens = torch.tensor([0, N // 2, B * N], dtype=torch.int32)
    wide, wide_bias, narrow = leaf(F, D), leaf(F), leaf(D, F)
    dropped = torch.ones(B, 1, 1, dtype=BF16)
    images, weight, prefix, positions = leaf(B, 3, 32, 32), leaf(D, 3, 16, 16), leaf(1, 1, D), leaf(1, 5, D)
    pixels = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8)
    statistics: dict[str, Any] = {"mean": torch.rand(3), "std": torch.rand(3)}
    ops, last = vk.ops, pixels.to(memory_format=torch.channels_last)
    tokens: dict[str, Any] = {"prefix_tokens": prefix, "pos_embed": positions}
    everywhere = {
        "layer_norm": lambda: ops.layer_norm(x, w, b),
        "add_layer_norm": lambda: ops.add_layer_norm(x, residual, w, b, layer_scale=scale),
        "attention": lambda: ops.attention(*qkv.unbind(2)),
        "attention_qkv": lambda: ops.attention_qkv(qkv),
        "attention_qkv of many heads": lambda: ops.attention_qkv(leaf(32, 20, 3, 12, 16)),
        "attention_qkv with a bias": lambda: ops.attention_qkv(qkv, bias=bias),
        "attention_qkv of packed images": lambda: ops.attention_qkv(packed, cu_seqlens=cu_seqlens),
        "attention_qkv in float32": lambda: ops.attention_qkv(leaf(B, N, 3, H, 16, dtype=torch.float32)),
        "resample_pos_embed": lambda: ops.resample_pos_embed(leaf(1, 16, D), (6, 5), num_prefix_tokens=0),
        "resample_pos_embed_many": lambda: ops.resample_pos_embed_many(leaf(1, 16, D), [(6, 5), (4, 4)], num_prefix_tokens=0),
    }
    by_plan = {
        "linear": lambda: ops.linear(x, wide, wide_bias, act="gelu"),
        "linear after a norm": lambda: ops.linear(x, wide, wide_bias, norm=(w, b, 1e-6)),
        "linear into the stream": lambda: ops.linear(x, leaf(D, D), b, layer_scale=scale, residual=residual, drop_path=dropped),
        "mlp": lambda: ops.mlp(x, w, b, wide, wide_bias, narrow, b, layer_scale=scale),
        "mlp that recomputes": lambda: ops.mlp(x, w, b, wide, wide_bias, narrow, b, recompute=True),
        "patch_embed": lambda: ops.patch_embed(images, weight, b, **tokens),
        "patch_embed of uint8": lambda: ops.patch_embed(pixels, weight, b, **tokens, **statistics),
        "patch_embed of channels last": lambda: ops.patch_embed(last, weight, b, **tokens, **statistics),
    }
    for name, call in everywhere.items():
        yield name, partial(backward, call)
    for plan in ("cublas", "triton"):
        for name, call in by_plan.items():
            yield f"{name}, {plan}", partial(backward, call, plan)


def models() -> Iterator[Case]:
    """Fused models, as small as they can be: forward under inference mode and, of those that train, forward and backward."""
    small: dict[str, Any] = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    vit = partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, **small)
    images = torch.randn(2, 3, 32, 32).to(BF16)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    patches = {
        "patches": torch.randn(2, 6, 768).to(BF16),
        "patch_coord": torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 0]], [[i // 3, i % 3] for i in range(6)]]),
        "patch_valid": torch.tensor([[True] * 4 + [False] * 2, [True] * 6]),
    }
    found: dict[str, tuple[nn.Module, dict[str, Any], Any]] = {
        "plain": (vit(), {}, images),
        "LayerScale": (vit(init_values=0.1), {}, images),
        "inference": (vit(init_values=0.1), {"inference": True}, images),
        "uint8": (vit(), {"input": "uint8"}, pixels),
        "attention pooling": (vit(class_token=False, global_pool="map"), {}, images),
        "NaFlex": (timm.create_model("naflexvit_base_patch16_gap", pos_embed_grid_size=(4, 4), **small), {}, patches),
    }
    for name, (stock, options, batch) in found.items():
        model = vk.fuse(stock.to(BF16).eval(), **options)
        for plan in ("cublas", "triton"):
            yield f"{name}, {plan}", partial(forward, model, batch, plan)
            if not options.get("inference"):
                yield f"{name}, {plan}, training", partial(backward, partial(model.train(), batch), plan)


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def forward(model: nn.Module, batch: object, plan: str) -> None:
    with torch.inference_mode(), _select.planning(plan):
        model.eval()(batch)


def backward(call: Callable[[], object], plan: str | None = None) -> None:
    with _select.planning(plan):
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def recorded(call: Callable[[], object]) -> int:
    kernels: list[str] = []
    with _recorder.recording(lambda kernel, *_: kernels.append(kernel)):
        call()
    return len(kernels)


def launches(call: Callable[[], object]) -> dict[str, object]:
    try:
        before = STUB.launches()
        call()
        return {"launches": STUB.launches() - before, "recorded": recorded(call)}
    except Exception as error:  # whatever Triton, PyTorch or a launcher refuses is what this looks for
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    with vk.backend("fused"):
        for room in (operators, functions, models):
            for name, call in room():
                print(json.dumps({"room": room.__name__, "case": name, **launches(call)}), flush=True)


if __name__ == "__main__":
    main()
