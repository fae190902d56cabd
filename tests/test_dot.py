"""Sums of matrix products over tiles: what Triton makes of them."""

import json

import pytest
from test_inspect import compiling

pytest.importorskip("triton")

SCRIPT = """
import json, re, sys
import torch
from vitkernels.kernels import _aot, attention_backward, linear, patch_embed, patch_embed_backward

def accumulators(compiled):  # what each product is added to: a constant is nothing yet
    lines = [line for kernel in compiled for line in kernel.asm["ttgir"].splitlines() if "tt.dot " in line]
    return [bool(re.search(r"tt.dot [^,]+, [^,]+, %cst", line)) for line in lines]

found = {}
with _aot.dry_run(80) as compiled:
    for tf32 in (False, True):
        x, weight = torch.empty(1000, 768, device="meta"), torch.empty(3072, 768, device="meta")
        linear.launch_linear_fwd(x, weight, None, None, None, None, None, x.dtype, "none", tf32, "triton", "sm_80")
        found[f"linear {tf32}"] = accumulators(compiled)
        compiled.clear()
        q, k, v = torch.empty(64, 197, 3, 3, 64, device="meta").unbind(2)
        statistics = q.new_empty(64, 3, 197)
        attention_backward.launch_attention_bwd(q, q, k, v, q, statistics, statistics, None, None, 0, 1.0, tf32, False)
        found[f"attention {tf32}"] = accumulators(compiled)
        compiled.clear()
        images, weight = torch.empty(64, 3, 224, 224, device="meta"), torch.empty(768, 3, 16, 16, device="meta")
        options = {"mean": None, "std": None, "allow_tf32": tf32, "plan": "triton", "arch": "sm_80"}
        dout = patch_embed.launch_patch_embed_fwd(images, weight, None, None, None, True, out_dtype=images.dtype, **options)
        patch_embed_backward.launch_patch_embed_bwd(dout, images, weight, need_dimages=True, need_dweight=True, **options)
        found[f"patch_embed {tf32}"] = accumulators(compiled)
        compiled.clear()
json.dump(found, sys.stdout)
"""


def test_true_float32_products_of_a_tile_are_summed_apart(tmp_path):
    """One chain of additions over all tiles would err three times as much. The interpreter cannot tell them apart."""
    result = compiling("-c", SCRIPT, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for operator in ("linear", "attention", "patch_embed"):
        assert all(found[f"{operator} False"])
        assert not all(found[f"{operator} True"])
