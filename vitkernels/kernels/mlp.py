"""The MLP of a ViT block, forward: LayerNorm, two linear layers and the residual, on the launchers of those stems.

Plan cublas has no pass of its own for fc2's bias and residual, nor for the bias that proj left out of the stream x, if any
(``owed``). cuBLAS adds a residual, or a bias, but not both, so the biases go through its sum over F, exactly:

    (1) u'      = [act(z) | 1 | 1 | 0 ...]              by the pass over z that there is anyway
    (2) weight' = [fc2_weight | owed | fc2_bias | ...]  (D, F + 8), made for each call: no copy of weights can be out of date
    (3) y       = x + u' @ weight'^T                    addmm

Units (B * T * D elements) for F = 4 D: LayerNorm 2, fc1 5, act 8, fc2 6, where the pass after fc2 makes it 5 + 3; and proj,
without its bias, is an addmm of 3 instead of 2 + 3. weight' costs 2 D (F + 8) elements, and fc2 one step of K = 64 more, which
is worth 0.35 units at the ridge of an H200 (184 FLOP/byte). Saved are 2 M D elements here and 2 M D in proj: below M = F rows,
where weight' takes all that is saved here, the pass runs. ViT-B/16 at B = 256: 4 units are 72 us of a block at 4.3 TB/s.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from .. import _env
from . import layer_norm, linear

if TYPE_CHECKING:
    from ._aot import Shape


def launch_mlp_fwd(
    x: Tensor,
    owed: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    out_dtype: torch.dtype,
    keep: bool,
    allow_tf32: bool,
    plan: str,
    arch: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, mean, rstd and, where ``keep`` asks for it, z; else an empty tensor."""
    gemm = (allow_tf32, plan, arch)
    h, mean, rstd = layer_norm.launch_layer_norm_fwd(x, norm_weight, norm_bias, eps, fc1_weight.dtype, owed)
    biases = [bias for bias in (owed, fc2_bias) if bias is not None]
    plain = layer_scale is None and drop_path is None and biases
    if plain and _biases_ride_along(x, h, fc1_weight, fc1_bias, fc2_weight, act, out_dtype, plan, arch):
        _, z = linear.launch_linear_fwd(h, fc1_weight, fc1_bias, act, None, None, None, h.dtype, "only", *gemm)
        del h
        u = linear.activate(linear.matrix(z), act, len(biases))
        z = z if keep else z.new_empty(0)
        return _add_fc2(x, u, fc2_weight, biases), mean, rstd, z
    preact = "also" if keep and act is not None else "none"
    u, z = linear.launch_linear_fwd(h, fc1_weight, fc1_bias, act, None, None, None, h.dtype, preact, *gemm)
    del h
    if owed is not None:
        fc2_bias = owed if fc2_bias is None else owed + fc2_bias
    y, _ = linear.launch_linear_fwd(u, fc2_weight, fc2_bias, None, layer_scale, drop_path, x, out_dtype, "none", *gemm)
    return y, mean, rstd, u if keep and act is None else z


def _biases_ride_along(x, h, fc1_weight, fc1_bias, fc2_weight, act, out_dtype, plan: str, arch: str) -> bool:
    rows, hidden = h.numel() // h.shape[-1], fc2_weight.shape[1]
    if rows < hidden or not x.is_contiguous() or _env.ADDMM_COPIES:
        return False
    if not x.dtype == out_dtype == fc2_weight.dtype != torch.float32:
        return False
    h = linear.matrix(h)
    if linear.gelu_in_cublas(act, h, fc1_weight, fc1_bias, plan, arch):  # saves 8 units, the biases 4
        return False
    gemms = (("plain" if act is None else linear.kind_of(act), fc1_weight), ("residual", fc2_weight))
    return all(linear.config_of(kind, h, weight, plan, arch) is None for kind, weight in gemms)


def _add_fc2(x: Tensor, u: Tensor, weight: Tensor, biases: list[Tensor]) -> Tensor:
    """Equations (2) and (3)."""
    with torch._C._DisableAutocast():  # the operator's dtypes are its arguments'
        columns = [bias.to(weight.dtype)[:, None] for bias in biases]
        zeroed = columns[-1].expand(-1, linear.EXTRA - len(columns))
        weight = torch.cat((weight, *columns, zeroed), 1)
        return linear.shaped(torch.addmm(x.view(-1, x.shape[-1]), u, weight.t()), x.shape)


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of the plan cublas of a ViT's MLP of this shape, with biases in fc2's product."""
    yield f"D={shape.width} cublas", partial(_aot, shape.train_batch * shape.tokens, shape.width, shape.hidden)


def _aot(M: int, D: int, F: int) -> None:
    arch = f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    x = torch.empty(max(M, F), D, dtype=torch.bfloat16, device="meta")
    fc1, fc2, wide, narrow = x.new_empty(F, D), x.new_empty(D, F), x.new_empty(F), x.new_empty(D)
    layers = (narrow, narrow, 1e-6, fc1, wide, fc2, narrow)
    _, mean, rstd, _ = launch_mlp_fwd(
        x, narrow, *layers, "gelu", None, None, x.dtype, True, False, "cublas", arch
    )  # fmt: skip
    layer_norm.launch_add_layer_norm_bwd(
        x, x, x, None, narrow, narrow, None, mean, rstd, x.dtype, x.dtype, True, True, narrow
    )  # fmt: skip
