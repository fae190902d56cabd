"""``vitkernels inspect``: kernels compiled without a GPU and read back from their binaries.

This process interprets kernels, so what compiles runs in another one.
"""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compiled import assert_sound

from vitkernels.cli import inspect as inspect_command
from vitkernels.cli import main
from vitkernels.cli._workloads import WORKLOADS
from vitkernels.cli.inspect import violations

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")

# Kernels that must spill, must not, take too much shared memory, use tensor cores; last a Triton without its disassembler.
ON_PURPOSE = """
import contextlib, io, json, shutil, sys
from pathlib import Path
import torch, triton
import triton.language as tl
from vitkernels.cli import main
from vitkernels.cli.inspect import violations, _row
from vitkernels.kernels import _aot

@triton.jit
def copy(x_ptr, y_ptr, N: tl.constexpr):
    rows, cols = tl.arange(0, N), tl.arange(0, N)
    x = tl.load(x_ptr + rows[:, None] * N + cols[None, :])
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], tl.exp(x) / tl.sum(x))

@triton.jit
def product(x_ptr, y_ptr, N: tl.constexpr):
    rows = tl.arange(0, N)
    offsets = rows[:, None] * N + rows[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x))

def rows(arch, kernel, dtype, N, **options):
    with _aot.dry_run(arch) as compiled:
        x = torch.empty(N, N, dtype=dtype, device="meta")
        kernel[(1,)](x, torch.empty(N, N, dtype=torch.float32, device="meta"), N, enable_fp_fusion=True, **options)
    return [_row("lab", ["config"], _aot.read(k, arch)) for k in compiled]

found = {
    "spilling": rows(90, copy, torch.float32, 128, num_warps=4, maxnreg=64),
    "plain": rows(90, copy, torch.float32, 64, num_warps=4),
    "too_big": rows(86, product, torch.bfloat16, 256, num_warps=8),
    "dot": [row for arch in (80, 90, 100) for row in rows(arch, product, torch.bfloat16, 64, num_warps=4)],
}

shutil.rmtree(Path(triton.knobs.cache.dir) / "vitkernels-inspect")  # what was read is forgotten, what was compiled is not
vars(type(triton.knobs.nvidia))["nvdisasm"].default_path = "/nowhere/nvdisasm"
_aot.tool_path.cache_clear()
with contextlib.redirect_stderr(io.StringIO()) as stderr:
    exit_code = main(["inspect", "layer_norm", "--workload", "B/16", "--arch", "90"])
found["without_nvdisasm"] = {"exit": exit_code, "stderr": stderr.getvalue()}
json.dump(found, sys.stdout)
"""
# The command on every stem, for sm_80 and sm_90, with the configurations that a plain bfloat16 ViT runs: float32, autocast,
# other activations, masks, packing and batch 1 are left to the slow sweeps. Elsewhere, with all configurations: layer_norm in
# this file, attention for sm_90 in test_attention_aot.py.
DEFAULTS = """
import contextlib, io, json, re, sys
from vitkernels.cli import inspect, main
from vitkernels.kernels import _recorder

SPECIAL = re.compile("autocast|fp32|tf32|B=1$|gelu_tanh|quick_gelu|silu|bias|mask|packed|pool|uint8$|bf16 channels_last")
every = inspect._launches
inspect._launches = lambda *args: {name: launch for name, launch in every(*args).items() if not SPECIAL.search(name)}
stems = [stem for stem, module in _recorder.modules().items() if hasattr(module, "aot_launches") and stem != "layer_norm"]
found = []
for arch, stem in ((arch, stem) for arch in (80, 90) for stem in stems if arch == 80 or not stem.startswith("attention")):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        arguments = ["--workload", "B/16", "--arch", str(arch), "--fail-on", "smem,no-mma", "--json"]
        code = main(["inspect", stem, *arguments])
    found.append({"stem": stem, "arch": arch, "exit": code, "stderr": err.getvalue(), **json.loads(out.getvalue())})
json.dump(found, sys.stdout)
"""


def compiling(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    """Python with these arguments, as a user without a GPU runs it: no interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), **environment}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def inspect(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    return compiling("-m", "vitkernels", "inspect", *arguments, cache=cache, **environment)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def runs(cache):
    """The command twice on one stem and workload, for sm_80 and sm_90: result and seconds of each run."""
    arguments = ("layer_norm", "--workload", "B/16", "--fail-on", "smem,no-mma", "--json")
    results = []
    for _ in range(2):
        start = time.monotonic()
        results.append((inspect(*arguments, cache=cache), time.monotonic() - start))
    return results


@pytest.fixture(scope="module")
def document(runs):
    result, _ = runs[0]
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def defaults(cache, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "defaults.py"
    script.write_text(DEFAULTS)
    result = compiling(str(script), cache=cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def on_purpose(runs, cache, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "on_purpose.py"
    script.write_text(ON_PURPOSE)
    result = compiling(str(script), cache=cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_layer_norm_kernel_compiles_as_recorded(document):
    source = (ROOT / "vitkernels/kernels/layer_norm.py").read_text()
    kernels = set(re.findall(r"def (_\w+_kernel)\(", source))
    assert len(kernels) == 3
    for arch in (80, 90):
        rows = [row for row in document["rows"] if row["arch"] == arch]
        assert {row["kernel"] for row in rows} == kernels
        for config in ("bf16", "bf16 add", "bf16 add scaled", "autocast", "autocast add", "autocast add scaled"):
            assert {row["kernel"] for row in rows if f"D=768 {config}" in row["configs"]} == kernels, (arch, config)
    assert_sound(document["rows"], recorded=True)


def test_every_stem_passes_every_check_for_ampere_and_hopper(defaults):
    stems = {path.stem for path in (ROOT / "vitkernels/kernels").glob("*.py") if "def aot_launches" in path.read_text()}
    ran = {(found["stem"], found["arch"]) for found in defaults}
    elsewhere = {("layer_norm", 80), *((stem, 90) for stem in ("layer_norm", "attention", "attention_backward"))}
    assert ran | elsewhere == {(stem, arch) for stem in stems if not stem.startswith("_") for arch in (80, 90)}
    for found in defaults:
        assert (found["exit"], found["errors"], found["stderr"]) == (0, [], ""), found
        assert found["rows"]
        assert_sound(found["rows"], recorded=True)
        for row in found["rows"]:
            assert not row["has_dot"] or row["mma"]["HMMA" if row["arch"] == 80 else "HGMMA"] > 0, row


def test_patch_embedding_loads_and_stores_128_bits_at_a_time(defaults):
    """bfloat16 pixels; those of a decoder's layout pass through registers."""
    rows = [row for found in defaults if found["stem"].startswith("patch_embed") for row in found["rows"]]
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (f"_patch_embed_{name}_kernel", arch) for name in ("fwd", "dweight", "dimages") for arch in (80, 90)
    }
    assert {row["config"].partition("p=16 ")[2] for row in rows} == {"224 P=1 bf16", "uint8 channels_last"}
    for row in rows:
        if row["kernel"] == "_patch_embed_fwd_kernel" and row["config"].endswith("bf16"):
            assert row["wide_global"] >= 0.8 * row["global_accesses"], row  # an alignment that was lost would show here


def test_the_document_has_what_it_promises(document):
    assert set(document) == {"archs", "rows", "errors"}
    assert document["archs"] == [80, 90]
    assert document["errors"] == []
    assert {row["stem"] for row in document["rows"]} == {"layer_norm"}
    for row in document["rows"]:
        assert row["config"] == row["configs"][0]
        assert set(row["mma"]) == {"HMMA", "HGMMA", "tcgen05"}
        assert row["has_dot"] == any(row["mma"].values())
        assert 16 <= row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= row["shared_limit"]
        assert 0 < row["wide_global"] <= row["global_accesses"] < row["instructions"]
        assert row["blocks_per_sm"] >= 2
        assert row["limited_by"] in ("regs", "smem", "tmem", "warps", "blocks")
        assert row["tma"] == row["async_copies"] == 0


def test_rows_are_accessed_128_bits_at_a_time(document):
    """A lost alignment (a stride that the compiler cannot see to be a multiple of 8) would show here."""
    for row in document["rows"]:
        if row["kernel"] != "_parameter_gradients_kernel":
            assert row["wide_global"] >= 0.7 * row["global_accesses"], row


def test_the_second_run_is_served_from_the_cache(runs):
    (first, cold), (second, warm) = runs
    assert second.stdout == first.stdout
    assert warm < cold / 2, (cold, warm)


def test_quiet_where_nobody_watches(runs):
    assert [result.stderr for result, _ in runs] == ["", ""]


def test_a_kernel_made_to_spill_is_caught(on_purpose):
    (row,) = on_purpose["spilling"]
    assert row["registers"] <= 64
    assert row["spill_bytes"] > 0
    assert row["spill_load_bytes"] > 0
    assert row["stack_bytes"] > 0
    assert row["local_stores"] > 0
    (line,) = violations(on_purpose["spilling"], ["spills", "smem", "no-mma"])
    assert re.fullmatch(r"lab: copy \(config, sm_90\) spills \d+ bytes of registers", line)
    assert violations(on_purpose["plain"], ["spills", "smem", "no-mma"]) == []


def test_rows_are_printed_to_a_terminal_of_ascii_characters(on_purpose, monkeypatch):
    monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    monkeypatch.setattr("vitkernels.cli.inspect._compile", lambda *_: (on_purpose["spilling"], []))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["inspect"]) == 0


def test_fail_on_ends_the_command_with_1(on_purpose, monkeypatch, capsys):
    rows = on_purpose["spilling"] + on_purpose["dot"]
    monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    monkeypatch.setattr("vitkernels.cli.inspect._compile", lambda *_: (rows, []))
    assert main(["inspect"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "lab, sm_100" in captured.out
    assert "tcgen05" in captured.out
    assert main(["inspect", "--fail-on", "spills,smem", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vitkernels: error: lab: copy (config, sm_90) spills ")
    assert captured.err.count("\n") == len(json.loads(captured.out)["errors"]) == 1


def test_record_puts_each_version_of_triton_beside_the_others(on_purpose, monkeypatch, tmp_path, capsys):
    aot = pytest.importorskip("vitkernels.kernels._aot")
    table, (spilling,), dots = tmp_path / "table.json", on_purpose["spilling"], on_purpose["dot"]
    twice = {**dots[0], "registers": 1, "spill_load_bytes": 40, "blocks_per_sm": 1, "configs": ["config", "other"]}
    monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    for version, rows in (("3.8.0", [*dots, spilling]), ("3.6.0", [spilling]), ("3.8.1", [dots[0], twice])):
        monkeypatch.setattr(aot.triton, "__version__", version)
        monkeypatch.setattr("vitkernels.cli.inspect._compile", lambda *_, rows=rows: (rows, []))
        assert main(["inspect", "--record", str(table)]) == 0
    text, found = table.read_text(), json.loads(table.read_text())
    names = ["100 product config", "80 product config", "80 product other", "90 copy config", "90 product config"]
    assert list(found) == [f"lab sm_{name}" for name in names]
    assert text.count("\n") == len(names) + 2, "a line for each launch"
    spilled = max(spilling["spill_bytes"], spilling["spill_load_bytes"])
    copied = {"registers": spilling["registers"], "spilled": spilled, "blocks": spilling["blocks_per_sm"]}
    assert list(found["lab sm_90 copy config"].items()) == [("3.6", copied), ("3.8", copied)]
    of_both = {"registers": dots[0]["registers"], "spilled": 40, "blocks": 1}  # the worst of two binaries of one launch
    assert found["lab sm_80 product config"] == {"3.8": of_both}
    assert found["lab sm_80 product other"] == {"3.8": {"registers": 1, "spilled": 40, "blocks": 1}}


def test_a_table_that_is_none_is_left_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    table = tmp_path / "table.json"
    for text in ("{", "[]", '{"launch": 1}'):
        table.write_text(text)
        assert main(["inspect", "--record", str(table)]) == 2
        assert f"--record: {table} is there and cannot be read: " in capsys.readouterr().err
        assert table.read_text() == text
    assert main(["inspect", "--record", str(tmp_path / "folder" / "table.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_head_dims_take_the_place_of_the_workloads_own():
    (workload,) = inspect_command._shapes("B/16", None)
    assert (workload.width, workload.head_dim) == (768, 64)
    shapes = inspect_command._shapes("B/16,L/16", [72, 88])
    found = [(shape.name, shape.num_heads, shape.width, shape.head_dim) for shape in shapes]
    assert found == [("B/16", 12, 864, 72), ("B/16", 12, 1056, 88), ("L/16", 16, 1152, 72), ("L/16", 16, 1408, 88)]


def test_too_much_shared_memory_is_caught(on_purpose):
    (row,) = on_purpose["too_big"]
    assert row["shared_bytes"] > row["shared_limit"] == 101376
    assert (row["blocks_per_sm"], row["limited_by"]) == (0, "smem")
    (line,) = violations(on_purpose["too_big"], ["smem"])
    assert str(row["shared_bytes"]) in line


def test_tensor_cores_are_seen_by_kind_and_missed(on_purpose):
    ampere, hopper, blackwell = (row["mma"] for row in on_purpose["dot"])
    assert ampere["HMMA"] > 0
    assert ampere["HGMMA"] == ampere["tcgen05"] == 0
    assert hopper["HGMMA"] > 0
    assert blackwell["tcgen05"] > 0
    assert all(row["has_dot"] for row in on_purpose["dot"])
    assert violations(on_purpose["dot"], ["no-mma"]) == []
    without = [{**row, "mma": dict.fromkeys(row["mma"], 0)} for row in on_purpose["dot"]]
    assert len(violations(without, ["no-mma"])) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "90,70"), "unknown architecture '70'; accepted: 80, 86, 89, 90, 100, 120"),
        (("--fail-on", "spils"), "unknown check 'spils'; accepted: spills, smem, no-mma"),
        (("--head-dims", "72,0"), "'0' is not a positive whole number"),
        (("--workload", "B/17"), "unknown workload 'B/17'; accepted: Ti/16, S/16"),
        (("pooling",), "unknown stem 'pooling'; there are kernels of: "),
        ((), "kernels cannot be compiled in a process that interprets them: unset TRITON_INTERPRET"),
    ],
)
def test_requests_that_cannot_be_served(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("vitkernels._env.INTERPRETING", True)
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_missing_disassembler_is_named(on_purpose):
    assert on_purpose["without_nvdisasm"]["exit"] == 2
    (line,) = on_purpose["without_nvdisasm"]["stderr"].splitlines()
    assert "nvdisasm is missing from this Triton installation; set TRITON_NVDISASM_PATH" in line


@pytest.mark.slow
def test_all_workloads_on_all_architectures(cache):
    result = inspect("--arch", "80,86,89,90,100,120", "--fail-on", "smem,no-mma", "--json", cache=cache)
    document = json.loads(result.stdout)
    assert document["errors"] == [], result.stderr
    assert result.returncode == 0
    rows = document["rows"]
    assert_sound(rows)
    assert {row["arch"] for row in rows} == {80, 86, 89, 90, 100, 120}
    widths = {config.split()[0] for row in rows if row["stem"] == "layer_norm" for config in row["configs"]}
    assert widths == {f"D={workload.width}" for workload in WORKLOADS}
