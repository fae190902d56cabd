"""The order in which the tiles of a GEMM are computed."""

import triton
import triton.language as tl


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the tile; GROUP_M rows of tiles share their columns of the second operand in the L2 cache."""
    group = index // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = index % (GROUP_M * tiles_n)
    return first + within % rows, within // rows
