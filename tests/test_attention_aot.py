"""The attention kernels, forward and backward, compiled ahead of time for real chips: instructions, spills, shared memory."""

import json

import pytest
from test_attention_backward import HEAD_DIMS
from test_inspect import compiling, inspect

pytest.importorskip("triton")
STEMS = ("attention", "attention_backward")
# No workload has every head dim.
HEAD_DIM_ROWS = """
import dataclasses, importlib, json, sys
from types import SimpleNamespace
from vitkernels.kernels import _aot

stem, arch, shapes = json.loads(sys.argv[1])
launches = importlib.import_module("vitkernels.kernels." + stem).aot_launches
rows = []
with _aot.dry_run(arch) as compiled:
    for N, Dh in shapes:
        for name, launch in launches(SimpleNamespace(tokens=N, width=12 * Dh, num_heads=12, train_batch=64)):
            launch()
            rows += [{"config": name, **dataclasses.asdict(_aot.read(kernel, arch))} for kernel in compiled]
            compiled.clear()
json.dump(rows, sys.stdout)
"""


def rows(cache, stem, *arguments):
    result = inspect(stem, *arguments, "--fail-on", "spills,smem,no-mma", "--json", cache=cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"]


def check(found, archs):
    assert {row["arch"] for row in found} == archs
    spills = [
        (row["config"], row["constants"], row["spill_bytes"]) for row in found if row["spill_bytes"] or row["local_stores"]
    ]
    assert not spills
    assert not [row for row in found if row["blocks_per_sm"] < 1 or row["shared_bytes"] > row["shared_limit"]]
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


def test_every_forward_of_vit_b_compiles_for_hopper_without_a_spill_and_multiplies_with_hgmma(cache):
    found = rows(cache, "attention", "--workload", "B/16", "--arch", "90")
    check(found, {90})
    (resident,) = [row for row in found if row["config"] == "N=197 Dh=64 bf16 B=4096"]
    assert resident["kernel"] == "_attention_fwd_kernel"
    assert resident["blocks_per_sm"] >= 2
    assert resident["wide_global"] >= 0.9 * resident["global_accesses"]


def test_every_backward_of_vit_b_compiles_for_hopper_without_a_spill_and_multiplies_with_hgmma(cache):
    found = rows(cache, "attention_backward", "--workload", "B/16", "--arch", "90")
    check(found, {90})
    assert {row["kernel"] for row in found} == {"_attention_bwd_kernel", "_attention_dbias_kernel"}
    (plain,) = [row for row in found if row["config"] == "N=197 Dh=64 bf16"]
    assert plain["constants"]["ALONE"], "one program a head"
    assert plain["blocks_per_sm"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_configuration_of_every_workload_compiles_without_a_spill(cache, stem, arch):
    check(rows(cache, stem, "--arch", str(arch)), {arch})


ALL = [(N, Dh) for Dh in HEAD_DIMS for N in (197, 577)]


@pytest.mark.parametrize(
    ("stem", "arch", "shapes"),
    [
        pytest.param("attention_backward", 90, [(197, 88)], id="Dh=88"),
        *(
            pytest.param(stem, arch, ALL, id=f"{stem}-{arch}", marks=pytest.mark.slow)
            for stem in STEMS
            for arch in (80, 90, 100, 120)
        ),
    ],
)
def test_every_head_dim_up_to_128_compiles_without_a_spill(cache, stem, arch, shapes):
    result = compiling("-c", HEAD_DIM_ROWS, json.dumps([stem, arch, shapes]), cache=cache)
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout), {arch})
