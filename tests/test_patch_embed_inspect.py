"""The patch-embedding kernels as compiled for each architecture. test_inspect.py has ViT-B/16 in the default run."""

import json
import re

import pytest
from test_inspect import ROOT, inspect

pytest.importorskip("triton")
STEMS = {
    "patch_embed": {"_patch_embed_fwd_kernel"},
    "patch_embed_backward": {"_patch_embed_dweight_kernel", "_patch_embed_dimages_kernel"},
}


def assert_sound(row):
    assert row["spill_bytes"] == row["spill_load_bytes"] == row["stack_bytes"] == 0, row
    assert row["local_loads"] == row["local_stores"] == 0, row
    assert row["shared_bytes"] <= row["shared_limit"], row
    assert row["mma"][{90: "HGMMA", 100: "tcgen05"}.get(row["arch"], "HMMA")] > 0, row
    if row["kernel"] == "_patch_embed_fwd_kernel" and re.match("D=768 (p=16 .*)?bf16", row["config"]):
        assert row["wide_global"] >= 0.8 * row["global_accesses"], row  # an alignment that was lost would show here


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("stem", STEMS)
def test_every_workload_compiles_without_a_spill_and_uses_tensor_cores(stem, arch, tmp_path):
    result = inspect(stem, "--arch", str(arch), "--fail-on", "spills,smem,no-mma", "--json", cache=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    source = (ROOT / f"vitkernels/kernels/{stem}.py").read_text()
    assert {row["kernel"] for row in rows} == set(re.findall(r"def (_\w+_kernel)\(", source)) == STEMS[stem]
    for row in rows:
        assert_sound(row)
