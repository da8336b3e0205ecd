"""token_terms: what each token adds to the loss, to the gradients and to the metrics, in one pass over the tokens.

Two launches: a program a block of tokens, which leaves the sums of its block, then one program that adds these up in a
fixed order. Metrics take a sort of the covariances by PyTorch in between. The mathematics is that of `token_terms.py`
of this package, in float64, since there are few numbers; a ratio is rounded to the dtype of the log-probs, so that it
overflows where theirs does.

Bytes: reads up to ten numbers and a flag a token, and two numbers of its sequence; writes up to five numbers a token,
and eighteen float64 a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...token_terms import COVARIANCE_QUANTILES, METRICS, TermOptions, TokenInputs, TokenTerms
from .configs import options as cut_of

# Float64 numbers that a block of tokens leaves, without and with metrics.
_LOSSES, _ALL = 3, 18


@triton.jit
def _expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 of float64, without cancellation near zero (W. Kahan): the errors of u = exp(x) and of log(u) are the
    same. (libdevice has one, but is not there under the interpreter.)"""
    u = tl.exp(x)
    near = (u != 1.0) & (u > 0.0) & (u < float("inf"))
    compensated = (u - 1.0) * x / tl.log(tl.where(near, u, 2.0))
    # Else 1 + x is 1, or x is infinite or NaN, or exp(x) is out of range.
    return tl.where(near, compensated, tl.where(u == 1.0, x, u - 1.0))


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    """The maximum of a block, NaN where one is among them."""
    return tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit(
    do_not_specialize=["n_tokens", "n_blocks"],
    do_not_specialize_on_alignment=[
        "logprobs", "entropy", "advantages", "valid", "old", "ref", "rollout", "weights", "penalised", "covariance",
        "segment", "lengths", "mean_log_ratio", "total", "logprob_grad", "shared_grad", "weights_grad", "entropy_grad",
        "to_sort", "partial",
    ],
)  # fmt: skip
def token_terms_kernel(  # type: ignore[no-untyped-def]
    logprobs,  # [N]
    entropy,  # [N]
    advantages,  # [N]
    valid,  # [N] bool
    old,  # [N] or None, as the next two
    ref,
    rollout,
    weights,  # [N] or None
    penalised,  # [N] bool or None
    covariance,  # [N] float64, or None without metrics
    segment,  # [N] int64 or None
    lengths,  # [S] float64 or None
    mean_log_ratio,  # [S] float64 or None
    total,  # []
    logprob_grad,  # [N]
    shared_grad,  # [N] or None, as the next two
    weights_grad,
    entropy_grad,
    to_sort,  # [N] float64, covariances, inf where masked; None without metrics
    partial,  # [18 with metrics, else 3; blocks] float64
    n_tokens,
    n_blocks,
    beta: tl.float64,
    entropy_coef: tl.float64,
    CISPO: tl.constexpr,
    RATIO_LOW: tl.constexpr,  # as the next two, None for no bound
    RATIO_HIGH: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    PENALTY: tl.constexpr,
    MAX_LENGTH: tl.constexpr,  # or None
    KL_ESTIMATOR: tl.constexpr,  # 1, 2 or 3
    KL_LOSS: tl.constexpr,  # beta is not zero
    METRICS: tl.constexpr,
    B_T: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    i_t = i_b * B_T + tl.arange(0, B_T)
    m_t = i_t < n_tokens
    m_v = tl.load(valid + i_t, mask=m_t, other=0) != 0
    zero = tl.zeros([B_T], tl.float64)
    x = tl.load(logprobs + i_t, mask=m_v, other=0.0).to(tl.float64)
    a0 = tl.load(advantages + i_t, mask=m_v, other=0.0).to(tl.float64)
    gap = x - x  # NaN where the log-prob is not finite
    if old is not None:
        gap = x - tl.load(old + i_t, mask=m_v, other=0.0).to(tl.float64)
    w = m_v.to(tl.float64)
    if weights is not None:
        w = tl.load(weights + i_t, mask=m_v, other=0.0).to(tl.float64)
    i_s = i_t
    if segment is not None:
        i_s = tl.load(segment + i_t, mask=m_v, other=0)

    # What a token's loss is multiplied by before the sum over all tokens.
    share = tl.where(m_v, 1.0 / (zero + tl.load(total).to(tl.float64)), 0.0)
    if MAX_LENGTH is not None:
        share /= MAX_LENGTH
    if lengths is not None:
        share /= tl.load(lengths + i_s, mask=m_v, other=1.0)

    log_ratio = gap
    if mean_log_ratio is not None:
        log_ratio = tl.load(mean_log_ratio + i_s, mask=m_v, other=0.0)
    dtype = logprobs.dtype.element_ty
    ratio = tl.exp(log_ratio).to(dtype).to(tl.float64)

    # A zero advantage has no policy term, whatever it would be multiplied with; but a NaN must reach the loss.
    has_term = (a0 != 0.0) | (x != x)
    a = tl.where(has_term, w * a0, 0.0)
    policy_ratio = tl.where(has_term, ratio, 1.0)
    dual_clipped = zero > 0.0
    clipped = dual_clipped
    if CISPO:
        slope = policy_ratio
        if RATIO_HIGH is not None:
            clipped = ratio > RATIO_HIGH
            slope = tl.where(policy_ratio > RATIO_HIGH, zero + RATIO_HIGH, policy_ratio)
        policy_x = tl.where(has_term, x, 0.0)
        policy, dx, da = -slope * a * policy_x, -slope * a, -slope * policy_x
    else:
        # Comparisons, since a minimum may lose a NaN.
        within = policy_ratio
        if RATIO_LOW is not None:
            within = tl.where(has_term & (within < RATIO_LOW), zero + RATIO_LOW, within)
        if RATIO_HIGH is not None:
            within = tl.where(has_term & (within > RATIO_HIGH), zero + RATIO_HIGH, within)
        clipped = within * a < policy_ratio * a
        slope = tl.where(clipped, within, policy_ratio)
        if DUAL_CLIP is not None:
            dual_clipped = (a < 0.0) & (slope > DUAL_CLIP)
            slope = tl.where(dual_clipped, zero + DUAL_CLIP, slope)
        policy, da = -slope * a, -slope
        dx = tl.where(clipped | dual_clipped, 0.0, -policy_ratio * a)

    m_p = m_v & False
    if penalised is not None:
        m_p = tl.load(penalised + i_t, mask=m_v, other=0) != 0
    policy_share = share
    if rollout is not None:
        # Where there is no term to multiply, an infinite weight must not make one.
        rollout_weight = tl.load(rollout + i_t, mask=m_v & (has_term | m_p), other=1.0)
        policy_share = share * rollout_weight.to(tl.float64)
    g = policy_share * dx
    if shared_grad is not None:
        tl.store(shared_grad + i_t, tl.where(m_v, g, 0.0), mask=m_t)
        g = zero
    if weights_grad is not None:
        tl.store(weights_grad + i_t, tl.where(m_v, policy_share * da * a0, 0.0), mask=m_t)
    if entropy_grad is not None:
        tl.store(entropy_grad + i_t, -entropy_coef * share, mask=m_t)
    if penalised is not None:
        sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, gap))
        policy += tl.where(m_p, tl.abs(gap) * PENALTY, 0.0)
        g += policy_share * tl.where(m_p, sign * PENALTY, 0.0)

    kl = zero
    if ref is not None:
        d = tl.load(ref + i_t, mask=m_v, other=0.0).to(tl.float64) - x
        if KL_ESTIMATOR == 1:
            kl, kl_grad = -d, zero + 1.0
        elif KL_ESTIMATOR == 2:
            kl, kl_grad = d * d * 0.5, -d
        else:
            kl_grad = -_expm1(d)
            kl = -kl_grad - d
        if KL_LOSS:
            g += share * kl_grad * beta
    tl.store(logprob_grad + i_t, tl.where(m_v, g, 0.0), mask=m_t)

    h = zero
    if METRICS or entropy_grad is not None:
        h = tl.load(entropy + i_t, mask=m_v, other=0.0).to(tl.float64)
    block = partial + i_b
    tl.store(block, tl.sum(tl.where(m_v, policy_share * policy, 0.0), 0))
    tl.store(block + n_blocks, tl.sum(tl.where(m_v, share * kl, 0.0), 0))
    tl.store(block + 2 * n_blocks, tl.sum(tl.where(m_v, share * h, 0.0), 0))
    if METRICS:
        c = tl.load(covariance + i_t, mask=m_v, other=0.0)
        tl.store(to_sort + i_t, tl.where(m_v, c, float("inf")), mask=m_t)
        n = tl.sum(m_v.to(tl.float64), 0)
        sum_c = tl.sum(c, 0)
        dc = tl.where(m_v, c - sum_c / tl.maximum(n, 1.0), 0.0)
        is_finite = tl.abs(ratio) < float("inf")
        tl.store(block + 3 * n_blocks, n)
        tl.store(block + 4 * n_blocks, tl.sum(h, 0))
        tl.store(block + 5 * n_blocks, tl.sum(tl.where(m_v, kl, 0.0), 0))
        tl.store(block + 6 * n_blocks, tl.sum(tl.where(m_v, ratio, 0.0), 0))
        tl.store(block + 7 * n_blocks, tl.sum((m_v & ~is_finite).to(tl.float64), 0))
        tl.store(block + 8 * n_blocks, tl.sum((m_v & clipped & (ratio < 1.0)).to(tl.float64), 0))
        tl.store(block + 9 * n_blocks, tl.sum((m_v & clipped & (ratio > 1.0)).to(tl.float64), 0))
        tl.store(block + 10 * n_blocks, tl.sum((m_v & dual_clipped).to(tl.float64), 0))
        tl.store(block + 11 * n_blocks, tl.sum(w, 0))
        tl.store(block + 12 * n_blocks, tl.sum(w * w, 0))
        tl.store(block + 13 * n_blocks, sum_c)
        tl.store(block + 14 * n_blocks, tl.sum(dc * dc, 0))
        tl.store(block + 15 * n_blocks, _largest(tl.where(m_v, ratio, -float("inf"))))
        tl.store(block + 16 * n_blocks, _largest(tl.where(m_v, w, -float("inf"))))
        tl.store(block + 17 * n_blocks, _largest(tl.where(m_v, -w, -float("inf"))))


@triton.jit
def _sum(partial, row, n_blocks, B_B: tl.constexpr):  # type: ignore[no-untyped-def]
    sums = tl.zeros([B_B], tl.float64)
    for o_b in range(0, n_blocks, B_B):
        i_b = o_b + tl.arange(0, B_B)
        sums += tl.load(partial + row * n_blocks + i_b, mask=i_b < n_blocks, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _maximum(partial, row, n_blocks, B_B: tl.constexpr):  # type: ignore[no-untyped-def]
    largest = tl.full([B_B], -float("inf"), tl.float64)
    for o_b in range(0, n_blocks, B_B):
        i_b = o_b + tl.arange(0, B_B)
        value = tl.load(partial + row * n_blocks + i_b, mask=i_b < n_blocks, other=-float("inf"))
        largest = tl.where((value > largest) | (value != value), value, largest)
    return _largest(largest)


@triton.jit
def _sum_of_deviations(partial, n_blocks, mean, B_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of squared deviations from the mean of all tokens, from those of each block from its own mean (Chan, Golub,
    LeVeque)."""
    sums = tl.zeros([B_B], tl.float64)
    for o_b in range(0, n_blocks, B_B):
        i_b = o_b + tl.arange(0, B_B)
        m_b = i_b < n_blocks
        n = tl.load(partial + 3 * n_blocks + i_b, mask=m_b, other=0.0)
        shift = tl.load(partial + 13 * n_blocks + i_b, mask=m_b, other=0.0) / tl.maximum(n, 1.0) - mean
        here = tl.load(partial + 14 * n_blocks + i_b, mask=m_b, other=0.0) + n * shift * shift
        sums += tl.where(n > 0.0, here, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _quantile(ascending, n, q):  # type: ignore[no-untyped-def]
    """Of the first n numbers: the one whose place is nearest, of two equally near ones that at the even place."""
    place = tl.maximum(n - 1.0, 0.0) * q
    nearest = tl.floor(place + 0.5)
    is_odd = nearest - 2.0 * tl.floor(nearest * 0.5) == 1.0
    nearest = tl.where((nearest - place == 0.5) & is_odd, nearest - 1.0, nearest)
    return tl.load(ascending + nearest.to(tl.int64), mask=n > 0.0, other=0.0)


@triton.jit(do_not_specialize=["n_blocks"], do_not_specialize_on_alignment=["partial", "ascending", "loss", "metrics"])
def totals_kernel(  # type: ignore[no-untyped-def]
    partial,  # [18 with metrics, else 3; blocks] float64
    ascending,  # [N] float64, covariances; None without metrics
    loss,  # []
    metrics,  # [22] in the order of METRICS; None without
    n_blocks,
    beta: tl.float64,
    entropy_coef: tl.float64,
    KL_LOSS: tl.constexpr,  # their coefficients are not zero
    ENTROPY_LOSS: tl.constexpr,
    TINY: tl.constexpr,  # the smallest normal number of the metrics' dtype
    Q: tl.constexpr,  # quantiles
    B_B: tl.constexpr,
):
    policy_loss = _sum(partial, 0, n_blocks, B_B)
    kl_loss = 0.0
    if KL_LOSS:
        kl_loss = _sum(partial, 1, n_blocks, B_B) * beta
    entropy_loss = 0.0
    if ENTROPY_LOSS:
        entropy_loss = _sum(partial, 2, n_blocks, B_B) * -entropy_coef
    tl.store(loss, policy_loss + kl_loss + entropy_loss)
    if metrics is not None:
        n = _sum(partial, 3, n_blocks, B_B)
        count = tl.maximum(n, 1.0)
        sum_w = _sum(partial, 11, n_blocks, B_B)
        mean_c = _sum(partial, 13, n_blocks, B_B) / count
        variance = _sum_of_deviations(partial, n_blocks, mean_c, B_B) / count
        squares = _sum(partial, 12, n_blocks, B_B) * count
        tl.store(metrics, policy_loss)
        tl.store(metrics + 1, kl_loss)
        tl.store(metrics + 2, entropy_loss)
        tl.store(metrics + 3, _sum(partial, 4, n_blocks, B_B) / count)
        tl.store(metrics + 4, _sum(partial, 5, n_blocks, B_B) / count)
        tl.store(metrics + 5, _sum(partial, 6, n_blocks, B_B) / count)
        tl.store(metrics + 6, tl.where(n > 0.0, _maximum(partial, 15, n_blocks, B_B), 0.0))
        tl.store(metrics + 7, _sum(partial, 7, n_blocks, B_B))
        tl.store(metrics + 8, _sum(partial, 8, n_blocks, B_B) / count)
        tl.store(metrics + 9, _sum(partial, 9, n_blocks, B_B) / count)
        tl.store(metrics + 10, _sum(partial, 10, n_blocks, B_B) / count)
        tl.store(metrics + 11, sum_w / count)
        tl.store(metrics + 12, tl.where(n > 0.0, -_maximum(partial, 17, n_blocks, B_B), 0.0))
        tl.store(metrics + 13, tl.where(n > 0.0, _maximum(partial, 16, n_blocks, B_B), 0.0))
        # (sum W)^2 / sum W^2, as a share of the tokens.
        tl.store(metrics + 14, sum_w * sum_w / tl.where(squares < TINY, squares * 0.0 + TINY, squares))
        tl.store(metrics + 15, mean_c)
        tl.store(metrics + 16, tl.sqrt(variance))
        for i in tl.static_range(len(Q)):
            tl.store(metrics + 17 + i, _quantile(ascending, n, Q[i]))


def token_terms(inputs: TokenInputs, options: TermOptions) -> TokenTerms:
    """Loss, closed-form gradients and metrics. A token that is not valid has no influence on any of them."""
    x, metrics = inputs.logprobs, options.metrics
    tokens, device = len(x), x.device
    cut = cut_of("terms", device)
    blocks = triton.cdiv(tokens, cut["B_T"])
    wanted = (True, options.share_grad, options.differentiate_weights, options.entropy_coef != 0)
    grads = [torch.empty(tokens if want else 0, dtype=x.dtype, device=device) for want in wanted]
    partial = torch.empty(_ALL if metrics else _LOSSES, blocks, dtype=torch.float64, device=device)
    to_sort = torch.empty(tokens, dtype=torch.float64, device=device) if metrics else None
    loss, summary = x.new_empty(()), x.new_empty(len(METRICS) if metrics else 0)
    coefficients = dict(beta=options.beta, entropy_coef=options.entropy_coef)
    if tokens:
        g, shared, du, e = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        token_terms_kernel[(blocks,)](
            **{name: None if value is None else value.contiguous() for name, value in inputs._asdict().items()},
            logprob_grad=g, shared_grad=shared, weights_grad=du, entropy_grad=e, to_sort=to_sort, partial=partial,
            n_tokens=tokens, n_blocks=blocks, **coefficients, CISPO=options.cispo, RATIO_LOW=options.ratio_low,
            RATIO_HIGH=options.ratio_high, DUAL_CLIP=options.dual_clip, PENALTY=options.penalty,
            MAX_LENGTH=options.max_length,
            KL_ESTIMATOR=int(options.kl_estimator[1]), KL_LOSS=options.beta != 0, METRICS=metrics, **cut,
        )  # fmt: skip
    totals_kernel[(1,)](
        partial=partial, ascending=None if to_sort is None else to_sort.sort().values, loss=loss,
        metrics=summary if metrics else None, n_blocks=blocks, **coefficients,
        KL_LOSS=options.beta != 0, ENTROPY_LOSS=options.entropy_coef != 0, TINY=torch.finfo(x.dtype).tiny,
        Q=tuple(COVARIANCE_QUANTILES.values()), **cut_of("totals", device),
    )  # fmt: skip
    logprob_grad, shared_grad, weights_grad, entropy_grad = grads
    return TokenTerms(loss, logprob_grad, shared_grad, weights_grad, entropy_grad, summary)
