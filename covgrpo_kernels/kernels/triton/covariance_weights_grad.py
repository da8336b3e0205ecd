"""covariance_weights_grad: the gradient of the covariance weights in the log-probs, a program a scope, in float64.

Two launches at most: everything within a scope, then, where log-probs are centred in their sequence, the mean over each
sequence is taken off.

Bytes: reads four times up to four numbers, a flag and an index a token; writes and reads a number a token twice.
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
from .covariance_weights import _place


@triton.jit
def _take_mean_off(begin, end, order, valid, ddx, out, n, total, B_T: tl.constexpr):  # type: ignore[no-untyped-def]
    mean = total / tl.maximum(n, 1.0)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        tl.store(out + i_t, tl.where(m_v, tl.load(ddx + i_t, mask=m_v, other=0.0) - mean, 0.0), mask=m_t)


@triton.jit
def _softmax_grad(i_t, m_v, weights, weights_grad, mean_u, varies):  # type: ignore[no-untyped-def]
    """dL/dq of the weights W = constant * softmax(q)."""
    w = tl.load(weights + i_t, mask=m_v, other=0.0)
    u = tl.load(weights_grad + i_t, mask=m_v, other=0.0).to(tl.float64)
    return tl.where(varies, w * (u - mean_u), 0.0)


@triton.jit(
    do_not_specialize_on_alignment=[
        "weights_grad", "weights", "covariance", "deviation", "valid", "order", "offsets", "std", "ddx", "out",
    ],
)  # fmt: skip
def scope_grad_kernel(  # type: ignore[no-untyped-def]
    weights_grad,  # [N] u = dL/dW
    weights,  # [N] float64, as the next two
    covariance,
    deviation,
    valid,  # [N] bool
    order,  # [N] int64 or None
    offsets,  # [G + 1] int64
    std,  # [G] float64
    ddx,  # [N] float64, dL/d(deviation of x)
    out,  # [N] float64, dL/dx, or None: x is not centred in the scope
    BANDWIDTH_EPS: tl.constexpr,
    B_T: tl.constexpr,
):
    i_g = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + i_g), tl.load(offsets + i_g + 1)
    if begin == end:
        return
    sigma = tl.load(std + i_g)
    varies = sigma != 0.0
    bandwidth = tl.where(varies, sigma + BANDWIDTH_EPS, 1.0)

    n_b = tl.zeros([B_T], tl.float64)
    w_b, wu_b, c_b = n_b, n_b, n_b
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        w = tl.load(weights + i_t, mask=m_v, other=0.0)
        n_b += m_v.to(tl.float64)
        w_b += w
        wu_b += w * tl.load(weights_grad + i_t, mask=m_v, other=0.0).to(tl.float64)
        c_b += tl.load(covariance + i_t, mask=m_v, other=0.0)
    n, sum_w = tl.sum(n_b, 0), tl.sum(w_b, 0)
    n_or_1 = tl.maximum(n, 1.0)
    mean_u = tl.sum(wu_b, 0) / tl.where(sum_w != 0.0, sum_w, 1.0)
    mean_c = tl.sum(c_b, 0) / n_or_1

    db_b = tl.zeros([B_T], tl.float64)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        c = tl.load(covariance + i_t, mask=m_v, other=0.0)
        dq = _softmax_grad(i_t, m_v, weights, weights_grad, mean_u, varies)
        db_b += dq * c * c / (bandwidth * bandwidth * bandwidth)
    dvariance = tl.sum(db_b, 0) / (2.0 * tl.where(varies, sigma, 1.0))

    ddx_b = tl.zeros([B_T], tl.float64)
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        c = tl.load(covariance + i_t, mask=m_v, other=0.0)
        dq = _softmax_grad(i_t, m_v, weights, weights_grad, mean_u, varies)
        dc = -dq * c / (bandwidth * bandwidth) + dvariance * 2.0 / n_or_1 * (c - mean_c)
        own = tl.where(m_v, dc * tl.load(deviation + i_t, mask=m_v, other=0.0), 0.0)
        tl.store(ddx + i_t, own, mask=m_t)
        ddx_b += own
    if out is not None:
        tl.debug_barrier()  # other threads read what was stored
        _take_mean_off(begin, end, order, valid, ddx, out, n, tl.sum(ddx_b, 0), B_T)


@triton.jit(do_not_specialize_on_alignment=["valid", "order", "offsets", "ddx", "out"])
def centre_grad_kernel(  # type: ignore[no-untyped-def]
    valid,  # [N] bool
    order,  # [N] int64 or None
    offsets,  # [S + 1] int64
    ddx,  # [N] float64
    out,  # [N] float64
    B_T: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + i_s), tl.load(offsets + i_s + 1)
    n_b = tl.zeros([B_T], tl.float64)
    ddx_b = n_b
    for o_t in range(begin, end, B_T):
        i_t, m_t = _place(o_t, end, order, B_T)
        m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
        n_b += m_v.to(tl.float64)
        ddx_b += tl.load(ddx + i_t, mask=m_v, other=0.0)
    _take_mean_off(begin, end, order, valid, ddx, out, tl.sum(n_b, 0), tl.sum(ddx_b, 0), B_T)


def covariance_weights_grad(
    weights_grad: Tensor,  # [N] dL/dW
    stats: CovarianceStats,
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
) -> Tensor:  # [N] float64, dL/dlogprobs
    """The exact gradient through c, s2 and the normaliser. Scopes without variance have constant weights."""
    in_scope = weighting.centering == "scope"
    ddx, out = (torch.empty_like(stats.weights) for _ in range(2))
    cut = options("weights", valid.device)
    if scopes.bound:
        scope_grad_kernel[(scopes.bound,)](
            weights_grad=weights_grad.contiguous(), weights=stats.weights, covariance=stats.covariance,
            deviation=stats.advantage_deviation, valid=valid, order=scopes.order, offsets=scopes.offsets, std=stats.std,
            ddx=ddx, out=out if in_scope else None, BANDWIDTH_EPS=weighting.bandwidth_eps, **cut,
        )  # fmt: skip
    if not in_scope:
        assert sequences is not None
        if sequences.bound:
            centre_grad_kernel[(sequences.bound,)](
                valid=valid, order=sequences.order, offsets=sequences.offsets, ddx=ddx, out=out, **cut
            )
    return out
