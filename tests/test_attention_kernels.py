"""The attention kernels through the public functions, forward and backward, against the float64 reference."""

import interpreter
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    KERNEL_TESTS,
    ON_GPU,
    assert_matches_reference,
    assert_within_budget,
    outputs_and_gradients,
    slow_on_gpu,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import vitkernels as vk
from vitkernels.kernels import _recorder, attention_backward, attention_bias_backward
from vitkernels.kernels import attention as kernels

pytestmark = KERNEL_TESTS
bf16 = torch.bfloat16
LENGTHS = (1, 2, 63, 64, 65, 196, 197, 256, 257, 576, 577, 1370)
HEAD_DIMS = (32, 48, 64, 72, 76, 80, 88, 96, 104, 128)


def kernel(*args, **kwargs):
    with vk.backend("fused"):
        return (vk.ops.attention_qkv if args[0].dim() == 5 or "cu_seqlens" in kwargs else vk.ops.attention)(*args, **kwargs)


def draw(*shape, dtype=torch.float32, std=1.0):
    return (std * torch.randn(shape)).to(dtype)


def packed_qkv(B, N, H, Dh, dtype=torch.float32):
    """Queries of std 3: so are the logits, and the softmax has peaks."""
    qkv = torch.randn(B, N, 3, H, Dh)
    qkv[:, :, 0] *= 3
    return qkv.to(dtype)


def check_qkv(B, N, H, Dh, dtype, bias=None, compare=assert_matches_reference, **options):
    """Outputs and gradients, of the bias too."""
    compare(
        lambda qkv, bias: kernel(qkv, bias=bias, **options),
        lambda qkv, bias: vk.reference.attention_qkv(qkv, bias=bias, **options),
        [packed_qkv(B, N, H, Dh, dtype), bias],
        [draw(B, N, H, Dh)],
    )


BIASES = {
    "no bias": lambda B, H, N, M, dtype: None,
    "bias": lambda B, H, N, M, dtype: draw(1, H, N, M, dtype=dtype),
    "key mask": lambda B, H, N, M, dtype: torch.zeros(B, 1, 1, M, dtype=dtype).masked_fill_(torch.rand(B, 1, 1, M) < 0.3, -1e4),
}


KINDS = (*BIASES, "packed")


def check_packed(lengths, H, Dh, dtype, compare=assert_matches_reference, beyond=0):
    """``beyond``: tokens of no image after the last one, NaN and infinite."""
    cu_seqlens, total = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths) + beyond
    qkv = packed_qkv(1, total, H, Dh, dtype)[0]
    qkv[sum(lengths) :: 2], qkv[sum(lengths) + 1 :: 2] = torch.nan, torch.inf
    compare(
        lambda qkv: kernel(qkv, cu_seqlens=cu_seqlens),
        lambda qkv: vk.reference.attention_qkv(qkv, cu_seqlens=cu_seqlens),
        [qkv],
        [draw(total, H, Dh)],
    )


def check_kind(kind, B, N, H, Dh, dtype, compare=assert_matches_reference):
    if kind == "packed":
        check_packed([N, 3, N // 2] * B, H, Dh, dtype, compare)
    else:
        check_qkv(B, N, H, Dh, dtype, BIASES[kind](B, H, N, N, dtype), compare)


@pytest.fixture
def streaming(monkeypatch):
    """The kernel of chips whose products do not read shared memory, at lengths where this one keeps K and V resident."""
    monkeypatch.setattr(kernels, "architecture", lambda device: 80)


@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 196, 197, 256, 257])
def test_lengths(N):
    check_qkv(1, N, 2, 64, bf16)


@pytest.mark.parametrize("head_dim", [1, 7, 70, *HEAD_DIMS, 200, 256])
def test_head_dims(head_dim):
    check_qkv(1, 65, 1, head_dim, bf16)


@pytest.mark.parametrize(("head_dim", "unit"), [(64, 8), (72, 8), (76, 4), (70, 2), (7, 1)])
def test_rows_are_read_as_many_channels_at_a_time_as_all_strides_allow(head_dim, unit, monkeypatch):
    """Of 76 channels 4: one by one, the backward spilled 300 to 900 bytes on sm_90 and sm_100."""
    units = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: units.append(options["UNIT"])

    for module, name in ((kernels, "fwd"), (kernels, "stream_fwd"), (attention_backward, "bwd")):
        monkeypatch.setattr(module, f"_attention_{name}_kernel", Kernel())
    qkv = torch.empty(1, 5, 3, 1, head_dim, dtype=bf16, device="meta")
    out, row_max, log_sum = kernels.launch_attention_fwd(*qkv.unbind(2), None, None, 0, 1.0, False)
    attention_backward.launch_attention_qkv_bwd(out, qkv, out, row_max, log_sum, None, None, 0, 1.0, False, False)
    assert set(units) == {unit}
    assert len(units) >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_and_kinds(kind, dtype):
    check_kind(kind, 2, 70, 2, 72, dtype)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("N", "head_dim"), [(197, 64), pytest.param(577, 72, marks=pytest.mark.slow)])
def test_streamed_keys(streaming, N, head_dim, bias):
    check_qkv(1, N, 1, head_dim, bf16, BIASES[bias](1, 1, N, N, bf16))


def test_streamed_head_dims(streaming):
    for head_dim in (7, 104, 128, 256):
        check_qkv(1, 70, 1, head_dim, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("N", LENGTHS)
def test_outputs_over_the_whole_grid(N, head_dim, dtype, kind):
    """Gradients over the same grid: test_attention_backward.py."""
    if N > 257 and head_dim not in (64, 72, 128):
        pytest.skip("three head dims for the long ones")

    def outputs_only(kernel, reference, inputs, cotangents):
        oracle = reference(*(None if t is None else t.double() for t in inputs))
        assert_within_budget("out", kernel(*inputs), reference(*inputs), oracle)

    # The largest error of few rows is one of luck, and so is eager's: over 400 heads of two tokens both are 1e-6 in float32.
    many = 1 if N > 2 else 20 if dtype == torch.float32 else 4
    check_kind(kind, many, N, many, head_dim, dtype, outputs_only)


@slow_on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("N", LENGTHS)
def test_grid_on_a_gpu_at_full_size(N, head_dim, dtype, kind):
    check_kind(kind, 2, N, 4, head_dim, dtype)


@pytest.mark.gpu
def test_200_repetitions_are_bitwise_equal_on_a_gpu():
    qkv, dout = packed_qkv(8, 197, 12, 64, bf16), draw(8, 197, 12, 64)
    first = outputs_and_gradients(kernel, [qkv], [dout])
    for _ in range(200):
        again = outputs_and_gradients(kernel, [qkv], [dout])
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.gpu
def test_more_heads_than_65535_on_a_gpu():
    """PyTorch's own kernels have the images on an axis of their grid that ends at 65535: it gets them in two halves."""
    qkv = packed_qkv(70000, 5, 1, 16, bf16)
    eager, oracle = (torch.cat([vk.reference.attention_qkv(t) for t in x.chunk(2)]) for x in (qkv, qkv.double()))
    assert_within_budget("out", kernel(qkv), eager, oracle)


@pytest.mark.parametrize(("queries", "keys"), [(1, 257), (70, 50), (50, 130)])
@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
def test_queries_and_keys_of_different_number(queries, keys, dtype):
    inputs = [draw(3, queries, 2, 48, dtype=dtype, std=3.0), *(draw(3, keys, 2, 48, dtype=dtype) for _ in range(2))]
    assert_matches_reference(kernel, vk.reference.attention, inputs, [draw(3, queries, 2, 48)])


def test_cu_seqlens_may_be_strided():
    cu_seqlens = torch.tensor([[0, 5], [7, 5], [20, 5]], dtype=torch.int32)[:, 0]
    qkv, dout = packed_qkv(1, 20, 2, 16)[0], [draw(20, 2, 16)]
    got, expected = (
        outputs_and_gradients(lambda x, ends=ends: kernel(x, cu_seqlens=ends), [qkv], dout)
        for ends in (cu_seqlens, cu_seqlens.contiguous())
    )
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("lengths", [[130, 0, 5, 197, 1], [64], [0], []])
def test_packed_images(lengths):
    check_packed(lengths, 2, 32, bf16)


@pytest.mark.parametrize(("lengths", "beyond"), [([130, 0, 5], 1), ([5, 64], 130), ([0, 0], 70), ([70, 3, 0], 5)], ids=str)
@pytest.mark.parametrize("dtype", [bf16, torch.float16, torch.float32], ids=str)
def test_tokens_of_no_packed_image_give_zeros_and_get_no_gradient(lengths, beyond, dtype):
    check_packed(lengths, 2, 24, dtype, beyond=beyond)
    ends, used = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)
    qkv = packed_qkv(1, used + beyond, 2, 24, dtype)[0].requires_grad_()
    out = kernel(qkv, cu_seqlens=ends)
    out.backward(torch.full_like(out, torch.nan).index_fill(0, torch.arange(used), 1.0))  # nothing reads dout there
    assert not out[used:].any()
    assert not qkv.grad[used:].any()
    assert torch.isfinite(qkv.grad).all()
    with vk.backend("fused"):
        assert torch.equal(vk.ops.attention(*qkv.unbind(1), cu_seqlens=ends), out)


def test_more_packed_images_than_one_load_of_lengths():
    lengths = torch.randint(0, 3, (600,))
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    qkv = packed_qkv(1, int(lengths.sum()), 1, 16, bf16)[0]
    with interpreter.checking(races=False):
        out = kernel(qkv, cu_seqlens=cu_seqlens)
    expected = vk.reference.attention_qkv(qkv.double(), cu_seqlens=cu_seqlens)
    assert_within_budget("out", out, vk.reference.attention_qkv(qkv, cu_seqlens=cu_seqlens), expected)


def test_launching_packed_images_reads_no_length_back():
    """On ``meta`` tensors any look at a value raises."""
    q, k, v = torch.empty(300, 3, 2, 16, device="meta").unbind(1)
    launched = []
    with _recorder.recording(lambda name, *_: launched.append(name)):
        kernels.launch_attention_fwd(q, k, v, None, torch.empty(5, dtype=torch.int32, device="meta"), 0, 1.0, False)
    assert launched == ["_attention_stream_fwd_kernel"]


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (0, 0)])
def test_no_image_or_no_token(shape):
    results = outputs_and_gradients(kernel, [packed_qkv(*shape, 2, 16)], [draw(*shape, 2, 16)])
    assert results["output 0"].shape == (*shape, 2, 16)
    assert results["gradient of input 0"].shape == (*shape, 3, 2, 16)


@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("N", [50, 257, 333])  # keys in one pass, in several, and streamed
@pytest.mark.parametrize("shape", ["rows", "keys"])
def test_rows_masked_by_minus_infinity_give_zeros_and_zero_gradients(N, shape, dtype):
    bias = torch.zeros(1, 1, N, N, dtype=dtype)
    bias[..., : N // 2] = -torch.inf  # whole blocks of keys
    bias[:, :, 2] = -torch.inf
    bias = bias[:, :, 2:3] if shape == "keys" else bias
    qkv = packed_qkv(1, N, 1, 16, dtype).requires_grad_()
    out = kernel(qkv, bias=bias)
    out.sum().backward()
    assert not out[:, 2].any()
    assert not qkv.grad[:, 2, 0].any()
    assert not qkv.grad[:, : N // 2, 1:].any()
    assert torch.isfinite(qkv.grad).all()
    if shape == "keys":
        assert not out.any()
    else:
        oracle = vk.reference.attention_qkv(qkv.detach().double(), bias=bias.double())
        assert_within_budget("out", out.detach(), vk.reference.attention_qkv(qkv.detach(), bias=bias), oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [50, 333])
def test_a_row_masked_by_finfo_min_is_softmax_of_what_the_addition_leaves(N, dtype):
    """That is the mean of v, as in timm, where finfo.min swallows the logits (not in float16).

    Judged beside the formula: on a CPU scaled_dot_product_attention sums 1 / N as 1 in dv, since its one number for a row,
    finfo.min + log(N), is finfo.min. Only out and dv, since dq and dk of such rows are rounding noise.
    """
    bias = torch.zeros(1, 1, N, N, dtype=dtype)
    bias[..., N // 3 :] = torch.finfo(dtype).min
    bias[:, :, 2] = torch.finfo(dtype).min
    qkv = packed_qkv(1, N, 1, 16, dtype)

    def run(qkv, attention):
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, bias=bias.to(qkv.dtype))
        out.sum().backward()
        return out.detach(), leaf.grad[:, :, 2]

    def formula(qkv, bias):
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, Dh) each
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        return (s.softmax(-1) @ v).transpose(1, 2)

    eager, oracle = run(qkv, formula), run(qkv.double(), formula)
    for name, ours, theirs, exact in zip(("out", "dv"), run(qkv, kernel), eager, oracle, strict=True):
        assert_within_budget(name, ours, theirs, exact)
    if dtype != torch.float16:
        mean = qkv[0, :, 2].double().mean(0)
        torch.testing.assert_close(run(qkv, kernel)[0][0, 2].double(), mean, atol=1e-2, rtol=1e-2)


def test_bool_masks_and_small_bias_shapes():
    for shape in [(40, 40), (2, 1, 1, 40), (3, 40, 40), (40,)]:
        check_qkv(2, 40, 3, 16, torch.float32, draw(*shape))
    keep = torch.rand(2, 1, 40, 40) > 0.4
    qkv = packed_qkv(2, 40, 3, 16)
    expected = vk.reference.attention_qkv(qkv.double(), bias=keep)
    assert_within_budget("out", kernel(qkv, bias=keep), vk.reference.attention_qkv(qkv, bias=keep), expected)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.05, 0.5])
def test_any_scale(scale):
    check_qkv(1, 70, 1, 32, torch.float32, scale=scale)
    check_qkv(1, 70, 1, 32, bf16, draw(1, 1, 70, 70, dtype=bf16), scale=scale)


LAYOUTS = {
    "packed": lambda: torch.randn(2, 70, 3, 2, 24).unbind(2),
    "heads first": lambda: tuple(torch.randn(2, 2, 70, 24).transpose(1, 2) for _ in range(3)),
    "batch second": lambda: tuple(torch.randn(70, 2, 2, 24).transpose(0, 1) for _ in range(3)),
    "odd strides": lambda: tuple(torch.randn(2, 70, 2, 25)[..., :24] for _ in range(3)),
    **{
        f"odd strides of {name} alone": lambda odd=name: tuple(torch.randn(2, 70, 2, 24 + (odd == t))[..., :24] for t in "qkv")
        for name in "qkv"
    },
    "channels strided": lambda: tuple(torch.randn(2, 70, 24, 2).transpose(2, 3) for _ in range(3)),
    "shared key": lambda: (torch.randn(2, 70, 2, 24), *(torch.randn(2, 70, 1, 24).expand(-1, -1, 2, -1) for _ in range(2))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_bits_of_contiguous_inputs(layout):
    """On a GPU strides of other divisors are another compilation, which may add up in another order: within budget each."""
    inputs, dout = LAYOUTS[layout](), [draw(2, 70, 2, 24)]
    if ON_GPU:
        assert_matches_reference(kernel, vk.reference.attention, inputs, dout)
        return
    got, expected = (outputs_and_gradients(kernel, list(t), dout) for t in (inputs, [x.contiguous() for x in inputs]))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_results_depend_neither_on_the_run_nor_on_the_order_of_programs():
    qkv, dout = packed_qkv(2, 197, 2, 64, bf16), draw(2, 197, 2, 64)
    first = outputs_and_gradients(kernel, [qkv], [dout])
    with interpreter.checking(order="shuffle"):
        again = outputs_and_gradients(kernel, [qkv], [dout])
    assert all(torch.equal(again[name], value) for name, value in first.items())
    alone = outputs_and_gradients(kernel, [qkv[:1]], [dout[:1]])  # another number of query tiles a program
    assert torch.equal(alone["output 0"], first["output 0"][:1])


@slow_on_gpu
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 90),
    keys=st.integers(2, 150),
    heads=st.integers(1, 3),
    head_dim=st.integers(8, 40),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from(list(BIASES)),
    order=st.permutations([0, 1, 2]),
    arch=st.sampled_from([80, 90]),
)
def test_random_shapes_and_strides_forward_and_backward(batch, queries, keys, heads, head_dim, dtype, bias, order, arch):
    """Outputs and gradients, that of the bias too.

    Of 8 channels and more: with 1 to 7, tensors have so few numbers that eager's error is a lucky one, a tenth of a rounding
    step, in 1 example of 30. test_head_dims has 1 and 7 at 65 tokens.
    """

    def strided(n):
        sizes = (batch, n, heads)
        return torch.randn(*(sizes[i] for i in order), head_dim).permute(*(order.index(i) for i in range(3)), 3).to(dtype)

    inputs = [3 * strided(queries), strided(keys), strided(keys), BIASES[bias](batch, heads, queries, keys, dtype)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernels, attention_backward):
            patch.setattr(module, "architecture", lambda device: arch)
        assert_matches_reference(
            lambda q, k, v, bias: kernel(q, k, v, bias=bias),
            lambda q, k, v, bias: vk.reference.attention(q, k, v, bias=bias),
            inputs,
            [strided(queries)],
        )


# Size of a launch.


class _Launches:
    """Stands for a kernel and keeps the grids and the named arguments that it is launched with."""

    def __init__(self):
        self.grids, self.arguments = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: self.arguments.append(kwargs)


def issued(arguments, N):
    """Multiply-adds of both products for a head of N tokens, with all padding, from the arguments of the launch."""
    channels = sum(arguments[part] for part in ("D0", "D1", "D2"))
    if "KEYS0" in arguments:
        keys = sum(arguments[block] for block in ("KEYS0", "KEYS1", "KEYS2"))
    else:
        keys, rest = N - N % arguments["BLOCK_N"], N % arguments["BLOCK_N"]
        keys += -(-rest // arguments["TAIL"]) * arguments["TAIL"] if arguments["TAIL"] else 0
    return 2 * -(-N // arguments["BLOCK_M"]) * arguments["BLOCK_M"] * keys * channels


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("N", "head_dim", "least"), [(197, 64, 0.70), (257, 64, 0.70), (257, 80, 0.70), (256, 72, 0.85), (577, 64, 0.85)]
)
def test_most_of_the_multiplied_tiles_is_useful(monkeypatch, arch, N, head_dim, least):
    """Padding of queries, keys and channels included. The interpreter records the products: they are what is counted here."""
    monkeypatch.setattr(kernels, "architecture", lambda device: arch)
    launches, (q, k, v) = _Launches(), torch.empty(1, N, 3, 1, head_dim, dtype=bf16, device="meta").unbind(2)
    with monkeypatch.context() as patch:
        for name in ("_attention_fwd_kernel", "_attention_stream_fwd_kernel"):
            patch.setattr(kernels, name, launches)
        kernels.launch_attention_fwd(q, k, v, None, None, 0, 1.0, False)
    (arguments,) = launches.arguments
    if interpreter._installed:
        with interpreter.record_dots() as dots, interpreter.checking(races=False):
            kernel(packed_qkv(1, N, 1, head_dim, bf16))
        assert issued(arguments, N) == sum(rows * columns * inner for rows, columns, inner in dots)
    useful = 2 * N * N * head_dim / issued(arguments, N)
    assert least <= useful <= 1, useful


@pytest.mark.parametrize(("name", "N"), [("_attention_fwd_kernel", 197), ("_attention_stream_fwd_kernel", 577)])
def test_any_number_of_images_and_heads_fits_the_grid(monkeypatch, name, N):
    """Axes after the first hold 65,535 programs."""
    monkeypatch.setattr(kernels, name, stub := _Launches())
    q, k, v = torch.empty(9000, N, 3, 16, 64, dtype=bf16, device="meta").unbind(2)
    kernels.launch_attention_fwd(q, k, v, None, None, 0, 1.0, False)
    ((programs,),) = stub.grids
    assert programs >= 9000 * 16


@pytest.mark.parametrize("N", [197, 577])
def test_any_number_of_images_and_heads_fits_the_grids_of_the_backward(monkeypatch, N):
    modules = {"_attention_bwd_kernel": attention_backward, "_attention_dbias_kernel": attention_bias_backward}
    stubs = {name: _Launches() for name in modules}
    for name, module in modules.items():
        monkeypatch.setattr(module, name, stubs[name])
    qkv, dout = (torch.empty(9000, N, *rest, dtype=bf16, device="meta") for rest in ((3, 16, 64), (16, 64)))
    statistics = torch.empty(9000, 16, N, device="meta")
    bias = torch.empty(9000, 16, 1, N, dtype=bf16, device="meta")
    for b in (None, bias):
        saved = (dout, statistics, statistics, b, None, 0, 1.0, False, True)
        attention_backward.launch_attention_qkv_bwd(dout, qkv, *saved)
    for stub in stubs.values():
        for programs, *others in stub.grids:
            assert programs >= 9000 * 16
            assert all(n <= 65535 for n in others)
    assert all(stub.grids for stub in stubs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k", "bias"])
def test_a_logit_that_is_no_number_spoils_every_gradient_that_pytorchs_does(where, value, dtype):
    """So that whoever looks for NaN in the gradients of v alone finds it."""
    q, k, v = (torch.randn(1, n, 1, 16).to(dtype) for n in (4, 6, 6))
    bias = torch.zeros(1, 1, 4, 6, dtype=dtype)
    if where == "k":
        k[0, 2, 0, 0] = value
    else:
        bias[..., 2] = value
    inputs, dout = [q, k, v, bias], [torch.randn(1, 4, 1, 16).to(dtype)]

    def kernel(q, k, v, bias):
        with vk.backend("fused"):
            return vk.ops.attention(q, k, v, bias=bias)

    def stock(q, k, v, bias):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    got, expected = outputs_and_gradients(kernel, inputs, dout), outputs_and_gradients(stock, inputs, dout)
    assert got.keys() == expected.keys()
    for name in got:
        assert not got[name][~expected[name].isfinite()].isfinite().any(), name


def bfloat16_memory(elements, folder):
    """On a CPU a file that is all hole but for what is written to it; on a GPU NaN."""
    if not ON_GPU:
        (folder / "sparse").touch()
        return torch.from_file(str(folder / "sparse"), shared=True, size=elements, dtype=bf16)
    if torch.cuda.mem_get_info()[0] < 3 * elements:
        pytest.skip("too little free memory on this GPU")
    return torch.empty(elements, dtype=bf16)


def assert_same(got, expected, what):
    """To the bit. On a GPU large strides, which are int64 arguments, are another compilation, which may round otherwise."""
    if ON_GPU:
        torch.testing.assert_close(got, expected, msg=lambda message: f"{what}: {message}")
    else:
        assert torch.equal(got, expected), what


def test_offsets_beyond_32_bits(monkeypatch, tmp_path):
    """Images, heads and rows that lie over 2^31 elements apart."""

    class Unchecked:
        def __init__(self, tensors):
            self.spans = []

    monkeypatch.setattr(interpreter, "_Memory", Unchecked)  # it would keep a byte map of 5 GB
    memory = bfloat16_memory(2**31 + 2**30, tmp_path)
    shapes = {
        "images": ((2, 3, 1, 16), (2**31 + 8, 16, 16, 1)),
        "heads": ((1, 3, 2, 16), (0, 16, 2**31 + 8, 1)),
        "rows": ((1, 300, 1, 16), (0, 2**23, 16, 1)),
    }
    with interpreter.checking(bounds=False, races=False):
        for name, (size, stride) in shapes.items():
            far = memory.as_strided(size, stride)
            near = draw(*size, dtype=bf16)
            far.copy_(near)
            for arch in (80, 90):
                monkeypatch.setattr(kernels, "architecture", lambda device, arch=arch: arch)
                assert_same(kernel(far, far, far), kernel(near, near, near), (name, arch))
            left = (*kernels.launch_attention_fwd(near, near, near, None, None, 0, 0.25, False), None, None, 0, 0.25, False)
            grads = (attention_backward.launch_attention_bwd(t, t, t, t, *left, False) for t in (far, near))
            for got, expected in zip(*grads, strict=True):
                assert_same(got, expected, name)
        far, near = memory.as_strided((1, 1, 90, 90), (0, 0, 2**25, 1)), draw(1, 1, 90, 90, dtype=bf16)
        far.copy_(near)
        qkv = packed_qkv(1, 90, 1, 16, bf16)
        assert_same(kernel(qkv, bias=far), kernel(qkv, bias=near), "bias")


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_true_float32_unless_pytorch_allows_tf32_by_its_newer_setting(setting):
    """Reading the older one raises once a program has used the newer."""
    if not interpreter._installed:
        pytest.skip("the interpreter shows which precision was asked for")
    qkv = packed_qkv(1, 40, 2, 32)
    exact = vk.reference.attention_qkv(qkv.double())
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        with interpreter.checking(tf32=True):
            error = (kernel(qkv) - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert error < 2e-5 if setting == "ieee" else error > 1e-4
