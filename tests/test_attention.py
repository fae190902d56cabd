"""attention and attention_qkv: reference, operators' contract, autograd, wiring. The kernels: test_attention_kernels.py."""

import importlib
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import outputs_and_gradients
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels.ops.attention import MAX_HEAD_DIM, _Attention, _attention_fwd_reference, _AttentionQKV, why_not


def formula(q, k, v, scale=None, bias=None):
    """Softmax attention written out, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    s = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    s = s if bias is None else s + bias.double()
    return s.softmax(-1).nan_to_num(0.0).matmul(v).transpose(1, 2)


def heads(*shape, dtype=torch.float32):
    return (2 * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("head_dim", [32, 72, 80])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (197, 197), (1, 50)])
def test_attention_is_the_formula(queries, keys, head_dim):
    q, k, v = heads(2, queries, 3, head_dim), heads(2, keys, 3, head_dim), heads(2, keys, 3, head_dim)
    out = vk.ops.attention(q, k, v)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), formula(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vk.ops.attention(q, k, v, scale=0.3).double(), formula(q, k, v, 0.3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 3, 7, 9), (2, 1, 1, 9), (7, 9), (1, 1, 1, 1)])
def test_bias_broadcasts(shape):
    q, k, v, bias = heads(2, 7, 3, 16), heads(2, 9, 3, 16), heads(2, 9, 3, 16), torch.randn(shape)
    torch.testing.assert_close(vk.ops.attention(q, k, v, bias=bias).double(), formula(q, k, v, bias=bias), atol=1e-5, rtol=1e-5)


def test_minus_infinity_masks_keys_and_a_fully_masked_row_gives_zeros_and_zero_gradients():
    q, k, v = (heads(1, 5, 2, 16).requires_grad_() for _ in range(3))
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 3] = -torch.inf
    bias[:, :, 2] = -torch.inf
    out = vk.ops.attention(q, k, v, bias=bias)
    out.sum().backward()
    assert not out[:, 2].any()
    assert not q.grad[:, 2].any()
    assert not v.grad[:, 3].any()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_row_masked_by_finfo_min_gives_the_mean_of_v_as_in_timm(backend, dtype, wide):
    q, k, v = (heads(1, 5, 2, 16).to(dtype) for _ in range(3))
    bias = torch.full((1, 1, 5, 5), torch.finfo(wide).min, dtype=wide)
    expected = v.mean(1, keepdim=True).expand_as(v)
    step = max(1e-6, torch.finfo(dtype).eps)
    with vk.backend(backend):
        torch.testing.assert_close(vk.ops.attention(q, k, v, bias=bias), expected, atol=step, rtol=step)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_bias_is_of_any_dtype_under_autocast(dtype, other):
    q, bias = heads(1, 5, 2, 16).to(dtype), torch.randn(5, 5).to(other)
    with torch.autocast("cpu", torch.bfloat16):
        out = vk.ops.attention(q, q, q, bias=bias)
        packed = vk.ops.attention_qkv(torch.stack([q, q, q], 2), bias=bias)
    assert out.dtype == packed.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    torch.testing.assert_close(out.double(), formula(q, q, q, bias=bias), atol=2e-2, rtol=2e-2)
    assert torch.equal(packed, out)


def test_a_bool_bias_masks_what_is_false():
    q, k, v, keep = heads(2, 5, 2, 16), heads(2, 5, 2, 16), heads(2, 5, 2, 16), torch.rand(2, 1, 5, 5) > 0.4
    keep[..., 0] = True
    additive = torch.zeros(keep.shape).masked_fill_(~keep, -torch.inf)
    torch.testing.assert_close(vk.ops.attention(q, k, v, bias=keep), vk.ops.attention(q, k, v, bias=additive))


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_bias_that_is_a_subclass_of_pytorchs_is_pytorchs_to_read(make):
    """Its memory is not the mask that it stands for."""
    q, k, v = heads(2, 5, 2, 16), heads(2, 5, 2, 16), heads(2, 5, 2, 16)
    expected = vk.ops.attention(q, k, v, bias=torch.ones(5, 5, dtype=torch.bool).tril())
    for call in (vk.ops.attention, lambda *qkv, bias: vk.ops.attention_qkv(torch.stack(qkv, 2), bias=bias)):
        torch.testing.assert_close(call(q, k, v, bias=make(5, 5)), expected)
        with vk.backend("fused"), pytest.raises(RuntimeError, match="a tensor subclass needs PyTorch's own operators"):
            call(q, k, v, bias=make(5, 5))


@pytest.mark.parametrize("lengths", [[5, 3, 9], [4, 0, 2], [0], [1]])
def test_packed_images_attend_to_themselves_only(lengths):
    total = sum(lengths)
    qkv = heads(total, 3, 2, 16).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = vk.ops.attention_qkv(qkv, cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
    one_by_one = [vk.ops.attention_qkv(image[None])[0] for image in qkv.split(lengths)]
    assert packed.shape == (total, 2, 16)
    assert torch.equal(packed, torch.cat(one_by_one))
    packed.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_no_image_at_all_is_an_empty_pack():
    assert vk.ops.attention_qkv(heads(0, 3, 2, 16), cu_seqlens=torch.zeros(1, dtype=torch.int32)).shape == (0, 2, 16)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_without_an_image_queries_keys_and_values_get_empty_gradients(backend):
    q, k, v = (heads(0, 2, 16).requires_grad_() for _ in range(3))
    with vk.backend(backend):
        out = vk.ops.attention(q, k, v, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape] * 3


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_of_no_image_at_all_give_zeros_and_zero_gradients(packed, tokens):
    qkv = heads(tokens, 3, 2, 16).requires_grad_()
    with vk.backend("fused"):
        cu_seqlens = torch.zeros(1, dtype=torch.int32)
        if packed:
            out = vk.ops.attention_qkv(qkv, cu_seqlens=cu_seqlens)
        else:
            out = vk.ops.attention(*qkv.unbind(1), cu_seqlens=cu_seqlens)
    assert torch.equal(out, torch.zeros(tokens, 2, 16))
    (gradient,) = torch.autograd.grad(out, qkv, torch.randn(tokens, 2, 16))
    assert torch.equal(gradient, torch.zeros(tokens, 3, 2, 16))


@pytest.mark.parametrize("tokens", [0, 5])
def test_the_reference_without_an_image_gives_zeros_and_zero_gradients(tokens):
    q, k, v = (heads(tokens, 2, 16).requires_grad_() for _ in range(3))
    out = vk.reference.attention(q, k, v, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(tokens, 2, 16))
    for gradient in torch.autograd.grad(out, (q, k, v), torch.randn(tokens, 2, 16)):
        assert torch.equal(gradient, torch.zeros(tokens, 2, 16))


@pytest.mark.parametrize("ends", [[0, 5, 12], [0, 5, 12, 15], [0, 0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tokens_of_no_packed_image_give_zeros_and_get_no_gradient(ends, dtype):
    qkv, cu_seqlens, used = heads(16, 3, 2, 16).to(dtype), torch.tensor(ends, dtype=torch.int32), ends[-1]
    qkv[used:] = torch.nan
    alone = qkv[:used].clone().requires_grad_()
    expected = torch.cat([vk.ops.attention_qkv(alone, cu_seqlens=cu_seqlens), torch.zeros(16 - used, 2, 16, dtype=dtype)])
    dout = torch.randn(16, 2, 16).to(dtype)
    dqkv = torch.cat([torch.autograd.grad(expected, alone, dout)[0], torch.zeros(16 - used, 3, 2, 16, dtype=dtype)])
    qkv.requires_grad_()
    packed = vk.ops.attention_qkv(qkv, cu_seqlens=cu_seqlens)
    separate = vk.ops.attention(*qkv.unbind(1), cu_seqlens=cu_seqlens)
    for out in (packed, separate):
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out, qkv, dout)[0], dqkv)


def test_tokens_of_no_packed_image_pass_gradcheck_in_float64():
    qkv, cu_seqlens = torch.randn(7, 3, 1, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 5]).int()
    assert torch.autograd.gradcheck(lambda x: vk.reference.attention_qkv(x, cu_seqlens=cu_seqlens), (qkv,))


def test_statistics_of_tokens_of_no_packed_image_are_those_of_a_row_without_a_key():
    """Of the operator's reference too."""
    q, k, v = heads(20, 3, 2, 16).unbind(1)
    arguments = (q, k, v, None, torch.tensor([0, 7]).int(), 0, 0.25, False)
    for _, row_max, log_sum in (torch.ops.vitkernels.attention_fwd(*arguments), _attention_fwd_reference(*arguments)):
        assert not row_max[:, 7:].any()
        assert torch.equal(log_sum[:, 7:], torch.full((2, 13), torch.inf))


def test_tokens_of_no_packed_image_have_autocasts_dtype():
    qkv, cu_seqlens = heads(9, 3, 2, 16), torch.tensor([0, 4]).int()
    with torch.autocast("cpu", torch.bfloat16):
        out = vk.ops.attention_qkv(qkv, cu_seqlens=cu_seqlens)
    assert out.dtype == torch.bfloat16
    assert not out[4:].any()


def test_attention_qkv_is_bitwise_timms_attention_forward_and_backward():
    qkv = heads(2, 50, 3, 4, 24).requires_grad_()
    dout = torch.randn(2, 50, 4 * 24)
    (dqkv,) = torch.autograd.grad(vk.ops.attention_qkv(qkv).flatten(2), qkv, dout)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    timms = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 50, 96)
    assert torch.equal(vk.ops.attention_qkv(qkv).flatten(2), timms)
    assert torch.equal(dqkv, torch.autograd.grad(timms, qkv, dout)[0])


def test_gradcheck_in_float64():
    qkv = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv, bias: vk.ops.attention_qkv(qkv, bias=bias), (qkv, bias))


def test_autocast_gives_its_dtype():
    qkv = heads(1, 5, 3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert vk.ops.attention_qkv(qkv, bias=torch.zeros(1, 1, 5, 5)).dtype == torch.bfloat16


# The operators' contract.


def opcheck_arguments():
    """Arguments for each operator of this stem, for test_registration."""
    qkv, dout = heads(2, 20, 3, 2, 16), torch.randn(2, 20, 2, 16)
    bias, mask = torch.randn(1, 2, 20, 20), torch.zeros(2, 1, 1, 20).masked_fill(torch.rand(2, 1, 1, 20) < 0.3, -torch.inf)
    cu_seqlens = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    dense = [(qkv, bias, None), (qkv, mask, None), (qkv.bfloat16(), None, None)]
    calls = [*dense, (qkv[0], None, cu_seqlens)]
    found = {"attention_fwd": [], "attention_bwd": [], "attention_qkv_bwd": []}
    for qkv, bias, cu_seqlens in calls:
        numbers = (0, 0.25, False)
        forward = (*qkv.unbind(-3), bias, cu_seqlens, *numbers)
        saved = torch.ops.vitkernels.attention_fwd(*forward)
        need_dbias = bias is not None and bias.shape[1] == 2
        rest = (*saved, bias, cu_seqlens, *numbers, need_dbias)
        grad = (dout if qkv.dim() == 5 else dout[0]).to(qkv.dtype)
        found["attention_fwd"].append(forward)
        found["attention_bwd"].append((grad, *qkv.unbind(-3), *rest))
        found["attention_qkv_bwd"].append((grad, qkv, *rest))
    return found


@pytest.mark.parametrize("shape", [None, (1, 2, 5, 5), (2, 1, 1, 5), (5, 5)])
def test_autograd_wiring_passes_gradcheck_in_float64(no_interpreter, shape):
    """The kernels have no float64; the operators' reference does, and takes the same road through autograd."""
    f64 = {"dtype": torch.float64, "requires_grad": True, "device": "cpu"}
    qkv, q = torch.randn(2, 5, 3, 2, 3, **f64), torch.randn(2, 5, 2, 3, **f64)
    bias = None if shape is None else torch.randn(shape, **f64)
    assert torch.autograd.gradcheck(lambda x, b: _AttentionQKV.apply(x, b, None, 0, 0.7, False), (qkv, bias))
    k, v = (torch.randn(2, 5, 2, 3, **f64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: _Attention.apply(*a, None, 0, 0.7, False), (q, k, v, bias))


def test_autograd_wiring_of_packed_images_passes_gradcheck_in_float64(no_interpreter):
    qkv = torch.randn(7, 3, 2, 3, dtype=torch.float64, requires_grad=True, device="cpu")
    cu_seqlens = torch.tensor([0, 3, 3, 6], dtype=torch.int32, device="cpu")  # the seventh token is of no image
    assert torch.autograd.gradcheck(lambda x: _AttentionQKV.apply(x, None, cu_seqlens, 0, 0.7, False), (qkv,))
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(1))
    assert torch.autograd.gradcheck(lambda *a: _Attention.apply(*a, None, cu_seqlens, 0, 0.7, False), (q, k, v))


def fused_qkv(*args, **kwargs):
    with vk.backend("fused"):
        return vk.ops.attention_qkv(*args, **kwargs)


def test_a_bias_that_needs_no_gradient_gets_none_and_qkv_still_does():
    qkv, bias = heads(1, 20, 3, 2, 16).requires_grad_(), torch.randn(1, 2, 20, 20)
    fused_qkv(qkv, bias=bias).sum().backward()
    assert qkv.grad.abs().sum() > 0
    assert bias.grad is None


def test_double_backward_raises():
    qkv = heads(1, 20, 3, 2, 16).requires_grad_()
    (grad,) = torch.autograd.grad(fused_qkv(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_kernels_run_under_compile_fullgraph_with_dynamic_shapes():
    compiled = torch.compile(vk.ops.attention_qkv, fullgraph=True, dynamic=True, backend="aot_eager")
    with vk.backend("fused"):
        for tokens in (20, 23):
            qkv, dout = heads(2, tokens, 3, 2, 16), torch.randn(2, tokens, 2, 16)
            want = outputs_and_gradients(vk.ops.attention_qkv, [qkv], [dout])
            got = outputs_and_gradients(compiled, [qkv], [dout])
            assert all(torch.equal(want[name], got[name]) for name in want)


def test_kernels_run_under_gradient_checkpointing():
    def checkpointed(qkv):
        return torch.utils.checkpoint.checkpoint(fused_qkv, qkv, use_reentrant=False)

    qkv, dout = heads(1, 20, 3, 2, 16), torch.randn(1, 20, 2, 16)
    want, got = (outputs_and_gradients(f, [qkv], [dout]) for f in (fused_qkv, checkpointed))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_under_autocast_kernels_compute_in_its_dtype_and_gradients_keep_the_inputs():
    qkv = heads(1, 20, 3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        results = outputs_and_gradients(fused_qkv, [qkv], [torch.ones(1, 20, 2, 16)])
        mixed = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2].bfloat16()  # LayerNorm of q and k is float32 under CUDA autocast
        with vk.backend("fused"):
            assert torch.equal(vk.ops.attention(*mixed), results["output 0"])
    assert results["output 0"].dtype == torch.bfloat16
    assert results["gradient of input 0"].dtype == torch.float32
    assert torch.equal(results["output 0"], fused_qkv(qkv.bfloat16()))


def test_reasons_name_what_is_unsupported():
    q = torch.zeros(1, 5, 2, 16)
    assert why_not(q, q, q) == []
    assert "float64" in " ".join(why_not(*(q.double(),) * 3))
    wide = torch.zeros(1, 5, 2, MAX_HEAD_DIM + 1)
    assert f"head dim of 1 to {MAX_HEAD_DIM}, got {MAX_HEAD_DIM + 1}" in " ".join(why_not(wide, wide, wide))
    assert "different devices" in " ".join(why_not(q, q, q, cu_seqlens=torch.zeros(2, device="meta")))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_torch_func_transforms_take_the_reference(transform):
    qkv = heads(2, 5, 3, 2, 16)
    call = {
        "grad": lambda: torch.func.grad(lambda x: vk.ops.attention_qkv(x).square().sum())(qkv),
        "vmap": lambda: torch.func.vmap(vk.ops.attention_qkv)(qkv[None]),
        "jvp": lambda: torch.func.jvp(vk.ops.attention_qkv, (qkv,), (qkv,)),
    }[transform]
    with vk.backend("fused"), pytest.raises(RuntimeError, match=r"torch\.func"):
        call()


def test_fused_on_a_cpu_without_the_interpreter_raises_with_the_reason(no_interpreter):
    with pytest.raises(RuntimeError, match="attention_qkv cannot run its kernel: kernels run on CUDA tensors, got cpu"):
        fused_qkv(heads(1, 5, 3, 2, 16))


class Listing(TorchDispatchMode):
    """The operators that run, views left out."""

    VIEWS = (
        "view",
        "unsafe_view",
        "transpose",
        "permute",
        "unbind",
        "select",
        "expand",
        "slice",
        "detach",
        "t",
        "unsqueeze",
        "empty",
    )

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name.strip("_") not in self.VIEWS:
            self.ran.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tokens", "runs_kernel"), [(5461, False), (5462, True)])
def test_auto_leaves_tokens_below_8_mib_to_pytorch_because_they_are_launch_bound(tokens, runs_kernel):
    qkv = torch.empty(1, tokens, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    with vk._select.targeting("sm_90"):
        for call in (lambda: vk.ops.attention_qkv(qkv), lambda: vk.ops.attention(*qkv.unbind(2))):
            with Listing() as listing:
                call()
            assert ("attention_fwd" in listing.ran) == runs_kernel
        with Listing() as listing:
            vk.ops.attention_qkv(qkv[0, :9], cu_seqlens=cu_seqlens)
    assert "attention_fwd" in listing.ran, "PyTorch would read the lengths back"


# Wiring.


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(importlib.import_module("vitkernels.ops.attention"), "MIN_BYTES", 0)
    with vk._select.targeting("sm_90"):
        yield


def between_products(ran):
    """What runs between the first two matrix products: qkv and the projection of a block."""
    first, second = [i for i, name in enumerate(ran) if name in ("addmm", "mm", "linear")][:2]
    return ran[first + 1 : second]


def trace(module, *args, **kwargs):
    with Listing() as listing:
        module(*args, **kwargs)
    return listing.ran


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_fused_block_has_nothing_but_attention_between_its_projections(any_size, qk_norm, masked):
    with torch.device("meta"):
        block = timm.models.vision_transformer.Block(64, 2, qkv_bias=True, qk_norm=qk_norm).bfloat16()
        x = torch.empty(2, 17, 64, dtype=torch.bfloat16)
        mask = torch.empty(2, 1, 1, 17, dtype=torch.bfloat16) if masked else None
    stock = between_products(trace(block, x, attn_mask=mask))
    assert "clone" in stock, "timm packs the heads after attention"
    block.__class__ = vk.models.FusedBlock
    fused = between_products(trace(block, x, attn_mask=mask))
    assert fused == [*["native_layer_norm"] * 2 * qk_norm, "attention_fwd"]


def test_the_gradient_of_a_fused_block_reaches_qkv_in_one_piece(any_size):
    with torch.device("meta"):
        block = timm.models.vision_transformer.Block(64, 2, qkv_bias=True).bfloat16()
        x = torch.empty(2, 17, 64, dtype=torch.bfloat16, requires_grad=True)
    block.__class__ = vk.models.FusedBlock
    out = block(x)
    with Listing() as listing:
        out.backward(torch.empty_like(out))
    after = listing.ran[listing.ran.index("attention_qkv_bwd") + 1 :]
    assert after[0] in ("mm", "addmm"), f"qkv's products follow at once, not {after[0]}"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_without_data_gives_the_shape(dtype):
    with torch.device("meta"):
        q, mask = torch.empty(2, 5, 2, 8, dtype=torch.bfloat16), torch.empty(2, 1, 1, 5, dtype=dtype)
        assert vk.ops.attention(q, q, q, bias=mask).shape == q.shape
        assert vk.ops.attention_qkv(torch.stack([q] * 3, 2), bias=mask).shape == q.shape


def test_attention_pooling_runs_the_kernel_without_copies_of_keys_and_values(any_size):
    with torch.device("meta"):
        pool = timm.layers.AttentionPoolLatent(64, num_heads=2, mlp_ratio=2).bfloat16()
        x = torch.empty(2, 17, 64, dtype=torch.bfloat16)
    pool.__class__ = vk.models.FusedAttentionPool
    ran = trace(pool, x)
    assert "attention_fwd" in ran
    products = [i for i, name in enumerate(ran) if name in ("addmm", "mm")]
    assert ran[products[1] + 1 : products[2]] == ["attention_fwd"]


Q = torch.zeros(2, 5, 3, 16)
QKV = Q[:, :, :, None]
CU = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.attention(Q[0], Q, Q), ValueError, r"q must have shape \(B, N, H, Dh\), got \(5, 3, 16\)"),
        (lambda: vk.ops.attention(Q, Q[:1], Q), ValueError, r"k must have shape \(2, M, 3, 16\), got \(1, 5, 3, 16\)"),
        (lambda: vk.ops.attention(Q, Q, Q[:, :4]), ValueError, "v must have shape"),
        (lambda: vk.ops.attention(Q, Q.half(), Q), TypeError, "k must be of dtype float32, got float16"),
        (lambda: vk.ops.attention(Q.int(), Q, Q), TypeError, "q must be of dtype"),
        (lambda: vk.ops.attention(Q, Q, Q, bias=torch.zeros(3, 3)), ValueError, r"bias must broadcast to \(2, 3, 5, 5\)"),
        (lambda: vk.ops.attention(Q, Q, Q, bias=CU), TypeError, "bias must be of dtype"),
        (lambda: vk.ops.attention(Q, Q, Q, cu_seqlens=CU), ValueError, r"q must have shape \(total, H, Dh\)"),
        (lambda: vk.ops.attention(Q[0], Q[0], Q[0], cu_seqlens=CU.long()), TypeError, "cu_seqlens must be of dtype int32"),
        (lambda: vk.ops.attention(Q[0], Q[0], Q[0], cu_seqlens=CU, bias=Q), ValueError, "bias cannot be given together"),
        (lambda: vk.ops.attention(Q[0], Q[0], Q[0], cu_seqlens=CU[:0]), ValueError, r"cu_seqlens must have B \+ 1 elements"),
        (lambda: vk.ops.attention(Q, Q, Q, scale="0.5"), TypeError, "scale must be a number, got str"),
        (lambda: vk.ops.attention(Q, Q, Q, scale=1j), TypeError, "scale must be a number, got complex"),
        (lambda: vk.ops.attention(Q, Q, Q, scale=torch.ones(2)), TypeError, "scale must be a number, got Tensor"),
        (
            lambda: vk.ops.attention(Q, Q, Q, scale=torch.tensor(0.5, requires_grad=True)),
            TypeError,
            "scale must be a number, got one that requires a gradient",
        ),
        (lambda: vk.ops.attention_qkv(QKV, scale=[0.5]), TypeError, "scale must be a number, got list"),
        (lambda: vk.ops.attention(Q, Q, Q, scale=10**400), ValueError, "scale must be a number that a float can hold"),
        (lambda: vk.ops.attention(Q, Q, Q, max_seqlen=7.0), TypeError, "max_seqlen must be an integer, got 7.0"),
        (lambda: vk.ops.attention_qkv(QKV, max_seqlen="7"), TypeError, "max_seqlen must be an integer, got '7'"),
        (lambda: vk.ops.attention_qkv(QKV, max_seqlen=CU), TypeError, r"max_seqlen must be an integer, got tensor\(\[0, 5\]"),
        (lambda: vk.ops.attention_qkv(QKV, max_seqlen=True), TypeError, "max_seqlen must be an integer, got True"),
        (lambda: vk.ops.attention_qkv(QKV, max_seqlen=2**63), ValueError, "max_seqlen must be an integer of 64 bits"),
        (lambda: vk.ops.attention_qkv(Q), ValueError, r"qkv must have shape \(B, N, 3, H, Dh\)"),
        (lambda: vk.ops.attention_qkv([Q]), TypeError, "qkv must be a Tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    "number",
    [1, 0.5, torch.tensor(0.5), np.float32(0.5), Fraction(1, 2)],
    ids=["int", "float", "tensor", "numpy", "fraction"],
)
def test_a_scale_is_any_number(number, backend):
    q = torch.randn(2, 5, 3, 16)
    with vk.backend(backend):
        assert torch.equal(vk.ops.attention(q, q, q, scale=number), vk.ops.attention(q, q, q, scale=float(number)))


@pytest.mark.parametrize("ends", [[0, 5, 3], [2, 5], [-1, 5], [0, 6], [3, 2]], ids=str)
def test_the_reference_names_lengths_that_are_no_ends_of_images(ends):
    cu_seqlens, message = torch.tensor(ends, dtype=torch.int32), ": cu_seqlens must ascend from 0 to at most 5, the tokens"
    with vk.backend("reference"), pytest.raises(ValueError, match="^attention" + message):
        vk.ops.attention(Q[0], Q[0], Q[0], cu_seqlens=cu_seqlens)
    with vk.backend("reference"), pytest.raises(ValueError, match="^attention_qkv" + message):
        vk.ops.attention_qkv(QKV[0].expand(5, 3, 3, 16), cu_seqlens=cu_seqlens)
