"""What a user without a GPU runs: under ``auto`` the blocks of a fused model leave a call to timm's forward.

The rest of the suite takes that decision away, to test the fused forward on what the operators choose; here it is the real one.
"""

import copy
import pickle

import pytest
import torch
from helpers import elsewhere
from test_fuse import IMAGES, LEAVES_TO_PYTORCH, outputs_and_gradients, small
from test_timm_contract import images, stock_and_fused
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

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


# Programs that leave this process: the one that loads them need not have vitkernels.


def models_that_leave():
    """By name: timm's model, ours, and images of which the first is exported, at all sizes where there are two."""
    small_and_large = [images(2, (64, 96)), images(3, (128, 80))]
    static, dynamic = {}, {"dynamic_img_size": True}
    cases = {
        "static": (stock_and_fused(**static), [images()]),
        "dynamic": (stock_and_fused(**dynamic, reg_tokens=1), small_and_large),
        "own size": (stock_and_fused(**dynamic), [images()]),  # for any batch, but nothing is resampled
        "recompute": (stock_and_fused(**dynamic), small_and_large),
        "uint8": (stock_and_fused(**dynamic), small_and_large),
        "inference": (stock_and_fused(**dynamic, init_values=0.1), small_and_large),
        "siglip": (stock_and_fused("vit_base_patch16_siglip_224", **dynamic), small_and_large),
        "naflex": (stock_and_fused("naflexvit_base_patch16_gap", img_size=None, pos_embed_grid_size=(7, 7)), [images()]),
    }
    vk.fuse(cases["recompute"][0][1], recompute="mlp")
    vk.fuse(cases["uint8"][0][1], input="uint8")
    vk.fuse(cases["inference"][0][1], inference=True)
    stock, _ = stock_and_fused(**dynamic)
    ours = vk.VisionTransformer(dynamic_img_size=True, img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=10).eval()
    ours.load_state_dict(stock.state_dict())
    cases["ours"] = ((stock, ours), small_and_large)
    return cases


def exported(model, inputs, strict=False):
    sizes = {2: 16 * Dim("gh", min=2, max=16), 3: 16 * Dim("gw", min=2, max=16)} if len(inputs) > 1 else {}
    batch = {} if "NaFlex" in type(model).__name__ else {0: Dim("batch", min=1, max=64)}
    with torch.no_grad():
        return torch.export.export(model, (inputs[0],), dynamic_shapes=({**batch, **sizes},), strict=strict)


def operators_of_ours(program):
    return [node.target for node in program.graph.nodes if str(node.target).startswith("vitkernels")]


def test_exported_programs_load_and_run_where_vitkernels_is_not_installed(tmp_path):
    """ONNX is made of such a program too: its converters know PyTorch's operators and no others."""
    cases = models_that_leave()
    for name, ((_, fused), inputs) in cases.items():
        program = exported(fused, inputs)
        assert operators_of_ours(program) == []
        torch.export.save(program, tmp_path / f"{name}.pt2")
    found = elsewhere("torch.export", tmp_path, {name: inputs for name, (_, inputs) in cases.items()})
    for name, ((stock, _), inputs) in cases.items():
        for got, x in zip(found[name], inputs, strict=True):
            # For all sizes positions are resampled where nothing changes, too, by timm as by us: 1e-6 of them stays.
            torch.testing.assert_close(got, stock(x), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


RECORDED = {
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module(),
    "torch.export, strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("kind", ["plain", "inference", "own size", "uint8"])
def test_a_program_is_bound_to_no_dtype_and_to_no_device(kind, record):
    """A cast that changes nothing here would refuse the images of a program that is cast, or moved, later."""
    options = {"dynamic_img_size": True} if kind == "own size" else {"reg_tokens": 1, "init_values": 0.1}
    stock, fused = stock_and_fused(depth=1, **options)
    vk.fuse(fused, inference=kind == "inference", input="uint8" if kind == "uint8" else "float")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(stock.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    normalised = (pixels / 255 - mean) / std
    x = pixels if kind == "uint8" else normalised
    with torch.no_grad():
        program = record(fused, x)
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
            got = program.to(dtype)(x if kind == "uint8" else x.to(dtype))
            torch.testing.assert_close(got, stock.to(dtype)(normalised.to(dtype)), rtol=tolerance, atol=tolerance)
    if isinstance(program, torch.fx.GraphModule):
        assert not [node for node in program.graph.nodes if "device" in node.kwargs]


def test_a_program_exported_by_dynamo_holds_pytorchs_operators():
    (_, fused), inputs = models_that_leave()["dynamic"]
    assert operators_of_ours(exported(fused, inputs, strict=True)) == []


@pytest.mark.parametrize("case", ["dynamic", "siglip", "naflex", "ours"])
def test_a_graph_of_make_fx_holds_pytorchs_operators(case):
    (stock, fused), inputs = models_that_leave()[case]
    graph = make_fx(fused)(inputs[0])
    assert [node.target for node in graph.graph.nodes if "vitkernels" in str(node.target)] == []
    torch.testing.assert_close(graph(inputs[0]), stock(inputs[0]), rtol=1e-4, atol=1e-4)


def test_aotinductor_packages_run_where_vitkernels_is_not_installed(tmp_path):
    stock, fused = stock_and_fused(depth=1, dynamic_img_size=True)
    inputs = [images(2, (64, 96)), images(3, (128, 80))]
    torch._inductor.aoti_compile_and_package(exported(fused, inputs), package_path=str(tmp_path / "model.pt2"))
    for got, x in zip(elsewhere("AOTInductor", tmp_path, {"model": inputs})["model"], inputs, strict=True):
        torch.testing.assert_close(got, stock(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_traced_models_load_and_run_where_vitkernels_is_not_installed(tmp_path):
    stock, fused = stock_and_fused(dynamic_img_size=True)
    square = [images(2, (96, 96)), images(2, (64, 80))]
    torch.jit.save(torch.jit.trace(fused, square[0], check_trace=False), tmp_path / "model.pt2")
    table = torch.randn(1, 17, 8)
    resample = torch.jit.trace(lambda posemb: vk.ops.resample_pos_embed(posemb, (6, 5)), table)  # the size is no input
    torch.jit.save(resample, str(tmp_path / "resample.pt2"))
    found = elsewhere("torch.jit", tmp_path, {"model": square, "resample": [table]})
    for got, x in zip(found["model"], square, strict=True):
        torch.testing.assert_close(got, stock(x), rtol=0, atol=2e-5)
    torch.testing.assert_close(found["resample"][0], vk.reference.resample_pos_embed(table, (6, 5)), rtol=0, atol=2e-6)


@pytest.mark.skipif(vk._env.EXTENSION is None, reason="vitkernels._C is not built")
def test_what_stays_in_this_process_keeps_the_resampling_kernel():
    """As do torch.compile's graphs, and programs of a caller who asks for the kernel."""
    _, fused = stock_and_fused(dynamic_img_size=True)
    x, seen = images(2, 96), []

    def looking(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(fused, backend=looking)(x)
    assert "vitkernels.resample_pos_embed_fwd" in seen
    table = torch.nn.ParameterList([torch.randn(1, 17, 8)])

    class Resample(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self):
            return vk.ops.resample_pos_embed(self.table[0], (6, 5))

    with vk.backend("fused"), torch.no_grad():
        program = torch.export.export(Resample(), ())
    assert [str(op) for op in operators_of_ours(program)] == ["vitkernels.resample_pos_embed_fwd.default"]
