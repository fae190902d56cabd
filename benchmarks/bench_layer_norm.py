"""LayerNorm and add + LayerNorm against eager PyTorch: ``pytest benchmarks/ --benchmark-only``.

The fused provider is checked against eager at the very shape before it is timed. On a GPU it runs under
``backend("fused")``, so a missing kernel fails instead of timing the fallback; on a CPU it runs under ``auto`` and every
row says so.
"""

import pytest
import torch
import torch.nn.functional as F

import vitkernels as vk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# (B, N, D) of ViT-S/16, B/16, L/16 and So400m/14; a batch that fills a GPU, or one image on a CPU.
BATCH = 256 if DEVICE == "cuda" else 1
SHAPES = [(BATCH, 197, 384), (BATCH, 197, 768), (BATCH, 197, 1024), (BATCH, 256, 1152)]


def eager(x, residual, weight, bias):
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
    stream = residual + x
    return F.layer_norm(stream, x.shape[-1:], weight, bias, 1e-6)


def fused(x, residual, weight, bias):
    with vk.backend("fused" if DEVICE == "cuda" else "auto"):
        if residual is None:
            return vk.ops.layer_norm(x, weight, bias)
        return vk.ops.add_layer_norm(x, residual, weight, bias)[0]


@pytest.mark.parametrize("provider", [eager, fused], ids=lambda p: p.__name__)
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_layer_norm(benchmark, shape, op, mode, provider):
    train = mode == "forward_backward"
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=train) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=DEVICE, dtype=DTYPE, requires_grad=train) for _ in range(2))
    inputs = (x, residual if op == "add_layer_norm" else None, weight, bias)
    dy = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    torch.testing.assert_close(provider(*inputs), eager(*inputs))

    def run():
        y = provider(*inputs)
        if train:
            torch.autograd.grad(y, [t for t in inputs if t is not None], dy)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {mode} {'x'.join(map(str, shape))}"
    path = "pytorch" if provider is eager else ("kernel" if DEVICE == "cuda" else "reference")
    benchmark.extra_info.update(path=path, device=DEVICE, dtype=str(DTYPE), torch=torch.__version__)
    benchmark(run)
