"""A fused timm model is still that model, to everything that stores, copies, reloads, averages or converts it.

What every test_timm_contract_*.py shares stands here as well: small models, exact comparison, and the probe that tells a fused
forward from timm's.
"""

import contextlib
import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from helpers import timm_since
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import vitkernels
import vitkernels.models.block

# Two heads of 32 and 4 x 4 patches: the contract is about Python, not about sizes, and such a model is built in 5 ms.
SMALL = {"depth": 2, "img_size": 64, "embed_dim": 64, "num_heads": 2, "num_classes": 10}


def build(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    """A small timm model in evaluation mode; an argument of None is left to timm."""
    arguments = {key: value for key, value in (SMALL | kwargs).items() if value is not None}
    return perturbed(timm.create_model(name, **arguments).eval())


def perturbed(model: nn.Module) -> nn.Module:
    """LayerScale starts at 1e-5, the class token at 1e-6 and biases at 0: a forward that forgot them would pass."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def stock_and_fused(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The same model twice: timm's, and fused."""
    stock = build(name, **kwargs)
    return stock, vitkernels.fuse(copy.deepcopy(stock))


def images(batch: int = 2, size: int | tuple[int, int] = 64) -> Tensor:
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))


def assert_same(got: Any, expected: Any, where: str = "output") -> None:
    """Bitwise equal, or within 1e-6 of the tensor's largest element; lists, tuples and dictionaries element by element.

    Below 1e-7 all is equal: the gradient of a bias of the keys is zero but for rounding, in timm as here.
    """
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), where
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_same(g, e, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        scale = expected.detach().abs().max().item() if expected.numel() else 0.0
        tolerance = 1e-6 * max(scale, 0.1)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance, msg=lambda text: f"{where}: {text}")
    else:
        assert got == expected, where


def outputs_and_gradients(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Output, gradient of the image and of each parameter, for one fixed cotangent."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(x, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    # Cloned, because model.double() converts the gradients that are there in place.
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "gradient of the image": x.grad} | gradients


class Calls:
    """Counters that Dynamo can trace."""

    mlp = 0
    linear = 0


@contextlib.contextmanager
def fused_calls() -> Iterator["Calls"]:
    """Counts calls from fused blocks: ``.mlp``, one per fused forward (none while drop path drops), and ``.linear``."""
    module = vitkernels.models.block
    calls = Calls()
    mlp, linear, projected_mlp = module.residual_mlp, module.linear, module.projected_mlp

    def counting_mlp(*args, **kwargs):
        calls.mlp += 1
        return mlp(*args, **kwargs)

    def counting_linear(*args, **kwargs):
        calls.linear += 1
        return linear(*args, **kwargs)

    def counting_both(*args, **kwargs):
        calls.mlp += 1
        calls.linear += 1
        return projected_mlp(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "residual_mlp", counting_mlp)
        patch.setattr(module, "linear", counting_linear)
        patch.setattr(module, "projected_mlp", counting_both)
        yield calls


def counted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """``call``'s result, and how many blocks ran fused in it."""
    with fused_calls() as calls:
        result = call(*args, **kwargs)
    return result, calls.mlp


def assert_runs_fused(fused: nn.Module, stock: nn.Module, x: Tensor, blocks: int = 2) -> None:
    """``fused`` gives ``stock``'s output and gradients, through ``blocks`` fused blocks."""
    got, ran = counted(outputs_and_gradients, fused, x)
    assert_same(got, outputs_and_gradients(stock, x))
    assert ran == blocks


def assert_modified_alike(modify, x: Tensor | None = None, blocks: int = 1, effect: bool = True, **kwargs) -> None:
    """``modify(model)`` changes the fused model as it changes timm's, and leaves ``blocks`` of two blocks fused."""
    stock, fused = stock_and_fused(**kwargs)
    x = images() if x is None else x
    before = outputs_and_gradients(stock, x)
    modify(stock)
    modify(fused)
    expected = outputs_and_gradients(stock, x)
    if effect:
        assert any(name not in before or not torch.equal(expected[name], before[name]) for name in expected)
    got, ran = counted(outputs_and_gradients, fused, x)
    assert_same(got, expected)
    assert ran == blocks


def reasons(model: nn.Module, name: str = "blocks.1") -> tuple[str, ...]:
    (report,) = (m for m in vitkernels.explain(model).modules if m.name == name)
    return report.reasons


# The probe and the models.


def test_the_probe_tells_a_fused_forward_from_timms():
    stock, fused = stock_and_fused()
    x = images()
    assert counted(stock, x)[1] == 0
    assert counted(fused, x)[1] == 2
    assert counted(vitkernels.unfuse(fused), x)[1] == 0


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_timms(training):
    stock, fused = stock_and_fused(init_values=0.1)
    assert_runs_fused(fused.train(training), stock.train(training), images())


# What is stored in it.


def test_state_dict_keys_order_and_storage_are_unchanged():
    model = build()
    before = model.state_dict(keep_vars=True)
    after = vitkernels.fuse(model).state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_parameters_and_buffers_keep_their_identity():
    model = build()
    before = [*model.named_parameters(), *model.named_buffers()]
    vitkernels.fuse(model)
    after = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))


def test_optimizer_built_before_fuse_updates_the_fused_model():
    stock = build()
    model = copy.deepcopy(stock)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (stock, model)]
    vitkernels.fuse(model)
    x = images()
    before = model(x).detach()
    for _ in range(2):
        for m, optimizer in zip((stock, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    assert not torch.equal(model(x), before)
    # AdamW divides a gradient by its own size, which turns one last bit of a gradient near zero into a whole step.
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


def test_model_ema_follows_a_fused_model():
    stock, fused = stock_and_fused()
    averages = [ModelEmaV3(m, decay=0.5) for m in (stock, fused)]
    for model, average in zip((stock, fused), averages, strict=True):
        torch.manual_seed(1)
        perturbed(model)
        average.update(model)
    x = images()
    out, ran = counted(averages[1], x)
    assert_same(out, averages[0](x))
    assert ran == 2
    assert not torch.equal(out, fused(x))


def test_model_ema_built_before_fuse_follows_the_fused_model():
    model = build()
    average = ModelEmaV3(model, decay=0.0)
    perturbed(vitkernels.fuse(model))
    average.update(model)
    x = images()
    assert_same(average(x), model(x))


@timm_since("1.0.31", "_model_args")
def test_model_args_and_pretrained_cfg_stay_json_serialisable():
    stock, fused = stock_and_fused()
    for attribute in ("_model_args", "pretrained_cfg"):
        assert json.dumps(getattr(fused, attribute)) == json.dumps(getattr(stock, attribute))


# Copies and files.


def test_deepcopy_is_fused_and_independent():
    stock, fused = stock_and_fused()
    clone = copy.deepcopy(fused)
    perturbed(fused)
    assert_runs_fused(clone, stock, images())


def test_pickle_round_trip_is_fused():
    stock, fused = stock_and_fused()
    assert_runs_fused(pickle.loads(pickle.dumps(fused)), stock, images())


def test_torch_save_of_the_model_loads_fused():
    stock, fused = stock_and_fused()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert_runs_fused(torch.load(file, weights_only=False), stock, images())  # our own bytes, written two lines above


def test_safetensors_of_a_fused_model_load_into_timms(tmp_path):
    stock, fused = stock_and_fused()
    safetensors.torch.save_file(fused.state_dict(), tmp_path / "model.safetensors")
    fresh = build()
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    x = images()
    assert_same(fresh(x), stock(x))


@timm_since("1.0.31", "_model_args")
def test_timm_exports_a_fused_model_and_reads_it_back(tmp_path):
    stock, fused = stock_and_fused(embed_dim=None, num_heads=None)
    save_for_hf(fused, str(tmp_path))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images()
    assert_same(loaded(x), stock(x))


def test_load_state_dict_after_fuse_takes_effect():
    other = build()
    _, fused = stock_and_fused()
    fused.load_state_dict(other.state_dict(), strict=True)
    assert_runs_fused(fused, other, images())


def test_load_state_dict_with_assign_after_fuse_takes_effect():
    other = build()
    _, fused = stock_and_fused()
    fused.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=True)
    assert_runs_fused(fused, other, images())


# Conversions after fuse.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_to_another_dtype_after_fuse(dtype):
    stock, fused = stock_and_fused(init_values=0.1)
    assert_runs_fused(fused.to(dtype), stock.to(dtype), images().to(dtype))


def test_to_meta_after_fuse_gives_shapes():
    _, fused = stock_and_fused()
    out, ran = counted(fused.to("meta"), images().to("meta"))
    assert out.shape == (2, 10)
    assert out.is_meta
    assert ran == 2


def test_to_empty_and_load_state_dict_bring_a_meta_model_back():
    stock = build()
    with torch.device("meta"):
        fused = vitkernels.fuse(timm.create_model("vit_tiny_patch16_224", **SMALL).eval())
    fused.to_empty(device="cpu").load_state_dict(stock.state_dict())
    assert_runs_fused(fused, stock, images())


def test_set_input_size_after_fuse():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        model.set_input_size(img_size=96)
    assert_runs_fused(fused, stock, images(size=96))


def test_reset_classifier_after_fuse():
    _, fused = stock_and_fused()
    fused.reset_classifier(0)
    assert fused(images()).shape == (2, SMALL["embed_dim"])


# Undo.


def test_unfuse_restores_classes_and_results_exactly():
    stock, fused = stock_and_fused()
    x = images()
    expected = outputs_and_gradients(stock, x)
    vitkernels.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert all(type(b) is Block for b in fused.blocks)
    assert type(fused.patch_embed) is PatchEmbed
    assert [sorted(vars(m)) for m in fused.modules()] == [sorted(vars(m)) for m in stock.modules()]
    got = outputs_and_gradients(fused, x)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# Which classes: exactly timm's at fuse time, any subclass of ours at call time.


class _UsersBlock(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask=attn_mask, is_causal=is_causal)


class _UsersModel(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return -super().forward_head(x, pre_logits)


def test_a_users_subclass_of_block_is_left_alone_and_explained():
    stock = perturbed(VisionTransformer(patch_size=16, **SMALL).eval())
    stock.blocks[1].__class__ = _UsersBlock
    fused = vitkernels.fuse(copy.deepcopy(stock))
    assert type(fused.blocks[1]) is _UsersBlock
    assert_runs_fused(fused, stock, images(), blocks=1)
    (report,) = (m for m in vitkernels.explain(fused).modules if m.name == "blocks.1")
    assert not report.fused
    assert "_UsersBlock" in report.reasons[0]


def test_a_users_subclass_of_the_model_keeps_its_methods():
    stock = perturbed(_UsersModel(patch_size=16, **SMALL).eval())
    fused = vitkernels.fuse(copy.deepcopy(stock))
    assert isinstance(fused, _UsersModel)
    assert_runs_fused(fused, stock, images())


def test_a_dynamic_subclass_of_a_fused_block_runs_fused_and_is_reported_so():
    """FSDP2 swaps ``__class__`` for a class of its own that inherits from the module's."""
    stock, fused = stock_and_fused()
    for block in fused.blocks:
        block.__class__ = type("FSDP" + type(block).__name__, (type(block),), {})
    assert_runs_fused(fused, stock, images())
    assert all(m.fused for m in vitkernels.explain(fused).modules)


def test_blocks_inside_another_model_are_fused():
    stock = nn.Sequential(build(), nn.Linear(10, 3))
    fused = vitkernels.fuse(copy.deepcopy(stock))
    assert_runs_fused(fused, stock, images())
