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


# Datasheets print tensor-core rates with 2:4 sparsity; dense is half.
CHIPS = {
    "h200": Chip("sm_90", 132, 989.5, 4800, "NVIDIA H200 datasheet, SXM: 1979 TFLOPS sparse, 4.8 TB/s"),
    "h100": Chip("sm_90", 132, 989.5, 3350, "NVIDIA H100 datasheet, SXM: 1979 TFLOPS sparse, 3.35 TB/s"),
    "a100": Chip("sm_80", 108, 312, 2039, "NVIDIA A100 datasheet, 80 GB SXM: 312 TFLOPS dense, 2039 GB/s"),
    "l40s": Chip("sm_89", 142, 362.05, 864, "NVIDIA L40S datasheet: 362.05 TFLOPS dense, 864 GB/s"),
    "b200": Chip("sm_100", 148, 2250, 8000, "NVIDIA DGX B200 datasheet, an eighth: 36 PFLOPS sparse, 64 TB/s"),
    "rtx5090": Chip(
        "sm_120", 170, 209.5, 1792, "NVIDIA RTX Blackwell whitepaper: 209.5 TFLOPS dense (FP32 accumulate), 1792 GB/s"
    ),
}
