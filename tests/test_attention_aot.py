"""The attention kernels, forward and backward, compiled ahead of time for real chips: instructions, spills, shared memory."""

import json

import pytest
from test_inspect import inspect

pytest.importorskip("triton")
STEMS = ("attention", "attention_backward")


def rows(cache, stem, *arguments):
    result = inspect(stem, *arguments, "--fail-on", "spills,smem,no-mma", "--json", cache=cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"]


def check(found, archs):
    assert {row["arch"] for row in found} == archs
    for row in found:
        assert row["spill_bytes"] == row["spill_load_bytes"] == row["local_stores"] == 0, row
        assert row["blocks_per_sm"] >= 1, row
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
