"""The backward kernels of attention through their launchers: gradients against the float64 reference, bitwise repeatable."""

import itertools

import pytest
import torch
from helpers import DTYPES, KERNEL_TESTS, assert_within_budget
from interpreter import checking

from vitkernels import reference
from vitkernels.kernels import attention_backward

pytestmark = KERNEL_TESTS


def normal(*shape, dtype=torch.float32, std=1.0):
    return (std * torch.randn(shape)).to(dtype)


def statistics(q, k, v, bias, scale):
    """out, row_max and log_sum as the forward leaves them, from float64: dense tensors."""
    s = scale * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    if bias is not None:
        s = s + bias.double()
        s = s.float().double()  # natural units in float32, where finfo.min swallows the logits
    row_max = s.amax(-1)
    row_max = row_max.where(row_max > -torch.inf, 0.0)
    log_sum = (s - row_max[..., None]).exp().sum(-1).log()
    log_sum = log_sum.where(log_sum > -torch.inf, torch.inf)
    p = ((s - row_max[..., None]) - log_sum[..., None]).exp()
    out = torch.einsum("bhnm,bmhd->bnhd", p, v.double())
    return out.to(q.dtype).contiguous(), row_max.float().contiguous(), log_sum.float().contiguous()


def launch(q, k, v, bias, dout, scale, need_dbias=False):
    out, row_max, log_sum = statistics(q, k, v, bias, scale)
    return attention_backward.launch_attention_bwd(
        dout, q, k, v, out, row_max, log_sum, bias, None, 0, scale, False, need_dbias
    )


def gradients(q, k, v, bias, dout, scale):
    """Of the reference, in the inputs' dtype."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (q, k, v, bias)]
    out = reference.attention(*leaves[:3], scale=scale, bias=leaves[3])
    return torch.autograd.grad(out, [t for t in leaves if t is not None], dout.to(out.dtype))


def check(q, k, v, dout, bias=None, need_dbias=False, scale=None):
    """The launcher's gradients are within the budget."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    got = launch(q, k, v, bias, dout, scale, need_dbias)
    eager = gradients(q, k, v, bias, dout, scale)
    oracle = gradients(*(None if t is None else t.double() for t in (q, k, v, bias)), dout.double(), scale)
    for name, *tensors in zip(("dq", "dk", "dv"), got, eager, oracle, strict=False):
        assert_within_budget(name, *tensors)
    if need_dbias:
        assert_within_budget("dbias", got[3], eager[3], oracle[3])
    else:
        assert got[3].numel() == 0


def inputs(B, N, M, H, Dh, dtype):
    """Logits of std 3 and more: q of std 3, k of std 1, scale Dh ** -0.5."""
    return normal(B, N, H, Dh, dtype=dtype, std=3.0), *(normal(B, n, H, Dh, dtype=dtype) for n in (M, M, N))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "Dh"), [(197, 64), (64, 32), (65, 80), (257, 72)])
def test_gradients_are_within_budget(N, Dh, dtype):
    check(*inputs(1, N, N, 2, Dh, dtype))


BIASES = {
    "relative positions (1, H, N, M)": lambda B, H, N, M: normal(1, H, N, M),
    "images (B, 1, N, M)": lambda B, H, N, M: normal(B, 1, N, M),
    "all (B, H, N, M)": lambda B, H, N, M: normal(B, H, N, M),
    "keys (B, 1, 1, M)": lambda B, H, N, M: normal(B, 1, 1, M),
    "shared (N, M)": lambda B, H, N, M: normal(N, M),
}


@pytest.mark.parametrize("one_program", [True, False], ids=["one program", "two passes"])
@pytest.mark.parametrize("make", BIASES.values(), ids=BIASES)
def test_bias_and_its_gradient_are_within_budget(make, one_program, monkeypatch):
    force(monkeypatch, one_program)
    q, k, v, dout = inputs(2, 65, 70, 2, 32, torch.bfloat16)
    check(q, k, v, dout, make(2, 2, 65, 70).bfloat16(), need_dbias=True)


def force(monkeypatch, one_program, **changes):
    config = attention_backward._config
    monkeypatch.setattr(
        attention_backward, "_config", lambda *args: config(*args)._replace(one_program=one_program, **changes)
    )


@pytest.mark.parametrize("lengths", [[5], [64, 1, 0, 70], [0, 3, 0], [128, 64]], ids=str)
def test_packed_sequences_get_the_gradients_of_each_alone(lengths):
    H, Dh, total = 2, 32, sum(lengths)
    qkv, dout = normal(total, 3, H, Dh, dtype=torch.bfloat16, std=1.7), normal(total, H, Dh, dtype=torch.bfloat16)
    ends = list(itertools.accumulate([0, *lengths]))
    out, row_max, log_sum = torch.zeros(total, H, Dh, dtype=qkv.dtype), torch.zeros(H, total), torch.zeros(H, total)
    for a, b in itertools.pairwise(ends):
        if b > a:
            o, m, s = statistics(*qkv[None, a:b].unbind(2), None, Dh**-0.5)
            out[a:b], row_max[:, a:b], log_sum[:, a:b] = o[0], m[0], s[0]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    dqkv, dbias = attention_backward.launch_attention_qkv_bwd(
        dout, qkv, out, row_max, log_sum, None, cu_seqlens, 0, Dh**-0.5, False, False
    )
    assert dbias.numel() == 0
    for a, b in itertools.pairwise(ends):
        if b > a:
            image = [t[None, a:b] for t in qkv.unbind(1)]
            eager = gradients(*image, None, dout[None, a:b], Dh**-0.5)
            oracle = gradients(*(t.double() for t in image), None, dout[None, a:b].double(), Dh**-0.5)
            for i, name in enumerate(("dq", "dk", "dv")):
                assert_within_budget(name, dqkv[None, a:b, i], eager[i], oracle[i])


def test_gradient_of_a_bias_that_all_keys_share_is_summed_over_them():
    """It is sum(dout * out) - delta = 0 by the softmax; with zeros passed for out, delta is 0 and the sum shows."""
    q, k, v, dout = inputs(2, 65, 70, 2, 32, torch.float32)
    out, row_max, log_sum = statistics(q, k, v, None, 0.2)
    bias = torch.zeros(2, 65, 1)
    *_, dbias = attention_backward.launch_attention_bwd(
        dout, q, k, v, torch.zeros_like(out), row_max, log_sum, bias, None, 0, 0.2, False, True
    )
    torch.testing.assert_close(dbias, (dout * out).sum((0, 3)).T[..., None], atol=1e-4, rtol=1e-4)
