"""patch_embed: the reference against timm's PatchEmbed and _pos_embed, pixels of a real photograph, argument checks."""

import pytest
import timm
import torch
from sklearn.datasets import load_sample_image

import vitkernels as vk


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"no_embed_class": True, "reg_tokens": 4},
        {"pos_embed": "none"},
        {"patch_size": (16, 8)},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_patch_embed_is_timms_embedding_forward_and_backward(arguments, memory_format):
    model = timm.models.VisionTransformer(img_size=32, embed_dim=64, depth=1, num_heads=2, **arguments)
    images = torch.randn(2, 3, 32, 32).to(memory_format=memory_format).requires_grad_()
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    prefix = [t for t in (model.cls_token, model.reg_token) if t is not None]
    expected = model._pos_embed(model.patch_embed(images))
    got = vk.ops.patch_embed(
        images,
        weight,
        bias,
        prefix_tokens=torch.cat(prefix, dim=1) if prefix else None,
        pos_embed=model.pos_embed,
        pos_embed_prefix=not model.no_embed_class,
    )
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    leaves = [images, weight, bias, *prefix, *([] if model.pos_embed is None else [model.pos_embed])]
    dout = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_uint8_pixels_of_a_photograph_are_normalised_as_timms_transforms_do():
    photo = torch.from_numpy(load_sample_image("china.jpg").copy())[:416, :640]  # (H, W, C)
    images = photo.permute(2, 0, 1)[None]  # (1, C, H, W), a channels_last view
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    weight = torch.randn(64, 3, 16, 16)
    got = vk.ops.patch_embed(images, weight, mean=mean, std=std)
    normalised = (images.double() / 255 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)
    expected = vk.reference.patch_embed(normalised, weight.double())
    assert got.shape == (1, 26 * 40, 64)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


def test_fused_raises_and_says_that_there_is_no_kernel_yet():
    with vk.backend("fused"), pytest.raises(RuntimeError, match="this version has no patch_embed kernel"):
        vk.ops.patch_embed(torch.zeros(1, 3, 16, 16), torch.zeros(8, 3, 16, 16))


X, W = torch.zeros(1, 3, 32, 32), torch.zeros(8, 3, 16, 16)
MEAN = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.patch_embed(X[:, :, :30], W), ValueError, "images of 30x32 do not divide into patches of 16x16.*pad"),
        (lambda: vk.ops.patch_embed(X[:, :2], W), ValueError, r"images must have shape \(B, 3, H, W\), got \(1, 2, 32, 32\)"),
        (lambda: vk.ops.patch_embed(X[0], W), ValueError, "images must have shape"),
        (lambda: vk.ops.patch_embed(X.int(), W), TypeError, "images must be of dtype .*uint8, got int32"),
        (lambda: vk.ops.patch_embed(X, W, MEAN), ValueError, r"bias must have shape \(8\)"),
        (lambda: vk.ops.patch_embed(X, W, prefix_tokens=torch.zeros(2, 1, 8)), ValueError, r"prefix_tokens must have shape"),
        (
            lambda: vk.ops.patch_embed(X, W, pos_embed=torch.zeros(1, 5, 8)),
            ValueError,
            r"pos_embed must have .*\(1, 4, 8\)",
        ),
        (lambda: vk.ops.patch_embed(X.byte(), W), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X.byte(), W, mean=MEAN), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X, W, mean=MEAN, std=MEAN), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X, W, mean=MEAN), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X.byte(), W, mean=MEAN[:2], std=MEAN), ValueError, r"mean must have shape \(3\)"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
