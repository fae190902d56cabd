"""Whatever is hooked, replaced, patched or switched on inside a fused module still takes effect, as in timm's model.

A fused forward calls none of its children, so each of these would be skipped in silence if the per-call guard missed it. Every
test does the same to timm's model, and checks that it has an effect there at all.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from helpers import timm_since
from test_timm_contract import (
    SMALL,
    assert_modified_alike,
    assert_runs_fused,
    assert_same,
    build,
    counted,
    images,
    outputs_and_gradients,
    reasons,
    stock_and_fused,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parallel import replicate
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

import vitkernels

# Every optional child is a real module here, none an Identity.
FULL = {"init_values": 0.1, "qk_norm": True, "drop_path_rate": 0.1}
CHILDREN = [name for name, _ in Block(32, 2, init_values=0.1, qk_norm=True, drop_path=0.1).named_modules() if name]
# scaled_dot_product_attention takes the probability: timm never calls this module.
NEVER_CALLED = {"attn.attn_drop"}


# Hooks.


def forward_hook(module: nn.Module, log: list):
    return module.register_forward_hook(lambda _module, _args, out: (log.append("forward"), out * 1.5)[1])


def forward_pre_hook(module: nn.Module, log: list):
    def hook(_module, args):
        log.append("pre")
        return (args[0] * 1.5, *args[1:])

    return module.register_forward_pre_hook(hook)


def full_backward_hook(module: nn.Module, log: list):
    def hook(_module, grads, _grad_outputs):
        log.append("backward")
        return tuple(None if g is None else g * 1.5 for g in grads)

    return module.register_full_backward_hook(hook)


def full_backward_pre_hook(module: nn.Module, log: list):
    def hook(_module, grads):
        log.append("backward pre")
        return tuple(None if g is None else g * 1.5 for g in grads)

    return module.register_full_backward_pre_hook(hook)


HOOKS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("child", CHILDREN)
def test_hook_on_a_child_fires_and_changes_the_result_as_in_timm(child, register):
    logs: list[list[str]] = []

    def modify(model):
        logs.append([])
        register(model.blocks[1].get_submodule(child), logs[-1])

    assert_modified_alike(modify, effect=child not in NEVER_CALLED, **FULL)
    assert logs[0] == logs[1]
    assert bool(logs[0]) == (child not in NEVER_CALLED)


def test_hook_with_keyword_arguments_sees_them():
    seen = []

    def modify(model):
        hook = lambda _module, _args, kwargs, out: seen.append(sorted(kwargs)) or out * 2  # noqa: E731
        model.blocks[1].attn.register_forward_hook(hook, with_kwargs=True)

    assert_modified_alike(modify)
    assert seen == [["attn_mask", "is_causal"]] * 2


def test_removed_hook_leaves_the_block_fused_again():
    stock, fused = stock_and_fused(**FULL)
    handle = forward_hook(fused.blocks[1].attn.qkv, [])
    assert counted(fused, images())[1] == 1
    assert reasons(fused) == ("attn.qkv has hooks",)
    handle.remove()
    assert_runs_fused(fused, stock, images())


@pytest.mark.parametrize("register", HOOKS)
def test_hook_on_the_block_itself_fires_while_it_stays_fused(register):
    logs: list[list[str]] = []

    def modify(model):
        logs.append([])
        register(model.blocks[1], logs[-1])

    assert_modified_alike(modify, blocks=2)
    assert logs[0] == logs[1] != []


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
)
def test_global_module_hook_sees_every_module_that_it_sees_in_timms(register):
    stock, fused = stock_and_fused(**FULL)
    names = {model: {m: name for name, m in model.named_modules()} for model in (stock, fused)}
    seen = {stock: [], fused: []}
    x = images()
    for model in (stock, fused):
        handle = register(lambda module, *_, model=model: seen[model].append(names[model][module]))
        try:
            _, ran = counted(outputs_and_gradients, model, x)
        finally:
            handle.remove()
        assert ran == 0
    assert "blocks.0.mlp.act" in seen[stock]
    assert seen[fused] == seen[stock]
    assert_runs_fused(fused, stock, x)


def test_a_replaced_call_of_all_modules_sees_every_module_that_it_sees_in_timms(monkeypatch):
    stock, fused = stock_and_fused(**FULL)
    x, seen, original = images(), [], nn.Module.__call__

    def call(module, *args, **kwargs):
        seen.append(type(module).__name__.removeprefix("Fused"))
        return original(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", call)
        assert counted(fused, x)[1] == 0
        of_fused = seen.copy()
        seen.clear()
        stock(x)
    assert of_fused == seen
    assert "Linear" in seen
    assert_runs_fused(fused, stock, x)


def test_feature_hooks_inside_a_block_capture_attention_outputs():
    stock, fused = stock_and_fused()
    captured = {}
    for name, model in (("stock", stock), ("fused", fused)):
        model.blocks[1].attn.register_forward_hook(lambda _m, _a, out, name=name: captured.__setitem__(name, out))
        model(images())
    assert captured["fused"].shape == captured["stock"].shape


# Replaced layers and weights.


class _Lora(nn.Module):
    """A low-rank update beside a frozen layer, in a module of another class (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((2, base.in_features), 0.05))
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class _LoraLinear(nn.Linear):
    """The same by subclassing, as loralib does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("name", LINEARS)
def test_lora_wrapper_around_a_linear_takes_effect(name):
    def modify(model):
        block = model.blocks[1]
        block.set_submodule(name, _Lora(block.get_submodule(name)))

    assert_modified_alike(modify)


@pytest.mark.parametrize("name", LINEARS)
def test_subclass_of_linear_takes_effect(name):
    def modify(model):
        model.blocks[1].get_submodule(name).__class__ = _LoraLinear

    assert_modified_alike(modify)


@pytest.mark.parametrize("name", ["norm1", "attn", "ls1", "drop_path1", "mlp", "mlp.act", "mlp.drop1", "mlp.norm", "attn.norm"])
def test_replaced_child_takes_effect(name):
    class Halve(nn.Module):
        def forward(self, x, **_kwargs):
            return 0.5 * x

    assert_modified_alike(lambda model: model.blocks[1].set_submodule(name, Halve()), **FULL)


@pytest.mark.parametrize("name", LINEARS)
def test_parametrized_weight_takes_effect(name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def modify(model):
        parametrize.register_parametrization(model.blocks[1].get_submodule(name), "weight", Double())

    assert_modified_alike(modify)


def test_pruned_weight_takes_effect():
    assert_modified_alike(lambda model: torch.nn.utils.prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", amount=0.5))


@pytest.mark.parametrize("name", ["norm1.weight", "attn.qkv.weight", "attn.proj.bias", "ls1.gamma", "mlp.fc2.weight"])
def test_reassigned_parameter_takes_effect_and_the_block_stays_fused(name):
    def modify(model):
        owner, _, attribute = name.rpartition(".")
        owner = model.blocks[1].get_submodule(owner)
        setattr(owner, attribute, nn.Parameter(getattr(owner, attribute).detach() * 2))

    assert_modified_alike(modify, blocks=2, init_values=0.1)


def test_weight_changed_in_place_takes_effect_and_the_block_stays_fused():
    assert_modified_alike(lambda model: model.blocks[1].attn.qkv.weight.data.mul_(2), blocks=2)


@pytest.mark.parametrize("name", ["norm1.weight", "attn.qkv.weight", "attn.proj.bias", "ls1.gamma", "mlp.fc2.weight"])
def test_wrapper_subclass_weight_runs_timms_forward(name):
    def modify(model):
        owner, _, attribute = name.rpartition(".")
        owner = model.blocks[1].get_submodule(owner)
        value = getattr(owner, attribute).detach()
        setattr(owner, attribute, nn.Parameter(TwoTensor(value, value.clone())))

    stock, fused = stock_and_fused(init_values=0.1)
    for model in (stock, fused):
        modify(model)
    x = images()
    got, ran = counted(fused.blocks[1], torch.ones(2, 17, 64))
    assert_same(got.a, stock.blocks[1](torch.ones(2, 17, 64)).a)
    assert ran == 0
    assert "tensor subclass" in reasons(fused)[0]
    assert fused(x).a.shape == (2, 10)


class _Counting(Tensor):
    """A subclass that acts in ``__torch_function__``: no wrapper, so that a raw pointer would skip what it does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return 2 * super().__torch_function__(func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def test_torch_function_subclass_weight_runs_timms_forward():
    _, fused = stock_and_fused()
    layer = fused.blocks[1].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Counting))
    assert type(layer.weight) is _Counting
    assert counted(fused, images())[1] == 1


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_sparse_weights_run_timms_forward(inference, dtype):
    """As pruning leaves them."""
    stock, fused = stock_and_fused()
    x = images().to(dtype)
    for model in (stock.to(dtype), fused.to(dtype)):
        layer = model.blocks[1].mlp.fc1
        weight = layer.weight.detach().where(torch.rand_like(layer.weight, dtype=torch.float32) > 0.5, 0)
        layer.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)
    fused.blocks[1].mlp.fc1.weight = stock.blocks[1].mlp.fc1.weight
    vitkernels.fuse(fused, inference=inference)
    assert "mlp.fc1 has a parameter that is a tensor subclass, sparse or no tensor" in reasons(fused)
    if dtype == torch.float32:  # PyTorch multiplies no others on a CPU
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["images", "tokens", "mask", "inference", "naflexvit", "pooling"])
def test_a_tensor_subclass_given_to_a_model_acts_as_in_timm(kind):
    arguments = {"class_token": False, "global_pool": "map"} if kind == "pooling" else {}
    if kind == "naflexvit":
        stock, fused = stock_and_fused("naflexvit_base_patch16_gap", img_size=None)
    else:
        stock, fused = stock_and_fused(**arguments)
    vitkernels.fuse(fused, inference=kind == "inference")

    pixels = images()

    def call(model: nn.Module, cls: type[Tensor]) -> Tensor:
        if kind in ("images", "naflexvit"):
            return model(pixels.as_subclass(cls))
        tokens = torch.linspace(-1, 1, 2 * 17 * SMALL["embed_dim"]).view(2, 17, -1)
        if kind == "mask":
            return model.blocks[0](tokens, attn_mask=torch.eye(17).as_subclass(cls))
        module = {"inference": model.blocks, "tokens": model.blocks[0], "pooling": model.attn_pool}[kind]
        return module(tokens.as_subclass(cls))

    with torch.no_grad():
        expected = call(stock, _Acting)
        assert not torch.equal(expected.as_subclass(Tensor), call(stock, Tensor))
        with vitkernels.backend("fused"):
            got = call(fused, _Acting)
        assert type(got) is type(expected)
        assert_same(got.as_subclass(Tensor), expected.as_subclass(Tensor))


class _Acting(Tensor):
    """A subclass that changes what functions of PyTorch do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        changed = (F.gelu, F.conv2d, F.linear, F.scaled_dot_product_attention, torch.Tensor.add, torch.Tensor.__add__)
        return 1.5 * result if func in changed else result


def test_fused_attn_false_runs_timms_attention():
    def modify(model):
        model.blocks[1].attn.fused_attn = False
        # Only the unfused path of timm calls this module.
        model.blocks[1].attn.attn_drop = nn.Threshold(0.05, 0.0)

    assert_modified_alike(modify)


def test_fused_attn_false_alone_is_enough():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        model.blocks[1].attn.fused_attn = False
    x = images()
    out, ran = counted(fused, x)
    assert torch.equal(out, stock(x))
    assert ran == 1


def test_fast_norm_is_not_fused():
    stock = build()
    stock.blocks[1].norm1._fast_norm = True
    fused = vitkernels.fuse(stock)
    assert counted(fused, images())[1] == 1
    assert "fast norm" in reasons(fused)[0]


def test_fast_norm_set_after_fuse_runs_timms_forward():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        model.blocks[1].norm2._fast_norm = True
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        out, ran = counted(fused, x)
        assert torch.equal(out, stock(x))
    assert ran == 1


@timm_since("1.0.28", "gated attention")
def test_gated_attention_is_not_fused():
    def modify(model):
        model.blocks[1].attn.gate = nn.Linear(64, 64)
        nn.init.constant_(model.blocks[1].attn.gate.weight, 0.01)
        nn.init.zeros_(model.blocks[1].attn.gate.bias)

    assert_modified_alike(modify)


# Weights that are no parameters: plain tensors, as DataParallel's replicas, FSDP 1 and hypernetworks set them.


def plain_tensors(module: nn.Module) -> None:
    for layer in module.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                delattr(layer, name)
                setattr(layer, name, parameter.detach() * 1.5)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.proj", "ls1", "mlp.fc1", "mlp.fc2", "patch_embed"])
def test_weights_that_are_plain_tensors_take_effect_and_the_block_stays_fused(name, inference):
    stock, fused = stock_and_fused(init_values=0.1)
    if inference:
        vitkernels.fuse(fused, inference=True)
    for model in (stock, fused):
        plain_tensors(model.patch_embed if name == "patch_embed" else model.blocks[1].get_submodule(name))
    x = images()
    with torch.no_grad():
        expected = stock(x)
        got, ran = counted(fused, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert ran == 2


def test_weights_with_a_gradient_of_their_own_get_it_through_the_fused_block():
    """As a hypernetwork makes them: the weight is a function of something that trains."""
    stock, fused = stock_and_fused()
    knobs = []
    for model in (stock, fused):
        layer, knob = model.blocks[1].mlp.fc1, torch.tensor(2.0, requires_grad=True)
        weight = layer.weight.detach()
        del layer.weight
        layer.weight = weight * knob
        model(images().fill_(0.5)).sum().backward()
        knobs.append(knob)
    assert knobs[0].grad != 0
    torch.testing.assert_close(knobs[1].grad, knobs[0].grad, rtol=1e-5, atol=1e-6)


def test_a_tensor_subclass_as_a_plain_attribute_runs_timms_forward():
    _, fused = stock_and_fused()
    layer = fused.blocks[1].mlp.fc1
    weight = layer.weight.detach().as_subclass(_Counting)
    del layer.weight
    layer.weight = weight
    assert counted(fused, images())[1] == 1
    assert "tensor subclass" in reasons(fused)[0]


REPLICATED = {
    "plain": ({}, {}),
    "layer scale, q and k norms": ({"init_values": 0.1, "qk_norm": True}, {}),
    "dynamic size": ({"dynamic_img_size": True, "reg_tokens": 2}, {}),
    "attention pooling": ({"class_token": False, "global_pool": "map"}, {}),
    "recompute": ({}, {"recompute": "mlp"}),
    "inference": ({"init_values": 0.1}, {"inference": True}),
    "uint8": ({}, {"input": "uint8"}),
    "NaFlex": ({"name": "naflexvit_base_patch16_gap", "img_size": None}, {}),
}


@pytest.mark.parametrize("kind", REPLICATED)
def test_replicas_of_data_parallel_give_stocks_numbers_and_leave_the_model_as_it_is(kind, monkeypatch):
    """By torch's own ``replicate``; what copies to devices is replaced, since a CPU has one."""
    arguments, options = REPLICATED[kind]
    stock = build(**arguments)
    fused = vitkernels.fuse(copy.deepcopy(stock), **options)
    monkeypatch.setattr(
        sys.modules[replicate.__module__],
        "_broadcast_coalesced_reshape",
        lambda ts, to, detach=False: [[t.clone() for t in ts] for _ in to],
    )
    before = [{**vars(module)} for module in fused.modules()]
    transient = [{*module._non_persistent_buffers_set} for module in fused.modules()]
    replicas = replicate(fused, ["cuda:0", "cuda:1"], detach=True)
    assert not list(replicas[1].parameters())
    x = images()
    with torch.no_grad():
        for pixels in [x, *([torch.randint(0, 256, x.shape, dtype=torch.uint8)] if kind == "uint8" else [])]:
            mean, std = (torch.tensor(stock.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
            expected = stock(pixels if pixels.is_floating_point() else (pixels / 255 - mean) / std)
            for replica in replicas:
                got, ran = counted(replica, pixels)
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
                assert ran == 2
    assert [{**vars(module)} for module in fused.modules()] == before
    assert [module._non_persistent_buffers_set for module in fused.modules()] == transient


class _Attention(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 1.5 * result if function in (F.scaled_dot_product_attention, F.interpolate) else result


@pytest.mark.parametrize(
    "arguments",
    [{}, {"class_token": False, "global_pool": "map"}, {"dynamic_img_size": True}],
    ids=["blocks", "pooling", "positions"],
)
def test_a_mode_that_changes_functions_of_torch_takes_effect(arguments):
    stock, fused = stock_and_fused(**arguments)
    x = images(2, (96, 64)) if "dynamic_img_size" in arguments else images()
    before = stock(x)
    with _Attention():
        expected, got = stock(x), fused(x)
    assert not torch.equal(expected, before)
    assert_same(got, expected)
    with torch.device("cpu"):  # a mode as well, of PyTorch's own
        assert counted(fused, x)[1] == 2


# Shapes that timm broadcasts, or refuses.


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_norm_of_heads_and_tokens_takes_effect(name):
    """17 tokens of 17 heads: the shapes alone would fit the fused forward's layout, tokens first."""

    def modify(model):
        norm = nn.LayerNorm((17, 4))
        nn.init.normal_(norm.weight)
        setattr(model.blocks[1].attn, name, norm)

    torch.manual_seed(0)
    state = torch.get_rng_state()

    def seeded(model):
        torch.set_rng_state(state)
        modify(model)

    assert_modified_alike(seeded, embed_dim=68, num_heads=17)


def test_a_layer_scale_in_place_of_another_dtype_takes_effect():
    def modify(model):
        for name in ("ls1", "ls2"):
            getattr(model.blocks[1], name).float().inplace = True

    stock, fused = stock_and_fused(init_values=0.1)
    for model in (stock, fused):
        modify(model.bfloat16())
    x = images().bfloat16()
    got, ran = counted(fused, x)
    assert got.dtype == torch.bfloat16
    assert ran == 1
    torch.testing.assert_close(got, stock(x), atol=0.05, rtol=0.05)


def test_a_layer_scale_of_integers_takes_effect():
    def modify(model):
        model.blocks[1].ls1.gamma = nn.Parameter(torch.full((64,), 2), requires_grad=False)

    assert_modified_alike(modify, init_values=0.1)


def test_a_layer_norm_over_two_dimensions_runs_timms_forward():
    def modify(model):
        model.blocks[1].norm1 = nn.LayerNorm((17, 64))

    assert_modified_alike(modify)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 64), (17, 1)])
def test_a_layer_scale_that_broadcasts_takes_effect(shape):
    def modify(model):
        model.blocks[1].ls2.gamma = nn.Parameter(torch.full(shape, 0.7))

    assert_modified_alike(modify, init_values=0.1)


def test_a_width_that_the_norm_does_not_have_is_refused_as_in_timm():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        model.blocks[1].norm2.normalized_shape = (32,)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model(images())


def test_heads_of_another_number_set_by_hand_take_effect():
    def modify(model):
        model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim = 4, 16

    assert_modified_alike(modify, blocks=2)


def test_a_number_in_the_place_of_layer_scale_takes_effect():
    def modify(model):
        del model.blocks[1].ls1.gamma
        model.blocks[1].ls1.gamma = 0.7

    assert_modified_alike(modify, init_values=0.1)


def test_an_attention_width_set_by_hand_is_refused_as_in_timm():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        model.blocks[1].attn.attn_dim = 32
        with pytest.raises(RuntimeError, match="invalid for input"):
            model(images())
