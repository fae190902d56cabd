"""What holds of every operator's results and gradients: memory of their own, changes in place, second derivatives."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import test_registration
import torch
from helpers import KERNEL_TESTS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels import ops
from vitkernels.ops import _register
from vitkernels.ops.mlp import projected_mlp

pytestmark = KERNEL_TESTS
NORM, LAYERS = ((16,), (16,)), ((24, 16), (24,), (16, 24), (16,))
TOKENS, HEADS = (3, 10, 16), (2, 5, 2, 8)


def packed(qkv: Tensor) -> Tensor:
    return ops.attention_qkv(qkv, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))


def in_half(*tensors: Tensor) -> Tensor:
    """proj and MLP of a block in bfloat16, where proj's bias may be left to fc2."""
    x, heads, weight, bias, *parameters = (t.bfloat16() for t in tensors)
    return projected_mlp(heads, x, weight, bias, tuple(parameters), 1e-6, "gelu")


# By name: the operator as a function of float32 leaves, and their shapes.
CASES: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[tuple[int, ...], ...]]] = {
    "layer_norm": (ops.layer_norm, (TOKENS, *NORM)),
    "add_layer_norm": (ops.add_layer_norm, (TOKENS, TOKENS, *NORM)),
    "add_layer_norm, LayerScale": (
        lambda x, residual, weight, bias, gamma: ops.add_layer_norm(x, residual, weight, bias, layer_scale=gamma),
        (TOKENS, TOKENS, *NORM, (16,)),
    ),
    "linear": (ops.linear, (TOKENS, (24, 16), (24,))),
    "linear of one row": (ops.linear, ((16,), (24, 16), (24,))),
    "linear of a matrix": (ops.linear, ((5, 16), (24, 16), (24,))),
    "linear, act": (lambda x, weight, bias: ops.linear(x, weight, bias, act="gelu"), (TOKENS, (24, 16), (24,))),
    "linear, residual": (
        lambda x, weight, residual: ops.linear(x, weight, residual=residual),
        (TOKENS, (16, 16), TOKENS),
    ),
    "linear, everything": (
        lambda x, weight, bias, norm_weight, norm_bias, gamma, residual: ops.linear(
            x, weight, bias, norm=(norm_weight, norm_bias, 1e-6), act="silu", layer_scale=gamma, residual=residual
        ),
        (TOKENS, (24, 16), (24,), *NORM, (24,), (3, 10, 24)),
    ),
    "linear, LayerScale": (
        lambda x, weight, bias, gamma, residual: ops.linear(x, weight, bias, layer_scale=gamma, residual=residual),
        (TOKENS, (16, 16), (16,), (16,), TOKENS),
    ),
    "mlp": (ops.mlp, (TOKENS, *NORM, *LAYERS)),
    "mlp, recompute": (lambda *tensors: ops.mlp(*tensors, recompute=True), (TOKENS, *NORM, *LAYERS)),
    "mlp, LayerScale": (lambda *tensors: ops.mlp(*tensors[:-1], layer_scale=tensors[-1]), (TOKENS, *NORM, *LAYERS, (16,))),
    "mlp without act": (lambda *tensors: ops.mlp(*tensors, act=None), (TOKENS, *NORM, *LAYERS)),
    "projected_mlp in bfloat16": (in_half, (TOKENS, TOKENS, (16, 16), (16,), *NORM, *LAYERS)),
    "attention": (ops.attention, (HEADS, HEADS, HEADS)),
    "attention, bias": (lambda q, k, v, bias: ops.attention(q, k, v, bias=bias), (HEADS, HEADS, HEADS, (1, 2, 5, 5))),
    "attention_qkv": (ops.attention_qkv, ((2, 5, 3, 2, 8),)),
    "attention_qkv, bias": (lambda qkv, bias: ops.attention_qkv(qkv, bias=bias), ((2, 5, 3, 2, 8), (1, 2, 5, 5))),
    "attention_qkv, packed": (packed, ((8, 3, 2, 8),)),
    "patch_embed": (ops.patch_embed, ((2, 3, 8, 8), (16, 3, 4, 4), (16,))),
    "patch_embed, prefix": (
        lambda images, weight, prefix: ops.patch_embed(images, weight, prefix_tokens=prefix),
        ((2, 3, 8, 8), (16, 3, 4, 4), (1, 2, 16)),
    ),
    "patch_embed, positions": (
        lambda images, weight, bias, prefix, positions: ops.patch_embed(
            images, weight, bias, prefix_tokens=prefix, pos_embed=positions
        ),
        ((2, 3, 8, 8), (16, 3, 4, 4), (16,), (1, 2, 16), (1, 6, 16)),
    ),
    "patch_embed, positions of patches": (
        lambda images, weight, bias, prefix, positions: ops.patch_embed(
            images, weight, bias, prefix_tokens=prefix, pos_embed=positions, pos_embed_prefix=False
        ),
        ((2, 3, 8, 8), (16, 3, 4, 4), (16,), (1, 2, 16), (1, 4, 16)),
    ),
    "resample_pos_embed": (lambda table: ops.resample_pos_embed(table, (3, 5)), ((1, 17, 16),)),
    "resample_pos_embed_many": (lambda table: ops.resample_pos_embed_many(table, [(3, 5), (2, 2)]), ((1, 16, 16),)),
}
PLANS = ("triton", "cublas")
STATISTICS = ("mean", "rstd")  # of rows: saved for backward alone
every_case = pytest.mark.parametrize("name", CASES)
every_plan = pytest.mark.parametrize("plan", PLANS)


@contextlib.contextmanager
def kernels(plan: str = "triton") -> Iterator[None]:
    with vk.backend("fused"), vk._select.planning(plan), pytest.MonkeyPatch.context() as m:
        m.setattr("vitkernels._env.ADDMM_COPIES", False)  # as in PyTorch 2.15: biases of an MLP go through its sum
        yield


@contextlib.contextmanager
def pytorch() -> Iterator[None]:
    """PyTorch's operators, of those of attention the one that can be differentiated twice."""
    with vk.backend("reference"), sdpa_kernel(SDPBackend.MATH):
        yield


def call(name: str, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = CASES[name][0](*leaves)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def draw(name: str) -> list[Tensor]:
    return [(0.5 + torch.randn(shape)).requires_grad_() for shape in CASES[name][1]]


close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Do two contiguous tensors share a byte?"""
    first, second = ((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (a, b))
    return max(first[0], second[0]) < min(first[1], second[1])


# Gradients have memory of their own.


@every_plan
@every_case
def test_no_two_gradients_overlap_and_none_overlaps_the_incoming_ones(name, plan):
    leaves = draw(name)
    with kernels(plan):
        outputs = call(name, leaves)
        incoming = [torch.randn(t.shape).to(t.dtype) for t in outputs]
        torch.autograd.backward(outputs, incoming)
    gradients = [t.grad for t in leaves]
    # DDP warns about other strides, also of a dimension of size 1.
    assert [t.stride() for t in gradients] == [
        torch.empty_like(t, memory_format=torch.contiguous_format).stride() for t in gradients
    ]
    for a, b in itertools.combinations((*gradients, *incoming), 2):
        assert not overlap(a, b)


def stem(tokens: int) -> tuple[Callable[[], Tensor], nn.ParameterDict]:
    images = torch.randn(2, 3, 8, 8)
    shapes = {"weight": (16, 3, 4, 4), "bias": (16,), "prefix_tokens": (1, 2, 16), "pos_embed": (1, tokens, 16)}
    parameters = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
    return lambda: ops.patch_embed(images, **parameters, pos_embed_prefix=tokens == 6).square().sum(), parameters


def gradients(parameters: nn.ParameterDict) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items()}


@pytest.mark.parametrize("tokens", [6, 4])
def test_gradients_of_a_stem_accumulate_are_clipped_and_cleared_one_by_one(tokens):
    loss, parameters = stem(tokens)
    with pytorch():
        loss().backward()
    want = gradients(parameters)
    parameters.zero_grad()
    with kernels():
        loss().backward()
        loss().backward()
    close(gradients(parameters), {name: 2 * t for name, t in want.items()})
    norm = math.sqrt(sum(t.double().square().sum().item() for t in want.values()))
    assert nn.utils.clip_grad_norm_(parameters.values(), norm).item() == pytest.approx(2 * norm, rel=1e-4)
    close(gradients(parameters), want)
    parameters["prefix_tokens"].grad.zero_()
    close(parameters["pos_embed"].grad, want["pos_embed"])


# Results can be changed in place.


@pytest.mark.parametrize("name", [name for name in _register.NAMES if name.endswith("_fwd")])
def test_no_result_that_a_caller_gets_is_a_view(name):
    for args in test_registration.arguments(name):
        operator = getattr(torch.ops.vitkernels, name)
        results = operator(*args)
        results = (results,) if isinstance(results, Tensor) else results
        for declared, result in zip(operator.default._schema.returns, results, strict=True):
            assert declared.name in STATISTICS or not result._is_view()


@every_plan
@every_case
def test_results_can_be_changed_in_place(name, plan):
    """Where backward starts from what was there, it raises instead of computing with what is there now."""
    leaves = draw(name)

    def slopes(add: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((add(t, 1) ** 2).sum() for t in call(name, leaves)), leaves)

    with kernels(plan):
        want = slopes(Tensor.add)
        # The stream, as in PyTorch; attention's output, as in PyTorch's flash attention.
        if name.startswith(("add_layer_norm", "attention")):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                slopes(Tensor.add_)
        else:
            assert all(map(torch.equal, slopes(Tensor.add_), want))


@every_plan
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("resample")])  # their last step is a view
def test_a_result_without_gradients_can_be_added_to_with_gradients(name, plan):
    with kernels(plan):
        with torch.no_grad():
            outputs = call(name, draw(name))
        term = torch.ones((), requires_grad=True)
        for output in outputs:
            output.add_(term)
            output.sum().backward()
    assert term.grad == sum(t.numel() for t in outputs)


# What is kept for backward, and what requires grad.


def _refilled(x: Tensor) -> Tensor:
    """A buffer of data, which is used for the next batch before backward."""
    return x.detach().clone()


def _of_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach() * 1


# By name: shapes of the data and of the frozen weight and of what is trained, and the operator.
FROZEN: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Tensor]]] = {
    "linear": ((TOKENS, (24, 16), (24,)), ops.linear),
    "linear, act": ((TOKENS, (24, 16), (24,)), lambda x, weight, bias: ops.linear(x, weight, bias, act="gelu")),
    "linear, residual": (
        (TOKENS, (24, 16), (3, 10, 24)),
        lambda x, weight, residual: ops.linear(x, weight, residual=residual),
    ),
    "patch_embed": (
        ((2, 3, 8, 8), (16, 3, 4, 4), (1, 4, 16)),
        lambda images, weight, positions: ops.patch_embed(images, weight, pos_embed=positions),
    ),
}


@pytest.mark.parametrize("data", [_refilled, _of_inference_mode])
@every_plan
@pytest.mark.parametrize("name", FROZEN)
def test_data_that_no_gradient_needs_is_not_kept(name, plan, data):
    """A frozen stem with trained positions, as MoCo v3's, or a frozen layer with a trained bias."""
    shapes, operator = FROZEN[name]
    x, weight, trained = (torch.randn(shape) for shape in shapes)
    gradients = []
    for backend in (vk.backend("reference"), kernels(plan)):
        with backend:
            given, leaf = data(x), trained.clone().requires_grad_()
            out = operator(given, weight, leaf)
            if not given.is_inference():
                given.fill_(torch.nan)
            out.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_a_layer_of_frozen_weights_lets_its_input_be_changed():
    """``h += linear(h, frozen)``, where autograd needs the weight and not h."""
    weight, start = torch.randn(16, 16), torch.randn(3, 16)
    gradients = []
    for backend in ("reference", "fused"):
        with vk.backend(backend):
            leaf = start.clone().requires_grad_()
            h = leaf * 2
            h += ops.linear(h, weight)
            h.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_case
def test_a_gradient_is_the_same_whatever_else_needs_one(name, dtype):
    leaves = draw(name)

    def slopes(needed: list[Tensor]) -> list[Tensor]:
        for t in leaves:
            t.requires_grad_(any(t is other for other in needed))
        with kernels("cublas"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = [t for t in call(name, leaves) if t.requires_grad]
        return list(torch.autograd.grad(sum(t.float().square().sum() for t in outputs), needed))

    for leaf, want in zip(leaves, slopes(leaves), strict=True):
        (alone,) = slopes([leaf])
        torch.testing.assert_close(alone, want, rtol=0.02, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("trained", ["x", "residual", "weight", "bias", "layer_scale"])
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_the_stream_of_add_layer_norm_requires_grad_where_something_in_it_is_trained(backend, trained):
    tensors = {"x": (3, 16), "residual": (3, 16), "weight": (16,), "bias": (16,), "layer_scale": (16,)}
    arguments = {name: torch.randn(shape, requires_grad=name == trained) for name, shape in tensors.items()}
    with vk.backend(backend):
        y, stream = ops.add_layer_norm(**arguments)
    assert y.requires_grad
    assert stream.requires_grad == (trained in ("x", "residual", "layer_scale"))
    y.sum().backward()
    assert arguments[trained].grad is not None


# Second derivatives.


@every_case
def test_second_derivatives_raise_on_every_path(name):
    """Of each gradient with respect to each leaf, wherever PyTorch's operators have one that is not zero."""
    leaves = draw(name)
    for loss in (lambda outputs: sum(t.sin().sum() for t in outputs), lambda outputs: sum((t * 3).sum() for t in outputs)):
        with pytorch():
            want = torch.autograd.grad(loss(call(name, leaves)), leaves, create_graph=True)
        with kernels():
            found = torch.autograd.grad(loss(call(name, leaves)), leaves, create_graph=True)
        for (true, gradient), leaf in itertools.product(zip(want, found, strict=True), leaves):
            weights, second = torch.randn(true.shape), None
            if true.requires_grad:
                (second,) = torch.autograd.grad((true * weights).sum(), leaf, retain_graph=True, allow_unused=True)
            if second is None or second.abs().max() < 1e-3:
                continue
            if name.startswith("resample"):  # linear: derivatives of any order
                (again,) = torch.autograd.grad((gradient * weights).sum(), leaf, retain_graph=True)
                torch.testing.assert_close(again, second)
                continue
            with pytest.raises(RuntimeError, match=r'differentiate twice.*with vitkernels\.backend\("reference"\)'):
                torch.autograd.grad((gradient * weights).sum(), leaf, retain_graph=True, allow_unused=True)


@every_case
def test_create_graph_alone_gives_the_same_gradients(name):
    leaves = draw(name)
    with kernels():
        outputs = call(name, leaves)
        incoming = [torch.randn(t.shape).to(t.dtype) for t in outputs]
        plain, recorded = (
            torch.autograd.grad(outputs, leaves, incoming, retain_graph=True, create_graph=create) for create in (False, True)
        )
    assert not any(t.requires_grad for t in (*plain, *incoming))
    assert all(map(torch.equal, plain, recorded))


@pytest.mark.parametrize("reentrant", [None, False], ids=["", "checkpointed"])
def test_a_hessian_vector_product_of_weights_raises_instead_of_lacking_a_part(reentrant):
    leaves = draw("mlp")
    run = ops.mlp if reentrant is None else lambda *tensors: checkpoint(ops.mlp, *tensors, use_reentrant=False)

    def product() -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(run(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(slopes, leaves, [torch.ones_like(t) for t in leaves])

    with kernels(), pytest.raises(RuntimeError, match="differentiate twice"):
        product()
    with pytorch():
        assert all(t.isfinite().all() for t in product())


def test_a_vectorised_jacobian_is_right_and_raises_where_it_would_be_differentiated():
    x, weight, bias = draw("layer_norm")
    jacobian = functools.partial(torch.autograd.functional.jacobian, lambda x: ops.layer_norm(x, weight, bias), x[0])
    with kernels():
        close(jacobian(vectorize=True), jacobian())
        assert jacobian(create_graph=True).requires_grad
        with pytest.raises(RuntimeError, match="differentiate twice"):
            jacobian(vectorize=True, create_graph=True)


def test_first_derivatives_pass_through_where_a_second_one_goes_another_way():
    """A head's gradient depends on features, and they on what is below: by first derivatives of the kernels alone."""
    x, weight, bias = draw("layer_norm")

    def slope_of_slope() -> Tensor:
        head = torch.linspace(-1, 1, 16).requires_grad_()
        (slope,) = torch.autograd.grad((ops.layer_norm(x, weight, bias) @ head).sin().sum(), head, create_graph=True)
        return torch.autograd.grad(slope.sum(), x)[0]

    with kernels():
        found = slope_of_slope()
    with pytorch():
        close(found, slope_of_slope())
