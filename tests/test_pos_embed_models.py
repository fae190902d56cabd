"""Models that resample positions do it with our operator: dynamic image sizes, set_input_size, checkpoints, NaFlex batches."""

import copy

import pytest
import timm
import torch
from test_timm_contract import assert_same, build, images, outputs_and_gradients, perturbed, stock_and_fused
from test_timm_contract_models import naflex_batch
from timm.models import VisionTransformer
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.vision_transformer import checkpoint_filter_fn

import vitkernels as vk
import vitkernels.models.naflexvit
import vitkernels.models.vision_transformer
import vitkernels.ops._leaves
from vitkernels.models import FusedNaFlexEmbeds

VARIANTS = {
    "class token": {},
    "registers, positions for patches alone": {"reg_tokens": 4, "no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


@pytest.fixture
def resampled(monkeypatch):
    """The (new_size, sizes) that models gave to the operators."""
    calls = []

    def spy(module, name):
        original = getattr(module, name)

        def counting(posemb, size, *args, **kwargs):
            calls.append(size)
            return original(posemb, size, *args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    spy(vitkernels.ops._leaves, "resample_pos_embed_operator")
    spy(vitkernels.models.vision_transformer, "resample_pos_embed")
    spy(vitkernels.models.naflexvit, "resample_pos_embed_many")
    return calls


def assert_close(got, expected, atol=2e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol * scale, msg=lambda text, name=name: f"{name}: {text}")


# VisionTransformer.


@pytest.mark.parametrize("size", [(96, 96), (48, 80), (32, 128)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dynamic_sizes_give_timms_outputs_and_gradients(variant, size, resampled):
    stock, fused = stock_and_fused(dynamic_img_size=True, **VARIANTS[variant])
    x = images(2, size)
    assert_close(outputs_and_gradients(fused, x), outputs_and_gradients(stock, x))
    assert resampled == [(size[0] // 16, size[1] // 16)]


@pytest.mark.slow
def test_compiled_dynamic_sizes_have_gradients_too():
    """timm's do not: torch 2.15 has no meta function of the antialiased backward for symbolic sizes."""
    stock, fused = stock_and_fused(dynamic_img_size=True)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (64, (96, 64), (80, 112)):
        x = images(2, size)
        got = {name.removeprefix("_orig_mod."): t for name, t in outputs_and_gradients(compiled, x).items()}
        assert_close(got, outputs_and_gradients(stock, x), atol=1e-4)
    torch._dynamo.reset()


def test_positions_are_not_cached():
    stock, fused = stock_and_fused(dynamic_img_size=True)
    x = images(2, 96)
    fused(x)
    for model in (stock, fused):
        model.pos_embed.data.mul_(3)
    torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["_pos_embed", "set_input_size"])
def test_a_method_patched_in_timms_class_takes_effect(name, monkeypatch, resampled):
    _, fused = stock_and_fused(dynamic_img_size=True)
    monkeypatch.setattr(VisionTransformer, name, lambda self, *args, **kwargs: f"patched {name}")
    assert getattr(fused, name)(*((torch.zeros(1, 4, 4, 64),) if name == "_pos_embed" else ())) == f"patched {name}"
    assert resampled == []


def test_the_class_of_the_model_comes_and_goes_with_fuse():
    stock, fused = stock_and_fused()
    assert isinstance(fused, VisionTransformer)
    assert type(fused) is not VisionTransformer
    assert type(vk.unfuse(fused)) is VisionTransformer
    ours = vk.unfuse(vk.VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2))
    assert type(ours) is vk.VisionTransformer
    with_class_of_its_own = type("Mine", (VisionTransformer,), {})(img_size=32, embed_dim=64, depth=1, num_heads=2)
    assert type(vk.fuse(with_class_of_its_own)).__name__ == "Mine"
    assert type(stock) is VisionTransformer


@pytest.mark.parametrize("arguments", [{"img_size": (96, 64)}, {"img_size": 128}, {"img_size": 64, "patch_size": 8}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_set_input_size_gives_timms_model(variant, arguments, resampled):
    stock, fused = stock_and_fused(**VARIANTS[variant])
    for model in (stock, fused):
        model.pos_embed.requires_grad_(False)
        model.set_input_size(**arguments)
    assert len(resampled) == 1
    assert not fused.pos_embed.requires_grad
    assert list(fused.state_dict()) == list(stock.state_dict())
    stock.pos_embed.requires_grad_(False)  # timm < 1.0.29 forgets
    x = images(2, stock.patch_embed.img_size)
    assert_close(outputs_and_gradients(fused, x), outputs_and_gradients(stock, x))
    fused.set_input_size(**arguments)  # nothing changes now
    assert len(resampled) == 1


def test_an_error_in_set_input_size_keeps_the_positions():
    _, fused = stock_and_fused()
    before = fused.pos_embed
    with pytest.raises((AssertionError, TypeError, ValueError)):
        fused.set_input_size(img_size="large")
    assert fused.pos_embed is before


# A checkpoint of another resolution.

WIDE = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.mark.parametrize("size", [384, (160, 320)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_trained_at_224_runs_at_another_size_as_in_timm(variant, size, resampled):
    trained = perturbed(VisionTransformer(img_size=224, **WIDE, **VARIANTS[variant]))
    stock = VisionTransformer(img_size=size, **WIDE, **VARIANTS[variant]).eval()
    stock.load_state_dict(checkpoint_filter_fn(trained.state_dict(), stock, interpolation="bicubic", antialias=True))
    ours = vk.VisionTransformer(img_size=size, **WIDE, **VARIANTS[variant]).eval()
    state = trained.state_dict()
    assert str(ours.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert len(resampled) == 1
    assert state["pos_embed"].shape == trained.pos_embed.shape
    torch.testing.assert_close(ours.pos_embed, stock.pos_embed, rtol=0, atol=2e-6)
    x = images(2, size)
    assert_close(outputs_and_gradients(ours, x), outputs_and_gradients(stock, x))
    # The other way there: load at 224, then change the size.
    fused = vk.fuse(copy.deepcopy(trained).eval())
    fused.set_input_size(img_size=size)
    assert_close(outputs_and_gradients(fused, x), outputs_and_gradients(stock, x))


def test_a_model_inside_another_loads_too():
    trained = torch.nn.ModuleDict({"vit": VisionTransformer(img_size=224, **WIDE)})
    ours = torch.nn.ModuleDict({"vit": vk.VisionTransformer(img_size=96, **WIDE)})
    ours.load_state_dict(trained.state_dict())
    expected = timm.layers.resample_abs_pos_embed(trained["vit"].pos_embed, (6, 6))
    torch.testing.assert_close(ours["vit"].pos_embed, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "shape",
    [(1, 1 + 12, 64), (1, 1 + 36, 32), (2, 1 + 36, 64), (37, 64), (1, 1, 64)],
    ids=["2 x 6", "width", "2", "2-d", "none"],
)
def test_positions_that_are_no_square_grid_of_this_width_are_pytorchs_error(shape):
    ours = vk.VisionTransformer(img_size=64, **WIDE)
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        ours.load_state_dict(ours.state_dict() | {"pos_embed": torch.zeros(shape)})


def test_a_fused_timm_model_keeps_pytorchs_error():
    trained, (_, fused) = build(img_size=96), stock_and_fused()
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        fused.load_state_dict(trained.state_dict())


def test_vit_pytorch_weights_load_at_another_size():
    from test_vit_pytorch import load_vit_pytorch, vit_pytorch_weights

    weights = vit_pytorch_weights()
    small, large = (load_vit_pytorch(weights, num_heads=2, **arguments) for arguments in ({}, {"img_size": 64}))
    assert large.patch_embed.img_size == (64, 64)
    expected = timm.layers.resample_abs_pos_embed(small.pos_embed, large.patch_embed.grid_size)
    torch.testing.assert_close(large.pos_embed, expected, rtol=0, atol=2e-6)


# NaFlexVit.

NAFLEX = {
    "plain": {},
    "aspect preserving": {"pos_embed_ar_preserving": True},
    "bilinear": {"pos_embed_interp_mode": "bilinear"},
    "class token and registers": {"class_token": True, "reg_tokens": 2, "global_pool": "token"},
}


def mixed_batch(sizes, tokens=None, patch=16):
    """A NaFlex batch of images of these grids, padded to ``tokens``."""
    tokens = tokens or max(h * w for h, w in sizes)
    coordinates, valid = torch.zeros(len(sizes), tokens, 2, dtype=torch.long), torch.zeros(len(sizes), tokens, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).view(-1, 2)
        coordinates[i, : h * w], valid[i, : h * w] = grid, True
    return {"patches": torch.randn(len(sizes), tokens, 3 * patch * patch), "patch_coord": coordinates, "patch_valid": valid}


def naflex(**arguments):
    return stock_and_fused("naflexvit_base_patch16_gap", img_size=None, pos_embed_grid_size=(7, 7), **arguments)


SIZES = {"mixed": [(3, 5), (7, 7), (4, 4), (3, 5), (10, 2), (1, 1)], "equal": [(4, 6)] * 3, "its own": [(7, 7)] * 2}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", NAFLEX)
def test_naflex_batches_are_timms_loop_in_one_call(case, sizes, resampled):
    stock, fused = naflex(**NAFLEX[case])
    batch = mixed_batch(SIZES[sizes])
    embed = [model.embeds(batch["patches"], batch["patch_coord"], batch["patch_valid"])[0] for model in (stock, fused)]
    assert len(resampled) == 1
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(embed[1], embed[0])
    scale = max(1.0, stock.embeds.pos_embed.abs().max().item())
    torch.testing.assert_close(embed[1], embed[0], rtol=0, atol=2e-6 * scale)
    gradients = [
        torch.autograd.grad(e.square().sum(), m.embeds.pos_embed)[0] for e, m in zip(embed, (stock, fused), strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
    got, expected = (model(batch) for model in (fused, stock))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_naflex_positions_in_reduced_precision(dtype):
    stock, fused = (model.to(dtype) for model in naflex())
    batch = mixed_batch(SIZES["mixed"])
    batch["patches"] = batch["patches"].to(dtype)
    got, expected = (model.embeds(batch["patches"], batch["patch_coord"], batch["patch_valid"])[0] for model in (fused, stock))
    assert got.dtype == expected.dtype == dtype
    step = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=step)


@pytest.mark.parametrize(("dtype", "cast"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("kind", ["batch", "image"])
def test_naflex_positions_in_another_dtype_than_the_stream_are_rounded_once(kind, dtype, cast):
    """As in timm: from float32, whatever the parameters are, to what autocast makes of the patches. These are zero here."""
    embeds = []
    for model in naflex(reg_tokens=0):
        model.to(dtype).embeds.proj.bias.data.zero_()
        batch, image = mixed_batch(SIZES["mixed"]), torch.zeros(1, 3, 64, 96)
        inputs = (batch["patches"].zero_(), batch["patch_coord"], batch["patch_valid"]) if kind == "batch" else (image,)
        with torch.autocast("cpu", cast), torch.no_grad():
            embeds.append(model.embeds(*inputs)[0])
    expected, got = embeds
    assert got.dtype == expected.dtype == cast
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [(112, 112), (64, 96)], ids=str)
@pytest.mark.parametrize("case", NAFLEX)
def test_naflexvit_of_whole_images(case, size, resampled):
    stock, fused = naflex(**NAFLEX[case])
    x = images(2, size)
    assert_close(outputs_and_gradients(fused, x), outputs_and_gradients(stock, x))
    assert [tuple(grid) for grids in resampled for grid in grids] == [(size[0] // 16, size[1] // 16)]


def test_a_batch_longer_than_its_grids_and_one_that_is_cut():
    stock, fused = naflex()
    for tokens in (60, 12):
        batch = mixed_batch([(3, 5), (4, 4)], max(tokens, 16))
        batch = {name: t[:, :tokens] for name, t in batch.items()}
        got, expected = (model.embeds(batch["patches"], batch["patch_coord"], None)[0] for model in (fused, stock))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("arguments", [{"pos_embed": "factorized"}, {"pos_embed": "none"}], ids=str)
def test_other_kinds_of_positions_stay_timms(arguments, resampled):
    stock, fused = naflex(**arguments)
    batch = naflex_batch()
    assert_same(fused(batch), stock(batch))
    assert resampled == []
    (report,) = (m for m in vk.explain(fused).modules if m.name == "embeds")
    assert not report.fused
    assert "not learned" in report.reasons[0]


def test_explain_says_that_grid_sampled_batches_stay_timms_while_whole_images_are_ours(resampled):
    stock, fused = naflex(pos_embed_use_grid_sample=True)
    batch, x = mixed_batch(SIZES["mixed"]), images(2, (64, 96))
    assert_same(fused(batch), stock(batch))
    assert resampled == []
    torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=2e-5)
    assert len(resampled) == 1
    assert fused.embeds.why_not_merged() == []
    (report,) = (m for m in vk.explain(fused).modules if m.name == "embeds")
    assert not report.fused
    assert "grid_sample: timm samples the positions of mixed batches" in report.state
    assert FusedNaFlexEmbeds.why_not(stock.embeds) == list(report.reasons)


def test_naflex_embeddings_are_swapped_and_explained():
    _, fused = naflex()
    assert type(fused.embeds) is FusedNaFlexEmbeds
    assert {m.name: m.fused for m in vk.explain(fused).modules}["embeds"]
    assert type(vk.unfuse(fused).embeds) is NaFlexEmbeds


def test_a_naflex_method_patched_in_timms_class_takes_effect(monkeypatch, resampled):
    stock, fused = naflex()
    original = NaFlexEmbeds._apply_learned_naflex_pos_embed

    def patched(self, x, patch_coord):
        original(self, x, patch_coord)
        x.mul_(1.5)

    monkeypatch.setattr(NaFlexEmbeds, "_apply_learned_naflex_pos_embed", patched)
    batch = mixed_batch(SIZES["mixed"])
    assert_same(fused(batch), stock(batch))
    assert resampled == []
