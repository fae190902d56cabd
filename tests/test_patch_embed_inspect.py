"""The patch-embedding kernels as compiled for each architecture. This process interprets kernels: another one compiles."""

import json
import re

import pytest
from test_inspect import ROOT, inspect

pytest.importorskip("triton")
KERNELS = {"_patch_embed_fwd_kernel", "_patch_embed_dweight_kernel", "_patch_embed_dimages_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_kernel_compiles_without_a_spill_and_uses_tensor_cores(arch, tmp_path):
    """B/16: whole blocks of K; So400m/14: a tail, and pixels four bytes at a time."""
    names = "B/16,So400m/14"
    result = inspect(
        "patch_embed", "--arch", str(arch), "--workload", names, "--fail-on", "spills,smem,no-mma", "--json", cache=tmp_path
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert set(re.findall(r"def (_\w+_kernel)\(", (ROOT / "vitkernels/kernels/patch_embed.py").read_text())) == KERNELS
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack_bytes"] == row["local_loads"] == row["local_stores"] == 0, row
        assert row["mma"]["HGMMA" if arch == 90 else "tcgen05" if arch == 100 else "HMMA"] > 0, row
        if row["kernel"] == "_patch_embed_fwd_kernel" and any("p=16 224 bf16" in config for config in row["configs"]):
            assert row["wide_global"] >= 0.8 * row["global_accesses"], row  # an alignment that was lost would show here
