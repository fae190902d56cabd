"""One launch of each kernel: the bytes that the roofline's ledger counts are those that the interpreter saw touched.

Shapes fill no tile. The ledger knows a launch's tensors (``WRITES`` of the kernel's file), the bounds checker each address.
``BEYOND`` has what they differ by.
"""

import interpreter
import pytest
import torch

from vitkernels.cli import _ledger
from vitkernels.cli._chips import CHIPS
from vitkernels.kernels import (
    _recorder,
    attention,
    attention_backward,
    folded_linear,
    layer_norm,
    linear,
    linear_bwd,
    patch_embed,
    patch_embed_backward,
)

pytestmark = pytest.mark.skipif(not interpreter._installed, reason="the interpreter sees what a launch touches")
BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6


def draw(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype)


# LayerNorm.

ROWS, WIDTH = 10, 200


def _layer_norm(dtype, needs):
    x, weight, bias = draw(ROWS, WIDTH, dtype=dtype), torch.randn(WIDTH), torch.randn(WIDTH)
    y, mean, rstd = layer_norm.launch_layer_norm_fwd(x, weight, bias, EPS, dtype)
    layer_norm.launch_layer_norm_bwd(torch.randn_like(y), x, weight, bias, mean, rstd, needs, needs)


def _add_layer_norm(dtype, needs):
    x, residual = draw(ROWS, WIDTH, dtype=dtype), torch.randn(ROWS, WIDTH)
    weight, bias, gamma = torch.randn(3, WIDTH).unbind()
    scale = gamma if needs else None
    y, stream, mean, rstd = layer_norm.launch_add_layer_norm_fwd(x, residual, weight, bias, scale, EPS, FP32, dtype)
    layer_norm.launch_add_layer_norm_bwd(
        torch.randn_like(y), torch.randn_like(stream), stream, x if needs else None, weight, bias, scale, mean, rstd, dtype,
        FP32, needs, needs,
    )  # fmt: skip


# Linear layers.


def _linear(plan, arch, preact="none", act="gelu", residual=False):
    x, weight, bias = draw(37, 72), draw(40, 72), draw(40)
    epilogue = (draw(40), torch.ones(37, dtype=FP32), draw(37, 40)) if residual else (None, None, None)
    linear.launch_linear_fwd(x, weight, bias, act, *epilogue, BF16, preact, False, plan, arch)


def _linear_bwd(act, scaled):
    scale = (draw(200), torch.ones(2, dtype=FP32)) if scaled else (None, None)
    z = draw(2, 19, 200) if act or scaled else None
    linear_bwd.launch_linear_bwd(draw(2, 19, 200, dtype=FP32), z, act, *scale, BF16, True, act is not None, True, scaled)


def _layer_scale_bwd():
    args = draw(10, 72, dtype=FP32), draw(10, dtype=FP32), draw(10, 72), draw(10), draw(10)
    linear_bwd.launch_layer_scale_bwd(*args, True, True, True)


def _statistics():
    x, weight, residual = draw(70, 64), draw(128, 64), draw(70, 128)
    folded_linear.launch_linear_statistics_fwd(x, weight, draw(128), None, residual, EPS, "triton", "sm_80")


def _folded():
    x, weight, sums = draw(37, 72), draw(40, 72), draw(40, dtype=FP32)
    folded_linear.launch_folded_linear_fwd(
        x, None, None, None, None, EPS, weight, None, weight, sums, sums, "gelu", "triton", "sm_80"
    )


# Attention.


def _attention(keys=21, queries=21, bias=None, packed=False, dbias=False, dim=24):
    """Forward and backward, of views of one packed qkv where there are as many queries as keys."""
    images = () if packed else (2,)
    q, k, v = draw(*images, keys, 3, 2, dim).unbind(-3)
    q = q[..., :queries, :, :]
    bias = None if bias is None else draw(*bias)
    cu_seqlens = torch.tensor([0, 9, keys], dtype=torch.int32) if packed else None
    settings = bias, cu_seqlens, 12, dim**-0.5, False
    saved = attention.launch_attention_fwd(q, k, v, *settings)
    attention_backward.launch_attention_bwd(draw(*q.shape), q, k, v, *saved, *settings, dbias)


# Patch embedding.


def _patch_embed(dtype=BF16, prefix=1, channels_last=False):
    images = (255 * torch.rand(2, 3, 24, 16)).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    normalise = (torch.rand(3), torch.rand(3) + 0.1) if dtype == torch.uint8 else (None, None)
    weight, end = draw(40, 3, 8, 8), (False, "triton", "sm_80")
    tokens = None if prefix == 0 else draw(1, prefix, 40)
    out = patch_embed.launch_patch_embed_fwd(
        images, weight, draw(40), tokens, draw(1, prefix + 6, 40), True, *normalise, BF16, *end
    )
    needs = dtype != torch.uint8, True
    patch_embed_backward.launch_patch_embed_bwd(draw(*out.shape), images, weight, *normalise, *needs, *end)


NORM = ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_parameter_gradients_kernel"]
LINEAR_BWD = ["_linear_bwd_kernel", "_parameter_gradients_kernel"]
BACKWARD = ["_attention_bwd_kernel"]
ATTENTION = ["_attention_fwd_kernel", *BACKWARD]
STREAM = ["_attention_stream_fwd_kernel", *BACKWARD]
PATCHES = ["_patch_embed_fwd_kernel", "_patch_embed_dimages_kernel", "_patch_embed_dweight_kernel"]
CASES = {
    **{f"layer_norm {d}": (lambda d=d: _layer_norm(d, True), NORM) for d in (FP32, BF16)},
    "layer_norm without parameter gradients": (lambda: _layer_norm(BF16, False), NORM[:2]),
    **{f"add_layer_norm {d}": (lambda d=d: _add_layer_norm(d, True), NORM) for d in (FP32, BF16)},
    "add_layer_norm without parameter gradients": (lambda: _add_layer_norm(BF16, False), NORM[:2]),
    "linear, pointers": (lambda: _linear("triton", "sm_80"), ["_linear_pointer_kernel"]),
    "linear, pointers, residual": (lambda: _linear("triton", "sm_80", "none", None, True), ["_linear_pointer_kernel"]),
    "linear, pointers, z too": (lambda: _linear("triton", "sm_80", "also"), ["_linear_pointer_kernel"]),
    "linear, descriptors, z too": (lambda: _linear("triton", "sm_90", "also"), ["_linear_descriptor_kernel"]),
    "linear, descriptors, residual": (lambda: _linear("triton", "sm_90", "none", None, True), ["_linear_descriptor_kernel"]),
    "linear, cuBLAS": (lambda: _linear("cublas", "sm_90", "none", None, True), ["_linear_epilogue_kernel"]),
    "linear_bwd": (lambda: _linear_bwd("gelu", False), LINEAR_BWD),
    "linear_bwd, sum and cast": (lambda: _linear_bwd(None, False), LINEAR_BWD),
    "linear_bwd, scaled": (lambda: _linear_bwd("gelu", True), LINEAR_BWD),
    "layer_scale_bwd": (_layer_scale_bwd, ["_layer_scale_bwd_kernel"]),
    "linear with statistics": (_statistics, ["_linear_pointer_kernel", "_combine_moments_kernel"]),
    "folded linear": (_folded, ["_row_statistics_kernel", "_linear_pointer_kernel"]),
    "attention": (_attention, ATTENTION),
    "attention, cross": (lambda: _attention(queries=5), STREAM),
    "attention, key mask": (lambda: _attention(bias=(2, 1, 1, 21)), ATTENTION),
    "attention, bias": (lambda: _attention(bias=(1, 2, 21, 21), dbias=True), [*STREAM, *BACKWARD, "_attention_dbias_kernel"]),
    "attention, one bias": (
        lambda: _attention(bias=(21, 21), dbias=True), [*STREAM, *BACKWARD, "_attention_dbias_kernel", "_sum_partials_kernel"]
    ),
    "attention, packed": (lambda: _attention(packed=True), [*STREAM, *BACKWARD]),
    "patch_embed": (_patch_embed, PATCHES),
    "patch_embed, uint8": (lambda: _patch_embed(torch.uint8, 0, True), [PATCHES[0], PATCHES[2]]),
}  # fmt: skip
# By case and number of the launch: bytes that the ledger counts beyond those touched, read and written.
# A query's statistics are four floats for one load of 128 bits; nobody writes the fourth (of 84, 20 or 42 rows). Two
# launches of which one writes them and the other reads them both count as writing: ``WRITES`` is of the kernel.
# Of the gradient of the tokens, the patch embedding's backward skips the class token's, 40 bfloat16 of two images.
BEYOND = {
    ("attention", 1): (-4 * 84, 4 * 84),
    ("attention, cross", 1): (-4 * 20, 4 * 20),
    ("attention, key mask", 1): (-4 * 84, 4 * 84),
    ("attention, bias", 1): (0, 4 * 84),
    ("attention, bias", 2): (-16 * 84, 16 * 84),
    ("attention, one bias", 1): (0, 4 * 84),
    ("attention, one bias", 2): (-16 * 84, 16 * 84),
    ("attention, packed", 1): (0, 4 * 42),
    ("attention, packed", 2): (-16 * 42, 16 * 42),
    ("patch_embed", 1): (2 * 80, 0),
    ("patch_embed", 2): (2 * 80, 0),
}


def test_every_kernel_is_here():
    declared = {name for module in _recorder.modules().values() for name in getattr(module, "WRITES", {})}
    assert {name for _, kernels in CASES.values() for name in kernels} == declared


@pytest.mark.parametrize("case", CASES)
def test_a_launch_counts_the_bytes_that_it_touches(case):
    launch, kernels = CASES[case]
    with interpreter.record_traffic() as touched:
        launch()
    ledger = _ledger._Ledger(CHIPS["h100"])

    def record(kernel, reads, writes, flops):
        ledger.add(kernel, flops, reads, writes)

    with _recorder.recording(record):
        launch()
    assert [o.name for o in ledger.operators] == [name for name, _, _ in touched.launches] == kernels
    for number, (operator, (_, read, written)) in enumerate(zip(ledger.operators, touched.launches, strict=True)):
        more_read, more_written = BEYOND.get((case, number), (0, 0))
        assert (operator.read_bytes, operator.written_bytes) == (read + more_read, written + more_written), operator.name
