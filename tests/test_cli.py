"""The command line: documents, numbers, pictures, and one clear line for everything that cannot be done."""

import io
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
import timm
import torch
from safetensors.torch import save_file

from vitkernels import _env
from vitkernels.cli import _checkpoint, _floor, _measure, _models, _output, _photos, _providers, main

PIL_Image = pytest.importorskip("PIL.Image")
sample_images = pytest.importorskip("sklearn.datasets")
pytest.importorskip("matplotlib")

MODEL = "test_vit"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch):
    monkeypatch.setattr(_measure, "_SECONDS_PER_ROUND", 0.002)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    names = ("china.jpg", "flower.jpg")
    for name in names:
        PIL_Image.fromarray(sample_images.load_sample_image(name)).save(folder / name)
    return [str(folder / name) for name in names]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A random test_vit with 7 classes, saved in every way that is accepted."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    state = timm.create_model(MODEL, num_classes=7).state_dict()
    for name, parameter in state.items():
        if "qkv.weight" in name:
            parameter *= 6  # attention that is not uniform
    save_file(state, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "ddp.pt")
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, folder / "compiled.pth")
    return folder


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *arguments: str) -> str:
    """The one line of a request that cannot be served."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("vitkernels: error: ")
    return lines[0]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


# One process each: the entry point, and what really reaches standard output.


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "vitkernels", *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_bench_in_its_own_process_puts_json_alone_on_stdout():
    done = command("bench", "--models", MODEL, "--batch-sizes", "1", "--rounds", "1", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["provider"] for row in json.loads(done.stdout)["rows"]] == ["eager", "autocast", "fused"]


def test_a_bad_request_in_its_own_process_has_no_traceback():
    done = command("bench", "--models", "resnet_of_my_dreams", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vitkernels: error: unknown model")
    assert "Traceback" not in done.stderr


def test_help_imports_neither_timm_nor_matplotlib():
    code = (
        "import sys; from vitkernels.cli import main; assert main(['bench', '--help']) == 0;"
        "print([m for m in ('timm', 'matplotlib', 'rich', 'PIL', 'sklearn') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout
    assert out.splitlines()[-1] == "[]"


# info


def test_info_json_names_versions_devices_and_every_operator(capsys):
    document = run_json(capsys, "info", "--device", "cpu")
    assert set(document["versions"]) == {"vitkernels", "python", "torch", "timm", "triton", "numpy"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["devices"]["cpu"]["name"]
    assert len(document["devices"]["gpus"]) == torch.cuda.device_count()
    assert document["backend"] in _env.BACKENDS
    why_not = document["operators"]["why_not"]
    assert {"patch_embed", "layer_norm", "attention", "linear", "mlp", "resample_pos_embed"} <= set(why_not)
    assert document["operators"]["device"] == "cpu"


def test_info_says_that_the_extension_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(_env, "extension", lambda: None)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "vitkernels._C is missing" in out
    assert "without a C++ compiler" in out


def test_info_says_that_the_extension_is_broken(capsys, monkeypatch):
    def broken():
        raise ImportError("undefined symbol: nothing")

    monkeypatch.setattr(_env, "extension", broken)
    extension = run_json(capsys, "info")["extension"]
    assert extension["available"] is False
    assert "undefined symbol" in extension["reason"]


def test_info_shows_how_the_extension_was_built(capsys, monkeypatch):
    built = {"compiler": "GNU 13", "cuda": None, "architectures": []}
    monkeypatch.setattr(_env, "extension", lambda: types.SimpleNamespace(build_info=lambda: built))
    assert run_json(capsys, "info")["extension"] == {"available": True, "build_info": built}
    main(["info"])
    assert "compiler GNU 13, cuda none, architectures none" in capsys.readouterr().out


def test_info_shows_the_policy_and_reasons(capsys, no_interpreter):
    assert main(["info", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "auto" in out
    assert "kernels run on CUDA tensors, got cpu" in " ".join(out.split())


# bench

ROW = {
    "model",
    "batch",
    "provider",
    "mode",
    "dtype",
    "path",
    "images_per_s",
    "images_per_s_p10",
    "images_per_s_p90",
    "ms",
    "ratio_to_eager",
    "max_abs_diff",
    "peak_mem_bytes",
    "rounds",
    "floor_ms",
    "share_of_floor",
}


@pytest.mark.parametrize(
    ("mode", "dtype"), [("infer", "float32"), ("train", "float32"), ("infer", "bfloat16"), ("infer", "float16")]
)
def test_bench_document(capsys, mode, dtype):
    arguments = (
        "--models",
        MODEL,
        "--batch-sizes",
        "1,3",
        "--rounds",
        "3",
        "--device",
        "cpu",
        "--mode",
        mode,
        "--dtype",
        dtype,
    )
    document = run_json(capsys, "bench", *arguments)
    environment, rows = document["environment"], document["rows"]
    assert {"machine", "cpu", "threads", "gpus", "torch", "triton", "timm", "python", "vitkernels", "commit", "sdpa"} <= set(
        environment
    )
    assert environment["input"] == "photographs"
    assert [(row["batch"], row["provider"]) for row in rows] == [(b, p) for b in (1, 3) for p in ("eager", "autocast", "fused")]
    for row in rows:
        assert set(row) >= ROW
        assert (row["model"], row["mode"], row["dtype"], row["rounds"], row["peak_mem_bytes"]) == (MODEL, mode, dtype, 3, None)
        assert row["path"] == ("reference" if row["provider"] == "fused" else "pytorch")
        assert 0 < row["images_per_s_p10"] <= row["images_per_s"] <= row["images_per_s_p90"]
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["ms"], rel=1e-6)
        assert ("max_abs_grad_diff" in row) == (mode == "train")
    eager, autocast, fused = rows[3:]
    assert (eager["ratio_to_eager"], eager["max_abs_diff"]) == (1.0, 0.0)
    assert fused["max_abs_diff"] <= (1e-5 if dtype == "float32" else 2e-2)
    assert dtype != "float32" or autocast["max_abs_diff"] > fused["max_abs_diff"], "autocast ran without autocast"


QUICK = ("--models", MODEL, "--batch-sizes", "2", "--rounds", "2", "--device", "cpu")


def test_bench_shows_the_share_of_the_floor_on_a_known_gpu(capsys, monkeypatch):
    assert main(["bench", *QUICK]) == 0
    assert "of floor" not in capsys.readouterr().out
    monkeypatch.setattr(_floor, "_gpu_name", lambda device: "NVIDIA H200")
    assert main(["bench", *QUICK, "--dtype", "bfloat16"]) == 0
    assert "of floor" in capsys.readouterr().out


def test_the_floor_is_the_rooflines_and_is_counted_on_another_model(capsys, monkeypatch):
    """H200 and L40S differ in rates; every provider has one floor, and what was measured is on its device as before."""
    measured = []
    true_providers = _providers.providers

    def watched(*arguments):
        found = true_providers(*arguments)
        measured.extend(p.model for p in found[0])
        return found

    monkeypatch.setattr("vitkernels.cli.bench.providers", watched)
    floors = {}
    for chip, name in (("h200", "NVIDIA H200"), ("l40s", "NVIDIA L40S")):
        monkeypatch.setattr(_floor, "_gpu_name", lambda device, name=name: name)
        rows = run_json(capsys, "bench", *QUICK, "--dtype", "bfloat16")["rows"]
        assert [row["provider"] for row in rows] == ["eager", "autocast", "fused"]
        for row in rows:
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        (floors[chip],) = {row["floor_ms"] for row in rows}
        document = run_json(capsys, "roofline", MODEL, "--batch", "2", "--chip", chip)
        forward = document["models"][MODEL]["eager"]["model"]["forward"]
        assert floors[chip] == pytest.approx(forward["floor_us"] / 1000)
    assert floors["l40s"] > 2 * floors["h200"] > 0
    tensors = [t for model in measured for t in model.parameters()]
    assert tensors
    assert {(t.device.type, t.dtype) for t in tensors} == {("cpu", torch.float32), ("cpu", torch.bfloat16)}


@pytest.mark.parametrize(
    ("gpu", "mode", "dtype"),
    [
        (None, "infer", "bfloat16"),
        ("NVIDIA GH200 480GB", "infer", "bfloat16"),
        ("NVIDIA H200", "train", "bfloat16"),
        ("NVIDIA H200", "infer", "float32"),
    ],
)
def test_no_floor_on_a_cpu_on_an_unknown_gpu_in_training_and_in_float32(capsys, monkeypatch, gpu, mode, dtype):
    monkeypatch.setattr(_floor, "_gpu_name", lambda device: gpu)
    for row in run_json(capsys, "bench", *QUICK, "--mode", mode, "--dtype", dtype)["rows"]:
        assert (row["floor_ms"], row["share_of_floor"]) == (None, None)


@pytest.mark.parametrize(
    ("gpu", "chip"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_gpu_is_known_by_its_name(gpu, chip):
    assert _floor.chip_named(gpu) == chip


def test_bench_prints_a_table_and_draws_a_plot(capsys, tmp_path):
    plot = tmp_path / "bench.png"
    arguments = [
        "--models",
        f"{MODEL},test_vit2",
        "--batch-sizes",
        "1",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--plot",
        str(plot),
    ]
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "images/s" in out
    assert "reference" in out
    assert "test_vit2" in out
    width, height = png_size(plot)
    assert 1000 < width < 3000
    assert 400 < height < 3000


def test_bench_shows_no_number_for_a_model_that_computes_something_else(capsys, monkeypatch):
    true_fuse = _models.fuse

    def wrong(model, name):
        fused = true_fuse(model, name)
        fused.register_forward_hook(lambda _module, _inputs, output: output + 1e-3)
        return fused

    monkeypatch.setattr(_models, "fuse", wrong)
    assert main(["bench", "--models", MODEL, "--batch-sizes", "2", "--rounds", "1", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        f"vitkernels: error: {MODEL}, batch 2: the fused model does not match eager: output error 1.0e-03"
    )


def test_bench_shows_no_number_for_wrong_gradients(capsys, monkeypatch):
    true_fuse = _models.fuse

    def wrong(model, name):
        fused = true_fuse(model, name)
        fused.blocks[2].register_full_backward_hook(lambda _module, inputs, _outputs: tuple(1.01 * g for g in inputs))
        return fused

    monkeypatch.setattr(_models, "fuse", wrong)
    arguments = ["--models", MODEL, "--batch-sizes", "2", "--rounds", "1", "--device", "cpu", "--mode", "train"]
    assert main(["bench", *arguments]) == 1
    assert "gradient error" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_fused_equals_eager(name):
    device = torch.device("cpu")
    contestants, _ = _providers.providers(name, device, torch.float32, "infer", False)
    images, _ = _photos.sample_batch({"input_size": (3, 160, 160), "mean": (0.5,) * 3, "std": (0.5,) * 3}, 2)
    eager, _, fused = contestants
    assert fused.model is not eager.model
    assert {p.data_ptr() for p in fused.model.parameters()} == {p.data_ptr() for p in eager.model.parameters()}
    arguments = (images, torch.zeros(2, dtype=torch.long), "infer")
    base = _measure.outputs(eager, arguments)
    differences, wrong = _measure.compare(_measure.outputs(fused, arguments), base, base, torch.float32)
    assert differences["max_abs_diff"] <= 1e-5
    assert wrong == ""


def test_path_is_what_availability_says(monkeypatch):
    cuda, half = torch.device("cuda"), torch.bfloat16
    fused = _models.fuse(_models.create(MODEL), MODEL)

    def path(missing):
        reasons = {name: ["no kernel"] if name in missing else [] for name in _providers._OPERATORS}
        monkeypatch.setattr(_providers, "availability", lambda device, dtype: reasons)
        return _providers._policy_and_path(fused, cuda, half)

    assert path(()) == ("fused", "kernel")
    assert path(("mlp",)) == ("auto", "mixed")
    assert path(_providers._OPERATORS) == ("auto", "reference")
    fused.blocks[0].attn.register_forward_hook(lambda *_: None)  # this block runs timm's forward
    assert path(()) == ("auto", "mixed")


def test_ratio_is_the_median_within_rounds():
    """The machine slows down threefold half way: every round still says 2x."""
    eager, other = [2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0]
    found = _measure.statistics(other, eager, batch=4)
    assert found["ratio_to_eager"] == 2.0
    assert found["ms"] == 2000.0
    assert found["rounds"] == 4


def test_rounds_are_interleaved_and_stop_at_the_time_cap(monkeypatch):
    monkeypatch.setattr(_measure, "SECONDS_PER_ROW", 0.0)
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    monkeypatch.setattr(_measure, "_calls", lambda step, device: 1)
    assert len(list(_measure.interleaved(steps, torch.device("cpu"), None))) == _measure.MIN_ROUNDS
    assert "".join(calls) == "abbaba"
    assert len(list(_measure.interleaved(steps, torch.device("cpu"), 7))) == 7


def test_no_two_images_of_a_batch_are_equal():
    config = {"input_size": (3, 96, 64), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    images, source = _photos.sample_batch(config, 40)
    assert images.shape == (40, 3, 96, 64)
    assert source == "photographs"
    assert len({image.numpy().tobytes() for image in images}) == 40
    assert torch.equal(images, _photos.sample_batch(config, 40)[0])


def test_without_scikit_learn_the_input_is_random_and_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    arguments = ("--models", MODEL, "--batch-sizes", "1", "--rounds", "1", "--device", "cpu")
    assert run_json(capsys, "bench", *arguments)["environment"]["input"] == "random"


# classify


@pytest.mark.parametrize("file", ["plain.safetensors", "plain.pth", "ddp.pt", "compiled.pth"])
def test_classify_a_photo_with_a_checkpoint(capsys, photos, checkpoints, file):
    arguments = ("--model", MODEL, "--checkpoint", str(checkpoints / file), "--device", "cpu")
    document = run_json(capsys, "classify", *photos, *arguments)
    assert (document["model"], document["classes"]) == (MODEL, 7)
    assert [entry["photo"] for entry in document["photos"]] == photos
    for entry in document["photos"]:
        probabilities = [top["probability"] for top in entry["top"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1
        assert entry["top"][0]["name"] == f"class {entry['top'][0]['class']}"
        assert entry["max_abs_diff"] <= 1e-5


def test_classify_says_what_the_model_says(capsys, photos, checkpoints):
    """Against timm used directly."""
    model = timm.create_model(MODEL, num_classes=7, checkpoint_path=str(checkpoints / "plain.pth")).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.inference_mode():
        expected = model(transform(PIL_Image.open(photos[0]))[None]).softmax(-1)[0]
    arguments = ("--model", MODEL, "--checkpoint", str(checkpoints / "plain.pth"), "--device", "cpu")
    for top in run_json(capsys, "classify", photos[0], *arguments)["photos"][0]["top"]:
        assert top["probability"] == pytest.approx(expected[top["class"]].item(), abs=1e-6)


def test_classify_names_imagenet_classes_and_prints_tables(capsys, photos, tmp_path):
    save_file(timm.create_model(MODEL).state_dict(), tmp_path / "imagenet.safetensors")
    arguments = ["--model", MODEL, "--checkpoint", str(tmp_path / "imagenet.safetensors"), "--device", "cpu"]
    assert main(["classify", photos[0], *arguments]) == 0
    out = capsys.readouterr().out
    assert "probability" in out
    assert "to the unfused model" in out
    names = {entry["name"] for entry in run_json(capsys, "classify", photos[0], *arguments)["photos"][0]["top"]}
    assert names <= set(timm.data.ImageNetInfo().label_descriptions())


@pytest.mark.parametrize("model", ["test_vit", "test_vit2"])
def test_attention_map_is_a_picture(capsys, photos, tmp_path, model):
    save_file(timm.create_model(model, num_classes=3).state_dict(), tmp_path / "model.safetensors")
    out = tmp_path / "map.png"
    arguments = ("--model", model, "--checkpoint", str(tmp_path / "model.safetensors"), "--device", "cpu")
    assert run_json(capsys, "classify", *photos, *arguments, "--attention-map", str(out))["attention_map"] == str(out)
    width, height = png_size(out)
    assert 1000 < width < 3000
    assert 700 < height < 3000
    pixels = numpy.asarray(PIL_Image.open(out).convert("RGB"))
    assert pixels.std() > 20, "an empty picture"


@pytest.mark.parametrize("name", ["a$x_$b.jpg", "[red]:dog:.jpg", "f\udcfcnf.jpg"], ids=["mathematics", "markup", "Latin-1"])
def test_names_of_files_are_no_markup(capsys, photos, checkpoints, tmp_path, name):
    folder = tmp_path / "[exp1]" / "[" / "red]"  # and so in the checkpoint's and in the picture's path
    folder.mkdir(parents=True)
    photo, weights, out = folder / name, folder / f"{name}.pth", folder / f"{name}.png"
    photo.write_bytes(Path(photos[0]).read_bytes())
    weights.write_bytes((checkpoints / "plain.pth").read_bytes())
    arguments = ("--model", MODEL, "--checkpoint", str(weights), "--device", "cpu", "--attention-map", str(out))
    assert main(["classify", str(photo), *arguments]) == 0
    printed = "".join(capsys.readouterr().out.split())  # long lines are wrapped
    for path in (photo, weights, out):
        assert str(path).replace("\udcfc", "\\udcfc") in printed
    assert png_size(out)[0] > 1000


def test_a_progress_bar_takes_its_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _output.progress() as bar:
        bar.add_task("a [/red] task", total=1)
    assert "a [/red] task" in capsys.readouterr().err


def test_recorded_attention_is_timms(checkpoints):
    """The recorded probabilities applied to v give the layer's output."""
    from vitkernels.cli import _attention

    model = timm.create_model(MODEL, num_classes=7, checkpoint_path=str(checkpoints / "plain.pth")).eval()
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 1, 64, 64**-0.5  # one head: the average is the head
    last, seen = model.blocks[-1].attn, {}
    last.qkv.register_forward_hook(lambda _m, _in, out: seen.update(v=out[..., 128:]))
    last.proj.register_forward_pre_hook(lambda _m, inputs: seen.update(heads=inputs[0]))
    with torch.inference_mode(), _attention.recorded(model) as layers:
        model(torch.randn(2, 3, 160, 160))
    assert len(layers) == 6
    assert torch.allclose(layers[-1].sum(-1), torch.ones(2, 101), atol=1e-5)
    assert torch.allclose(layers[-1] @ seen["v"], seen["heads"], atol=1e-5)
    assert len(last.qkv._forward_hooks) == 1, "recorded() left its hook behind"


def test_rollout_rows_sum_to_one_and_uniform_stays_uniform():
    from vitkernels.cli import _attention

    layers = [torch.randn(2, 10, 10).mul(3).softmax(-1) for _ in range(5)]
    mixed = _attention.rollout(layers)
    assert torch.allclose(mixed.sum(-1), torch.ones(2, 10), atol=1e-6)
    byhand = torch.eye(10)
    for attention in layers:
        byhand = (0.5 * attention[1] + 0.5 * torch.eye(10)) @ byhand
    assert torch.allclose(mixed[1], byhand, atol=1e-6)
    uniform = _attention.rollout([torch.full((1, 10, 10), 0.1)] * 4)
    assert torch.allclose(uniform - torch.diag_embed(torch.diagonal(uniform[0]))[None], uniform[0, 0, 1] * (1 - torch.eye(10)))
    for class_token in (True, False):
        heat = _attention.heat_map(uniform, 1, (3, 3), class_token)
        assert torch.allclose(heat, torch.full((1, 3, 3), 1 / 9))
        heat = _attention.heat_map(mixed, 1, (3, 3), class_token)
        assert torch.allclose(heat.sum((1, 2)), torch.ones(2))


def test_classify_without_network_and_checkpoint_fails_soon(capsys, photos, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = error_of(capsys, "classify", photos[0], "--model", "test_vit", "--device", "cpu")
    assert "no pretrained weights for test_vit: the model hub cannot be reached" in message
    assert "--checkpoint" in message
    assert not constants.is_offline_mode()


def test_the_hub_is_asked_for_a_bounded_time(monkeypatch):
    import socket

    monkeypatch.setattr(_checkpoint, "_HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        assert not _checkpoint._answers(f"http://127.0.0.1:{silent.getsockname()[1]}")


# Requests that cannot be served.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required"),
        (("explode",), "invalid choice"),
        (("bench", "--models", "vit_tiny_patch16_225"), "unknown model 'vit_tiny_patch16_225', did you mean vit_"),
        (("bench", "--models", "vit_tiny_patch16_224.nonsense"), "unknown weights tag"),
        (("bench", "--models", "resnet10t"), "cannot be fused"),
        (("bench", "--models", ""), "unknown model"),
        (("bench", "--batch-sizes", "0"), "not a positive whole number"),
        (("bench", "--batch-sizes", "8,-1"), "not a positive whole number"),
        (("bench", "--batch-sizes", "many"), "not a positive whole number"),
        (("bench", "--rounds", "0"), "not a positive whole number"),
        (("bench", "--dtype", "float64"), "invalid choice"),
        (("bench", "--mode", "dream"), "invalid choice"),
        (("bench", "--device", "tpu"), "unknown device"),
        (("bench", "--device", "meta"), "unknown device"),
        (("bench", "--plot", "/no/such/folder/a.png"), "its folder does not exist"),
        (("bench", "--plot", "a.txt"), "must end in"),
        (("info", "--dtype", "int8"), "invalid choice"),
        (("classify",), "required"),
        (("classify", "/no/such/photo.jpg"), "no such file"),
        (("classify", __file__), "not an image"),
    ],
)
def test_bad_requests(capsys, arguments, message):
    assert message in error_of(capsys, *arguments)
    if arguments and arguments[0] in ("bench", "info", "classify"):
        assert message in error_of(capsys, *arguments, "--json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "/no/such/file.pth"), "no such file"),
        (("--checkpoint", __file__), "cannot be read as weights"),
        (("--checkpoint", "PHOTO"), "cannot be read as weights"),
        (("--checkpoint", "FOLDER/plain.pth", "--model", "test_vit3"), "does not fit test_vit3"),
        (("--checkpoint", "FOLDER/list.pth"), "holds no state dict"),
        (("--checkpoint", "FOLDER/pickle.pth"), "cannot be read as weights"),
        (("--checkpoint", "FOLDER/headless.pth"), "has no head.weight"),
        (("--checkpoint", "FOLDER/scalar.pth"), "has no head.weight"),
        (("--checkpoint", "FOLDER/broken.safetensors"), "cannot be read as weights"),
        (("--attention-map", "/no/such/folder/a.png"), "its folder does not exist"),
        (("--model", "vit_nonsense"), "unknown model"),
        (("--model", "vit_small_patch16_36x1_224"), "no pretrained weights"),
    ],
)
def test_bad_classify_requests(capsys, photos, checkpoints, arguments, message):
    torch.save([torch.zeros(3)], checkpoints / "list.pth")
    torch.save({"head.weight": Path("not a tensor")}, checkpoints / "pickle.pth")
    torch.save({"norm.weight": torch.zeros(3)}, checkpoints / "headless.pth")
    torch.save({"head.weight": torch.tensor(3.0)}, checkpoints / "scalar.pth")
    (checkpoints / "broken.safetensors").write_bytes(b"nothing")
    arguments = [a.replace("FOLDER", str(checkpoints)).replace("PHOTO", photos[0]) for a in arguments]
    model = () if "--model" in arguments else ("--model", MODEL)
    assert message in error_of(capsys, "classify", photos[0], "--device", "cpu", *model, *arguments)


def test_a_cut_off_photo_is_reported(capsys, photos, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(Path(photos[0]).read_bytes()[:5000])
    assert "cannot be read" in error_of(capsys, "classify", str(tmp_path / "cut.jpg"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [("bench",), ("info",), ("classify", __file__)])
def test_cuda_asked_for_and_absent(capsys, command):
    assert "no usable NVIDIA GPU" in error_of(capsys, *command, "--device", "cuda")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("matplotlib", ("bench", "--plot", "x.png")), ("PIL.Image", ("classify", __file__))],
)
def test_a_missing_optional_package_names_the_extra(capsys, monkeypatch, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "vitkernels[bench]"' in error_of(capsys, *arguments)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    from matplotlib.figure import Figure

    with pytest.raises(_output.CommandError, match="cannot write"):
        _output.save_picture(Figure(), tmp_path / "gone" / "a.png")


# Streams.


def ascii_stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def arguments_of(command, checkpoint, photo):
    return {
        "info": ["info"],
        "bench": ["bench", *QUICK],
        "roofline": ["roofline", MODEL],
        "classify": ["classify", str(photo), "--model", MODEL, "--checkpoint", str(checkpoint), "--device", "cpu"],
    }[command]


@pytest.mark.parametrize("command", ["info", "bench", "roofline", "classify"])
def test_commands_print_to_a_terminal_of_ascii_characters(monkeypatch, checkpoints, photos, tmp_path, command):
    photo = tmp_path / "f\xfcnf.jpg"
    photo.write_bytes(Path(photos[0]).read_bytes())
    arguments = arguments_of(command, checkpoints / "plain.pth", photo)
    for json_option in ([], ["--json"]):
        out, err = ascii_stream(), ascii_stream()
        out.isatty = err.isatty = lambda: True
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        monkeypatch.setenv("COLUMNS", "40")  # columns are cut, with an ellipsis
        assert main([*arguments, *json_option]) == 0
        out.flush()
        assert out.buffer.getvalue()
    assert json.loads(out.buffer.getvalue())


def test_an_error_is_printed_to_a_terminal_of_ascii_characters(monkeypatch):
    monkeypatch.setattr("sys.stderr", err := ascii_stream())
    assert main(["bench", "--models", "f\xfcnf"]) == 2
    err.flush()
    assert b"f\\xfcnf" in err.buffer.getvalue()


@pytest.mark.parametrize("stream", [None, "closed", types.SimpleNamespace(write=len)], ids=["none", "closed", "write only"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_standard_output_may_be_closed_or_no_file(monkeypatch, stream, options):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["info", *options]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without /dev/full")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=str)
def test_a_full_disk_is_one_line(monkeypatch, capsys, options):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["info", *options]) == 1
    assert capsys.readouterr().err == "vitkernels: error: cannot write standard output: No space left on device\n"


@pytest.mark.parametrize("variables", [{"COLUMNS": "0"}, {"TERM": "dumb"}, {"TERM": "dumb", "COLUMNS": "0"}], ids=str)
def test_terminals_without_a_width_or_cursor(monkeypatch, capsys, variables):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 0
    assert "vitkernels info" in capsys.readouterr().out
    with _output.progress() as bar:
        bar.advance(bar.add_task("work", total=2))
    assert bar.console.width > 0


def test_a_picture_is_drawn_where_standard_output_is_ascii(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout", ascii_stream())
    assert main(["bench", *QUICK, "--plot", str(tmp_path / "gr\xf6\xdfe.png")]) == 0
    assert (tmp_path / "gr\xf6\xdfe.png").exists()


def test_version_and_help_return_zero(capsys):
    assert main(["--version"]) == 0
    assert main(["classify", "--help"]) == 0
    assert "--attention-map" in capsys.readouterr().out


def test_rounds_begin_with_every_provider_in_turn_and_run_both_ways():
    orders = [_measure.rotated(["a", "b", "c"], done) for done in range(6)]
    assert [order[0] for order in orders[:3]] == ["a", "b", "c"]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "cba", "acb", "bac"]
