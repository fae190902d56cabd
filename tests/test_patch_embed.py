"""patch_embed: the kernels against the float64 reference, the reference against timm, the operators' contract.

A call that names no plan follows the tuned table; ``kernel`` below is the fused GEMM, ``cublas`` the other plan.
"""

import numpy as np
import pytest
import timm
import torch
from helpers import DTYPES, KERNEL_TESTS, ON_GPU, assert_within_budget, beside_reference, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import vitkernels as vk
from vitkernels import _select
from vitkernels.ops.patch_embed import _PatchEmbed, why_not

pytestmark = KERNEL_TESTS
fused = vk.backend("fused")
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _true_float32(monkeypatch):
    """float32 means float32, in the interpreter too: patch_embed follows the convolution's switch, which is on by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def draw(batch, channels, height, width, patch, D, num_prefix, dtype, pos="all", layout=CONTIGUOUS, pixel=None):
    """images, weight, bias, prefix tokens, positions (``all`` rows, ``patches`` only, or None), mean, std."""
    pixel = pixel or dtype
    p_h, p_w = patch
    rows = (height // p_h) * (width // p_w) + (num_prefix if pos == "all" else 0)
    if pixel == torch.uint8:
        images = torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)
        statistics = [0.3 + 0.3 * torch.rand(channels), 0.2 + 0.2 * torch.rand(channels)]
    else:
        images, statistics = torch.randn(batch, channels, height, width).to(pixel), [None, None]
    weight = (torch.randn(D, channels, p_h, p_w) / (channels * p_h * p_w) ** 0.5).to(dtype)
    prefix = torch.randn(1, num_prefix, D).to(dtype) if num_prefix else None
    positions = torch.randn(1, rows, D).to(dtype) if pos else None
    return [images.to(memory_format=layout), weight, torch.randn(D).to(dtype), prefix, positions, *statistics]


def under(plan, pos="all"):
    def call(images, weight, bias, prefix, positions, mean, std):
        with vk.backend("fused"), _select.planning(plan):  # a new one: calls nest
            return vk.ops.patch_embed(
                images,
                weight,
                bias,
                prefix_tokens=prefix,
                pos_embed=positions,
                pos_embed_prefix=pos == "all",
                mean=mean,
                std=std,
            )

    return call


def by_pytorch(pos="all"):
    def call(images, weight, bias, prefix, positions, mean, std):
        return vk.reference.patch_embed(
            images, weight, bias, prefix_tokens=prefix, pos_embed=positions, pos_embed_prefix=pos == "all", mean=mean, std=std
        )

    return call


def check(inputs, pos="all", plan="triton"):
    for name, got, eager, oracle in beside_pytorch(inputs, pos, plan):
        assert_within_budget(name, got, eager, oracle)


def beside_pytorch(inputs, pos, plan="triton"):
    images, weight = inputs[:2]
    tokens = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    num_prefix = 0 if inputs[3] is None else inputs[3].shape[1]
    cotangent = torch.randn(images.shape[0], num_prefix + tokens, weight.shape[0])
    mean, std = inputs[5:]
    kernel, reference = under(plan, pos), by_pytorch(pos)
    # The helper makes every input float64 for the oracle: uint8 images are none of its inputs.
    pixels = images.dtype == torch.uint8
    fixed, leaves = ([images], inputs[1:5]) if pixels else ([], inputs[:5])

    def exact(*rest):
        compute = torch.promote_types(torch.float32, rest[-4].dtype)
        return reference(*fixed, *rest, *(None if t is None else t.to(compute) for t in (mean, std)))

    return beside_reference(lambda *rest: kernel(*fixed, *rest, mean, std), exact, leaves, [cotangent])


# (channels, height, width, patch, D, prefix, positions): patch and grid of every kind, images of 32 to 98, K with and without
# a tail (588 = 9.2 blocks of 64), D with one (136), more than one block of rows.
SHAPES = {
    "p16": (3, 32, 48, (16, 16), 64, 1, "all"),
    "p16 registers": (3, 48, 48, (16, 16), 64, 5, "patches"),
    "p16 no prefix": (3, 80, 96, (16, 16), 64, 0, "all"),
    "p14 odd grid": (3, 70, 98, (14, 14), 136, 1, "all"),
    "p8 gray": (1, 40, 72, (8, 8), 48, 1, "all"),
    "p32 no positions": (3, 96, 64, (32, 32), 64, 5, None),
    "16x8 rgba": (4, 64, 40, (16, 8), 64, 1, "patches"),
    "p4 twelve bands": (12, 36, 52, (4, 4), 64, 1, "all"),
}
FORMATS = {
    "nchw": {},
    "nhwc": {"layout": LAST},
    "uint8 nchw": {"pixel": torch.uint8},
    "uint8 nhwc": {"pixel": torch.uint8, "layout": LAST},
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_is_within_budget(shape, dtype, form):
    *sizes, pos = shape
    check(draw(2, *sizes, dtype, pos=pos, **form), pos)


@pytest.mark.parametrize("form", ["nchw", "uint8 nhwc"])
def test_float16_is_within_budget(form):
    """Two of the slow ones above."""
    check(draw(1, 3, 32, 48, (16, 16), 64, 1, torch.float16, **FORMATS[form]))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("image", "patch", "D"), [(224, 16, 768), (224, 14, 1152), (378, 14, 384)])
def test_kernel_is_within_budget_on_a_gpu_at_full_size(image, patch, D, dtype, form):
    check(draw(16, 3, image, image, (patch, patch), D, 1, dtype, **form))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([1, 2, 3, 4, 12]),
    patch=st.tuples(st.integers(4, 32), st.integers(4, 32)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    D=st.integers(1, 150),
    num_prefix=st.sampled_from([0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
    pos=st.sampled_from(["all", "patches", None]),
    form=st.sampled_from(list(FORMATS.values())),
)
def test_kernel_is_within_budget_at_random_shapes(channels, patch, grid, D, num_prefix, dtype, pos, form):
    height, width = (g * p for g, p in zip(grid, patch, strict=True))
    # The error of a gradient of few numbers is luck, the kernel's and eager's: so many draws are judged as one.
    draws = [draw(2, channels, height, width, patch, D, num_prefix, dtype, pos=pos, **form) for _ in range(-(-64 // D))]
    for same in zip(*(beside_pytorch(inputs, pos) for inputs in draws), strict=True):
        names, *tensors = zip(*same, strict=True)
        assert_within_budget(names[0], *(torch.stack(each) for each in tensors))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), [("p14 odd grid", torch.bfloat16), ("p16 registers", torch.float32)], ids=str)
def test_cublas_plan_is_within_budget(shape, dtype, form):
    *sizes, pos = SHAPES[shape]
    check(draw(3, *sizes, dtype, pos=pos, **form), pos, plan="cublas")


@pytest.mark.parametrize("pixel", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_pixels_are_rounded_to_the_weights_dtype_in_the_load(pixel):
    inputs = draw(2, 3, 32, 48, (16, 16), 64, 1, torch.bfloat16, pixel=pixel)
    check(inputs)
    if pixel == torch.uint8:
        return
    images, identity = inputs[0][..., :16, :16], torch.eye(768).view(768, 3, 16, 16).bfloat16()
    with fused, _select.planning("triton"):
        assert torch.equal(vk.ops.patch_embed(images, identity).view(2, 3, 16, 16), images.bfloat16())


@pytest.mark.skipif(ON_GPU, reason="the interpreter shows which precision was asked for")
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_true_float32_unless_pytorch_allows_tf32(form, monkeypatch):
    import interpreter

    inputs = draw(2, 3, 32, 48, (16, 16), 64, 1, torch.float32, **form)

    def errors():
        """As a part of the largest value."""
        with interpreter.checking(tf32=True):
            beside = list(beside_pytorch(inputs, "all"))
        return {name: ((got - oracle).abs().max() / oracle.abs().max()).item() for name, got, _, oracle in beside}

    exact = errors()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    rounded = errors()
    leaves = 1 if "pixel" in form else 2  # whose gradients are products: the weight, and float images
    assert max(exact.values()) < 5e-6
    assert min(rounded[name] for name in ("output 0", *(f"gradient of input {i}" for i in range(leaves)))) > 1e-4


def test_float32_positions_make_a_float32_stream_of_bfloat16_products():
    """The dtypes of autocast, after its casts."""
    inputs = draw(2, 3, 32, 48, (16, 16), 64, 1, torch.float32)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        out = under("triton")(*inputs)
    rounded = [*(t.bfloat16() for t in inputs[:2]), *inputs[2:]]
    assert out.dtype == torch.float32
    oracle = by_pytorch()(*(None if t is None else t.double() for t in rounded))
    torch.testing.assert_close(out.double(), oracle, atol=1e-5, rtol=1e-5)


STRIDED = {
    "crop": lambda: torch.randn(2, 3, 40, 56)[:, :, 3:35, 5:53],
    "every second column": lambda: torch.randn(2, 3, 32, 96)[..., ::2],
    "channels out of four": lambda: torch.randn(2, 4, 32, 48).to(memory_format=LAST)[:, :3],
    "transposed": lambda: torch.randn(2, 3, 48, 32).transpose(2, 3),
    "one image for all": lambda: torch.randn(1, 3, 32, 48).expand(2, -1, -1, -1),
    "one channel for all": lambda: torch.randn(2, 1, 32, 48).expand(-1, 3, -1, -1),
    "one column for all": lambda: torch.randn(2, 3, 32, 1).expand(-1, -1, -1, 48),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_any_strides_give_the_bits_of_the_contiguous_images(make):
    images, inputs = make(), draw(2, 3, 32, 48, (16, 16), 48, 1, torch.float32)[1:5]
    call, cotangent = (lambda *a: under("triton")(*a, None, None)), torch.randn(2, 7, 48)
    strided = outputs_and_gradients(call, [images, *inputs], [cotangent])
    dense = outputs_and_gradients(call, [images.contiguous(), *inputs], [cotangent])
    for name, value in dense.items():
        torch.testing.assert_close(strided[name], value, atol=2e-6, rtol=1e-5)


def test_a_batch_of_hwc_images_is_read_without_a_copy():
    photos = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    inputs = draw(2, 3, 32, 48, (16, 16), 48, 1, torch.float32, pixel=torch.uint8)
    images = photos.permute(0, 3, 1, 2)
    assert images.is_contiguous(memory_format=LAST)
    got = under("triton")(images, *inputs[1:])
    torch.testing.assert_close(got, by_pytorch()(images, *inputs[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="lends its pixels from memory that is reserved and never touched")
def test_pixels_beyond_2_to_the_31_are_found():
    """Images that lie 2^31 bytes apart, and lines of which the last lies that far from the first."""
    inputs = draw(2, 1, 16, 16, (8, 8), 16, 1, torch.bfloat16, pixel=torch.uint8)
    memory = torch.from_numpy(np.zeros(2**32, np.uint8))  # pages appear when written
    for strides in ((2**31, 256, 16, 1), (16, 32, 2**28, 1)):
        images = memory.as_strided((2, 1, 16, 16), strides)
        images.copy_(inputs[0])
        assert torch.equal(under("triton")(images, *inputs[1:]), under("triton")(*inputs))


def test_uint8_pixels_are_normalised_to_the_last_bits_of_float32():
    """A weight that is the identity lets every pixel through: all 256 values of three channels with ImageNet's mean and std."""
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    weight = torch.eye(768).view(768, 3, 16, 16)
    with fused, _select.planning("triton"):
        got = vk.ops.patch_embed(images, weight, mean=mean, std=std).view(3, 256)
    # On a CPU, which divides: on a GPU PyTorch multiplies by 1 / 255 instead, and is 7e-7 off.
    pixels, mean, std = images.cpu().float(), mean.cpu().view(-1, 1, 1), std.cpu().view(-1, 1, 1)
    expected = ((pixels / 255 - mean) / std).view(3, 256)
    # The interpreter's fma rounds twice, a GPU's once.
    torch.testing.assert_close(got.cpu(), expected, atol=0 if ON_GPU else 3e-7, rtol=0)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("plan", ["triton", "cublas"])
def test_no_image_and_one_image(batch, plan):
    inputs = draw(batch, 3, 32, 48, (16, 16), 64, 1, torch.float32)
    if batch:
        return check(inputs, plan=plan)
    results = outputs_and_gradients(lambda *a: under(plan)(*a, None, None), inputs[:5], [torch.zeros(0, 7, 64)])
    assert results["output 0"].shape == (0, 7, 64)
    assert not any(results[f"gradient of input {i}"].any() for i in range(1, 5))


def test_weight_gradient_adds_up_any_number_of_partial_sums(monkeypatch):
    """As many splits as a large GPU runs, the last of them short."""
    monkeypatch.setattr("vitkernels.kernels.patch_embed_backward.multiprocessors", lambda device: 132)
    check(draw(5, 3, 96, 96, (8, 8), 32, 1, torch.bfloat16))


@given(d=st.integers(1, 2**24), n=st.integers(0, 2**30 - 1))
def test_division_by_multiplication_is_division(d, n):
    from vitkernels.kernels.patch_embed_backward import _magic

    for value in (n, n // d * d, max(n // d * d - 1, 0)):
        magic, shift = _magic(d)
        assert magic < 2**31
        assert value * magic >> shift == value // d


def test_results_are_bitwise_reproducible():
    inputs, cotangent = draw(3, 3, 70, 98, (14, 14), 64, 1, torch.bfloat16), torch.randn(3, 36, 64)
    call = lambda *a: under("triton")(*a, None, None)  # noqa: E731
    first, again = (outputs_and_gradients(call, inputs[:5], [cotangent]) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_without_a_table_16_bit_takes_the_kernel_and_true_float32_cublas(monkeypatch):
    launched = []
    from vitkernels.kernels import patch_embed as kernels

    monkeypatch.setattr(kernels, "_cublas_fwd", lambda *a: launched.append("cublas"))
    for dtype in (torch.bfloat16, torch.float32):
        under("auto")(*draw(1, 3, 32, 32, (16, 16), 32, 1, dtype))
    assert launched == ["cublas"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # has tensor cores
    under("auto")(*draw(1, 3, 32, 32, (16, 16), 32, 1, torch.float32))
    table = {"fwd/bfloat16/32/768/64": {"plan": "cublas"}}
    monkeypatch.setattr("vitkernels.kernels._tuned.lookup", lambda gpu, stem, key: table.get(key))
    under("auto")(*draw(1, 3, 32, 32, (16, 16), 32, 1, torch.float16))  # has no entry
    assert launched == ["cublas"]
    under("auto")(*draw(1, 3, 32, 32, (16, 16), 32, 1, torch.bfloat16))
    assert launched == ["cublas", "cublas"]


# The operators' contract.


def opcheck_arguments():
    """Arguments for each operator of this stem, for test_registration."""
    f32 = torch.float32
    images, weight, bias, prefix, positions, _, _ = draw(2, 3, 8, 12, (4, 4), 16, 1, f32)
    pixels, _, _, _, patches, mean, std = draw(2, 3, 8, 12, (4, 4), 16, 1, f32, pos="patches", pixel=torch.uint8, layout=LAST)
    dout, half = torch.randn(2, 7, 16), weight.bfloat16()
    last = images.to(memory_format=LAST)
    return {
        "patch_embed_fwd": [
            (images, weight, bias, prefix, positions, True, None, None, f32, False, "triton", ""),
            (last, weight, None, None, None, True, None, None, f32, False, "cublas", ""),
            (pixels, half, bias, prefix, patches, False, mean, std, f32, False, "auto", ""),
        ],
        "patch_embed_bwd": [
            (dout, images, weight, None, None, True, True, False, "triton", ""),
            (dout, last, weight, None, None, True, True, False, "cublas", ""),
            (dout, pixels, half, mean, std, False, True, False, "auto", ""),
        ],
    }


def test_autograd_wiring_passes_gradcheck_in_float64(no_interpreter):
    """The kernels have no float64; the operators' reference does, and takes the same road through autograd."""
    with torch.device("cpu"):
        inputs = draw(2, 2, 4, 6, (2, 2), 3, 2, torch.float64)[:5]
    leaves = [t.requires_grad_() for t in inputs]
    settings = (torch.float64, False, "auto", "")
    assert torch.autograd.gradcheck(lambda *a: _PatchEmbed.apply(*a, True, None, None, *settings), leaves)
    leaves[4] = leaves[4][:, 2:].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: _PatchEmbed.apply(*a, False, None, None, *settings), leaves)


def test_only_what_is_asked_for_gets_a_gradient():
    images, weight, bias, prefix, positions, _, _ = draw(2, 3, 32, 48, (16, 16), 48, 1, torch.float32)
    under("triton")(images, weight, bias.requires_grad_(), prefix, positions.requires_grad_(), None, None).sum().backward()
    assert images.grad is None
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full((48,), 12.0))
    torch.testing.assert_close(positions.grad, torch.full((1, 7, 48), 2.0))


@pytest.mark.parametrize("call", [under("triton"), by_pytorch(), vk.ops.patch_embed], ids=["kernel", "reference", "auto"])
def test_mean_and_std_are_constants(call):
    images, weight, _, _, _, *statistics = draw(2, 3, 32, 48, (16, 16), 48, 0, torch.float32, pixel=torch.uint8)
    for t in statistics:
        t.requires_grad_()
    if call is vk.ops.patch_embed:
        run = lambda: call(images, weight, mean=statistics[0], std=statistics[1])  # noqa: E731
    else:
        run = lambda: call(images, weight, None, None, None, *statistics)  # noqa: E731
    assert not run().requires_grad
    weight.requires_grad_()
    run().sum().backward()
    assert weight.grad is not None
    assert statistics[0].grad is statistics[1].grad is None


def test_gradients_under_autocast_are_within_budget():
    """float32 pixels, weights and stream; products in bfloat16."""
    inputs = draw(2, 3, 32, 48, (16, 16), 64, 1, torch.float32)[:5]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for function, autocast, dtype in (
        (under("triton"), True, None),
        (by_pytorch(), True, None),
        (by_pytorch(), False, torch.double),
    ):
        leaves = [t.to(dtype or t.dtype) for t in inputs]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            results.append(outputs_and_gradients(lambda *a, f=function: f(*a, None, None), leaves, [torch.ones(2, 7, 64)]))
    kernel, eager, oracle = results
    for name, value in kernel.items():
        assert value.dtype == torch.float32
        assert_within_budget(name, value, eager[name], oracle[name])


def test_a_kernel_runs_under_gradient_checkpointing():
    inputs, cotangent = draw(2, 3, 32, 48, (16, 16), 48, 1, torch.bfloat16)[:5], torch.randn(2, 7, 48)
    call = lambda *a: under("triton")(*a, None, None)  # noqa: E731
    checkpointed = lambda *a: torch.utils.checkpoint.checkpoint(call, *a, use_reentrant=False)  # noqa: E731
    want, got = (outputs_and_gradients(f, inputs, [cotangent]) for f in (call, checkpointed))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_double_backward_raises():
    images, weight, bias, prefix, positions, _, _ = draw(1, 3, 16, 16, (16, 16), 16, 1, torch.float32)
    out = under("triton")(images, weight.requires_grad_(), bias, prefix, positions, None, None)
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_a_kernel_runs_under_compile_fullgraph_with_dynamic_shapes():
    call = lambda *a: under("triton")(*a, None, None)  # noqa: E731

    def function(images, weight, bias, prefix, positions):
        return vk.ops.patch_embed(images, weight, bias, prefix_tokens=prefix, pos_embed=positions)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with fused, _select.planning("triton"):
        for height in (32, 48):
            inputs = draw(2, 3, height, 32, (16, 16), 32, 1, torch.bfloat16)[:5]
            cotangents = [torch.ones(2, inputs[4].shape[1], 32)]
            want, got = (outputs_and_gradients(f, inputs, cotangents) for f in (call, compiled))
            assert all(torch.equal(want[name], got[name]) for name in want)


def test_why_not_names_what_the_kernel_does_not_take(no_interpreter):
    images, weight = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    with torch.device("cpu"):
        assert "TRITON_INTERPRET=1" in " ".join(why_not(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)))
    assert "float64" in " ".join(why_not(images, weight.double()))
    assert "no elements" in " ".join(why_not(images, weight[:0]))
    assert "more than 1073741824 patches" in " ".join(why_not(images.expand(2**30 + 1, -1, -1, -1), weight))
    assert "different devices" in " ".join(why_not(images, weight.to("meta")))


# The reference against timm.


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
    from sklearn.datasets import load_sample_image  # heavy, and other processes import this file for its shapes

    photo = torch.from_numpy(load_sample_image("china.jpg").copy())[:416, :640]  # (H, W, C)
    images = photo.permute(2, 0, 1)[None]  # (1, C, H, W), a channels_last view
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    weight = torch.randn(64, 3, 16, 16)
    got = vk.ops.patch_embed(images, weight, mean=mean, std=std)
    normalised = (images.double() / 255 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)
    expected = vk.reference.patch_embed(normalised, weight.double())
    assert got.shape == (1, 26 * 40, 64)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


MEAN_AND_STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def list_of_tensors(values):
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize("kind", [tuple, list, np.array, np.float32, list_of_tensors], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("call", ["operator", "reference", "kernel"])
def test_mean_and_std_may_be_numbers_per_channel(kind, call):
    images, weight = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.randn(5, 3, 4, 4)
    function = vk.reference.patch_embed if call == "reference" else vk.ops.patch_embed
    with vk.backend("fused" if call == "kernel" else "auto"):
        got = function(images, weight, mean=kind(MEAN_AND_STD[0]), std=kind(MEAN_AND_STD[1]))
        expected = function(images, weight, mean=torch.tensor(MEAN_AND_STD[0]), std=torch.tensor(MEAN_AND_STD[1]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("function", [vk.ops.patch_embed, vk.reference.patch_embed], ids=["operator", "reference"])
def test_integers_are_numbers_and_float64_keeps_all_digits(function):
    images, weight = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in MEAN_AND_STD)
    normalised = (images.double() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert torch.equal(function(images, weight, mean=MEAN_AND_STD[0], std=MEAN_AND_STD[1]), function(normalised, weight))
    assert torch.equal(function(images, weight, mean=(0, 0, 0), std=[1, 1, 1]), function(images.double() / 255, weight))


def test_numbers_per_channel_compile_in_one_graph():
    def function(images, weight):
        return vk.ops.patch_embed(images, weight, mean=MEAN_AND_STD[0], std=list(MEAN_AND_STD[1]))

    images, weight = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.randn(5, 3, 4, 4)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(images, weight), function(images, weight))


@pytest.mark.parametrize("function", [vk.ops.patch_embed, vk.reference.patch_embed], ids=["operator", "reference"])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("mean", (0.5, 0.5), ValueError, "3 numbers, got 2"),
        ("std", [], ValueError, "3 numbers, got 0"),
        ("mean", 0.5, TypeError, "3 numbers, got float"),
        ("mean", torch.Tensor, TypeError, "3 numbers, got "),
        ("std", np.ndarray, TypeError, "3 numbers, got type"),
        ("std", "abc", TypeError, "3 numbers, got str"),
        ("mean", (0.5, "a", 0.5), TypeError, r"got \(0.5, 'a', 0.5\)"),
        ("mean", (0.5, True, 0.5), TypeError, r"got \(0.5, True, 0.5\)"),
        ("mean", [[0.5]] * 3, TypeError, "3 numbers, got "),
        ("mean", (0.5, float("nan"), 0.5), ValueError, "all finite, got .*nan"),
        ("std", (0.5, float("inf"), 0.5), ValueError, "all finite, got .*inf"),
        ("std", (0.5, 10**400, 0.5), ValueError, "all finite, got "),
        ("std", (0.5, 0, 0.5), ValueError, r"none of them 0, got \(0.5, 0, 0.5\)"),
        ("std", (0.5, 1e-60, 0.5), ValueError, "none of them 0, got "),
    ],
)
def test_what_is_not_one_good_number_per_channel_is_named(function, name, value, error, message):
    arguments = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), name: value}
    with pytest.raises(error, match=f"patch_embed: {name} must be a Tensor, or a list or tuple of .*{message}"):
        function(X.byte(), W, **arguments)


# Wrong input.

X, W = torch.zeros(1, 3, 32, 32), torch.zeros(8, 3, 16, 16)
MEAN = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.patch_embed(X[:, :, :30], W), ValueError, "images of 30x32 do not divide into patches of 16x16.*pad"),
        (lambda: vk.ops.patch_embed(X[:, :2], W), ValueError, r"images must have shape \(B, 3, H, W\), got \(1, 2, 32, 32\)"),
        (lambda: vk.ops.patch_embed(X[0], W), ValueError, "images must have shape"),
        (lambda: vk.ops.patch_embed(X, W, pos_embed_prefix="no"), TypeError, "pos_embed_prefix must be one of True, False"),
        (lambda: vk.ops.patch_embed(X, W, pos_embed_prefix=W), TypeError, "pos_embed_prefix must be one of True, False"),
        (lambda: vk.ops.patch_embed(X.int(), W), TypeError, "images must be of dtype .*uint8, got int32"),
        (lambda: vk.ops.patch_embed(X, W, MEAN), ValueError, r"bias must have shape \(8\)"),
        (lambda: vk.ops.patch_embed(X, W, W[:, 0, 0, 0].half()), TypeError, "bias must be of dtype float32, got float16"),
        (lambda: vk.ops.patch_embed(X, W, prefix_tokens=torch.zeros(2, 1, 8)), ValueError, r"prefix_tokens must have shape"),
        (
            lambda: vk.ops.patch_embed(X, W, pos_embed=torch.zeros(1, 5, 8)),
            ValueError,
            r"pos_embed must have .*\(1, 4, 8\)",
        ),
        (lambda: vk.ops.patch_embed(X.byte(), W), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X.byte(), W, mean=MEAN), ValueError, "mean and std belong to uint8"),
        (lambda: vk.reference.patch_embed(X.byte(), W, mean=MEAN), ValueError, "uint8 images need mean and std"),
        (lambda: vk.ops.patch_embed(X, W, mean=MEAN, std=MEAN), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X.byte(), W), ValueError, r"vitkernels.fuse\(model, input='uint8'\)"),
        (lambda: vk.ops.patch_embed(X, W[:, :, :0]), ValueError, r"weight must have .* patch of .*1x1, got \(8, 3, 0, 16\)"),
        (lambda: vk.ops.patch_embed(X, W[..., :0]), ValueError, r"weight must have .* patch of .*1x1, got \(8, 3, 16, 0\)"),
        (lambda: vk.ops.patch_embed(X[:, :0], W[:, :0]), ValueError, r"weight must have channels .*got \(8, 0, 16, 16\)"),
        (lambda: vk.ops.patch_embed(X[:, :, :0], W), ValueError, r"images must have at least one patch, got \(1, 3, 0, 32\)"),
        (lambda: vk.ops.patch_embed(X[..., :0], W), ValueError, r"images must have at least one patch, got \(1, 3, 32, 0\)"),
        (lambda: vk.ops.patch_embed(X, W, mean=MEAN), ValueError, "mean and std belong to uint8"),
        (lambda: vk.ops.patch_embed(X.byte(), W, mean=MEAN[:2], std=MEAN), ValueError, r"mean must have shape \(3\)"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_autocast_casts_a_bias_of_another_dtype():
    """As PyTorch's convolution: timm runs a bfloat16 model that kept its biases in float32."""
    images, weight, bias = torch.randn(1, 3, 4, 4), torch.randn(8, 3, 2, 2).bfloat16(), torch.randn(8)
    with torch.autocast(images.device.type, torch.bfloat16):
        expected = torch.nn.functional.conv2d(images, weight, bias, stride=2).flatten(2).mT
        got = vk.ops.patch_embed(images, weight, bias)
        with pytest.raises(TypeError, match="bias must be of dtype"):
            vk.ops.patch_embed(images, weight, bias.double())
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
