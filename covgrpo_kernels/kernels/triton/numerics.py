"""What kernels share: functions that Triton's language lacks, from a product to a logit, a block of an online softmax,
pieces of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from ..interface import LOG_ZERO, NO_MAX

_NO_MAX = tl.constexpr(NO_MAX)
_LOG_ZERO = tl.constexpr(LOG_ZERO)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


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
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 to a few ulp in float64, and in float32 for x <= 1 (beyond, as exact as Triton's exp), also near 0,
    where the subtraction would cancel: there it is 2t / (1 - t) with t = tanh(x / 2), in which for a large x the other
    difference would cancel. (libdevice has one, but is not there under the interpreter.)"""
    t = tanh(0.5 * x)
    return tl.where(x > 1.0, tl.exp(x) - 1.0, 2.0 * t / (1.0 - t))


@triton.jit
def inverse(x):  # type: ignore[no-untyped-def]
    """1 / x, rounded once: plain division of float32 is an approximation."""
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, x)
    else:
        return 1.0 / x


@triton.jit
def log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) of x >= 0 to a few ulp: the rounding of 1 + x is undone by the factor x / ((1 + x) - 1). (libdevice
    has one, but is not there under the interpreter.)"""
    total = 1.0 + x
    added = total - 1.0
    return tl.where(added == 0.0, x, tl.log(total) * (x * inverse(tl.where(added == 0.0, 1.0, added))))


@triton.jit
def _compare_and_swap(x, RUN: tl.constexpr, DISTANCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each two elements of a row that are DISTANCE apart the smaller comes first; in every other run of RUN elements
    the larger one."""
    h = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * DISTANCE), 2, DISTANCE])
    partner = tl.reshape(tl.sum(h, 2, keep_dims=True) - h, x.shape)
    i_k = tl.arange(0, x.shape[1])[None, :]
    takes_larger = ((i_k & DISTANCE) != 0) != ((i_k & RUN) != 0)
    return tl.where((x > partner) != takes_larger, partner, x)


@triton.jit
def sort_rows(x):  # type: ignore[no-untyped-def]
    """Each row of integers [R, K] in ascending order, K a power of two up to 256: a bitonic network. (The one of
    Triton's library takes a minute for a hundred rows under the interpreter, whose only fast reductions are sums and
    maxima.)"""
    for stage in tl.static_range(1, 9):
        if 2**stage <= x.shape[1]:
            for step in tl.static_range(0, stage):
                x = _compare_and_swap(x, 2**stage, 2 ** (stage - 1 - step))
    return x


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


@triton.jit
def online_softmax_block(z, m, s, u, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds logits [R, C] to a running softmax: maximum m, sum s and entropy sum u [R]."""
    return online_softmax_block_with_maximum(z, tl.max(z, 1), m, s, u, ENTROPY)


@triton.jit
def online_softmax_block_with_maximum(z, largest, m, s, u, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Likewise, for a caller that needs the largest logit of each row itself."""
    mb = tl.maximum(largest, _NO_MAX)  # a block of -inf has no maximum
    # z comes out of a `tl.where`: else a compiler would fuse the product that made it with this difference, and the
    # largest logit would not give zero.
    d = z - mb[:, None]
    at_max = d == 0.0
    e = tl.where(at_max, 0.0, tl.exp(d))
    ties = tl.sum(at_max.to(z.dtype), 1) - 1.0
    sb = tl.sum(e, 1) + tl.maximum(ties, 0.0)
    top = tl.maximum(m, mb)
    gap, gap_b = top - m, top - mb
    w, wb = tl.exp(-gap), tl.exp(-gap_b)
    # The smaller of the two maxima joins the sum of the others.
    lesser = tl.minimum(w, wb)
    if ENTROPY:
        ub = -tl.sum(e * tl.maximum(d, _LOG_ZERO), 1)
        u = w * (u + gap * s) + wb * (ub + gap_b * sb) + lesser * tl.maximum(gap, gap_b)
    return top, w * s + wb * sb + lesser, u


@triton.jit
def _halves(x):  # type: ignore[no-untyped-def]
    """Left and right half of the columns of [R, C]."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def slices_of(x, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """So many pieces of the columns of [R, C], a power of two, from left to right."""
    if SLICES == 1:
        return (x,)
    else:
        left, right = _halves(x)
        return slices_of(left, SLICES // 2) + slices_of(right, SLICES // 2)


@triton.jit
def round_up_to_bfloat16(x):  # type: ignore[no-untyped-def]
    """The smallest bfloat16 that is not less than x; NaN stays NaN. (Casts round to nearest.)"""
    if x.dtype == tl.float64:
        near = x.to(tl.float32)
        # Half a unit of float32 at most is missing. A whole one may be one too many: never less is what counts.
        single = tl.where(near.to(tl.float64) < x, near + (tl.abs(near) * 1.2e-7 + 1e-45), near)
    else:
        single = x
    bits = single.to(tl.int32, bitcast=True)
    # A bfloat16 is the upper half of a float32. Cutting the lower half off moves a number toward zero: up where it is
    # negative; where it is positive the carry of what is added moves it up, from the largest number to infinity.
    upper = tl.where(bits < 0, bits, bits + 0xFFFF) >> 16
    upper = tl.where(single == single, upper, 0x7FC0)
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def operand(x):  # type: ignore[no-untyped-def]
    """What a matrix product takes: the interpreter's products of bfloat16 are wrong."""
    if _INTERPRETED:  # noqa: SIM102
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float32)
    return x


@triton.jit
def dot_of_parts(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b for ``a`` in float32 and ``b`` of any dtype. Where that has 16 bits, ``a`` is the sum of two numbers
    of it, so that tensor cores can be used and at least 16 bits of its mantissa count; in float16 what is below 6e-8 is
    lost, as it is where dZ is rounded."""
    b = operand(b)
    if b.dtype.primitive_bitwidth == 16:
        high = a.to(b.dtype)
        acc = tl.dot(high, b, acc)
        acc = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def rounded(x, out):  # type: ignore[no-untyped-def]
    """float32 numbers in the dtype of what ``out`` points to, rounded to the nearest: the interpreter cuts bits off
    when it makes bfloat16."""
    if _INTERPRETED:  # noqa: SIM102
        if out.dtype.element_ty == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(out.dtype.element_ty)


@triton.jit
def counted_total(norm, n_rows, LARGEST_SHARE: tl.constexpr, B_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [N] float64: the sum of those that are finite; the largest T with T = sum of min(norm, LARGEST_SHARE * T / n),
    n of them being positive (the sum itself where LARGEST_SHARE is None); n; and how many are not finite.

    By Newton's method from above: in every step those over the limit that belongs to the last T count as if they were
    at the limit. It ends when none is added to them."""
    i_b = tl.arange(0, B_R)
    total_b = tl.zeros([B_R], tl.float64)
    n_bad_b = tl.zeros([B_R], tl.int32)
    n_counted_b = tl.zeros([B_R], tl.int32)
    for o_r in range(0, n_rows, B_R):
        m_r = o_r + i_b < n_rows
        x = tl.load(norm + o_r + i_b, mask=m_r, other=0.0)
        is_finite = x < float("inf")
        total_b += tl.where(is_finite, x, 0.0)
        n_counted_b += (is_finite & (x > 0.0)).to(tl.int32)
        n_bad_b += (m_r & (is_finite == 0)).to(tl.int32)
    total = tl.sum(total_b, 0)
    n_counted = tl.sum(n_counted_b, 0)
    counted = total
    if LARGEST_SHARE is not None:
        limit = LARGEST_SHARE / tl.maximum(n_counted, 1).to(tl.float64)
        n_over = tl.sum(tl.zeros([B_R], tl.int32), 0)
        n_before = n_over - 1
        while n_over > n_before:
            n_before = n_over
            others_b = tl.zeros([B_R], tl.float64)
            n_over_b = tl.zeros([B_R], tl.int32)
            for o_r in range(0, n_rows, B_R):
                x = tl.load(norm + o_r + i_b, mask=o_r + i_b < n_rows, other=0.0)
                is_over = (x < float("inf")) & (x > counted * limit)
                others_b += tl.where((x < float("inf")) & (is_over == 0), x, 0.0)
                n_over_b += is_over.to(tl.int32)
            n_over = tl.sum(n_over_b, 0)
            left = 1.0 - n_over.to(tl.float64) * limit
            counted = tl.where(left > 0.0, tl.sum(others_b, 0) / left, counted)
    return total, counted, n_counted, tl.sum(n_bad_b, 0)
