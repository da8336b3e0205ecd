"""The terms of each token: what it adds to the loss, to its gradients and to the metrics, on [N] vectors.

This is the specification, in plain PyTorch, of the kernel of the same name. `reference.py` specifies the mathematics,
and autograd through the reference checks the derivatives, which are in closed form here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COVARIANCE_QUANTILES = {"q01": 0.01, "q20": 0.2, "q50": 0.5, "q80": 0.8, "q99": 0.99}
WEIGHTING_METRICS = (
    *("weight/mean", "weight/min", "weight/max", "weight/ess", "covariance/mean", "covariance/std"),
    *(f"covariance/{q}" for q in COVARIANCE_QUANTILES),
)
METRICS = (
    *("loss/policy", "loss/kl", "loss/entropy", "entropy", "kl", "ratio/mean", "ratio/max", "ratio/non_finite"),
    *("clip/low", "clip/high", "clip/dual", *WEIGHTING_METRICS),
)


class TokenInputs(NamedTuple):
    """What the terms of N tokens are made of. All [N] tensors are zero where masked."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N] nats; read only with an entropy coefficient or for metrics
    advantages: Tensor  # [N]
    valid: Tensor  # [N] bool
    old: Tensor | None  # [N] log-probs of the policy that sampled; None: ``logprobs``
    ref: Tensor | None  # [N] log-probs of the KL reference; None: no KL
    rollout: Tensor | None  # [N] what the policy term is multiplied by; None: 1
    weights: Tensor | None  # [N] token weights; None: 1
    penalised: Tensor | None  # [N] bool, the tokens that KL-Cov penalises; None: none
    covariance: Tensor | None  # [N] float64, for metrics
    segment: Tensor | None  # [N] int64, the sequence of each token, where one of the next two is given
    lengths: Tensor | None  # [S] valid tokens of each sequence: token losses are divided by it; None: they are not
    mean_log_ratio: Tensor | None  # [S] of the sequences: the ratio is its sequence's; None: it is the token's own
    total: Tensor  # [] what the sum over the batch is divided by


class TermOptions(NamedTuple):
    """Numbers and flags that the terms depend on, from `CovGRPOConfig`; a custom operator takes them one by one."""

    cispo: bool
    ratio_low: float | None  # bounds of the clipped ratio
    ratio_high: float | None
    dual_clip: float | None
    penalty: float  # of KL-Cov
    max_length: int | None  # what token losses are divided by beside the total; None: nothing
    beta: float
    kl_estimator: str
    entropy_coef: float
    share_grad: bool  # the ratio is its sequence's: dL/dratio belongs to all tokens of the sequence
    differentiate_weights: bool
    metrics: bool


class TokenTerms(NamedTuple):
    loss: Tensor  # []
    logprob_grad: Tensor  # [N] dL/dx, without what follows from the next two
    shared_grad: Tensor  # [N] dL/d(log ratio of the sequence); [0] where the ratio is the token's own
    weights_grad: Tensor  # [N] dL/dW; [0] where weights are not differentiated
    entropy_grad: Tensor  # [N] dL/dH; [0] without an entropy coefficient
    metrics: Tensor  # [len(METRICS)], or [0]


def importance_ratio(
    logprobs: Tensor,  # [N]
    old: Tensor | None,  # [N]
    segment: Tensor | None,  # [N]
    mean_log_ratio: Tensor | None,  # [S]
) -> Tensor:  # [N]
    """Of the token, or of its sequence (GSPO, arXiv 2507.18071 eq. 7)."""
    if mean_log_ratio is not None:
        assert segment is not None
        return mean_log_ratio.to(logprobs.dtype)[segment].exp()
    # Without old log-probs one, but NaN where the log-prob is not finite, as autograd's ratio.
    return (logprobs - (logprobs if old is None else old)).exp()


def clip_ratio(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    return ratio if low is None and high is None else ratio.clamp(low, high)


def token_terms(inputs: TokenInputs, options: TermOptions) -> TokenTerms:
    """Loss, closed-form gradients and metrics. A token that is not valid has no influence on any of them."""
    x, a0, valid = inputs.logprobs, inputs.advantages, inputs.valid
    share = _token_shares(inputs, options)
    ratio = importance_ratio(x, inputs.old, inputs.segment, inputs.mean_log_ratio)
    weights = valid.to(x.dtype) if inputs.weights is None else inputs.weights

    # The policy term is -slope * a (times x for CISPO); dx and da are its derivatives in x and in a. A zero advantage
    # has none, whatever it would be multiplied with; but a log-prob that is NaN must reach the loss.
    has_term = (a0 != 0) | x.isnan()
    a = (weights * a0).where(has_term, 0)
    policy_ratio = ratio.where(has_term, 1)
    dual_clipped = torch.zeros_like(valid)
    if options.cispo:
        clipped = dual_clipped if options.ratio_high is None else ratio > options.ratio_high
        held = dual_clipped
        slope = clip_ratio(policy_ratio, None, options.ratio_high)
        policy_x = x.where(has_term, 0)
        policy, dx, da = -slope * a * policy_x, -slope * a, -slope * policy_x
    else:
        within = clip_ratio(ratio, options.ratio_low, options.ratio_high).where(has_term, 1)
        clipped = within * a < policy_ratio * a
        slope = within.where(clipped, policy_ratio)
        if options.dual_clip is not None:
            dual_clipped = (a < 0) & (slope > options.dual_clip)
            slope = slope.masked_fill(dual_clipped, options.dual_clip)
        held = clipped | dual_clipped
        policy, dx, da = -slope * a, -policy_ratio * a, -slope

    policy_share = share
    if inputs.rollout is not None:
        # Where there is no term to multiply, an infinite weight must not make one.
        counts = has_term if inputs.penalised is None else has_term | inputs.penalised
        policy_share = share * inputs.rollout.where(counts, 1)
    # What a bound holds has no gradient, whatever it would be multiplied with.
    g, shared = (policy_share * dx).masked_fill(held, 0), x.new_empty(0)
    if options.share_grad:
        g, shared = torch.zeros_like(x), g.where(valid, 0)
    if inputs.penalised is not None:
        gap = torch.zeros_like(x) if inputs.old is None else x - inputs.old
        policy = policy + (options.penalty * gap.abs()).where(inputs.penalised, 0)
        g = g + policy_share * (options.penalty * gap.sign()).where(inputs.penalised, 0)

    kl = torch.zeros_like(x)
    if inputs.ref is not None:
        kl, kl_grad = _kl_divergence(inputs.ref - x, options.kl_estimator)
        if options.beta != 0:
            g = g + share * options.beta * kl_grad

    # All sums over tokens are one reduction.
    terms = [policy_share * policy]
    if options.beta != 0:
        terms.append(options.beta * share * kl)
    if options.entropy_coef != 0:
        terms.append(-options.entropy_coef * share * inputs.entropy)
    means = []
    if options.metrics:
        flags = (~ratio.isfinite(), clipped & (ratio < 1), clipped & (ratio > 1), dual_clipped)
        means = [inputs.entropy, kl, ratio, *(flag.to(x.dtype) for flag in flags)]
    sums = torch.stack([*terms, *means]).where(valid, 0).sum(1)
    losses = sums[: len(terms)]

    metrics = x.new_empty(0)
    if options.metrics:
        metrics = _summary(inputs, options, losses, sums[len(terms) :], ratio, weights)
    return TokenTerms(
        losses.sum(),
        g.where(valid, 0),
        shared,
        (policy_share * da * a0).where(valid, 0) if options.differentiate_weights else x.new_empty(0),
        -options.entropy_coef * share if options.entropy_coef != 0 else x.new_empty(0),
        metrics,
    )


def _summary(
    inputs: TokenInputs,
    options: TermOptions,
    losses: Tensor,  # the policy's, then the other ones that there are
    sums: Tensor,  # [7] entropy, KL divergence, ratio; ratios not finite, clipped below, above, dual-clipped
    ratio: Tensor,  # [N]
    weights: Tensor,  # [N]
) -> Tensor:  # [len(METRICS)]
    assert inputs.covariance is not None
    zero = torch.zeros_like(losses[0])
    kl_loss = losses[1] if options.beta != 0 else zero
    entropy_loss = losses[-1] if options.entropy_coef != 0 else zero
    entropy, kl, ratio_mean, nonfinite, low, high, dual = sums
    means = torch.stack([entropy, kl, ratio_mean, low, high, dual]) / inputs.valid.sum().clamp(min=1)
    return torch.cat([
        torch.stack([losses[0], kl_loss, entropy_loss]),
        means[:3],
        _extremes(ratio.unsqueeze(0), inputs.valid),
        nonfinite.unsqueeze(0),
        means[3:],
        weighting_summary(weights, inputs.covariance, inputs.valid),
    ])  # fmt: skip


def _token_shares(inputs: TokenInputs, options: TermOptions) -> Tensor:  # [N]
    """What a token's loss is multiplied by before the sum over all tokens."""
    # One division after the other, because the product with a large total may overflow.
    share = 1 / inputs.total.to(inputs.logprobs.dtype)
    if options.max_length is not None:
        share = share / options.max_length
    if inputs.lengths is not None:
        assert inputs.segment is not None
        share = share / inputs.lengths.to(share.dtype).clamp(min=1)[inputs.segment]
    return share.where(inputs.valid, 0)


def _kl_divergence(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """[N] and its derivative in x; d is ref - x (http://joschu.net/blog/kl-approx.html)."""
    if estimator == "k1":
        return -d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, -d
    return torch.expm1(d) - d, -torch.expm1(d)


def _extremes(values: Tensor, valid: Tensor) -> Tensor:  # [M, N] -> [M]
    """The maxima over valid tokens, zero where there are none."""
    padded = torch.nn.functional.pad(values.where(valid, -torch.inf), (0, 1), value=-torch.inf)
    return padded.amax(1).where(valid.any(), 0)


def weighting_summary(
    weights: Tensor,  # [N], zero where masked
    covariance: Tensor,  # [N] float64, zero where masked
    valid: Tensor,  # [N] bool
) -> Tensor:  # [len(WEIGHTING_METRICS)] in the dtype of the weights
    """What the weights and the covariances under them are like over the valid tokens."""
    n = valid.sum()
    count = n.clamp(min=1)
    sum_w, sum_squares = torch.stack([weights, weights.square()]).sum(1)
    mean = covariance.where(valid, 0).sum() / count
    variance = (covariance - mean).square().where(valid, 0).sum() / count
    minus_least, largest = _extremes(torch.stack([-weights, weights]), valid)
    # (sum W)^2 / sum W^2, as a share of the tokens.
    share = sum_w.square() / (sum_squares * count).clamp(min=torch.finfo(weights.dtype).tiny)
    nearest = torch.stack([((n - 1).clamp(min=0).double() * q).round().long() for q in COVARIANCE_QUANTILES.values()])
    ascending = torch.nn.functional.pad(covariance.where(valid, torch.inf), (0, 1), value=torch.inf).sort().values
    quantiles = ascending[nearest].where(n > 0, 0)
    of_weights = torch.stack([sum_w / count, -minus_least, largest, share])
    return torch.cat([of_weights, torch.stack([mean, variance.sqrt()]), quantiles]).to(weights.dtype)
