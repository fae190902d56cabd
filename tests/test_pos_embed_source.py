"""The sources of the resampling kernels: the CUDA file under the emulator, the C++ file under sanitizers, what ptxas says."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from vitkernels import reference

ROOT = Path(__file__).resolve().parent.parent
CSRC, EMULATOR = ROOT / "csrc", ROOT / "tests" / "emulator"
# -O0: compilers take a quarter of the time, which is most of these tests'.
SANITIZED = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(output, *arguments):
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", f"-I{EMULATOR}", f"-I{CSRC}", *map(str, arguments), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in result.stderr or "cannot find -lubsan" in result.stderr:
        pytest.skip("g++ came without its sanitizers")
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr
    return output


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The real .cu file, compiled by g++ with both sanitizers."""
    sources = ("-DVITKERNELS_EMULATOR", "-x", "c++", CSRC / "pos_embed_cuda.cu", EMULATOR / "resample.cpp")
    return compiled(tmp_path_factory.mktemp("emulated") / "resample", *SANITIZED, *sources)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The real CPU kernel, compiled by g++ with both sanitizers, run on up to three threads."""
    sources = ("-DON_CPU", CSRC / "pos_embed_cpu.cpp", EMULATOR / "resample.cpp", "-lpthread", "-ldl")
    return compiled(tmp_path_factory.mktemp("sanitized") / "resample", *SANITIZED, *sources)


def run(program, forward, tensor, old_size, sizes, prefix, interpolation, antialias, align_corners, square, pad_to, **settings):
    """The program's result for a table (forward) or for gradients of copies, (rows, D). ``settings``: its environment."""
    targets = []
    for h, w in sizes:
        full = (max(h, w),) * 2 if square and (h, w) != old_size else (h, w)
        targets += [h, w, *full]
    numbers = [forward, DTYPES[tensor.dtype], *old_size, tensor.shape[-1], prefix, pad_to or 0]
    numbers += [interpolation == "bicubic", antialias, align_corners, len(sizes), *targets]
    data = struct.pack(f"<{len(numbers)}q", *map(int, numbers)) + tensor.contiguous().view(torch.uint8).numpy().tobytes()
    # Sanitizers stop the program; the leak checker cannot run in some containers, and the program's memory is in unique_ptrs.
    environment = {"ASAN_OPTIONS": "detect_leaks=0"} | {name.upper(): str(value) for name, value in settings.items()}
    result = subprocess.run([program], input=data, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr.decode()
    return torch.frombuffer(bytearray(result.stdout), dtype=tensor.dtype).view(-1, tensor.shape[-1])


def check(
    program, old_size, sizes, width, dtype=torch.float32, settings=None, oracle_dtype=torch.float64, share=4e-6, **changes
):
    """Forward and backward of one problem within ``share`` of the largest element of the reference."""
    options = {
        "prefix": 1,
        "interpolation": "bicubic",
        "antialias": True,
        "align_corners": False,
        "square": False,
        "pad_to": None,
    }
    problem = {**options, **changes}
    names = {"prefix": "num_prefix_tokens", "square": "preserve_aspect_ratio"}
    keywords = {names.get(name, name): value for name, value in problem.items()}
    table = torch.randn(1, problem["prefix"] + old_size[0] * old_size[1], width).to(dtype)
    oracle = table.to(oracle_dtype).requires_grad_()
    expected = reference.resample_pos_embed_many(oracle, sizes, old_size, **keywords).reshape(-1, width)
    got = run(program, True, table[0], old_size, sizes, **problem, **(settings or {}))
    step = torch.finfo(dtype).eps if dtype != torch.float64 else 0.0
    atol = (share + step) * expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected.detach().double(), rtol=0, atol=atol)
    dcopies = torch.randn(expected.shape).to(dtype)
    (dtable,) = torch.autograd.grad(expected, oracle, dcopies.to(oracle_dtype))
    got = run(program, False, dcopies, old_size, sizes, **problem, **(settings or {}))
    atol = (share + step) * dtable.abs().max().item()
    torch.testing.assert_close(got.double(), dtable[0].double(), rtol=0, atol=atol)


CASES = {
    "up": {"old_size": (5, 4), "sizes": [(9, 11)], "width": 20},
    "down": {"old_size": (13, 17), "sizes": [(4, 5)], "width": 12},
    "up without antialias": {"old_size": (5, 4), "sizes": [(9, 11)], "width": 20, "antialias": False},
    "down without antialias": {"old_size": (13, 17), "sizes": [(4, 5)], "width": 12, "antialias": False},
    "far down without antialias": {"old_size": (5, 20), "sizes": [(7, 4), (3, 3)], "width": 20, "antialias": False},
    "bilinear": {"old_size": (5, 4), "sizes": [(9, 3)], "width": 20, "interpolation": "bilinear"},
    "bilinear with aligned corners": {
        "old_size": (5, 4),
        "sizes": [(9, 3)],
        "width": 20,
        "interpolation": "bilinear",
        "antialias": False,
        "align_corners": True,
    },
    "bilinear to half the size": {
        "old_size": (6, 17),
        "sizes": [(3, 8)],
        "width": 12,
        "interpolation": "bilinear",
        "antialias": False,
    },
    "one position": {"old_size": (1, 1), "sizes": [(3, 2)], "width": 4},
    "to one position": {"old_size": (6, 7), "sizes": [(1, 1)], "width": 4, "prefix": 0},
    "odd width": {"old_size": (3, 4), "sizes": [(5, 5)], "width": 7, "prefix": 5},
    "one channel": {"old_size": (3, 4), "sizes": [(5, 5)], "width": 1},
    "several chunks": {"old_size": (3, 3), "sizes": [(4, 5)], "width": 300},
    "wide": {"old_size": (2, 40), "sizes": [(2, 90)], "width": 140},
    "many": {"old_size": (4, 4), "sizes": [(6, 5), (4, 4), (1, 7), (3, 3)], "width": 24},
    "repeated": {"old_size": (4, 4), "sizes": [(6, 5), (1, 7), (6, 5), (4, 4), (6, 5), (4, 4)], "width": 70, "pad_to": 18},
    "squares": {"old_size": (4, 5), "sizes": [(6, 3), (4, 5), (2, 7)], "width": 24, "square": True},
    "padded": {"old_size": (4, 4), "sizes": [(6, 5), (4, 4), (1, 7), (3, 3)], "width": 8, "pad_to": 14},
    "cut": {"old_size": (4, 4), "sizes": [(6, 5), (4, 4)], "width": 8, "pad_to": 7, "prefix": 2},
}


@needs_gxx
@pytest.mark.parametrize("order", [0, 1, 7], ids=["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("case", CASES)
def test_the_cuda_source_is_right_in_every_order_of_threads(emulated, case, order):
    check(emulated, settings={"emulator_order": order}, **CASES[case])


@needs_gxx
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_source_is_right_in_every_dtype(emulated, dtype, width):
    check(emulated, (4, 3), [(5, 6), (4, 3), (2, 2)], width, dtype, prefix=2)


@needs_gxx
@pytest.mark.slow
def test_the_cuda_source_takes_the_largest_grids(emulated):
    # In float32, since positions of up to 512 are 3e-5 off the true ones, in F.interpolate as here; its backward adds up
    # thousands of terms in one float32 variable.
    oracle = {"oracle_dtype": torch.float32, "share": 5e-5}
    for antialias in (True, False):
        check(emulated, (2, 512), [(3, 512), (1, 7)], 8, torch.float16, antialias=antialias, **oracle)
        check(emulated, (512, 3), [(7, 512)], 4, antialias=antialias, **oracle)


every_loop = pytest.mark.parametrize("vector_bits", [0, 256, 512], ids=["portable", "AVX2", "AVX-512"])


@needs_gxx
@every_loop
@pytest.mark.parametrize("case", CASES)
def test_the_cpu_source_is_clean_under_the_sanitizers(sanitized, case, vector_bits):
    check(sanitized, settings={"vector_bits": vector_bits}, **CASES[case])


@needs_gxx
@every_loop
@pytest.mark.parametrize("width", [16, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_source_is_clean_in_every_dtype(sanitized, dtype, width, vector_bits):
    settings = {"vector_bits": vector_bits}
    check(sanitized, (4, 3), [(5, 6), (4, 3), (2, 2)], width, dtype, settings, prefix=2)
    check(sanitized, (4, 3), [(5, 6), (4, 3)], width, dtype, settings, prefix=2, pad_to=9)


@needs_gxx
def test_the_cpu_source_is_clean_with_threads(sanitized):
    """Where there is enough to do for them; without PyTorch's, of its own."""
    check(sanitized, (16, 16), [(24, 24), (16, 16)], 1000)
    check(sanitized, (8, 8), [(7, 9)] * 40, 130)


@needs_gxx
@pytest.mark.parametrize(
    ("removed", "kernel"), [(i, kernel) for kernel, count in (("forward", 2), ("backward", 3)) for i in range(count)]
)
def test_a_missing_barrier_shows_in_the_emulator(tmp_path, removed, kernel):
    """Each barrier of the kernels is needed, and the emulator sees it go."""
    source = (CSRC / "pos_embed_cuda.cu").read_text()
    start = source.index(f"resample_{kernel}_kernel(const")
    barriers = [start + m.start() for m in re.finditer(r"__syncthreads\(\);", source[start:])]
    broken = tmp_path / "broken.cu"
    at = barriers[removed]
    broken.write_text(source[:at] + source[at + len("__syncthreads();") :])
    sources = ("-DVITKERNELS_EMULATOR", "-x", "c++", broken, EMULATOR / "resample.cpp")
    program = compiled(tmp_path / "resample", "-O0", "-ffp-contract=off", *sources)
    failed = 0
    for order in (0, 1, 7):
        try:
            check(program, settings={"emulator_order": order}, **CASES["many"])
        except AssertionError:
            failed += 1
    assert failed


PROBE = """
#include "cuda_emulator.h"
__global__ void kernel(int* out) {{
    VITKERNELS_SHARED_MEMORY(shared);
    {body}
    out[threadIdx.x] = shared[threadIdx.x] == shared[threadIdx.x];
}}
int main() {{
    int out[64];
    VITKERNELS_LAUNCH(kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, out);
    for (int i = 0; i < 64; ++i) std::printf("%d", out[i]);
}}
"""


@needs_gxx
@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("shared[threadIdx.x] = 1;", 0, "1" * 64),
        ("__syncthreads();", 0, "0" * 64),  # uninitialised shared memory is NaN
        ("if (threadIdx.x) __syncthreads();", -6, "1 of 64 threads left while the others wait at a barrier"),
        ("shared[threadIdx.x + 1] = 1;", 1, "heap-buffer-overflow"),
    ],
    ids=["fine", "uninitialised", "divergent barrier", "overflow"],
)
def test_the_emulator_reports_what_a_gpu_would_not(tmp_path, body, code, text):
    (tmp_path / "probe.cpp").write_text(PROBE.format(body=body))
    program = compiled(tmp_path / "probe", *SANITIZED, tmp_path / "probe.cpp")
    result = subprocess.run([program], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert result.returncode == code, result.stderr
    assert text in result.stdout + result.stderr


def ptxas(architecture, tmp_path):
    """What ptxas reports for each kernel: (registers, bytes of stack, bytes of spills)."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    source = CSRC / "pos_embed_cuda.cu"
    command = ["nvcc", "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", source, "-o", tmp_path / "cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    return [tuple(map(int, found)) for found in re.findall(pattern, result.stderr)]


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a != 90 else ()) for a in (80, 86, 89, 90, 100, 120)]
)
def test_the_cuda_kernels_compile_without_spills(architecture, tmp_path):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{architecture}\n" not in known:
        pytest.skip(f"this nvcc does not know compute_{architecture}")
    kernels = ptxas(architecture, tmp_path)
    assert len(kernels) == 2 * 4 * 2  # directions, dtypes, vectors or single elements
    for stack, stores, loads, registers in kernels:
        assert stores == loads == 0
        assert stack <= 32  # the four weights of a window without antialias
        assert registers <= 128  # two blocks of 256 threads a multiprocessor
