"""covariance_weights: the Gaussian covariance weights of every scope (arXiv 2605.11538), a program each, in float64.

Two launches at most: means over sequences where a reading of the paper needs them, then everything else. A program
passes over the tokens of its scope five times, two-pass numerics without anything in between written to memory; these
are a few numbers a token, where the head has as many as it is deep and the logits as the vocabulary is long.

Bytes: reads five times two numbers, a flag and an index a token; writes three numbers a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import CovarianceWeighting
from ...covariance import CovarianceStats
from ...segments import Segments
from .configs import options


@triton.jit
def _place(o_t, end, order, B_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the next tokens of a segment stand: [B] indices and which of them there are."""
    i_t = o_t + tl.arange(0, B_T)
    m_t = i_t < end
    if order is not None:
        i_t = tl.load(order + i_t, mask=m_t, other=0)
    return i_t, m_t


@triton.jit(do_not_specialize_on_alignment=["logprobs", "valid", "order", "offsets", "lengths", "means"])
def sequence_means_kernel(  # type: ignore[no-untyped-def]
    logprobs,  # [N]
    valid,  # [N] bool
    order,  # [N] int64 or None
    offsets,  # [S + 1] int64
    lengths,  # [S] float64
    means,  # [S] float64
    B_T: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + i_s), tl.load(offsets + i_s + 1)
    n = tl.zeros([B_T], tl.float64)
    sum_x = tl.zeros([B_T], tl.float64)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        n += m_v.to(tl.float64)
        sum_x += tl.load(logprobs + i_t, mask=m_v, other=0.0).to(tl.float64)
    length = tl.sum(n, 0)
    tl.store(lengths + i_s, length)
    tl.store(means + i_s, tl.sum(sum_x, 0) / tl.maximum(length, 1.0))


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    begin, end, order, logprobs, advantages, valid, segment, lengths, NOISE: tl.constexpr, B_T: tl.constexpr
):
    """How many valid tokens a scope has, the means of x and of A, and the standard deviation of c below which there is
    nothing but rounding."""
    n_b = tl.zeros([B_T], tl.float64)
    x_b, a_b, share_b = n_b, n_b, n_b
    x_max, a_max = n_b, n_b
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        x = tl.load(logprobs + i_t, mask=m_v, other=0.0).to(tl.float64)
        a = tl.load(advantages + i_t, mask=m_v, other=0.0).to(tl.float64)
        one = m_v.to(tl.float64)
        if lengths is not None:
            # 1 / length per token makes every response count once.
            share = one / tl.load(lengths + tl.load(segment + i_t, mask=m_v, other=0), mask=m_v, other=1.0)
        else:
            share = one
        n_b += one
        share_b += share
        x_b += x
        a_b += a * share
        x_max = tl.maximum(x_max, tl.abs(x))
        a_max = tl.maximum(a_max, tl.abs(a))
    n = tl.sum(n_b, 0)
    shares = tl.sum(share_b, 0)
    mean_x = tl.sum(x_b, 0) / tl.maximum(n, 1.0)
    mean_a = tl.sum(a_b, 0) / tl.where(shares > 0.0, shares, 1.0)
    return n, mean_x, mean_a, NOISE * tl.max(x_max, 0) * tl.max(a_max, 0)


@triton.jit
def _deviations(  # type: ignore[no-untyped-def]
    i_t, m_v, logprobs, advantages, mean_x, mean_a, segment, means
):
    """The token's deviation of A, and of x times that: da and c, zero where masked."""
    x = tl.load(logprobs + i_t, mask=m_v, other=0.0).to(tl.float64)
    a = tl.load(advantages + i_t, mask=m_v, other=0.0).to(tl.float64)
    if means is not None:
        dx = x - tl.load(means + tl.load(segment + i_t, mask=m_v, other=0), mask=m_v, other=0.0)
    else:
        dx = x - mean_x
    da = tl.where(m_v, a - mean_a, 0.0)
    return da, tl.where(m_v, dx * da, 0.0)


@triton.jit(
    do_not_specialize_on_alignment=[
        "logprobs", "advantages", "valid", "order", "offsets", "segment", "lengths", "means",
        "weights", "covariance", "deviation", "std",
    ],
)  # fmt: skip
def covariance_weights_kernel(  # type: ignore[no-untyped-def]
    logprobs,  # [N]
    advantages,  # [N]
    valid,  # [N] bool
    order,  # [N] int64 or None
    offsets,  # [G + 1] int64
    segment,  # [N] int64 sequence of each token, or None
    lengths,  # [S] float64 of the sequences, or None: means over responses, not tokens
    means,  # [S] float64 of the sequences, or None: x is centred in the scope
    weights,  # [N] float64, as are the next two
    covariance,
    deviation,
    std,  # [G] float64
    NOISE: tl.constexpr,  # share of max |x| max |A| below which a standard deviation is rounding
    BANDWIDTH_EPS: tl.constexpr,
    NUMEL: tl.constexpr,
    B_T: tl.constexpr,
):
    i_g = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + i_g), tl.load(offsets + i_g + 1)
    if begin == end:  # most of them, where nobody has counted how many scopes there are
        tl.store(std + i_g, 0.0)
        return
    n, mean_x, mean_a, floor = _moments(begin, end, order, logprobs, advantages, valid, segment, lengths, NOISE, B_T)

    c_b = tl.zeros([B_T], tl.float64)
    least = tl.full([B_T], float("inf"), tl.float64)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        da, c = _deviations(i_t, m_v, logprobs, advantages, mean_x, mean_a, segment, means)
        tl.store(deviation + i_t, da, mask=m_t)
        tl.store(covariance + i_t, c, mask=m_t)
        c_b += c
        least = tl.where(m_v, tl.minimum(least, c * c), least)
    mean_c = tl.sum(c_b, 0) / tl.maximum(n, 1.0)
    least_square = tl.min(least, 0)

    dc_b = tl.zeros([B_T], tl.float64)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        _, c = _deviations(i_t, m_v, logprobs, advantages, mean_x, mean_a, segment, means)
        dc = tl.where(m_v, c - mean_c, 0.0)
        dc_b += dc * dc
    variance = tl.sum(dc_b, 0) / tl.maximum(n, 1.0)
    # Zero within rounding: two tokens always have equal c, constant x or A leaves noise. NaN is not zero.
    sigma = tl.where(variance <= floor * floor, 0.0, tl.sqrt(variance))
    tl.store(std + i_g, sigma)
    bandwidth = sigma + BANDWIDTH_EPS
    # Without variance every exponent is zero, and every weight one.
    factor = tl.where(sigma == 0.0, 0.0, 0.5 / tl.where(sigma == 0.0, 1.0, bandwidth * bandwidth))

    kernel_b = tl.zeros([B_T], tl.float64)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        _, c = _deviations(i_t, m_v, logprobs, advantages, mean_x, mean_a, segment, means)
        kernel_b += tl.where(m_v, tl.exp((least_square - c * c) * factor), 0.0)
    goal = (end - begin).to(tl.float64) if NUMEL else n
    normaliser = goal / tl.where(n > 0.0, tl.sum(kernel_b, 0), 1.0)

    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        _, c = _deviations(i_t, m_v, logprobs, advantages, mean_x, mean_a, segment, means)
        w = tl.where(m_v, tl.exp((least_square - c * c) * factor) * normaliser, 0.0)
        tl.store(weights + i_t, w, mask=m_t)


def covariance_weights(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,  # needed by two of the readings
    weighting: CovarianceWeighting,
) -> CovarianceStats:
    """Gaussian covariance weights of every scope (arXiv 2605.11538), two-pass, in float64."""
    device = logprobs.device
    weights, covariance, deviation = (torch.empty_like(logprobs, dtype=torch.float64) for _ in range(3))
    std = torch.empty(scopes.bound, dtype=torch.float64, device=device)
    by_sequence = weighting.centering == "sequence"
    by_response = weighting.advantage_centering == "response"
    lengths = means = segment = None
    if by_sequence or by_response:
        assert sequences is not None
        segment = sequences.segment
        lengths, means = torch.empty(2, sequences.bound, dtype=torch.float64, device=device)
        sequence_means_kernel[(sequences.bound,)](
            logprobs=logprobs, valid=valid, order=sequences.order, offsets=sequences.offsets,
            lengths=lengths, means=means, **options("weights", device),
        )  # fmt: skip
    covariance_weights_kernel[(scopes.bound,)](
        logprobs=logprobs, advantages=advantages, valid=valid, order=scopes.order, offsets=scopes.offsets,
        segment=segment, lengths=lengths if by_response else None, means=means if by_sequence else None,
        weights=weights, covariance=covariance, deviation=deviation, std=std,
        NOISE=8 * torch.finfo(logprobs.dtype).eps, BANDWIDTH_EPS=weighting.bandwidth_eps,
        NUMEL=weighting.normalizer == "numel", **options("weights", device),
    )  # fmt: skip
    return CovarianceStats(weights, covariance, deviation, std)
