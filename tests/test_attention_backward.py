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
