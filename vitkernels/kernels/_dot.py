"""Sums of matrix products over tiles."""

import triton
import triton.language as tl


@triton.jit
def add_product(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b. True float32: the tile's sum apart, or 1024 terms are one chain of additions, with three times the error.

    Triton would add the terms to ``sums`` one by one after all, were it not for max_num_imprecise_acc, whose number is FP8's.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        sums += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums
