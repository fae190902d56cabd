"""Activations and their derivatives on the device, in float32. Names are those of ``reference/linear.py``.

erf-GELU for float32 results calls ``erf``. For bfloat16 and float16 results it needs one ex2 and six fused multiply-adds:

    gelu(z) = max(z, 0) - |z| * Phi(-|z|),    log2 Phi(-a) = a polynomial of degree 6 in a

fitted by us in the minimax sense (Lawson's iteration) on 0 <= a <= 6.5, where gelu(-a) is 2.6e-10. The error is relative,
7.7e-5 of Phi(-a) in float32 arithmetic, so also the left tail is right to the rounding of float16 (4.9e-4) and bfloat16
(2.0e-3). PyTorch's ``0.5 * (1 + erf)`` has lost half of its digits at z = -4 and all of them at -5.7.
"""

import triton
import triton.language as tl

# Coefficients of log2 Phi(-a), lowest first.
_C0 = tl.constexpr(-1.0001063346862793)
_C1 = tl.constexpr(-1.149621605873108)
_C2 = tl.constexpr(-0.4624537527561188)
_C3 = tl.constexpr(-0.050272636115550995)
_C4 = tl.constexpr(0.006880628876388073)
_C5 = tl.constexpr(-0.0005615060799755156)
_C6 = tl.constexpr(2.008577575907111e-05)
_FAR = tl.constexpr(16.0)  # log2 Phi(-a) <= -144 there: nothing is left, and infinities stay out of the polynomial

_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# tanh-GELU is z * sigmoid(2 * sqrt(2 / pi) * (z + 0.044715 z^3)).
_TANH_LINEAR = tl.constexpr(1.5957691216057308)
_TANH_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def _normal_tail(a):
    """Phi(-a) for 0 <= a <= _FAR."""
    p = a * _C6 + _C5
    p = p * a + _C4
    p = p * a + _C3
    p = p * a + _C2
    p = p * a + _C1
    p = p * a + _C0
    return tl.exp2(p)


@triton.jit
def _sigmoid(t):
    return 1.0 / (1.0 + tl.exp2(t * -_LOG2_E))


@triton.jit
def _sigmoid_and_slope(t):
    """s and s (1 - s), which has no cancellation here, and no overflow."""
    a = tl.exp2(tl.abs(t) * -_LOG2_E)
    s = 1.0 / (1.0 + a)
    return tl.where(t < 0.0, a * s, s), a * s * s


@triton.jit
def activation(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    """``ACT(z)``; ``EXACT`` for a float32 result. NaN stays NaN."""
    if ACT == "gelu":
        if EXACT:
            return z * 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        a = tl.minimum(tl.abs(z), _FAR)
        return tl.where(z < 0.0, 0.0, z) - a * _normal_tail(a)
    elif ACT == "gelu_tanh":
        return z * _sigmoid(z * (z * z * _TANH_CUBIC + _TANH_LINEAR))
    elif ACT == "quick_gelu":
        return z * _sigmoid(z * _QUICK)
    elif ACT == "silu":
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def activation_and_derivative(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    """``ACT(z)`` and ``ACT'(z)``."""
    if ACT == "gelu":
        density = tl.exp2(z * z * (-0.5 * _LOG2_E)) * _INV_SQRT_2PI
        if EXACT:
            cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
            return z * cdf, cdf + z * density
        else:
            a = tl.minimum(tl.abs(z), _FAR)
            tail = _normal_tail(a)
            cdf = tl.where(z < 0.0, tail, 1.0 - tail)
            return tl.where(z < 0.0, 0.0, z) - a * tail, cdf + z * density
    elif ACT == "gelu_tanh":
        square = z * z
        s, slope = _sigmoid_and_slope(z * (square * _TANH_CUBIC + _TANH_LINEAR))
        return z * s, s + z * slope * (square * (3.0 * _TANH_CUBIC) + _TANH_LINEAR)
    elif ACT == "quick_gelu":
        s, slope = _sigmoid_and_slope(z * _QUICK)
        return z * s, s + z * slope * _QUICK
    elif ACT == "silu":
        s, slope = _sigmoid_and_slope(z)
        return z * s, s + z * slope
    else:
        return z, 1.0
