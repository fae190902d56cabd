"""The patch-embedding kernels as compiled for each architecture. test_inspect.py has ViT-B/16 in the default run."""

import json
import re

import pytest
from compiled import assert_sound
from test_inspect import ROOT, inspect

pytest.importorskip("triton")
STEMS = {
    "patch_embed": {"_patch_embed_fwd_kernel"},
    "patch_embed_backward": {"_patch_embed_dweight_kernel", "_patch_embed_dimages_kernel"},
}


def assert_uses_the_chip(row):
    assert row["mma"][{90: "HGMMA", 100: "tcgen05"}.get(row["arch"], "HMMA")] > 0, row
    if row["kernel"] == "_patch_embed_fwd_kernel" and re.match("D=768 (p=16 .*)?bf16", row["config"]):
        assert row["wide_global"] >= 0.8 * row["global_accesses"], row  # an alignment that was lost would show here


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("stem", STEMS)
def test_every_workload_compiles_and_uses_tensor_cores(stem, arch, tmp_path):
    result = inspect(stem, "--arch", str(arch), "--fail-on", "smem,no-mma", "--json", cache=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    source = (ROOT / f"vitkernels/kernels/{stem}.py").read_text()
    assert {row["kernel"] for row in rows} == set(re.findall(r"def (_\w+_kernel)\(", source)) == STEMS[stem]
    assert_sound(rows)
    for row in rows:
        assert_uses_the_chip(row)
