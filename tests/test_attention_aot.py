"""The attention kernels, forward and backward, compiled ahead of time for real chips: instructions, spills, shared memory."""

import json

import pytest
from compiled import assert_sound
from test_attention_backward import HEAD_DIMS
from test_inspect import compiling, inspect

pytest.importorskip("triton")
STEMS = ("attention", "attention_backward")


def rows(cache, stem, *arguments):
    result = inspect(stem, *arguments, "--fail-on", "smem,no-mma", "--json", cache=cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"]


def check(found, archs, **expected):
    assert {row["arch"] for row in found} == archs
    assert_sound(found, **expected)
    for row in found:
        if row["has_dot"] and "pool" not in row["config"]:  # one query fills no Hopper tile of 64
            kind = {90: "HGMMA", 100: "tcgen05"}.get(row["arch"], "HMMA")
            assert row["mma"][kind] > 0, row
            assert row["arch"] != 90 or row["mma"]["HMMA"] == 0, row
        elif "fp32" in row["config"]:
            assert not any(row["mma"].values()), row


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


def test_every_forward_of_vit_b_compiles_for_hopper_as_recorded_and_multiplies_with_hgmma(cache):
    found = rows(cache, "attention", "--workload", "B/16", "--arch", "90")
    check(found, {90}, recorded=True)
    (resident,) = [row for row in found if row["config"] == "N=197 Dh=64 bf16 B=4096"]
    assert resident["kernel"] == "_attention_fwd_kernel"
    assert resident["blocks_per_sm"] >= 2
    assert resident["wide_global"] >= 0.9 * resident["global_accesses"]


def test_every_backward_of_vit_b_compiles_for_hopper_as_recorded_and_multiplies_with_hgmma(cache):
    found = rows(cache, "attention_backward", "--workload", "B/16", "--arch", "90")
    check(found, {90}, recorded=True)
    assert {row["kernel"] for row in found} == {"_attention_bwd_kernel", "_attention_dbias_kernel"}
    (plain,) = [row for row in found if row["config"] == "N=197 Dh=64 bf16"]
    assert plain["constants"]["ALONE"], "one program a head"
    assert plain["blocks_per_sm"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_configuration_of_every_workload_compiles_and_spills_little(cache, stem, arch):
    check(rows(cache, stem, "--arch", str(arch)), {arch})


@pytest.mark.parametrize(
    ("stem", "arch", "workloads", "head_dims"),
    [
        pytest.param("attention_backward", 90, "B/16", (76, 88), id="Dh=76,88"),
        *(
            pytest.param(stem, arch, "B/16,B/16@384", HEAD_DIMS, id=f"{stem}-{arch}", marks=pytest.mark.slow)
            for stem in STEMS
            for arch in (80, 90, 100, 120)
        ),
    ],
)
def test_every_head_dim_up_to_128_compiles_as_recorded(cache, stem, arch, workloads, head_dims):
    wanted = ("--arch", str(arch), "--workload", workloads, "--head-dims", ",".join(map(str, head_dims)))
    found = rows(cache, stem, *wanted)
    assert {f"Dh={Dh}" for Dh in head_dims} == {part for row in found for part in row["config"].split() if "Dh=" in part}
    check(found, {arch}, workloads=False)


WIDE = """
import json, sys
import torch
from vitkernels.kernels import _aot, attention, attention_backward

with _aot.dry_run(89) as compiled:
    q, k, v = torch.empty(64, 197, 3, 3, 256, device="meta").unbind(2)
    bias = torch.empty(1, 3, 197, 197, device="meta")
    out, *statistics = attention.launch_attention_fwd(q, k, v, bias, None, 0, 1.0, False)
    attention_backward.launch_attention_bwd(out, q, k, v, out, *statistics, bias, None, 0, 1.0, False, True)
json.dump([(kernel.metadata.shared, _aot.CHIPS[89].shared_per_block) for kernel in compiled], sys.stdout)
"""


def test_the_widest_float32_heads_fit_the_smallest_shared_memory(cache):
    """101,376 bytes a block on sm_86, 89 and 120."""
    result = compiling("-c", WIDE, cache=cache)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) >= 4
    assert all(shared <= limit for shared, limit in found), found


# What no workload launches: other lengths and so other tails, one query, float32 with masks, few heads, biases of every kind.
OTHER_ROWS = """
import itertools, json, sys
import torch
from vitkernels.cli.inspect import _row
from vitkernels.kernels import _aot, attention, attention_backward

arch, head_dims = json.loads(sys.argv[1])
rows = []

KINDS = ("none", "key", "full", "trained key", "trained full")

def bias_of(kind, B, N, M, dtype):
    shape = {"none": None, "key": (B, 1, 1, M), "full": (1, 12, N, M)}[kind.removeprefix("trained ")]
    return None if shape is None else torch.empty(shape, dtype=dtype, device="meta")

def note(compiled, *names):
    rows.extend(_row("attention", [" ".join(map(str, names))], _aot.read(kernel, arch)) for kernel in compiled)
    compiled.clear()

def of(B, N, M, Dh, dtype):
    q, kv = (torch.empty(B, n, 12, Dh, dtype=dtype, device="meta") for n in (N, M))
    return q, kv, kv, q.new_empty(B, 12, N, dtype=torch.float32)

with _aot.dry_run(arch) as compiled:
    for Dh, N, kind in itertools.product(head_dims, (50, 63, 100, 177), ("none", "key", "full")):
        q, k, v, _ = of(4096, N, N, Dh, torch.bfloat16)
        attention.launch_attention_fwd(q, k, v, bias_of(kind, 4096, N, N, q.dtype), None, 0, 1.0, False)
        note(compiled, "forward", N, Dh, kind)
    for dtype, Dh in ((torch.bfloat16, 64), (torch.bfloat16, 72), (torch.float32, 64)):
        name = "fp32" if dtype == torch.float32 else "bf16"
        for (B, N), kind in itertools.product(((4096, 1), (4096, 197), (1, 197)), KINDS):
            q, k, v, statistics = of(B, N, 197, Dh, dtype)
            bias = bias_of(kind, B, N, 197, dtype)
            attention.launch_attention_fwd(q, k, v, bias, None, 0, 1.0, False)
            note(compiled, "forward", *(("pool",) if N == 1 else ()), name, B, N, Dh, kind)
            attention_backward.launch_attention_bwd(
                q, q, k, v, q, statistics, statistics, bias, None, 0, 1.0, False, kind.startswith("trained")
            )
            note(compiled, "backward", *(("pool",) if N == 1 else ()), name, B, N, Dh, kind)
        q, k, v, statistics = (t[0] for t in of(1, 4096, 4096, Dh, dtype))
        ends = torch.empty(9, dtype=torch.int32, device="meta")
        attention.launch_attention_fwd(q, k, v, None, ends, 0, 1.0, False)
        attention_backward.launch_attention_bwd(q, q, k, v, q, statistics, statistics, None, ends, 0, 1.0, False, False)
        note(compiled, "packed", name, Dh)
json.dump(rows, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_what_no_workload_launches_compiles(cache, arch):
    result = compiling("-c", OTHER_ROWS, json.dumps([arch, HEAD_DIMS]), cache=cache)
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout), {arch}, workloads=False)
