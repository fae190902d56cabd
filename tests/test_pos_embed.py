"""resample_pos_embed: timm's rules, argument checks."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

import vitkernels as vk

SIZES = [((4, 4), (6, 6)), ((4, 4), (2, 2)), ((4, 4), (3, 7)), ((1, 1), (5, 5)), ((7, 3), (1, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("old_size", "new_size"), SIZES)
def test_resampling_is_bitwise_timms(old_size, new_size, interpolation, antialias, dtype):
    for num_prefix_tokens in (0, 1, 5):
        posemb = torch.randn(1, num_prefix_tokens + old_size[0] * old_size[1], 24).to(dtype)
        arguments = (posemb, new_size, old_size, num_prefix_tokens, interpolation, antialias)
        got = vk.ops.resample_pos_embed(*arguments)
        assert torch.equal(got, resample_abs_pos_embed(*arguments))
        assert torch.equal(got[:, :num_prefix_tokens], posemb[:, :num_prefix_tokens])


def test_the_same_tensor_comes_back_when_nothing_changes():
    posemb = torch.randn(1, 17, 8)
    assert vk.ops.resample_pos_embed(posemb, (4, 4)) is posemb
    assert vk.ops.resample_pos_embed(posemb, (4, 4), (4, 4)) is posemb
    assert vk.ops.resample_pos_embed(posemb.double(), (4, 4)).dtype == torch.float64


@pytest.mark.parametrize(("old_size", "new_size"), [((4, 4), (2, 8)), ((2, 8), (4, 4))])
def test_another_grid_of_as_many_tokens_is_resampled(old_size, new_size):
    """timm 1.0.26 returned (2, 8) -> (4, 4) unchanged, later versions resample it."""
    posemb = torch.randn(1, 17, 8)
    got = vk.ops.resample_pos_embed(posemb, new_size, old_size)
    image = posemb[:, 1:].unflatten(1, old_size).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_size, mode="bicubic", antialias=True)
    assert torch.equal(got, torch.cat([posemb[:, :1], image.flatten(2).transpose(1, 2)], dim=1))


def test_gradients_are_timms_and_prefix_rows_pass_theirs_through():
    posemb = torch.randn(1, 17, 8, requires_grad=True)
    dout = torch.randn(1, 37, 8)
    (got,) = torch.autograd.grad(vk.ops.resample_pos_embed(posemb, (6, 6)), posemb, dout)
    assert torch.equal(got, torch.autograd.grad(resample_abs_pos_embed(posemb, (6, 6)), posemb, dout)[0])
    assert torch.equal(got[:, 0], dout[:, 0])


def test_the_reference_keeps_float64_and_passes_gradcheck():
    posemb = torch.randn(1, 10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: vk.reference.resample_pos_embed(p, (4, 5)), posemb)


def test_fused_raises_and_says_that_there_is_no_kernel_yet():
    with vk.backend("fused"), pytest.raises(RuntimeError, match="no resampling kernel"):
        vk.ops.resample_pos_embed(torch.zeros(1, 17, 8), (6, 6))


P = torch.zeros(1, 17, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.resample_pos_embed(P[0], (4, 4)), ValueError, "posemb must have shape"),
        (lambda: vk.ops.resample_pos_embed(P.int(), (4, 4)), TypeError, "posemb must be of dtype"),
        (lambda: vk.ops.resample_pos_embed(P, (0, 4)), ValueError, r"new_size must be two positive integers, got \(0, 4\)"),
        (lambda: vk.ops.resample_pos_embed(P, (4,)), ValueError, "new_size must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), (3, 5)), ValueError, "old_size must be two integers with product 16"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), None, 0), ValueError, "old_size is needed, since 17 tokens"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), None, 17), ValueError, "num_prefix_tokens must leave at least one"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), interpolation="nearest"), ValueError, "interpolation must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
