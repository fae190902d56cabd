"""attention and attention_qkv: the reference against the formula and timm, packing, masks, argument checks."""

import pytest
import torch
import torch.nn.functional as F

import vitkernels as vk


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


def test_a_row_masked_by_finfo_min_gives_the_mean_of_v_as_in_timm():
    q, k, v = (heads(1, 5, 2, 16) for _ in range(3))
    bias = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min)
    expected = v.mean(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(vk.ops.attention(q, k, v, bias=bias), expected, atol=1e-6, rtol=1e-6)


def test_a_bool_bias_masks_what_is_false():
    q, k, v, keep = heads(2, 5, 2, 16), heads(2, 5, 2, 16), heads(2, 5, 2, 16), torch.rand(2, 1, 5, 5) > 0.4
    keep[..., 0] = True
    additive = torch.zeros(keep.shape).masked_fill_(~keep, -torch.inf)
    torch.testing.assert_close(vk.ops.attention(q, k, v, bias=keep), vk.ops.attention(q, k, v, bias=additive))


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


def test_fused_raises_and_says_that_there_is_no_kernel_yet():
    with vk.backend("fused"), pytest.raises(RuntimeError, match="this version has no attention kernel"):
        vk.ops.attention_qkv(heads(1, 5, 3, 2, 16))


Q = torch.zeros(2, 5, 3, 16)
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
        (lambda: vk.ops.attention_qkv(Q), ValueError, r"qkv must have shape \(B, N, 3, H, Dh\)"),
        (lambda: vk.ops.attention_qkv([Q]), TypeError, "qkv must be a Tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
