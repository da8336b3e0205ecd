"""token_terms: what each token adds to the loss, to the gradients and to the metrics, in one pass over the tokens.

Two launches: a program a block of tokens, which leaves the sums of its block, then one program that adds these up in a
fixed order. Metrics take a sort of the covariances by PyTorch in between. The mathematics is that of `token_terms.py`
of this package, in float64, since there are few numbers; a ratio is rounded to the dtype of the log-probs, so that it
overflows where theirs does.

Bytes: reads up to ten numbers and a flag a token, and two numbers of its sequence; writes up to five numbers a token,
and eighteen float64 a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...token_terms import COVARIANCE_QUANTILES, METRICS, TermOptions, TokenInputs, TokenTerms
from .configs import aligned
from .configs import options as cut_of
from .numerics import expm1

# Float64 numbers that a block of tokens leaves, without and with metrics. In this order: the loss of the policy, of the
# KL divergence and the entropy, each times the shares of its tokens; how many tokens; the sums of the entropy, the KL
# divergence and the ratio; how many ratios are not finite, and how many a bound holds from below, from above and by the
# dual clip; the sums of the weights, of their squares, of the covariances and of the squares of their deviations; the
# largest ratio, the largest weight and minus the smallest one.
_LOSSES, _ALL = 3, 18


class _PolicyTerm(NamedTuple):
    """Of the tokens of a block, before their shares."""

    loss: Any
    logprob_grad: Any  # but for what a bound holds
    advantage_grad: Any  # with respect to the weighted advantage
    clipped: Any  # whether the lower or upper bound holds it
    dual_clipped: Any
    held: Any  # whether a bound leaves it no gradient


@triton.jit
def _load(pointer, i_t, m_t):  # type: ignore[no-untyped-def]
    return tl.load(pointer + i_t, mask=m_t, other=0.0).to(tl.float64)


@triton.jit
def _token_shares(inputs, i_s, m_v, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a token's loss is multiplied by before the sum over all tokens."""
    share = tl.where(m_v, 1.0 / tl.load(inputs.total).to(tl.float64), 0.0)
    if OPTIONS.max_length is not None:
        share /= OPTIONS.max_length
    if inputs.lengths is not None:
        share /= tl.load(inputs.lengths + i_s, mask=m_v, other=1.0)
    return share


@triton.jit
def _policy_term(ratio, x, a, has_term, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """-slope * a, times x for CISPO; ``a`` is the weighted advantage."""
    policy_ratio = tl.where(has_term, ratio, 1.0)
    zero = tl.zeros_like(ratio)
    dual_clipped = zero > 0.0
    clipped = dual_clipped
    held = dual_clipped
    if OPTIONS.cispo:
        slope = policy_ratio
        if OPTIONS.ratio_high is not None:
            clipped = ratio > OPTIONS.ratio_high
            slope = tl.where(policy_ratio > OPTIONS.ratio_high, zero + OPTIONS.ratio_high, policy_ratio)
        policy_x = tl.where(has_term, x, 0.0)
        policy, dx, da = -slope * a * policy_x, -slope * a, -slope * policy_x
    else:
        # Comparisons, since a minimum may lose a NaN.
        within = policy_ratio
        if OPTIONS.ratio_low is not None:
            within = tl.where(has_term & (within < OPTIONS.ratio_low), zero + OPTIONS.ratio_low, within)
        if OPTIONS.ratio_high is not None:
            within = tl.where(has_term & (within > OPTIONS.ratio_high), zero + OPTIONS.ratio_high, within)
        clipped = within * a < policy_ratio * a
        slope = tl.where(clipped, within, policy_ratio)
        if OPTIONS.dual_clip is not None:
            dual_clipped = (a < 0.0) & (slope > OPTIONS.dual_clip)
            slope = tl.where(dual_clipped, zero + OPTIONS.dual_clip, slope)
        held = clipped | dual_clipped
        policy, dx, da = -slope * a, -policy_ratio * a, -slope
    return _PolicyTerm(policy, dx, da, clipped, dual_clipped, held)


@triton.jit
def _kl_divergence(d, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """And its derivative in x; d is ref - x."""
    if OPTIONS.kl_estimator == "k1":
        kl, kl_grad = -d, tl.full(d.shape, 1.0, d.dtype)
    elif OPTIONS.kl_estimator == "k2":
        kl, kl_grad = d * d * 0.5, -d
    else:
        kl_grad = -expm1(d)
        kl = -kl_grad - d
    return kl, kl_grad


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    """The maximum of a block, NaN where one is among them."""
    return tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit
def _store_metrics(partial, c, h, kl, ratio, w, term, m_v):  # type: ignore[no-untyped-def]
    """What the block leaves for the metrics: numbers 3 to 17."""
    is_finite = tl.abs(ratio) < float("inf")
    sums = (
        m_v,
        h,
        tl.where(m_v, kl, 0.0),
        tl.where(m_v, ratio, 0.0),
        m_v & ~is_finite,
        m_v & term.clipped & (ratio < 1.0),
        m_v & term.clipped & (ratio > 1.0),
        m_v & term.dual_clipped,
        w,
        w * w,
    )
    block, n_blocks = partial + tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(len(sums)):
        tl.store(block + (3 + i) * n_blocks, tl.sum(sums[i].to(tl.float64), 0))
    sum_c = tl.sum(c, 0)
    dc = tl.where(m_v, c - sum_c / tl.maximum(tl.sum(m_v.to(tl.float64), 0), 1.0), 0.0)
    tl.store(block + 13 * n_blocks, sum_c)
    tl.store(block + 14 * n_blocks, tl.sum(dc * dc, 0))
    tl.store(block + 15 * n_blocks, _largest(tl.where(m_v, ratio, -float("inf"))))
    tl.store(block + 16 * n_blocks, _largest(tl.where(m_v, w, -float("inf"))))
    tl.store(block + 17 * n_blocks, _largest(tl.where(m_v, -w, -float("inf"))))


@triton.jit(do_not_specialize=["n_tokens"])
def token_terms_kernel(  # type: ignore[no-untyped-def]
    inputs,  # TokenInputs
    out,  # TokenTerms, None for what nobody asked for; loss and metrics are of totals_kernel
    to_sort,  # [N] float64, covariances, inf where masked; None without metrics
    partial,  # [18 with metrics, else 3; blocks] float64
    n_tokens,
    beta: tl.float64,
    entropy_coef: tl.float64,
    OPTIONS: tl.constexpr,  # TermOptions; of beta and entropy_coef it says only whether they are not zero
    B_T: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64) * B_T + tl.arange(0, B_T)
    m_t = i_t < n_tokens
    m_v = tl.load(inputs.valid + i_t, mask=m_t, other=0) != 0
    x, a0 = _load(inputs.logprobs, i_t, m_v), _load(inputs.advantages, i_t, m_v)
    w = m_v.to(tl.float64) if inputs.weights is None else _load(inputs.weights, i_t, m_v)
    i_s = i_t if inputs.segment is None else tl.load(inputs.segment + i_t, mask=m_v, other=0)
    share = _token_shares(inputs, i_s, m_v, OPTIONS)

    gap = x - x if inputs.old is None else x - _load(inputs.old, i_t, m_v)  # NaN where the log-prob is not finite
    log_ratio = gap if inputs.mean_log_ratio is None else _load(inputs.mean_log_ratio, i_s, m_v)
    ratio = tl.exp(log_ratio).to(inputs.logprobs.dtype.element_ty).to(tl.float64)
    # A zero advantage has no policy term, whatever it would be multiplied with; but a NaN must reach the loss.
    has_term = (a0 != 0.0) | (x != x)
    term = _policy_term(ratio, x, tl.where(has_term, w * a0, 0.0), has_term, OPTIONS)
    m_p = m_v & False if inputs.penalised is None else tl.load(inputs.penalised + i_t, mask=m_v, other=0) != 0
    policy_share = share
    if inputs.rollout is not None:
        # Where there is no term to multiply, an infinite weight must not make one.
        rollout_weight = tl.load(inputs.rollout + i_t, mask=m_v & (has_term | m_p), other=1.0)
        policy_share = share * rollout_weight.to(tl.float64)

    # What a bound holds has no gradient, whatever it would be multiplied with.
    policy, g = term.loss, tl.where(term.held, 0.0, policy_share * term.logprob_grad)
    if out.shared_grad is not None:
        tl.store(out.shared_grad + i_t, tl.where(m_v, g, 0.0), mask=m_t)
        g = tl.zeros_like(g)
    if out.weights_grad is not None:
        tl.store(out.weights_grad + i_t, tl.where(m_v, policy_share * term.advantage_grad * a0, 0.0), mask=m_t)
    if out.entropy_grad is not None:
        tl.store(out.entropy_grad + i_t, -entropy_coef * share, mask=m_t)
    if inputs.penalised is not None:
        sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, gap))
        policy += tl.where(m_p, tl.abs(gap) * OPTIONS.penalty, 0.0)
        g += policy_share * tl.where(m_p, sign * OPTIONS.penalty, 0.0)
    kl = tl.zeros_like(x)
    if inputs.ref is not None:
        kl, kl_grad = _kl_divergence(_load(inputs.ref, i_t, m_v) - x, OPTIONS)
        if OPTIONS.beta != 0:
            g += share * kl_grad * beta
    tl.store(out.logprob_grad + i_t, tl.where(m_v, g, 0.0), mask=m_t)

    h = tl.zeros_like(x)
    if OPTIONS.metrics or out.entropy_grad is not None:
        h = _load(inputs.entropy, i_t, m_v)
    block, n_blocks = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(block, tl.sum(tl.where(m_v, policy_share * policy, 0.0), 0))
    tl.store(block + n_blocks, tl.sum(tl.where(m_v, share * kl, 0.0), 0))
    tl.store(block + 2 * n_blocks, tl.sum(tl.where(m_v, share * h, 0.0), 0))
    if OPTIONS.metrics:
        c = _load(inputs.covariance, i_t, m_v)
        tl.store(to_sort + i_t, tl.where(m_v, c, float("inf")), mask=m_t)
        _store_metrics(partial, c, h, kl, ratio, w, term, m_v)


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
        token_terms_kernel[(blocks,)](
            TokenInputs._make(None if value is None else aligned(value) for value in inputs),
            TokenTerms._make([None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None]),
            to_sort, partial, tokens, **coefficients,
            OPTIONS=options._replace(beta=options.beta != 0, entropy_coef=options.entropy_coef != 0), **cut,
        )  # fmt: skip
    totals_kernel[(1,)](
        partial=partial, ascending=None if to_sort is None else to_sort.sort().values, loss=loss,
        metrics=summary if metrics else None, n_blocks=blocks, **coefficients,
        KL_LOSS=options.beta != 0, ENTROPY_LOSS=options.entropy_coef != 0, TINY=torch.finfo(x.dtype).tiny,
        Q=tuple(COVARIANCE_QUANTILES.values()), **cut_of("totals", device),
        # The place of a quantile is rounded before it is compared: no product may be fused with the next sum.
        enable_fp_fusion=False,
    )  # fmt: skip
    logprob_grad, shared_grad, weights_grad, entropy_grad = grads
    return TokenTerms(loss, logprob_grad, shared_grad, weights_grad, entropy_grad, summary)
