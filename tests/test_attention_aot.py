"""The attention kernels compiled ahead of time for real chips: instructions, spills, shared memory."""

import json

import pytest
from test_inspect import inspect

pytest.importorskip("triton")


def rows(cache, *arguments):
    result = inspect("attention", *arguments, "--fail-on", "spills,smem,no-mma", "--json", cache=cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"]


def check(found, archs):
    assert {row["arch"] for row in found} == archs
    for row in found:
        assert row["spill_bytes"] == row["spill_load_bytes"] == row["local_stores"] == 0, row
        if "bf16" in row["config"] and "pool" not in row["config"]:  # one query fills no Hopper tile of 64
            kind = {90: "HGMMA", 100: "tcgen05"}.get(row["arch"], "HMMA")
            assert row["mma"][kind] > 0, row
        elif "fp32" in row["config"]:
            assert not any(row["mma"].values()), row


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


def test_every_configuration_of_vit_b_compiles_for_hopper_without_a_spill_and_multiplies_with_hgmma(cache):
    found = rows(cache, "--workload", "B/16", "--arch", "90")
    check(found, {90})
    (resident,) = [row for row in found if row["config"] == "N=197 Dh=64 bf16 B=4096"]
    assert resident["kernel"] == "_attention_fwd_kernel"
    assert resident["blocks_per_sm"] >= 2
    assert resident["wide_global"] >= 0.9 * resident["global_accesses"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_configuration_of_every_workload_compiles_without_a_spill(cache, arch):
    check(rows(cache, "--arch", str(arch)), {arch})
