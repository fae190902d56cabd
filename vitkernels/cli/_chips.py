"""Datasheet rates of the GPUs that ``vitkernels roofline`` knows."""

from dataclasses import dataclass

# What dense work reaches of the H200's datasheet: 790 of 989 TFLOP/s (cuBLAS, bf16, 8192^3) and 4.3 of 4.8 TB/s (copy).
DATASHEET_SHARES = (0.80, 0.90)


@dataclass(frozen=True)
class Chip:
    """One GPU.

    Attributes:
        arch: as Triton names it.
        tflops: 10^12 FLOP/s, dense bfloat16 on tensor cores with float32 accumulation.
        gbs: 10^9 bytes/s, reads and writes of device memory together.
        source: where the rates are from.
        attainable: the share of ``tflops`` and of ``gbs`` that a large GEMM and a copy reach; 1 for measured rates.
    """

    arch: str
    multiprocessors: int
    tflops: float
    gbs: float
    source: str
    attainable: tuple[float, float] = DATASHEET_SHARES


# Datasheets print tensor-core rates with 2:4 sparsity; dense is half. Each is SMs x boost clock x dense FLOPs an SM and clock
# (1024 on sm_89, half of it with float32 accumulation on GeForce, 2048 on sm_80, 4096 on sm_90, 8192 on sm_100), which the
# tests check. The figures were compared in 2026 with copies of these tables: H100 and A100 on archive-lib.hpctech.co.jp and
# glennklockwood.com, L40S on mullet.se (its dense rate, 362.05, is less than half of its sparse one, 733), B200 on
# glennklockwood.com. The whitepaper's 209.5 for the RTX 5090 was found in no copy; it follows from the clock.
CHIPS = {
    "h200": Chip("sm_90", 132, 989.5, 4800, "NVIDIA H200 datasheet (2024), SXM: 1979 TFLOPS sparse, 4.8 TB/s"),
    "h100": Chip("sm_90", 132, 989.5, 3350, "NVIDIA H100 datasheet (2023), SXM: 1979 TFLOPS sparse, 3.35 TB/s"),
    "a100": Chip("sm_80", 108, 312, 2039, "NVIDIA A100 datasheet (2021), 80 GB SXM: 312 TFLOPS dense, 2039 GB/s"),
    "l40s": Chip("sm_89", 142, 362.05, 864, "NVIDIA L40S datasheet (2023): 362.05 TFLOPS dense, 864 GB/s"),
    "b200": Chip(
        "sm_100", 148, 2250, 8000, "NVIDIA Blackwell architecture technical brief (2024), HGX B200: 4.5 PFLOPS sparse, 8 TB/s"
    ),
    "rtx5090": Chip(
        "sm_120", 170, 209.5, 1792, "NVIDIA RTX Blackwell whitepaper (2025): 209.5 TFLOPS dense (FP32 accumulate), 1792 GB/s"
    ),
}
