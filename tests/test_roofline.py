"""``vitkernels roofline``: counts against closed formulas, what a launch declares, bad requests."""

import importlib
import json
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

import vitkernels
from vitkernels.cli import _ledger, main, roofline
from vitkernels.cli._chips import CHIPS
from vitkernels.cli._workloads import WORKLOADS
from vitkernels.kernels import _device, _recorder
from vitkernels.kernels import layer_norm as kernels

H200 = CHIPS["h200"]
SIZES = {w.name: w for w in WORKLOADS if w.name in ("S/16", "B/16", "L/16")}
# Units of one block, F = 4 D, in order. LN, qkv, attention, proj, add, LN, fc1, GELU, fc2, add:
EAGER = [1 + 1, 1 + 3, 3 + 1, 1 + 1, 2 + 1, 1 + 1, 1 + 4, 4 + 4, 4 + 1, 2 + 1]
assert sum(EAGER) == 38
# A float32 stream counts 2: LN, cast, qkv, attention, proj, add, LN, cast, fc1, GELU, fc2, add (weights' casts are not units).
AUTOCAST = [2 + 2, 2 + 1, 1 + 3, 3 + 1, 1 + 1, 1 + 2 + 2, 2 + 2, 2 + 1, 1 + 4, 4 + 4, 4 + 1, 1 + 2 + 2]
assert sum(AUTOCAST) == 52
# fc2 (dx, dW, db), GELU, fc1, LN, add, proj, attention (q k v o do -> dq dk dv), stack and clone of them, qkv, LN, add.
BACKWARD = [5, 5, 1, 12, 5, 5, 4, 3, 3, 2, 2, 1, 8, 6, 6, 4, 4, 3, 3, 3]


@pytest.fixture(autouse=True)
def _compiling(monkeypatch):
    """Dispatch on ``meta`` tensors as in a user's process; the launchers' kernels are recorded, never run.

    The models here are small, and ``auto`` would leave them to PyTorch.
    """
    monkeypatch.setattr(vitkernels._env, "INTERPRETING", False)
    monkeypatch.setattr(vitkernels._env, "ADDMM_COPIES", False)  # as in PyTorch 2.15
    set_min_bytes(monkeypatch, 0)


def set_min_bytes(monkeypatch, value):
    for stem in ("layer_norm", "attention", "linear", "mlp", "folded_linear"):
        monkeypatch.setattr(importlib.import_module(f"vitkernels.ops.{stem}"), "MIN_BYTES", value)


def model(name, dtype=torch.bfloat16):
    with torch.device("meta"):
        return timm.create_model(name, depth=2).to(dtype).eval()


def counted(workload, batch=4, fused=False, train=False, autocast=False):
    dtype = torch.float32 if autocast else torch.bfloat16
    vit = model(workload.timm_name, dtype)
    block = (vitkernels.fuse(vit) if fused else vit).blocks[0]
    x = torch.empty(batch, workload.tokens, workload.width, dtype=dtype, device="meta", requires_grad=train)
    return _ledger.count(block, (x,), {}, H200, train=train, autocast=autocast), 2 * x.numel()


def units(operators, unit):
    return [o.activation_bytes / unit for o in operators]


@pytest.mark.parametrize("size", SIZES)
def test_eager_forward_is_38_units_and_the_closed_flops(size):
    w = SIZES[size]
    count, unit = counted(w)
    statistics = 2 * 4 / (2 * w.width)  # mean and rstd of a LayerNorm, float32
    expected = [u + (statistics if u == 2 and i in (0, 5) else 0) for i, u in enumerate(EAGER)]
    assert units(count.forward, unit) == pytest.approx(expected)
    assert sum(units(count.forward, unit)) == pytest.approx(38 + 2 * statistics)
    rows = 4 * w.tokens
    flops = 2 * rows * (4 * w.width**2 + 2 * w.width * w.hidden) + 4 * rows * w.tokens * w.width
    assert sum(o.flops for o in count.forward) == flops
    weights = 2 * (12 * w.width**2 + 9 * w.width) + 2 * 4 * w.width
    assert sum(o.parameter_bytes for o in count.forward) == weights


@pytest.mark.parametrize("size", SIZES)
def test_eager_training_saves_16_units_and_moves_85_back(size):
    w = SIZES[size]
    count, unit = counted(w, train=True)
    statistics, lse = 2 * 4 / (2 * w.width), 4 * w.num_heads / (2 * w.width)
    assert count.saved_bytes / unit == pytest.approx(16 + 2 * statistics + lse)
    extra = {7: statistics, 18: statistics, 12: lse}
    assert units(count.backward, unit) == pytest.approx([u + extra.get(i, 0) for i, u in enumerate(BACKWARD)])
    rows = 4 * w.tokens
    products = 2 * 2 * rows * (4 * w.width**2 + 2 * w.width * w.hidden) + 10 * rows * w.tokens * w.width
    assert sum(o.flops for o in count.backward) == products  # attention computes its logits again


def test_autocast_is_52_units():
    w = SIZES["B/16"]
    count, unit = counted(w, autocast=True)
    moved = [u for u in units(count.forward, unit) if u > 0]
    assert sum(moved) == pytest.approx(52 + 2 * 8 / (2 * w.width))
    assert [round(u) for u in moved] == AUTOCAST


def test_the_gradients_of_cast_weights_are_not_activations():
    """At one image a gradient of a weight is larger than any activation; units must not see them, cast or not."""
    w = SIZES["S/16"]
    count, unit = counted(w, batch=1, train=True, autocast=True)
    weights = {(w.width * k, w.width) for k in (1, 3)} | {(w.hidden, w.width), (w.width, w.hidden)}
    gradients = [o for o in count.backward if o.shape in weights]
    assert {o.name for o in gradients} == {"mm", "_to_copy"}
    assert all(o.activation_bytes == 0 for o in gradients if o.name == "_to_copy")
    assert sum(units(count.backward, unit)) == pytest.approx(109, abs=0.2)


def test_fused_under_autocast_has_a_float32_stream_and_our_kernels():
    """PyTorch's LayerNorm gives float32 there, which the linear layer casts; before a linear layer ours rounds at once."""
    w = SIZES["B/16"]
    count, unit = counted(w, fused=True, autocast=True)
    assert not torch.is_autocast_enabled("cuda")  # as it was
    ours = [o for o in count.forward if o.name == "layer_norm_fwd"]
    assert [round(u) for u in units(ours, unit)] == [2 + 1] * 2
    assert sum(units(count.forward, unit)) == pytest.approx(52 - 2 * (1 + 2 + 1), abs=0.1)


def test_plans_that_operators_declare_are_counted_by_name(monkeypatch):
    """Two plans of the attention: what it chooses, and one that writes its output twice."""
    leaves = importlib.import_module("vitkernels.ops._leaves")
    plans, right = ("wasteful", "lean"), leaves.attention_qkv_operator

    def attention_qkv(qkv, **options):
        out = right(qkv, **options)
        return out if vitkernels._select.choose_plan(plans, lambda: "lean") == "lean" else out.clone()

    monkeypatch.setattr(importlib.import_module("vitkernels.ops.attention"), "PLANS", plans, raising=False)
    monkeypatch.setattr(leaves, "attention_qkv_operator", attention_qkv)
    monkeypatch.setattr(roofline, "BATCHES", (8,))
    vit = roofline._model("test_vit", 8, H200)
    assert {"wasteful", "lean"} <= set(vit["plans"])
    units = {name: plan["forward_units_per_block"] for name, plan in vit["plans"].items()}
    assert units["wasteful"] == pytest.approx(units["lean"] + 2)
    assert vit["selected_plan"] == "lean"
    assert vit["plans"]["lean"]["model"] == vit["fused"]["model"]


def test_the_fused_block_is_counted_by_launch():
    w, batch = SIZES["B/16"], 16
    count, unit = counted(w, batch, fused=True, train=True)
    ours = [o.name for o in (*count.forward, *count.backward) if o.ours]
    attention = [name for name in ours if name.startswith("attention")]
    assert attention[0] == "attention_fwd"
    assert len(attention) > 1
    assert all(name.startswith("attention_bwd") for name in attention[1:])
    forward = ["layer_norm_fwd", "layer_norm_fwd", "linear_epilogue"]
    linear_bwd = ["linear_bwd", "parameter_gradients"]
    normed = ["layer_norm_bwd", "parameter_gradients"]
    others = [name for name in ours if name not in attention]
    assert others == [*forward, "layer_norm_fwd", *linear_bwd * 2, *normed, *linear_bwd, "layer_norm_fwd", *linear_bwd, *normed]
    moved = [round(u) for u in units(count.forward, unit) if u > 0]
    assert moved == [2, 4, 4, 3, 2, 5, 8, 6]  # of plan cublas: no table says that a fused GEMM is faster
    backward = next(o for o in reversed(count.backward) if o.name == "layer_norm_bwd")
    programs = min(-(-batch * w.tokens // 2), 132 * 12 // 4)  # tiles of two rows
    partial_sums = 2 * programs * w.width * 4
    assert backward.written_bytes == unit + partial_sums
    assert next(o for o in reversed(count.backward) if o.name == "parameter_gradients").read_bytes == partial_sums


def test_an_extra_pass_changes_the_count(monkeypatch):
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, **kwargs: original(self, x * 2, **kwargs))
    count, unit = counted(SIZES["S/16"])
    assert sum(units(count.forward, unit)) == pytest.approx(40 + 2 * 8 / (2 * 384))
    assert count.forward[0].name == "mul"


def test_an_extra_launch_changes_the_count(monkeypatch):
    original = kernels.launch_layer_norm_fwd

    def twice(x, *rest):
        return original(original(x, *rest)[0].contiguous(), *rest)

    before, unit = counted(SIZES["S/16"], fused=True)
    monkeypatch.setattr(kernels, "launch_layer_norm_fwd", twice)
    after, _ = counted(SIZES["S/16"], fused=True)
    assert len(after.forward) == len(before.forward) + 2
    assert sum(units(after.forward, unit)) - sum(units(before.forward, unit)) == pytest.approx(2 * (2 + 8 / (2 * 384)))


def test_what_a_launcher_asks_of_pytorch_counts():
    """A gradient that is not contiguous is copied before the kernel reads it."""

    class Norm(nn.Module):
        def forward(self, x):
            return vitkernels.ops.layer_norm(x).transpose(0, 1).contiguous()

    x = torch.empty(2, 8, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    count = _ledger.count(Norm(), (x,), {}, H200, train=True)
    assert [o.name for o in count.forward] == ["layer_norm_fwd", "clone"]
    assert [o.name for o in count.backward] == ["clone", "layer_norm_bwd"]


def test_layer_norm_packs_a_stream_that_is_not_contiguous():
    """Without a class token timm's stream is channel-major, and CUDA's layer_norm copies it first; ours is packed at once."""
    name = "vit_base_patch16_siglip_256"
    found = []
    for vit in (model(name), vitkernels.fuse(model(name))):
        (args, kwargs), _ = roofline._block_arguments(vit, roofline._input(vit, 16), name)
        found.append(_ledger.count(vit.blocks[0], args, kwargs, H200).forward)
    unit = 16 * 256 * 768 * 2
    assert [sum(units(operators, unit)) for operators in found] == pytest.approx([38 + 4, 34], abs=0.1)
    assert [operator.name for operator in found[0]][:2] == ["contiguous", "native_layer_norm"]


class Rule(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, x):
        return self.rule(x)


@pytest.mark.parametrize(
    ("rule", "read", "written"),
    [
        (lambda x: x.view(8, 2).t()[1:], 0, 0),
        (lambda x: x * x, 64, 64),
        (lambda x: x + x[:, :1].expand(4, 4), 64 + 16, 64),
        (lambda x: torch.empty_like(x).copy_(x), 64, 64),
        (lambda x: x.clone().add_(1), 64 + 64, 64 + 64),
        (lambda x: x.sum(0), 64, 16),
    ],
    ids=["views are free", "one tensor counts once", "broadcast", "copy", "in place", "reduction"],
)
def test_the_rules_of_counting(rule, read, written):
    count = _ledger.count(Rule(rule), (torch.empty(4, 4, device="meta"),), {}, H200)
    assert sum(o.read_bytes for o in count.forward) == read
    assert sum(o.written_bytes for o in count.forward) == written


def test_the_flops_of_a_launch_are_those_that_its_file_declares(monkeypatch):
    monkeypatch.setattr(kernels, "FLOPS", {"_layer_norm_fwd_kernel": lambda num_rows, D, **_: 7 * num_rows * D}, raising=False)
    count, _ = counted(SIZES["S/16"], fused=True)
    ours = [o for o in count.forward if o.name == "layer_norm_fwd"]
    assert [o.flops for o in ours] == [7 * 4 * 197 * 384] * 2
    assert {o.kind for o in ours} == {"matrix products"}


def test_a_file_that_multiplies_matrices_must_declare_their_flops(monkeypatch, tmp_path):
    source = tmp_path / "layer_norm.py"
    source.write_text("tl.dot(a, b)")
    monkeypatch.setattr(kernels, "__file__", str(source))
    with pytest.raises(RuntimeError, match="layer_norm multiplies matrices and declares no FLOPS"), _recorder.recording(print):
        pass


def test_launchers_see_the_chip_that_is_counted_for():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            return vitkernels.ops.layer_norm(x)

    def launch(*arguments):
        device = torch.device("meta")
        seen.append((kernels.multiprocessors(device), _device.architecture(device)))
        return original(*arguments)

    original = kernels.launch_layer_norm_fwd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch_layer_norm_fwd", launch)
        for name in ("a100", "rtx5090"):
            _ledger.count(Look(), (torch.empty(2, 8, 64, device="meta"),), {}, CHIPS[name])
    assert seen == [(108, 80), (170, 120)]
    assert _device.architecture(torch.device("meta")) == 90


def test_a_kernel_that_declares_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "WRITES", {"_layer_norm_fwd_kernel": kernels.WRITES["_layer_norm_fwd_kernel"]})
    original = kernels._layer_norm_fwd_kernel
    with pytest.raises(RuntimeError, match="does not declare _layer_norm_bwd_kernel"), _recorder.recording(print):
        pass
    assert kernels._layer_norm_fwd_kernel is original


# The command.


def document(capsys, *arguments):
    assert main(["roofline", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_a_workload(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "BATCHES", (8,))
    found = document(capsys, "small", "--batch", "8")
    vit = found["models"]["vit_small_patch16_224"]
    assert vit["shape"] == {
        "tokens": 197, "width": 384, "depth": 12, "input_size": [3, 224, 224], "unit_bytes": 8 * 197 * 384 * 2
    }  # fmt: skip
    assert vit["eager"]["forward_units_per_block"] == pytest.approx(38, abs=0.1)
    assert vit["eager"]["saved_units_per_block"] == pytest.approx(16, abs=0.1)
    assert vit["autocast"]["forward_units_per_block"] == pytest.approx(52, abs=0.1)
    assert list(vit["plans"]) == [*roofline._plan_names(), "folded"]
    units = {name: plan["forward_units_per_block"] for name, plan in vit["plans"].items()}
    assert {name: round(count) for name, count in units.items()} == {"cublas": 34, "triton": 26, "folded": 22}
    assert vit["not_fused"] is None
    for path in (*(vit[name] for name in roofline.PATHS), *vit["plans"].values()):
        assert path.keys() == vit["eager"].keys()
    forward = vit["eager"]["model"]["forward"]
    assert forward["flops"] / 8 == pytest.approx(9.20e9, rel=2e-3)  # PERFORMANCE, section 1
    assert forward["units"] > 12 * vit["eager"]["forward_units_per_block"]
    assert vit["eager"]["model"]["saved_bytes"] > 12 * 16 * vit["shape"]["unit_bytes"]
    row = vit["eager"]["block"]["forward"][0]
    assert row["operator"] == "native_layer_norm"
    assert row["floor_us"] == pytest.approx((row["read_bytes"] + row["written_bytes"]) / 4.8e6)


def test_measured_rates_reproduce_the_additive_model(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "_plan_names", list)
    found = document(capsys, "base", "--tflops", "790", "--gbs", "4300", "--batch", "8")
    assert found["chip"]["source"] == "TFLOP/s measured, GB/s measured"
    rows = {row["batch"]: row for row in found["models"]["vit_base_patch16_224"]["predicted_images_per_s"]}
    assert list(rows) == [1, 8, 64, 256]
    assert rows[256]["eager"] == pytest.approx(13_500, rel=0.03)  # PERFORMANCE, section 1
    assert rows[256]["ideal"] == pytest.approx(22_500, rel=0.01)
    assert rows[1]["eager_bound"] == "host"


def test_a_model_that_cannot_be_fused_says_why(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "BATCHES", (1,))
    vit = document(capsys, "vit_base_patch16_dinov3", "--batch", "1")["models"]["vit_base_patch16_dinov3"]
    assert "cannot be fused" in vit["not_fused"]
    assert vit["plans"] == {}
    assert vit["selected_plan"] is None
    assert vit["fused"]["forward_units_per_block"] == vit["eager"]["forward_units_per_block"]


def test_a_kernel_of_the_extension_is_counted(capsys, monkeypatch):
    """NaFlexVit resamples its positions at every call, and calls its blocks one by one."""
    monkeypatch.setattr(roofline, "BATCHES", (1,))
    name, seen = "naflexvit_base_patch16_gap", []
    add = _ledger._Ledger.add

    def adding(self, name, flops, reads, writes, launched_by=""):
        seen.append((name, launched_by))
        add(self, name, flops, reads, writes, launched_by)

    monkeypatch.setattr(_ledger._Ledger, "add", adding)
    vit = document(capsys, name, "--batch", "1")["models"][name]
    assert vit["not_fused"] is None
    assert "folded" in vit["plans"]
    for way in ("fwd", "bwd"):
        assert (f"resample_pos_embed_{way}", f"resample_pos_embed_{way}") in seen


def test_without_a_name_every_workload_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "_model", lambda name, batch, chip: {"name": name})
    assert list(document(capsys)["models"]) == [w.timm_name for w in WORKLOADS]


def test_tables_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "BATCHES", (1, 256))
    pytest.importorskip("matplotlib")
    picture = tmp_path / "roofline.png"
    assert main(["roofline", "test_vit", "--chip", "a100", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "layer_norm_fwd (ours)" in out
    assert "312 TFLOP/s, 2039 GB/s (NVIDIA A100 datasheet" in out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_of_my_dreams"], "unknown model 'vit_of_my_dreams'"),
        (["resnet18"], "resnet18 has no transformer blocks to count"),
        (["swin_tiny_patch4_window7_224"], "do not take tokens"),
        (["small", "--chip", "h300"], "invalid choice: 'h300'"),
        (["small", "--tflops", "-1"], "'-1' is not a positive number"),
        (["small", "--gbs", "nan"], "'nan' is not a positive number"),
        (["small", "--plot", "roofline.txt"], "must end in .png"),
    ],
)
def test_a_bad_request_is_one_line(arguments, message, capsys):
    assert main(["roofline", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err


# Boost clock in GHz under tensor load (NVIDIA's whitepapers), dense bfloat16 FLOPs an SM and clock.
CLOCKS = {
    "h200": (1.83, 4096), "h100": (1.83, 4096), "a100": (1.41, 2048), "l40s": (2.52, 1024), "b200": (1.86, 8192),
    "rtx5090": (2.407, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_a_source_and_a_rate_that_its_clock_gives(name):
    chip, (clock, flops) = CHIPS[name], CLOCKS[name]
    assert re.match(r"NVIDIA .*\(20\d\d\)", chip.source)
    assert chip.tflops == pytest.approx(chip.multiprocessors * clock * flops / 1000, rel=0.015)
    rate, unit = re.search(r"([\d.]+) ([TG])B/s", chip.source).groups()
    assert float(rate) * {"T": 1000, "G": 1}[unit] == chip.gbs


def test_small_batches_are_predicted_at_eagers_speed_because_dispatch_leaves_them_to_pytorch(monkeypatch):
    set_min_bytes(monkeypatch, 8 * 2**20)
    monkeypatch.setattr(roofline, "BATCHES", (1, 256))
    monkeypatch.setattr(roofline, "_plan_names", list)
    vit = roofline._model("vit_base_patch16_224", 256, H200)
    first, last = vit["predicted_images_per_s"][0], vit["predicted_images_per_s"][-1]
    assert (first["batch"], last["batch"]) == (1, 256)
    assert first["fused"] == pytest.approx(first["eager"], rel=0.02)  # one launch more: the tokens are made contiguous
    assert sum(row["ours"] for row in vit["fused"]["block"]["forward"]) == 4  # two LayerNorms, attention, GELU
