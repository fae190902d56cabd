"""What a user without a GPU runs: under ``auto`` the blocks of a fused model leave a call to timm's forward.

The rest of the suite takes that decision away, to test the fused forward on what the operators choose; here it is the real one.
"""

import copy
import pickle

import pytest
import torch
from test_fuse import IMAGES, LEAVES_TO_PYTORCH, outputs_and_gradients, small

import vitkernels as vk
from vitkernels.models import FusedBlock

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch, no_interpreter):
    monkeypatch.setattr("vitkernels.ops._availability.leaves_to_pytorch", LEAVES_TO_PYTORCH)


@pytest.fixture
def models():
    """A stock model and its fused copy; LayerScale, register tokens and DropPath included."""
    stock = small(init_values=0.1, reg_tokens=1, drop_path_rate=0.2)
    fused = vk.fuse(copy.deepcopy(stock))
    assert type(fused.blocks[0]) is FusedBlock
    return stock, fused


def bitwise(got, want):
    got, want = (x if isinstance(x, (list, tuple)) else [x] for x in (got, want))
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _infer(model):
    with torch.inference_mode():
        return model(IMAGES)


def _train(model):
    torch.manual_seed(1)
    return outputs_and_gradients(model.train(), IMAGES)


def _autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(IMAGES)


def _compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES)


def _exported(model):
    return torch.export.export(model, (IMAGES,)).module()(IMAGES)


def _intermediates(model):
    final, features = model.forward_intermediates(IMAGES)
    return [final, *features, *model.get_intermediate_layers(IMAGES, n=2)]


CALLS = {
    "inference": _infer,
    "training": _train,
    "autocast": _autocast,
    "float64": lambda model: model.double()(IMAGES.double()),
    "torch.compile": _compiled,
    "torch.export": _exported,
    "torch.jit.trace": lambda model: torch.jit.trace(model, IMAGES)(IMAGES),
    "deepcopy": lambda model: copy.deepcopy(model)(IMAGES),
    "pickle": lambda model: pickle.loads(pickle.dumps(model))(IMAGES),
    "intermediates": _intermediates,
    "forward_features": lambda model: model.forward_features(IMAGES),
    "vmap": lambda model: torch.vmap(model)(IMAGES[:, None]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("call", CALLS)
def test_a_fused_model_gives_timms_bits(models, call):
    stock, fused = models
    compiling = call in ("torch.compile", "torch.export", "torch.jit.trace")
    assert bitwise(CALLS[call](fused), stock(IMAGES) if compiling else CALLS[call](stock))


def test_a_fused_model_for_inference_gives_timms_bits(models):
    """The folded copies are not used here."""
    stock, fused = models
    vk.fuse(fused, inference=True)
    assert bitwise(_infer(fused), _infer(stock))
