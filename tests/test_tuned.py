"""Tuned tables: one file a GPU's name, the dtype in every key, and what becomes of tables of format 1."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from vitkernels import _env, _select
from vitkernels.kernels import (
    _attention_configs,
    _device,
    _patch_tiles,
    _recorder,
    _tuned,
    attention,
    attention_backward,
    linear,
    patch_embed,
)
from vitkernels.ops import folded_linear

bf16 = torch.bfloat16
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
POINTER = linear.config_entry(linear.GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=3))
STREAMED = _attention_configs.entry(_attention_configs.ForwardConfig(False, 64, 32, 4, 2))
CUBLAS = {"plan": "cublas"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """This user's folder of tables; what was warned of before counts for nothing."""
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    _tuned.forget()
    _tuned._ignore.cache_clear()
    _tuned._can_be_read.cache_clear()
    _tuned._go_without.cache_clear()
    (tmp_path / "tuned").mkdir()
    yield tmp_path / "tuned"
    _tuned.forget()


@pytest.fixture
def two_gpus(monkeypatch):
    """An H100 and an H200; yields how often the driver was asked for a name."""
    asked = []

    def name(index):
        asked.append(index)
        return (H100, H200)[index]

    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(linear, "_describable", lambda x, weight: True)  # it looks at addresses, which a fake tensor lacks
    _device.gpu_name.cache_clear()
    yield asked
    _device.gpu_name.cache_clear()


# Names.


@pytest.mark.parametrize(
    ("gpu", "file"),
    [
        (H100, "nvidia_h100_80gb_hbm3.json"),
        (H200, "nvidia_h200.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb.json"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "nvidia_a100_sxm4_40gb_mig_1g_5gb.json"),
        (" Quadro / ../RTX (R) ", "quadro_rtx_r.json"),
    ],
)
def test_a_tables_file_is_named_after_the_gpu(gpu, file):
    assert _tuned.file_name(gpu) == file


def test_without_a_gpu_the_chip_of_the_architecture_stands_for_it():
    assert _device.gpu_name(-1, "sm_90") == _device.gpu_of(torch.empty(1), "sm_90") == H100
    assert _device.gpu_of(torch.empty(1, device="meta"), "sm_80") == "NVIDIA A100-SXM4-80GB"
    names = {_device.gpu_name(-1, f"sm_{arch}") for arch in _device.CHIPS}
    assert len(names) == len(_device.CHIPS) == len(set(map(_tuned.file_name, names)))
    assert _tuned.file_name(_device.gpu_name(-1, "sm_103")) == "nvidia_sm_103.json"  # no file of format 1 has this name


def test_a_key_has_the_dtype_of_the_product():
    assert _tuned.gemm_key("act", bf16, 3072, 768, 256 * 197) == "act/bfloat16/3072/768/65536"
    assert _attention_configs.key("forward", torch.float16, 197, 64) == "forward/float16/64/256"
    assert _patch_tiles.table_key("fwd", torch.uint8, bf16, 32, 768, 100) == "fwd_uint8/bfloat16/32/768/128"


def test_the_driver_is_asked_once_for_a_devices_name(two_gpus):
    with FakeTensorMode():
        tensors = [torch.empty(1, device=f"cuda:{index}") for index in (0, 1, 0, 1)]
    assert [_device.gpu_of(x, "sm_90") for x in tensors] == [H100, H200] * 2
    assert two_gpus == [0, 1]


# Look-ups.


def gemm_on(device, dtype=bf16, rows_on=None):
    x, weight = (torch.empty(n, 64, dtype=dtype, device=where) for n, where in ((300, rows_on or device), (128, device)))
    return linear.config_of("act", x, weight, "auto", "sm_90")


def attention_on(device, dtype=bf16):
    qkv = torch.empty(1, 197, 3, 2, 64, dtype=dtype, device=device)
    launched = []
    with _recorder.recording(lambda name, *_: launched.append(name)):
        attention.launch_attention_fwd(*qkv.unbind(2), None, None, 0, 1.0, False)
    return launched == ["_attention_stream_fwd_kernel"]


def patches_on(device, dtype=bf16):
    images, weight = (torch.empty(n, 3, 16, 16, dtype=dtype, device=device) for n in (100, 32))
    launched = []
    with _recorder.recording(lambda name, *_: launched.append(name)):
        patch_embed.launch_patch_embed_fwd(images, weight, None, None, None, True, None, None, dtype, False, "auto", "sm_90")
    return launched == []  # cuBLAS


def write(folder, gpu, stem, key, entry):
    _tuned.write(folder / _tuned.file_name(gpu), stem, key, entry)


def test_two_gpus_of_one_architecture_have_tables_of_their_own(folder, two_gpus):
    write(folder, H200, "linear", _tuned.gemm_key("act", bf16, 128, 64, 300), POINTER)
    write(folder, H200, "attention", "forward/bfloat16/64/256", STREAMED)
    write(folder, H200, "patch_embed", _tuned.gemm_key("fwd", bf16, 32, 768, 100), CUBLAS)
    with FakeTensorMode():
        for there in (gemm_on, attention_on, patches_on):
            assert there("cuda:1")
            assert not there("cuda:0")
            assert not there("meta")
        assert gemm_on("cuda:1", rows_on="meta"), "rows that stand for their shape do not decide the GPU"
    assert sorted(two_gpus) == [0, 1]


@pytest.mark.parametrize("stem", ["linear", "attention", "patch_embed"])
@pytest.mark.parametrize("dtype", [bf16, torch.float16], ids=str)
def test_an_entry_is_of_one_dtype(folder, dtype, stem):
    name = str(dtype).removeprefix("torch.")
    key, entry, there = {
        "linear": (f"act/{name}/128/64/512", POINTER, gemm_on),
        "attention": (f"forward/{name}/64/256", STREAMED, attention_on),
        "patch_embed": (f"fwd/{name}/32/768/128", CUBLAS, patches_on),
    }[stem]
    write(folder, H100, stem, key, entry)
    assert [bool(there("meta", other)) for other in (bf16, torch.float16)] == [dtype == bf16, dtype != bf16]


def test_entries_of_attention_backward_are_of_one_gpu_and_dtype(folder, two_gpus, monkeypatch):
    launches = _attention_configs.BackwardConfig(False, 32, 16, 16, 4, 1)
    write(folder, H200, "attention", "backward/bfloat16/64/256", _attention_configs.entry(launches))
    found, choose = [], attention_backward.backward_config
    monkeypatch.setattr(attention_backward, "backward_config", lambda *a: found.append(choose(*a)) or found[-1])
    with FakeTensorMode():
        for device, dtype in (("cuda:1", bf16), ("cuda:0", bf16), ("meta", bf16), ("cuda:1", torch.float16)):
            qkv = torch.empty(1, 197, 3, 2, 64, dtype=dtype, device=device)
            dout, statistics = qkv.new_empty(1, 197, 2, 64), qkv.new_empty(1, 2, 197, dtype=torch.float32)
            with _recorder.recording(lambda *_: None):
                options = (None, None, 0, 1.0, False, False)
                attention_backward.launch_attention_qkv_bwd(dout, qkv, dout, statistics, statistics, *options)
    assert [config == launches for config in found] == [True, False, False, False]


@pytest.mark.parametrize("compiling", [False, True])
def test_folding_asks_for_the_gpu_of_the_weight_and_the_dtype(folder, two_gpus, monkeypatch, compiling):
    write(folder, H200, "linear", _tuned.gemm_key("norm_act", bf16, 128, 64, 300), POINTER)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)

    def folds(device, dtype=bf16, act="gelu"):
        x, weight = (torch.empty(n, 64, dtype=dtype, device=device) for n in (300, 128))
        return folded_linear.folds(x, folded_linear.Folded(weight, weight, weight), act)

    with FakeTensorMode(), torch.no_grad(), _select.targeting("sm_90"):
        assert folds("cuda:1")
        assert not folds("cuda:0")
        assert not folds("meta")
        assert not folds("cuda:1", torch.float16)
        assert not folds("cuda:1", act=None)


# Tables of format 1.


def looked_up_again(key, times=3):
    for _ in range(times):
        _tuned.forget()
        found = _tuned.lookup(H100, "linear", key)
    return found


@pytest.mark.parametrize("content", [{"linear": {"act/128/64/512": CUBLAS}}, {"linear": {"k": POINTER}}, {"linear": []}, {}])
def test_a_table_of_format_1_under_the_new_name_is_ignored_with_one_line(folder, caplog, content):
    file = folder / _tuned.file_name(H100)
    file.write_text(json.dumps({"format": 1, **content}))
    with caplog.at_level(logging.WARNING, "vitkernels"):
        assert looked_up_again("k") is None
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("vitkernels", "WARNING")
    assert f"{file} is ignored: it has format 1, whose keys lack the dtype" in record.message
    assert "`vitkernels tune` writes the new one" in record.message
    assert "\n" not in record.message


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 2, "linear": []}',
        '{"format": 2, "linear": null}',
        '{"format": 2, "linear": {"k": 7}}',
        '{"format": 2, "linear": {"k": {}}}',
        '{"format": 2, "linear": {"k": {"plan": 3}}}',
        "[" * 100_000,
        "7",
    ],
    ids=lambda content: content[:40],
)
def test_a_table_that_is_not_whole_is_ignored_with_one_line(folder, caplog, content):
    (folder / _tuned.file_name(H100)).write_text(content)
    with caplog.at_level(logging.WARNING, "vitkernels"):
        assert looked_up_again("k") is None
        assert not _tuned.any_gemm(H100, "k", bf16, 1, 1)
    assert len(caplog.records) == 1


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
READ_AND_WRITTEN_AGAIN = """
import locale, sys
from pathlib import Path
from vitkernels.cli import _compiled
from vitkernels.kernels import _tuned
assert locale.getpreferredencoding(False) != "UTF-8"
tuned, compiled = map(Path, sys.argv[1:])
assert _tuned.read(tuned)["linear"]["k"]["note"] == "12 \\u00b5s"
_tuned.write(tuned, "linear", "new", {"plan": "cublas"})
_compiled.write(compiled, _compiled.read(compiled))
"""


def test_tables_are_utf8_in_every_locale(tmp_path):
    """Ours are ASCII, by json's escapes; an editor may have saved one without."""
    tuned, compiled = tmp_path / "gpu.json", tmp_path / "compiled.json"
    written = {"format": _tuned.FORMAT, "linear": {"k": {**CUBLAS, "note": "12 \u00b5s"}}}
    tuned.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    compiled.write_text(json.dumps({"k": {"\u00b5": {}}}, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-c", READ_AND_WRITTEN_AGAIN, str(tuned), str(compiled)]
    done = subprocess.run(command, env={**os.environ, **ASCII_LOCALE}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(tuned.read_text())["linear"] == {**written["linear"], "new": CUBLAS}
    assert json.loads(compiled.read_text()) == {"k": {"\u00b5": {}}}


def test_a_package_in_a_zip_has_no_table_and_says_nothing(tmp_path, caplog):
    (tmp_path / "site.zip").touch()
    with caplog.at_level(logging.INFO, "vitkernels"):
        assert _tuned.read(tmp_path / "site.zip" / "vitkernels" / "tuned" / "gpu.json") == {}
    assert not caplog.records


def test_names_of_gpus_in_any_script_have_files_of_their_own():
    names = [H100, H200, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "\u6771\u4eac", "\u5927\u962a"]
    files = [_tuned.file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert files[0] == "nvidia_h100_80gb_hbm3.json"
    assert all(len(file) > len(".json") and file.isascii() for file in files)


def test_tables_by_architecture_are_ignored_with_one_line_and_the_new_one_beside_them_counts(folder, caplog):
    write(folder, H100, "linear", "k", POINTER)
    for arch in ("sm_80", "sm_90"):
        (folder / f"{arch}.json").write_text(json.dumps({"format": 1, "linear": {"k": CUBLAS}}))
    with caplog.at_level(logging.WARNING, "vitkernels"):
        assert looked_up_again("k") == POINTER
        assert not _tuned.any_gemm("NVIDIA A100-SXM4-80GB", "k", bf16, 1, 1)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("vitkernels", "WARNING")
    assert f"every sm_*.json in {folder} is ignored: a table has its GPU's name now, and the dtype" in record.message
    assert "`vitkernels tune` writes the new one" in record.message


def test_no_line_without_an_old_table(folder, caplog):
    write(folder, H100, "linear", "k", POINTER)
    with caplog.at_level(logging.WARNING, "vitkernels"):
        assert looked_up_again("k") == POINTER
    folder.joinpath(_tuned.file_name(H100)).unlink()
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "vitkernels"):
        assert looked_up_again("k") is None
    assert caplog.records == []


def no_home(monkeypatch):
    """Of a user that the system does not know, as in a container that was started with a number for a user."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "VITKERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_a_user_without_a_home_has_no_tables_and_is_told_once(folder, caplog, monkeypatch):
    no_home(monkeypatch)
    with caplog.at_level(logging.INFO, "vitkernels"):
        assert looked_up_again("k") is None
        assert not _tuned.any_gemm(H100, "k", bf16, 1, 1)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("vitkernels", "INFO")
    assert record.message.startswith("no tuned tables of this user are read: there is no home folder")


@pytest.mark.parametrize("home", ["none", "a file"])
def test_a_user_without_a_home_has_a_folder_for_compiled_kernels_while_the_process_runs(home, monkeypatch, caplog, tmp_path):
    no_home(monkeypatch)
    if home == "a file":
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        tmp_path.joinpath("file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # for what is set below to be undone
    monkeypatch.delenv("TRITON_HOME", raising=False)
    with caplog.at_level(logging.INFO, "vitkernels"):
        for _ in range(2):
            _env.give_triton_a_cache()
    (record,) = caplog.records
    assert "compiled kernels are kept until this process ends" in record.message
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert Path(triton.knobs.cache.dir) == folder
    assert folder.is_dir()
    _env._delete(str(folder), os.getpid() + 1)  # a forked child ends
    assert folder.is_dir()
    _env._delete(str(folder), os.getpid())
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["read-only", "a link that leads nowhere", "a file"])
def test_a_folder_for_compiled_kernels_that_cannot_be_written_is_read_from_a_temporary_one(kind, monkeypatch, tmp_path):
    """As one that came with a container is, for another user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    cache = tmp_path / ".triton" / "cache"
    if kind == "a link that leads nowhere":
        cache.parent.symlink_to(tmp_path / "nowhere")
    else:
        cache.parent.mkdir()
    if kind == "a file":
        cache.touch()
    if kind == "read-only":
        (cache / "key").mkdir(parents=True)
        (cache / "key" / "kernel.json").write_text("{}")
        allowed = os.access  # root may write everywhere
        monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    _env.give_triton_a_cache()
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert [path.name for path in folder.glob("*/*")] == (["kernel.json"] if kind == "read-only" else [])
    (folder / "another").mkdir()
    _env._delete(str(folder), os.getpid())
    assert not folder.exists()
    assert kind != "read-only" or (cache / "key" / "kernel.json").exists()


def test_without_a_temporary_folder_either_triton_is_left_alone(monkeypatch, caplog):
    no_home(monkeypatch)
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)

    def none(**_):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.mkdtemp", none)
    with caplog.at_level("INFO", "vitkernels"):
        _env.give_triton_a_cache()
    assert "TRITON_CACHE_DIR" not in os.environ
    assert "no usable temporary directory" in caplog.text


@pytest.mark.parametrize("named", ["TRITON_CACHE_DIR", "TRITON_HOME", "HOME"])
def test_a_folder_for_compiled_kernels_that_can_be_made_is_left_to_triton(named, monkeypatch, tmp_path):
    no_home(monkeypatch)
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(named, str(tmp_path / "new"))
    before = dict(os.environ)
    _env.give_triton_a_cache()
    assert dict(os.environ) == before


def test_the_shipped_table_serves_a_user_without_a_home(folder, monkeypatch, tmp_path):
    no_home(monkeypatch)
    monkeypatch.setattr(_tuned, "_SHIPPED", tmp_path)
    write(tmp_path, H100, "linear", "k", POINTER)
    assert looked_up_again("k") == POINTER


def a_file(path):
    path.write_text("")
    return path


PLACES = {
    "a file": lambda tmp_path: a_file(tmp_path / "cache"),
    "in a file": lambda tmp_path: a_file(tmp_path / "cache") / "x",
    "too long": lambda tmp_path: tmp_path / ("x" * 5000),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_cache_that_cannot_be_read_is_told_of_once(folder, caplog, monkeypatch, tmp_path, place):
    monkeypatch.setenv("VITKERNELS_CACHE", str(PLACES[place](tmp_path)))
    with caplog.at_level(logging.INFO, "vitkernels"):
        assert looked_up_again("k") is None
        assert looked_up_again("other") is None
    (record,) = caplog.records
    assert record.levelname == "INFO"


def test_a_folder_without_permission_is_told_of_once(folder, caplog, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", denied)  # root, who runs some tests, may read everything
    with caplog.at_level(logging.INFO, "vitkernels"):
        assert looked_up_again("k") is None
        assert looked_up_again("other") is None
    (record,) = caplog.records
    assert "Permission denied" in record.message
