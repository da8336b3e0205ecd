"""Functions of the kernels that Triton's language lacks, and what turns a product into a logit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """A few ulp in float32 and float64, also near 0, where 1 - 2 / (exp(2x) + 1) would cancel: there it is the
    seventh convergent of Lambert's continued fraction, off by 2e-16 at most. (libdevice has one, but is not there
    under the interpreter.)"""
    a = tl.abs(x)
    # Only small values enter, so that no square overflows in the branch that is not taken.
    n = tl.where(a < 0.5, x, 0.0)
    q = n * n
    near = n * (135135.0 + q * (17325.0 + q * (378.0 + q))) / (135135.0 + q * (62370.0 + q * (3150.0 + q * 28.0)))
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.5, near, tl.where(x < 0.0, -far, far))


@triton.jit
def inverse(x):  # type: ignore[no-untyped-def]
    """1 / x, rounded once: plain division of float32 is an approximation."""
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, x)
    else:
        return 1.0 / x


@triton.jit
def logit(product, bias, per_temperature, SCALE: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """softcap(scale * (product + bias)) / temperature, and its derivative in the product. ``bias`` and
    ``per_temperature`` (1 / temperature) may be None, as may CAP."""
    x = product
    if bias is not None:
        x += bias
    if CAP is not None:
        t = tanh(x * (SCALE / CAP))
        z = t * CAP
        slope = (1.0 - t * t) * SCALE
    else:
        z = x * SCALE
        slope = tl.full(x.shape, SCALE, x.dtype)
    if per_temperature is not None:
        z *= per_temperature
        slope *= per_temperature
    return z, slope
