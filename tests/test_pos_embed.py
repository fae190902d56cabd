"""resample_pos_embed and resample_pos_embed_many: PyTorch's numbers, timm's rules, their autograd, argument checks."""

import inspect
import itertools
import logging
import time

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from helpers import KERNEL_TESTS, assert_matches_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels import _env
from vitkernels.ops.pos_embed import MAX_SIZES, why_not

pytestmark = KERNEL_TESTS
needs_extension = pytest.mark.skipif(_env.EXTENSION is None, reason="vitkernels._C is not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MODES = [(interpolation, antialias) for interpolation in ("bicubic", "bilinear") for antialias in (True, False)]
every_mode = pytest.mark.parametrize(("interpolation", "antialias"), MODES)
every_alignment = pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
# Up, down, both, to and from one row, sizes whose ratio is no short fraction, and the largest side.
SIZES = [
    ((14, 14), (24, 24)),
    ((16, 16), (37, 37)),
    ((37, 37), (16, 16)),
    ((7, 3), (20, 50)),
    ((20, 50), (7, 3)),
    ((13, 8), (9, 21)),
    ((1, 1), (5, 5)),
    ((7, 3), (1, 1)),
    ((1, 6), (1, 9)),
    ((5, 1), (8, 1)),
    ((2, 8), (4, 4)),
    ((5, 9), (512, 40)),
    ((512, 7), (9, 7)),
]


def table(old_size, prefix=0, width=24, dtype=torch.float32):
    return torch.randn(1, prefix + old_size[0] * old_size[1], width).to(dtype)


def interpolated(posemb, new_size, old_size, interpolation, antialias, align_corners=False):
    """What F.interpolate makes of it, in float32 and in timm's layout (channels innermost): (1, h'*w', D)."""
    image = posemb.float().unflatten(1, old_size).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_size, mode=interpolation, antialias=antialias, align_corners=align_corners)
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def fused(*args, **kwargs):
    with vk.backend("fused"):
        return vk.ops.resample_pos_embed(*args, **kwargs)


def fused_many(*args, **kwargs):
    with vk.backend("fused"):
        return vk.ops.resample_pos_embed_many(*args, **kwargs)


def opcheck_arguments():
    rest = (1, "bicubic", True, False, False, None)
    padded = (1, "bilinear", False, True, True, 20)
    return {
        "resample_pos_embed_fwd": [
            (table((4, 4), 1), [4, 4], [6, 5], *rest),
            (table((4, 4), 1), [4, 4], [6, 5, 2, 2, 4, 4], *padded),
        ],
        "resample_pos_embed_bwd": [
            (torch.randn(31, 24), [4, 4], [6, 5], *rest),
            (torch.randn(60, 24), [4, 4], [6, 5, 2, 2, 4, 4], *padded),
        ],
    }


# PyTorch's numbers.


@needs_extension
@every_mode
@every_alignment
@pytest.mark.parametrize(("old_size", "new_size"), SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_interpolate(old_size, new_size, interpolation, antialias, align_corners):
    posemb = table(old_size).requires_grad_()
    mode = (interpolation, antialias)
    got = fused(posemb, new_size, old_size, 0, *mode, align_corners=align_corners)
    expected = interpolated(posemb, new_size, old_size, *mode, align_corners)
    assert_close(got, expected)
    dout = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(out, posemb, dout)[0] for out in (got, expected))
    # F.interpolate's backward adds up to h'w' terms per source in one float32 variable, in order; ours by axes.
    exact = torch.autograd.grad(interpolated_exactly(posemb, new_size, old_size, *mode, align_corners), posemb, dout)[0]
    budget = 2e-6 * max(1, exact.abs().max().item()) + 2 * (theirs - exact).abs().max().item()
    assert (mine - exact).abs().max().item() <= budget


# F.interpolate of CPUs without AVX2 multiplies and adds apart.
fuses_multiply_adds = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="PyTorch's kernels are not built for AVX2 here"
)


@needs_extension
@fuses_multiply_adds
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_with_antialias_the_bits_on_a_cpu_are_those_of_interpolate(interpolation):
    sides = (1, 2, 3, 5, 7, 8, 12, 14, 16, 21, 24, 37, 64)
    exchanged = [((h, w), (w, h)) for h, w in itertools.product(sides, sides) if h != w]
    for old_size, new_size in [*SIZES, *exchanged]:
        posemb = table(old_size).cpu()
        got = vk.ops.resample_pos_embed(posemb, new_size, old_size, 0, interpolation)
        assert torch.equal(got, interpolated(posemb, new_size, old_size, interpolation, True)), (old_size, new_size)


def assert_close(got, expected):
    tolerance = 2e-6 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def interpolated_exactly(posemb, new_size, old_size, interpolation, antialias, align_corners):
    """By PyTorch's own float32 weights of each axis, sums in float64."""
    matrices = (
        vk.reference.pos_embed.resampling_matrix(old, new, interpolation, antialias, align_corners)
        for old, new in zip(old_size, new_size, strict=True)
    )
    image = posemb.unflatten(1, old_size).double()
    along_h, along_w = (m.to(image.device).double() for m in matrices)
    return torch.einsum("ir,jc,brcd->bijd", along_h, along_w, image).flatten(1, 2).to(posemb.dtype)


@needs_extension
@every_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("old_size", "new_size"), [((14, 14), (24, 24)), ((37, 37), (16, 16)), ((7, 3), (5, 11))], ids=str)
def test_every_dtype_is_within_budget_of_float64(old_size, new_size, dtype, interpolation, antialias):
    posemb, dout = table(old_size, 2, dtype=dtype), torch.randn(1, 2 + new_size[0] * new_size[1], 24)
    arguments = (new_size, old_size, 2, interpolation, antialias)
    if dtype != torch.float64:
        kernel, reference = (lambda p, f=f: f(p, *arguments) for f in (fused, vk.reference.resample_pos_embed))
        assert_matches_reference(kernel, reference, [posemb], [dout])
        return
    # float64 is computed in float32, as timm does: within float32's budget, and prefix rows keep all their bits.
    got, oracle = fused(posemb, *arguments), vk.reference.resample_pos_embed(posemb, *arguments)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, oracle, rtol=0, atol=2e-6 * posemb.abs().max().item())
    assert torch.equal(got[:, :2], posemb[:, :2])


@needs_extension
@pytest.mark.parametrize("width", [1, 3, 16, 64, 65, 100, 192, 768, 1000])
def test_any_width_and_prefix(width):
    """Widths around the blocks of 64 channels; 1 against wider tables, as F.interpolate is wrong for h x 1 and D = 1."""
    for prefix in (0, 1, 5):
        posemb = table((5, 4), prefix, max(width, 2))
        expected = interpolated(posemb[:, prefix:], (7, 9), (5, 4), "bicubic", True)[..., :width]
        got = fused(posemb[..., :width], (7, 9), (5, 4), prefix)
        assert_close(got[:, prefix:], expected)
        assert torch.equal(got[:, :prefix], posemb[:, :prefix, :width])


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the C++ kernel")
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    posemb, dout = table((16, 16), 1, 1000), torch.randn(1, 1 + 37 * 37, 1000)
    sizes = [(37, 37), (40, 20), (16, 16), (37, 37), (37, 37)]
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            leaf = posemb.clone().requires_grad_()
            out = fused(leaf, (37, 37))
            results.append([out, *torch.autograd.grad(out, leaf, dout), fused_many(posemb, sizes, num_prefix_tokens=1)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def by_vectors(function, bits, tensor, rows, old_size, sizes):
    """The extension's own function with vectors of up to so many bits: bicubic with antialias, one prefix row."""
    out = tensor.new_full((rows, tensor.shape[-1]), torch.nan)
    call = getattr(_env.EXTENSION, function)
    table, copies = (tensor, out) if function == "resample_forward_cpu" else (out, tensor)
    where = (table.data_ptr(), copies.data_ptr(), DTYPES.index(tensor.dtype), *old_size, tensor.shape[-1])
    call(*where, 1, 0, True, True, False, False, [side for size in sizes for side in size], 2, bits)
    return out


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the C++ kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("old_size", "new_size"), [((14, 14), (24, 24)), ((37, 37), (16, 16)), ((7, 3), (5, 11))], ids=str)
def test_every_vector_width_gives_the_same_numbers(old_size, new_size, dtype):
    """AVX2 and AVX-512 the same bits; the portable loops have no fused multiply-add."""
    rows = {"forward": 1 + old_size[0] * old_size[1], "backward": 3 + 2 * new_size[0] * new_size[1] + old_size[0] * old_size[1]}
    for direction, count in rows.items():
        sizes = [new_size] if direction == "forward" else [new_size, old_size, new_size]
        made = 1 + new_size[0] * new_size[1] if direction == "forward" else rows["forward"]
        given = torch.randn(count, 70).to(dtype)
        arguments = (f"resample_{direction}_cpu", given, made, old_size, sizes)
        avx512, avx2, portable = (by_vectors(arguments[0], bits, *arguments[1:]) for bits in (512, 256, 0))
        assert torch.equal(avx2, avx512)
        step = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
        largest = avx512.abs().max().item()
        torch.testing.assert_close(portable.double(), avx512.double(), rtol=0, atol=max(2e-6, step) * max(1.0, largest))
        if direction == "forward":
            assert torch.equal(avx512, fused(given[None], new_size, old_size)[0])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_round_as_pytorch_for_every_half(dtype):
    """All 65536 bit patterns in and out unchanged, and the means of neighbours, most of which lie between two values."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    copied = fused(values[None, None].clone(), (1, 2), (1, 1), 0)[0, 0]
    assert torch.equal(copied.isnan(), values.isnan())
    assert torch.equal(copied[~values.isnan()].view(torch.int16), values[~values.isnan()].view(torch.int16))
    # Halves of these are exact in float32, and no sum overflows there.
    values = values[(values.abs() < 1e38) & ((values.abs() > 1e-36) | (values == 0))]
    pair = torch.stack([values, values.roll(1)])[None]
    middle = fused(pair, (1, 3), (1, 2), 0, "bilinear", False)[0, 1]
    assert torch.equal(middle, (pair[0].float().sum(0) / 2).to(dtype))


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    old_size=st.tuples(st.integers(1, 40), st.integers(2, 40)),
    new_size=st.tuples(st.integers(1, 60), st.integers(2, 60)),
    width=st.integers(2, 70),
    mode=st.sampled_from(MODES),
    align_corners=st.booleans(),
)
def test_any_pair_of_sizes(old_size, new_size, width, mode, align_corners):
    posemb = table(old_size, 1, width)
    expected = interpolated(posemb[:, 1:], new_size, old_size, *mode, align_corners)
    got = fused(posemb, new_size, old_size, 1, *mode, align_corners=align_corners)
    if old_size != new_size:
        assert_close(got[:, 1:], expected)
    else:
        assert got is posemb


@needs_extension
@pytest.mark.slow
@every_mode
@every_alignment
def test_a_sweep_of_sizes(interpolation, antialias, align_corners):
    sides = (1, 2, 3, 5, 7, 8, 13, 14, 16, 24, 31, 32, 37, 64, 100, 127, 256, 511, 512)
    for old, new in itertools.product(sides, sides):
        for old_size, new_size in (((old, 3), (new, 4)), ((3, old), (4, new))):
            posemb = table(old_size, width=4)
            got = fused(posemb, new_size, old_size, 0, interpolation, antialias, align_corners=align_corners)
            assert_close(got, interpolated(posemb, new_size, old_size, interpolation, antialias, align_corners))


# Other people's code.


def photograph(side):
    """A smooth image in 0..1 with an edge, (side, side) in float32."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    return (0.5 + 0.4 * np.sin(9 * x + 4 * y * y) * np.cos(7 * y) * (x > 0.3)).astype(np.float32)


@pytest.mark.parametrize("size", [(24, 31), (9, 16), (40, 13)], ids=str)
@pytest.mark.parametrize(("interpolation", "method"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
def test_antialiased_resampling_is_pils(size, interpolation, method):
    image = photograph(20)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], method))
    posemb = torch.from_numpy(image).reshape(1, 400, 1).expand(-1, -1, 2)
    got = vk.ops.resample_pos_embed(posemb, size, None, 0, interpolation)[0, :, 0].reshape(size)
    np.testing.assert_allclose(got.cpu().numpy(), expected, atol=2e-6)


def test_antialiased_resampling_is_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.from_numpy(photograph(20)).expand(3, 20, 20)
    posemb = image.permute(1, 2, 0).reshape(1, 400, 3)
    for size in ((24, 31), (9, 16)):
        expected = functional.resize(image, list(size), functional.InterpolationMode.BICUBIC, antialias=True)
        got = vk.ops.resample_pos_embed(posemb, size, None, 0)[0].reshape(*size, 3).permute(2, 0, 1)
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(24, 24), (20, 31), (7, 10)], ids=str)
def test_aligned_bilinear_is_the_papers_zoom(size):
    """The original code: ``scipy.ndimage.zoom(grid, zoom, order=1)`` (github.com/google-research/vision_transformer)."""
    grid = np.random.default_rng(0).normal(size=(14, 14, 8))
    expected = scipy.ndimage.zoom(grid, (size[0] / 14, size[1] / 14, 1), order=1)
    posemb = torch.from_numpy(grid).reshape(1, 196, 8).float()  # positions up to 13 in float32: 5e-7 off, times the slope
    got = vk.ops.resample_pos_embed(posemb, size, None, 0, "bilinear", False, align_corners=True)
    np.testing.assert_allclose(got.cpu().numpy().reshape(*size, 8), expected, atol=5e-6)


# timm's rules.


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_mode
@pytest.mark.parametrize(("old_size", "new_size"), [((4, 4), (6, 6)), ((4, 4), (3, 7)), ((1, 1), (5, 5)), ((7, 3), (2, 2))])
def test_resampling_is_timms(old_size, new_size, interpolation, antialias, dtype, backend):
    for prefix in (0, 1, 5):
        posemb = table(old_size, prefix, dtype=dtype)
        arguments = (posemb, new_size, old_size, prefix, interpolation, antialias)
        with vk.backend(backend):
            got = vk.ops.resample_pos_embed(*arguments)
        expected = resample_abs_pos_embed(*arguments)
        assert torch.equal(got[:, :prefix], posemb[:, :prefix])
        if backend == "reference":
            assert torch.equal(got, expected)
        else:
            step = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
            tolerance = max(2e-6, step) * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_the_signature_is_timms():
    """With at most more at the end: timm 1.0.26 has no align_corners."""
    ours, timms = (
        [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
        for f in (vk.ops.resample_pos_embed, resample_abs_pos_embed)
    )
    assert ours[: len(timms)] == timms
    assert [name for name, _, _ in ours[len(timms) :]] in ([], ["align_corners"])


def test_verbose_logs_the_two_grids_when_they_differ(caplog):
    posemb = table((4, 4), 1)
    with caplog.at_level(logging.INFO):
        for function in (vk.ops.resample_pos_embed, vk.reference.resample_pos_embed, resample_abs_pos_embed):
            assert torch.equal(function(posemb, (4, 4), verbose=True), posemb)
            assert caplog.messages == []
            function(posemb, (6, 5))
            assert caplog.messages == []
            function(posemb, (6, 5), None, 1, "bicubic", True, True)
            assert caplog.messages == ["Resized position embedding: (4, 4) to (6, 5)."]
            caplog.clear()


def test_no_align_corners_is_the_edges():
    posemb = table((4, 4), 1)
    edges, none = (vk.ops.resample_pos_embed(posemb, (6, 5), None, 1, "bicubic", True, False, a) for a in (False, None))
    assert torch.equal(edges, none)
    assert not torch.equal(edges, vk.ops.resample_pos_embed(posemb, (6, 5), align_corners=True))


@pytest.mark.parametrize("many", [list, tuple, iter, np.array], ids=["list", "tuple", "iterator", "array"])
def test_sizes_may_be_any_pairs_of_integers(many):
    posemb, size = table((4, 4), 1), torch.zeros(6, 5).shape
    expected = vk.ops.resample_pos_embed(posemb, (6, 5))
    assert torch.equal(vk.ops.resample_pos_embed(posemb, many(size), many([4, 4])), expected)
    assert torch.equal(vk.ops.resample_pos_embed_many(posemb, many([size]), num_prefix_tokens=1), expected[0])


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
    assert_close(got[:, 1:], interpolated(posemb[:, 1:], new_size, old_size, "bicubic", True))
    assert torch.equal(got[:, :1], posemb[:, :1])


def test_gradients_are_timms_and_prefix_rows_pass_theirs_through():
    posemb = torch.randn(1, 17, 8, requires_grad=True)
    dout = torch.randn(1, 37, 8)
    (got,) = torch.autograd.grad(vk.ops.resample_pos_embed(posemb, (6, 6)), posemb, dout)
    (expected,) = torch.autograd.grad(resample_abs_pos_embed(posemb, (6, 6)), posemb, dout)
    assert_close(got, expected)
    assert torch.equal(got[:, 0], dout[:, 0])


@needs_extension
@every_mode
@pytest.mark.parametrize(("old_size", "new_size"), [((4, 4), (7, 6)), ((9, 5), (3, 4))], ids=str)
def test_second_and_third_derivatives_are_those_of_interpolate(old_size, new_size, interpolation, antialias):
    posemb, direction = table(old_size, 2).requires_grad_(), table(old_size, 2)
    arguments = (new_size, old_size, 2, interpolation, antialias)

    def derivatives(function):
        value, found = function(posemb, *arguments).pow(4).sum(), []
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, posemb, create_graph=True)
            found.append(slope)
            value = (slope * direction).sum()
        return found

    for got, expected in zip(derivatives(fused), derivatives(resample_abs_pos_embed), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@needs_extension
@pytest.mark.parametrize("pad_to", [None, 10, 50])
def test_second_derivatives_of_many_sizes_are_the_references(pad_to):
    posemb, direction = table((4, 4), 1).requires_grad_(), table((4, 4), 1)
    results = []
    for function, dtype in ((fused_many, torch.float32), (vk.reference.resample_pos_embed_many, torch.float64)):
        rows = function(posemb.to(dtype), MANY, num_prefix_tokens=1, preserve_aspect_ratio=True, pad_to=pad_to)
        (slope,) = torch.autograd.grad(rows.pow(3).sum(), posemb, create_graph=True)
        results.append(torch.autograd.grad((slope * direction).sum(), posemb)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5 * results[1].abs().max().item())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, 17, 20)[..., 3:11],
        lambda: torch.randn(1, 8, 17).transpose(1, 2),
        lambda: torch.randn(1, 34, 8)[:, ::2],
        lambda: torch.randn(1, 1, 8).expand(1, 17, 8),
    ],
    ids=["slice", "transposed", "every second row", "expanded"],
)
def test_any_strides_give_the_bits_of_the_contiguous_input(make):
    posemb, dout = make(), torch.randn(8, 43).T[None]
    results = []
    for p in (posemb, posemb.contiguous()):
        leaf = p.detach().requires_grad_()
        out = vk.ops.resample_pos_embed(leaf, (7, 6))
        results.append([out, *torch.autograd.grad(out, leaf, dout if p is posemb else dout.contiguous())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("new_size", [(5, 1), (1, 1), (2, 1), (3, 2)], ids=str)
def test_the_reference_of_a_transposed_table_is_that_of_its_copy(new_size):
    """F.interpolate with antialias is not, for outputs of width 1 (torch 2.15 on a CPU)."""
    posemb = torch.randn(1, 8, 17).transpose(1, 2)
    for function in (vk.reference.resample_pos_embed, vk.ops.resample_pos_embed):
        with vk.backend("reference"):
            got, expected = (function(p, new_size) for p in (posemb, posemb.contiguous()))
        assert torch.equal(got, expected)
        assert_close(got[:, 1:], interpolated_exactly(posemb[:, 1:], new_size, (4, 4), "bicubic", True, False))


@pytest.mark.parametrize("lazy", [torch._neg_view, lambda p: torch._efficientzerotensor(p.shape)], ids=["negated", "zero"])
def test_values_that_are_not_in_memory_are_computed_first(lazy):
    posemb = lazy(torch.randn(1, 17, 8))
    assert torch.equal(vk.ops.resample_pos_embed(posemb, (7, 6)), vk.ops.resample_pos_embed(posemb.clone(), (7, 6)))


def test_the_reference_keeps_float64_and_passes_gradcheck():
    posemb = torch.randn(1, 10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: vk.reference.resample_pos_embed(p, (4, 5)), posemb)
    sizes, options = [(4, 5), (3, 3), (2, 1)], {"num_prefix_tokens": 1, "preserve_aspect_ratio": True, "pad_to": 12}
    assert torch.autograd.gradcheck(lambda p: vk.reference.resample_pos_embed_many(p, sizes, **options), posemb)


def test_derivatives_of_torch_func_go_through_the_reference():
    posemb, tangent = torch.randn(1, 17, 8), torch.randn(1, 17, 8)
    _, got = torch.func.jvp(lambda p: vk.ops.resample_pos_embed(p, (6, 6)), (posemb,), (tangent,))
    assert_close(got, resample_abs_pos_embed(tangent, (6, 6)))
    per_sample = torch.func.vmap(lambda p: vk.ops.resample_pos_embed(p, (6, 6)))(torch.stack([posemb, tangent]))
    assert_close(per_sample[1], resample_abs_pos_embed(tangent, (6, 6)))


@needs_extension
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace on itself and on checks of shapes
def test_whoever_looks_at_operators_sees_one():
    """Where nobody does, a CPU's kernel is called without it."""
    posemb, seen = table((4, 4), 1), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class WatchFunctions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    plain = vk.ops.resample_pos_embed(posemb, (6, 6))
    with WatchFunctions():
        vk.ops.resample_pos_embed(posemb, (6, 6))
    assert any("resample_pos_embed_fwd" in str(function) for function in seen)
    seen.clear()
    with Watch():
        watched = vk.ops.resample_pos_embed(posemb, (6, 6))
    assert "vitkernels.resample_pos_embed_fwd.default" in seen
    assert torch.equal(watched, plain)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        vk.ops.resample_pos_embed(posemb, (6, 6))
    assert "vitkernels::resample_pos_embed_fwd" in {event.key for event in profile.key_averages()}
    with FakeTensorMode() as mode:
        assert vk.ops.resample_pos_embed(mode.from_tensor(posemb), (6, 6)).shape == (1, 37, 24)
    with vk.backend("fused"):  # ``auto`` leaves to PyTorch what a CPU records
        traced = torch.jit.trace(lambda p: vk.ops.resample_pos_embed(p, (6, 6)), posemb)
    assert "vitkernels::resample_pos_embed_fwd" in str(traced.graph)
    assert torch.equal(traced(posemb * 2), vk.ops.resample_pos_embed(posemb * 2, (6, 6)))
    with torch.inference_mode():
        assert torch.equal(vk.ops.resample_pos_embed(posemb, (6, 6)), plain)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace on itself and on checks of shapes
@pytest.mark.parametrize("argument", ["new_size", "old_size", "sizes", "pad_to"])
def test_sizes_that_torch_jit_trace_records_follow_the_input(argument):
    """They are 0-d tensors then. The reference serves; ``fused`` says that the kernel cannot."""
    calls = {
        "new_size": lambda x, p: vk.ops.resample_pos_embed(p, (x.shape[0], x.shape[1]), (4, 4)),
        "old_size": lambda x, p: vk.ops.resample_pos_embed(p, (6, 5), (4 * x.shape[0] // x.shape[0], 4)),
        "sizes": lambda x, p: vk.ops.resample_pos_embed_many(p, [(3, 3), (x.shape[0], x.shape[1])], (4, 4), 1),
        "pad_to": lambda x, p: vk.ops.resample_pos_embed_many(p, [(3, 3), (5, 3)], (4, 4), 1, pad_to=x.shape[0]),
    }
    call, posemb, x, other = calls[argument], table((4, 4), 1), torch.zeros(7, 6), torch.zeros(9, 3)
    traced = torch.jit.trace(call, (x, posemb))
    assert_close(traced(x, posemb), call(x, posemb))
    assert_close(traced(other, 2 * posemb), call(other, 2 * posemb))
    if _env.EXTENSION is not None:
        with vk.backend("fused"), pytest.raises(RuntimeError, match=r"torch\.jit\.trace records these sizes"):
            torch.jit.trace(call, (x, posemb))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the C++ kernel")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_on_a_cpu_records_pytorchs_operators(mode, pre_dispatch, trained):
    def resampled(posemb):
        return vk.ops.resample_pos_embed(posemb, (6, 5)), vk.ops.resample_pos_embed_many(posemb, [(3, 2)], (4, 4), 1)

    posemb = table((4, 4), 1).requires_grad_(trained)
    graph = make_fx(resampled, tracing_mode=mode, pre_dispatch=pre_dispatch)(posemb)
    assert [node.target for node in graph.graph.nodes if "vitkernels" in str(node.target)] == []
    for got, expected in zip(graph(posemb), resampled(posemb), strict=True):
        assert_close(got, expected)


@needs_extension
def test_make_fx_records_the_kernel_that_a_caller_asks_for():
    with vk.backend("fused"):
        graph = make_fx(lambda posemb: vk.ops.resample_pos_embed(posemb, (6, 5)))(table((4, 4), 1))
    assert "vitkernels.resample_pos_embed_fwd" in str(graph.graph)


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
def test_a_square_table_of_any_size_compiles_in_one_graph(backend):
    def resampled(posemb):
        return vk.ops.resample_pos_embed(posemb, (6, 5)), vk.ops.resample_pos_embed_many(posemb, [(3, 2)], num_prefix_tokens=1)

    torch._dynamo.reset()
    compiled = torch.compile(resampled, fullgraph=True, dynamic=True, backend="aot_eager")
    with vk.backend(backend):
        for side in (4, 7, 3):
            posemb = table((side, side), 1)
            for got, expected in zip(compiled(posemb), resampled(posemb), strict=True):
                assert_close(got, expected)
    torch._dynamo.reset()


# Many sizes.

MANY = [(6, 6), (4, 4), (3, 7), (1, 1), (6, 6), (2, 9)]


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_many_sizes_are_the_single_ones_one_after_the_other(prefix, dtype, backend):
    posemb = table((4, 4), prefix, dtype=dtype)
    with vk.backend(backend):
        got = vk.ops.resample_pos_embed_many(posemb, MANY, num_prefix_tokens=prefix)
        single = [vk.ops.resample_pos_embed(posemb, size, (4, 4), prefix)[0] for size in MANY]
    assert torch.equal(got, torch.cat(single))


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
@pytest.mark.parametrize("options", [{}, {"pad_to": 16}, {"pad_to": 9}], ids=str)
@pytest.mark.parametrize("sizes", [[(4, 4)], [(4, 4)] * 2, []], ids=["one", "two", "none"])
def test_a_copy_of_the_tables_own_size_is_a_copy(sizes, options, backend):
    posemb = table((4, 4))
    before = posemb.clone()
    with vk.backend(backend):
        rows = vk.ops.resample_pos_embed_many(posemb, sizes, **options)
    rows.zero_()
    assert torch.equal(posemb, before)
    assert rows.untyped_storage().data_ptr() != posemb.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
def test_aspect_preserving_sizes_are_crops_of_the_square_as_in_naflex(backend):
    posemb = table((4, 4))
    with vk.backend(backend):
        got = vk.ops.resample_pos_embed_many(posemb, MANY, preserve_aspect_ratio=True).split([h * w for h, w in MANY])
    for rows, (h, w) in zip(got, MANY, strict=True):
        side = max(h, w)
        square = interpolated(posemb, (side, side), (4, 4), "bicubic", True).unflatten(1, (side, side))
        assert_close(rows, square[0, :h, :w].flatten(0, 1))
    # timm leaves an image of the table's own, here rectangular, grid alone.
    posemb = table((3, 5))
    with vk.backend(backend):
        assert torch.equal(vk.ops.resample_pos_embed_many(posemb, [(3, 5)], (3, 5), preserve_aspect_ratio=True), posemb[0])


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
@pytest.mark.parametrize("pad_to", [2, 10, 50])
def test_padded_copies_are_cut_or_filled_with_zeros(pad_to, backend):
    posemb = table((4, 4), 1)
    with vk.backend(backend):
        got = vk.ops.resample_pos_embed_many(posemb, MANY, num_prefix_tokens=1, pad_to=pad_to)
        packed = vk.ops.resample_pos_embed_many(posemb, MANY, num_prefix_tokens=1).split([1 + h * w for h, w in MANY])
    assert got.shape == (len(MANY), pad_to, 24)
    for image, rows in zip(got, packed, strict=True):
        kept = min(pad_to, rows.shape[0])
        assert torch.equal(image[:kept], rows[:kept])
        assert (image[kept:] == 0).all()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad_to", [None, 2, 10, 50])
@pytest.mark.parametrize("preserve_aspect_ratio", [False, True])
def test_gradients_of_many_sizes_are_the_references(preserve_aspect_ratio, pad_to, dtype):
    options = {"num_prefix_tokens": 1, "preserve_aspect_ratio": preserve_aspect_ratio, "pad_to": pad_to}
    posemb = table((4, 4), 1, 70).to(dtype).requires_grad_()
    out = fused_many(posemb, MANY, **options)
    dout = torch.randn(out.shape).to(dtype)
    (got,) = torch.autograd.grad(out, posemb, dout)
    wide = posemb.detach().double().requires_grad_()
    expected = torch.autograd.grad(vk.reference.resample_pos_embed_many(wide, MANY, **options), wide, dout.double())[0]
    step = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=(2e-6 + step) * expected.abs().max().item())


@needs_extension
def test_the_gradient_is_bitwise_the_same_from_run_to_run():
    posemb, sizes = table((16, 16), 1, 256).requires_grad_(), [(37, 37), (16, 16), (20, 31)]
    out = fused_many(posemb, sizes, num_prefix_tokens=1)
    dout = torch.randn_like(out)
    grads = [torch.autograd.grad(out, posemb, dout, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the C++ kernel")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_size_that_many_images_have_costs_one_resampling(direction):
    """As in timm's loop. 64 copies of one row each: all but the first cost nothing beside 128 x 128 rows of the table."""
    posemb = table((128, 128), 0, 64).requires_grad_()
    took = {}
    for count in (1, 64):
        out = fused_many(posemb, [(1, 1)] * count)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            if direction == "forward":
                fused_many(posemb, [(1, 1)] * count)
            else:
                torch.autograd.grad(out, posemb, torch.ones_like(out), retain_graph=True)
            times.append(time.perf_counter() - start)
        took[count] = min(times)
    assert took[64] < 8 * took[1]


@needs_extension
def test_more_sizes_than_one_launch_takes():
    posemb = table((3, 3), 1, 4).requires_grad_()
    sizes = [(1 + i % 3, 2) for i in range(MAX_SIZES + 5)]
    got = fused_many(posemb, sizes, num_prefix_tokens=1)
    expected = vk.reference.resample_pos_embed_many(posemb, sizes, num_prefix_tokens=1)
    assert_close(got, expected)
    dout = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(out, posemb, dout)[0] for out in (got, expected)))


def test_no_sizes_and_no_channels():
    posemb = table((3, 3), 1, 4).requires_grad_()
    out = vk.ops.resample_pos_embed_many(posemb, [], num_prefix_tokens=1)
    assert out.shape == (0, 4)
    assert torch.equal(torch.autograd.grad(out.sum(), posemb)[0], torch.zeros_like(posemb))
    for implementation in (vk.ops, vk.reference):
        padded = implementation.resample_pos_embed_many(posemb, [], num_prefix_tokens=1, pad_to=7)
        assert padded.shape == (0, 7, 4)
    assert vk.ops.resample_pos_embed(torch.zeros(1, 17, 0), (6, 6)).shape == (1, 37, 0)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("old_size", "new_size"), SIZES[:3], ids=str)
def test_full_width_on_a_gpu(old_size, new_size, dtype):
    for width in (768, 1024, 1152, 770):
        posemb = table(old_size, 1, width, dtype).requires_grad_()
        got = fused(posemb, new_size, old_size)
        expected = vk.reference.resample_pos_embed(posemb.double(), new_size, old_size)
        step = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
        atol = (4e-6 + step) * expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.gpu
def test_a_cuda_graph_captures_the_kernels():
    posemb, sizes = table((14, 14), 1, 768).requires_grad_(), [(24, 24), (14, 14), (9, 30)]

    def step():
        out = fused_many(posemb, sizes, num_prefix_tokens=1)
        return out, torch.autograd.grad(out.square().sum(), posemb)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        posemb.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_the_kernel_waits_for_the_work_of_the_current_stream():
    posemb = torch.zeros(1, 197, 768)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        posemb.fill_(1)
        out = fused(posemb, (24, 24))
    stream.synchronize()
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kernel_runs_on_the_device_of_its_tensor():
    posemb = table((14, 14), 1, 768).to("cuda:1")
    out = fused(posemb, (24, 24))
    assert out.device == posemb.device
    assert torch.equal(out, fused(posemb.to("cuda:0"), (24, 24)).to("cuda:1"))


# Fallback and wrong arguments.


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the C++ kernel")
def test_without_the_extension_auto_is_timms_bits_and_fused_raises(monkeypatch):
    monkeypatch.setattr("vitkernels._env.EXTENSION", None)
    posemb = table((4, 4), 1)
    assert torch.equal(vk.ops.resample_pos_embed(posemb, (6, 6)), resample_abs_pos_embed(posemb, (6, 6)))
    with pytest.raises(RuntimeError, match=r"vitkernels._C is not built"):
        fused(posemb, (6, 6))
    with pytest.raises(RuntimeError, match=r"resample_pos_embed_many cannot run its kernel: .*vitkernels._C is not built"):
        fused_many(posemb, [(6, 6)], num_prefix_tokens=1)


@needs_extension
def test_reasons_on_a_gpu(monkeypatch):
    posemb = torch.empty(1, 17, 8, device="meta")
    assert "run on CUDA and CPU tensors, got meta" in why_not(posemb)[0]
    monkeypatch.setattr("vitkernels._env.EXTENSION_ARCHITECTURES", ("sm_90", "compute_90"))
    with vk._select.targeting("sm_90"):
        assert why_not(posemb) == []
        assert why_not(posemb, 513) == ["the resampling kernel takes grids of up to 512 a side, got 513"]
        monkeypatch.setattr("vitkernels._env.EXTENSION_ARCHITECTURES", ())
        assert why_not(posemb) == ["the extension vitkernels._C was built without CUDA"]
    with vk._select.targeting("sm_75"):
        assert why_not(posemb)[0] == "sm_75 is older than sm_80"


@needs_extension
@pytest.mark.parametrize(
    ("built_for", "runs"),
    [
        ("sm_80 compute_80", "80 86 89 90 100 120"),  # the driver compiles PTX for newer ones
        ("sm_90 compute_90", "90 100 120"),
        ("sm_86 sm_90 compute_90", "86 89 90 100 120"),  # a binary runs on later ones of its generation
        ("sm_120 compute_120", "120"),
    ],
)
def test_an_extension_built_for_another_architecture_is_a_reason(monkeypatch, built_for, runs):
    """CUDA C++ programming guide, binary and PTX compatibility. The launch would fail, where timm resamples."""
    monkeypatch.setattr("vitkernels._env.EXTENSION_ARCHITECTURES", tuple(built_for.split()))
    posemb = torch.empty(1, 17, 8, device="meta")
    for arch in ("80", "86", "89", "90", "100", "120"):
        with vk._select.targeting(f"sm_{arch}"):
            refused = [f"the extension vitkernels._C was built for {built_for}, not for sm_{arch}"]
            assert why_not(posemb) == ([] if arch in runs.split() else refused)


P = torch.zeros(1, 17, 8)
NAMES = np.array(["bicubic", "bilinear"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.resample_pos_embed(P[0], (4, 4)), ValueError, "posemb must have shape"),
        (lambda: vk.ops.resample_pos_embed(P.int(), (4, 4)), TypeError, "posemb must be of dtype"),
        (lambda: vk.ops.resample_pos_embed(None, (4, 4)), TypeError, "posemb must be a Tensor"),
        (lambda: vk.ops.resample_pos_embed(P, (0, 4)), ValueError, r"new_size must be two positive integers, got \(0, 4\)"),
        (lambda: vk.ops.resample_pos_embed(P, (-2, 4)), ValueError, "new_size must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed(P, (4,)), ValueError, "new_size must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed(P, (4.0, 5.0)), TypeError, "new_size must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed(P, 6), TypeError, "new_size must be two positive integers, got 6"),
        (lambda: vk.ops.resample_pos_embed(P, None), TypeError, "new_size must be two positive integers, got None"),
        (
            lambda: vk.ops.resample_pos_embed(P, ("6", "6")),
            TypeError,
            r"new_size must be two positive integers, got \('6', '6'\)",
        ),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), (4.0, 4.0)), TypeError, r"old_size must be .*, got \(4.0, 4.0\)"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), 4), TypeError, "old_size must be two positive integers, got 4"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), antialias="no"), TypeError, "antialias must be one of .* got 'no'"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), antialias=0), TypeError, "antialias must be one of True, False, got 0"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), align_corners="no"), TypeError, "align_corners must be one of"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), align_corners=1), TypeError, "align_corners must be one of .* got 1"),
        (lambda: vk.ops.resample_pos_embed(P, (True, True)), TypeError, r"new_size must be .* got \(True, True\)"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), (True, 16)), TypeError, "old_size must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), None, True), TypeError, "num_prefix_tokens must be an integer, got True"),
        (lambda: vk.ops.resample_pos_embed(P.to_sparse(), (4, 5)), TypeError, "posemb must be of layout .*sparse_coo"),
        (lambda: vk.ops.resample_pos_embed(P.to_mkldnn(), (4, 5)), TypeError, "posemb must be of layout .*mkldnn"),
        (lambda: vk.ops.resample_pos_embed_many(P.to_sparse(), [(4, 5)], None, 1), TypeError, "posemb must be of layout"),
        (
            lambda: vk.ops.resample_pos_embed(P, (4, 5), num_prefix_tokens=1.0),
            TypeError,
            "num_prefix_tokens must be an integer",
        ),
        (
            lambda: vk.ops.resample_pos_embed(P, (4, 5), num_prefix_tokens=None),
            TypeError,
            "num_prefix_tokens must be an integer",
        ),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), (3, 5)), ValueError, "old_size must be .* with product 16"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), (-4, -4)), ValueError, "old_size must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), None, 0), ValueError, "old_size is needed, since 17 tokens"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), None, 17), ValueError, "num_prefix_tokens must leave at least one"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 4), interpolation="nearest"), ValueError, "interpolation must be one of"),
        (lambda: vk.ops.resample_pos_embed_many(P, [(4, 4), (0, 1)], None, 1), ValueError, "sizes must be two positive"),
        (lambda: vk.ops.resample_pos_embed_many(P, [(4, 4)]), ValueError, "old_size is needed, since 17 tokens"),
        (lambda: vk.ops.resample_pos_embed_many(P, [(4, 4)], None, 1, pad_to=0), ValueError, "pad_to must hold the 1 prefix"),
        (
            lambda: vk.ops.resample_pos_embed_many(P, [(4, 5)], None, 1, pad_to=5.0),
            TypeError,
            "pad_to must be an integer, got 5.0",
        ),
        (lambda: vk.ops.resample_pos_embed_many(P, [(4, 5)], None, 1.0), TypeError, "num_prefix_tokens must be an integer"),
        (
            lambda: vk.ops.resample_pos_embed_many(P, [(4, 5)], (4.0, 4.0), 1),
            TypeError,
            "old_size must be two positive integers",
        ),
        (lambda: vk.ops.resample_pos_embed_many(P, [(4, 5)], None, 1, antialias="no"), TypeError, "antialias must be one of"),
        (
            lambda: vk.ops.resample_pos_embed_many(P, [(4, 5)], None, 1, align_corners=2),
            TypeError,
            "align_corners must be one of",
        ),
        (
            lambda: vk.ops.resample_pos_embed_many(P, [(4, 5)], None, 1, preserve_aspect_ratio=0),
            TypeError,
            "preserve_aspect_ratio must be one of",
        ),
        (lambda: vk.ops.resample_pos_embed_many(P, 6, None, 1), TypeError, "sizes must be a sequence"),
        (lambda: vk.ops.resample_pos_embed_many(P, None, None, 1), TypeError, "sizes must be a sequence"),
        (lambda: vk.ops.resample_pos_embed_many(P, (4, 5), None, 1), TypeError, "sizes must be two positive integers, got 4"),
        (lambda: vk.ops.resample_pos_embed_many(P, [(4, 5.0)], None, 1), TypeError, "sizes must be two positive integers"),
        (lambda: vk.ops.resample_pos_embed_many(P.bool(), [(4, 4)]), TypeError, "posemb must be of dtype"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), verbose="no"), TypeError, "verbose must be one of True, False, got 'no'"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), interpolation=NAMES), ValueError, "interpolation must be one of"),
        (lambda: vk.ops.resample_pos_embed(P, (4, 5), interpolation=[]), ValueError, r"interpolation must be .*, got \[\]"),
        (lambda: vk.ops.resample_pos_embed_many(P, {(4, 5)}, None, 1), TypeError, "sizes must be a sequence"),
        (lambda: vk.ops.resample_pos_embed_many(P, {(4, 5): 1}, None, 1), TypeError, "sizes must be a sequence"),
        (lambda: vk.ops.resample_pos_embed_many(P, torch.tensor(3), None, 1), TypeError, r"sizes must be .*, got tensor\(3\)"),
        (lambda: vk.ops.resample_pos_embed_many(P, np.array(3), None, 1), TypeError, "sizes must be a sequence"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(call, error, message, monkeypatch):
    monkeypatch.setattr("vitkernels._env.EXTENSION", None)  # and would be missed, were it called
    with pytest.raises(error, match=message):
        call()


def integers(value) -> dict[str, tuple]:
    """Calls with ``value`` in the place of each integer, and what the message calls it."""
    one, many = vk.ops.resample_pos_embed, vk.ops.resample_pos_embed_many
    return {
        "new_size": (lambda: one(P, (value, 5)), "new_size must"),
        "old_size": (lambda: one(P, (4, 5), (4, value)), "old_size must"),
        "num_prefix_tokens": (lambda: one(P, (4, 5), None, value), "num_prefix_tokens must"),
        "sizes": (lambda: many(P, [(4, 5), (4, value)], None, 1), "sizes must"),
        "pad_to": (lambda: many(P, [(4, 5)], None, 1, pad_to=value), "pad_to must"),
    }


NO_INTEGERS = {
    "two": torch.tensor([1, 2]),
    "none": torch.tensor([], dtype=torch.int64),
    "float": torch.tensor(1.0),
    "bool": torch.tensor(True),
    "numpy": np.float32(1),
    "array": np.array([1, 2]),
}


@needs_extension
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", NO_INTEGERS)
@pytest.mark.parametrize("argument", integers(0))
def test_tensors_and_numbers_that_are_no_integer_are_named(argument, value, backend):
    call, message = integers(NO_INTEGERS[value])[argument]
    with vk.backend(backend), pytest.raises(TypeError, match=message):
        call()


@needs_extension
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [2**62, 2**64, 10**400], ids=["2^62", "2^64", "10^400"])
@pytest.mark.parametrize("argument", integers(0))
def test_integers_of_more_than_any_memory_are_named(argument, value, backend):
    call, message = integers(value)[argument]
    with vk.backend(backend), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [{4, 5}, frozenset((4, 5)), {4: 0, 5: 0}], ids=["set", "frozenset", "dict"])
def test_a_size_has_an_order(size):
    with pytest.raises(TypeError, match="new_size must be two positive integers"):
        vk.ops.resample_pos_embed(P, size)
    with pytest.raises(TypeError, match="old_size must be two positive integers"):
        vk.ops.resample_pos_embed(P, (4, 5), size)
    with pytest.raises(TypeError, match="sizes must be two positive integers"):
        vk.ops.resample_pos_embed_many(P, [size], None, 1)


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=needs_extension)])
@pytest.mark.parametrize(
    "kind", [torch.tensor, lambda n: torch.tensor([n]), np.int32, Index], ids=["0-d", "1-d", "numpy", "index"]
)
def test_an_integer_is_what_python_takes_for_one(kind, backend):
    posemb = table((4, 4), 1)
    with vk.backend(backend):
        got = vk.ops.resample_pos_embed(posemb, (kind(6), kind(5)), (kind(4), kind(4)), kind(1))
        assert torch.equal(got, vk.ops.resample_pos_embed(posemb, (6, 5), (4, 4), 1))
        got = vk.ops.resample_pos_embed_many(posemb, [(kind(6), kind(5))], (4, 4), kind(1), pad_to=kind(9))
        assert torch.equal(got, vk.ops.resample_pos_embed_many(posemb, [(6, 5)], (4, 4), 1, pad_to=9))
