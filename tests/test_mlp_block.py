"""Whole models on the linear and MLP kernels, beside timm; fuse(recompute="mlp")."""

import contextlib
import copy
import importlib
import itertools
import pickle

import pytest
import torch
from helpers import DTYPES
from test_fuse import SMALL, small
from test_linear import VARIANTS
from torch import nn

import vitkernels as vk
from vitkernels import _select
from vitkernels.models import FusedBlock

# Kernels of other stems that do not exist yet fall back under "auto", so these tests need no GPU and run on none.
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch):
    for stem in ("layer_norm", "attention", "linear", "mlp"):
        monkeypatch.setattr(importlib.import_module(f"vitkernels.ops.{stem}"), "MIN_BYTES", 0)


@contextlib.contextmanager
def on(variant):
    plan, arch = VARIANTS[variant]
    with _select.planning(plan), _select.targeting(arch), vk.backend("auto"):
        yield


def results(model, x, autocast=False):
    """Output and gradients, from one seed, so that drop path draws the same."""
    model.zero_grad()
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return {"output": out.detach(), "image": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_norms_within_budget(got, eager, oracle):
    """DESIGN's budget in relative L2. The largest single element of a whole model's gradients is a matter of luck."""
    for name, value in eager.items():
        assert got[name].dtype == value.dtype, name
        error, allowed = ((t.double() - oracle[name]).norm() for t in (got[name], value))
        assert error <= 2 * allowed + torch.finfo(value.dtype).eps * oracle[name].norm(), name


def judged(variant, model, dtype):
    images = torch.randn(6, 3, 32, 32, dtype=dtype)
    model = model.to(dtype)
    oracle = results(copy.deepcopy(model).double(), images.double())
    eager = results(model, images)
    state = torch.get_rng_state()
    with on(variant):
        got = results(vk.fuse(copy.deepcopy(model)), images)
    assert torch.equal(torch.get_rng_state(), state), "another random stream"
    assert_norms_within_budget(got, eager, oracle)
    assert any(not torch.equal(got[name], eager[name]) for name in eager), "no kernel ran"


MODELS = {
    "plain": {},
    "layer scale": {"init_values": 0.1},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "tanh": {"act_layer": "gelu_tanh"},
}


def cases():
    """By default the plain model in each dtype, and every model in bfloat16; the rest is slow. float16 is as bfloat16."""
    for model, dtype, variant in itertools.product(MODELS, DTYPES, VARIANTS):
        if dtype != torch.float16 or variant == "pointer":
            rest = model != "plain" and dtype != torch.bfloat16
            yield pytest.param(
                MODELS[model], dtype, variant, id=f"{model}-{dtype}-{variant}", marks=pytest.mark.slow if rest else ()
            )


@pytest.mark.parametrize(("arguments", "dtype", "variant"), list(cases()))
def test_a_model_is_within_budget_of_timms(arguments, dtype, variant):
    torch.manual_seed(1)
    judged(variant, small(**arguments), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1}], ids=["plain", "layer scale"])
def test_under_autocast_the_stream_stays_float32_and_within_budget(arguments, variant):
    torch.manual_seed(1)
    model, images = small(**arguments), torch.randn(6, 3, 32, 32)
    oracle, eager = results(copy.deepcopy(model).double(), images.double()), results(model, images, autocast=True)
    with on(variant):
        got = results(vk.fuse(copy.deepcopy(model)), images, autocast=True)
    assert_norms_within_budget(got, eager, oracle)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1}], ids=["plain", "layer scale"])
def test_drop_path_in_the_epilogue_drops_what_timm_drops(arguments, dtype, variant):
    torch.manual_seed(1)
    model = small(drop_path_rate=0.5, **arguments).train()
    judged(variant, model, dtype)
    images = torch.randn(6, 3, 32, 32, dtype=dtype)
    assert not torch.equal(results(model, images)["output"], results(model.eval(), images)["output"]), "it drops at all"


# fuse(recompute="mlp").


@pytest.mark.parametrize("variant", VARIANTS)
def test_recompute_is_a_switch_of_fuse_with_bitwise_the_same_gradients(variant):
    torch.manual_seed(1)
    model, images = small(init_values=0.1, drop_path_rate=0.5).train(), torch.randn(4, 3, 32, 32)
    with on(variant):
        saved = results(vk.fuse(model), images)
        recomputed = results(vk.fuse(model, recompute="mlp"), images)
    assert all(block._vk_recompute_mlp for block in model.blocks)
    for name, value in saved.items():
        assert torch.equal(value, recomputed[name]), name


def test_recompute_on_a_cpu_gives_timms_gradients_and_saves_less():
    model, images = small(), torch.randn(4, 3, 32, 32)

    def run(m):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return results(m, images), sum(sizes.values())

    (stock, before), (got, after) = run(model), run(vk.fuse(copy.deepcopy(model), recompute="mlp"))
    assert after < 0.8 * before
    for name, value in stock.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_the_switch_is_copied_and_pickled_is_no_state_and_is_undone():
    model = small()
    keys = list(model.state_dict())
    vk.fuse(model, recompute="mlp")
    assert list(model.state_dict()) == keys
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(block._vk_recompute_mlp for block in clone.blocks)
    vk.fuse(model)
    assert not any(block._vk_recompute_mlp for block in model.blocks)
    vk.unfuse(vk.fuse(model, recompute="mlp"))
    assert not any("_vk_recompute_mlp" in m.__dict__ for m in model.modules())
    assert not any(hasattr(m, "_vk_recompute_mlp") for m in model.modules())


def test_an_unknown_part_to_recompute_is_refused_before_anything_changes():
    model = small()
    with pytest.raises(ValueError, match="recompute must be one of None, 'mlp', got 'attention'"):
        vk.fuse(model, recompute="attention")
    assert not any(isinstance(m, FusedBlock) for m in model.modules())


def test_the_model_here_has_what_the_tests_need():
    """Its width and hidden width are multiples of 16 bytes, so the descriptor kernel takes it."""
    assert SMALL["embed_dim"] % 8 == 0
    assert isinstance(small(init_values=0.1).blocks[0].ls1, nn.Module)
