"""What the linear kernels' default configurations become on each architecture, read from the binaries."""

import json

import pytest
from compiled import assert_sound
from test_inspect import compiling, inspect

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from vitkernels.cli._workloads import WORKLOADS
from vitkernels.cli.inspect import _row
from vitkernels.kernels import _aot, folded_linear, linear, linear_bwd

rows = []
for arch in (80, 90):
    with _aot.dry_run(arch) as compiled:
        linear._aot_gemm(128 * 197, 3072, 768, "fc1", "gelu", "bf16 train", "triton")
        folded_linear._aot_statistics(128 * 197, 768, 3072)
        linear._aot_gemm(128 * 197, 3072, 768, "fc1", "gelu", "bf16 train", "cublas")
        linear._aot_gemm(128 * 257, 2730, 1024, "fc1", "gelu", "bf16 train", "triton")  # rows of 5460 bytes
        for launch in dict(linear_bwd.aot_launches(WORKLOADS[2])).values():
            launch()
    rows += [_row("linear", ["B/16"], _aot.read(kernel, arch)) for kernel in compiled]
json.dump(rows, sys.stdout)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "aot.py"
    script.write_text(SCRIPT)
    result = compiling(str(script), cache=tmp_path_factory.mktemp("triton"))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


_PASSES = ("_linear_epilogue_kernel", "_linear_bwd_kernel", "_layer_scale_bwd_kernel")


def gemms(rows, arch):
    kernel = "_linear_descriptor_kernel" if arch >= 90 else "_linear_pointer_kernel"
    return [row for row in rows if row["arch"] == arch and row["kernel"] == kernel]


def test_nothing_spills_and_shared_memory_suffices(rows):
    assert len({row["kernel"] for row in rows}) == 7
    assert_sound(rows)


def test_hopper_multiplies_with_hgmma_and_loads_and_stores_with_tma(rows):
    with_z, with_moments = gemms(rows, 90)  # the third takes the pointer kernel
    for row in (with_z, with_moments):
        assert row["mma"]["HGMMA"] > 0
        assert row["tma"] >= 6  # loads of x and weight, before and in the loop, and stores
    assert with_z["tma"] > with_moments["tma"]
    assert with_z["blocks_per_sm"] == 2, "one block's epilogue hides behind the other's products"


def test_ampere_multiplies_with_hmma_and_copies_asynchronously(rows):
    for row in gemms(rows, 80):
        assert row["mma"]["HMMA"] > 0
        assert row["async_copies"] > 0
        assert row["tma"] == 0


def test_elementwise_kernels_access_128_bits_at_a_time(rows):
    passes = [row for row in rows if row["kernel"] in _PASSES]
    assert len(passes) >= 4
    for row in passes:
        narrow = row["global_accesses"] - row["wide_global"]
        assert narrow <= 7, row  # sums, and what there is one of for each column or row
        assert row["blocks_per_sm"] >= 6, row


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["linear", "linear_bwd", "folded_linear", "mlp"])
def test_every_workload_on_every_architecture(stem, tmp_path):
    result = inspect(stem, "--arch", "80,86,89,90,100,120", "--fail-on", "smem,no-mma", "--json", cache=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["rows"]
    assert_sound(found)
    for row in found:
        if row["has_dot"] and row["arch"] in (90, 100):
            assert row["mma"]["HGMMA" if row["arch"] == 90 else "tcgen05"] > 0
            assert row["tma"] > 0
