"""The covariance weights of CW-GRPO (arXiv 2605.11538) on [N] vectors: statistics of each scope, weights, and their
exact gradient. Symbols as in DESIGN and `reference.py`: x log-probs, A advantages, c covariance contributions, s2 their
variance, W weights.

A *scope* is the set of tokens over which means, variance and normaliser are taken: a group or the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import CovarianceWeighting
from .segments import Segments


class ScopeMoments(NamedTuple):
    """What a token's weight depends on besides its own log-prob and advantage, of S scopes, float64."""

    logprob: Tensor  # [S] mean
    advantage: Tensor  # [S] mean
    std: Tensor  # [S] of the covariances; zero where it is zero within rounding
    max_exponent: Tensor  # [S] the largest exponent of the Gaussian, subtracted before exp
    normalizer: Tensor  # [S] what the weights of the scope sum to, over the sum of exp(exponent - max_exponent)


class CovarianceStats(NamedTuple):
    """Weights and covariances of N tokens, float64: differences of log-probs are small, and there are few numbers."""

    weights: Tensor  # [N] W_t, zero where masked
    covariance: Tensor  # [N] c_t, zero where masked
    advantage_deviation: Tensor  # [N] A_t minus its mean, zero where masked
    std: Tensor  # [bound] sqrt(s2) of each scope, zero where it is zero within rounding


def covariance_weights(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,  # needed by two of the readings of the paper
    weighting: CovarianceWeighting,
) -> CovarianceStats:
    """Gaussian covariance weights of every scope (arXiv 2605.11538), two-pass, in float64."""
    moments = scope_moments(logprobs, advantages, valid, scopes, sequences, weighting)
    return weights_from_moments(logprobs, advantages, valid, scopes, sequences, weighting, moments)


def scope_moments(
    logprobs: Tensor,  # [N], this and the next four as `covariance_weights`
    advantages: Tensor,
    valid: Tensor,
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
) -> ScopeMoments:
    eps = torch.finfo(logprobs.dtype).eps
    x, a = logprobs.double(), advantages.double()
    ones = valid.double()
    share = ones
    if weighting.advantage_centering == "response":
        # A weight of 1 / length for each token makes every response count once.
        assert sequences is not None
        share = ones / sequences.gather(sequences.sum(ones).clamp(min=1))
    n, sum_x, sum_a, shares = scopes.sum(torch.stack([ones, x, a * share, share]))
    n_or_1 = n.clamp(min=1)
    mean_x, mean_a = sum_x / n_or_1, sum_a / shares.where(shares > 0, 1)
    c, _ = _covariances(x, a, valid, scopes, sequences, weighting, mean_x, mean_a)

    dc = (c - scopes.gather(scopes.sum(c) / n_or_1)).where(valid, 0)
    variance = scopes.sum(dc.square()) / n_or_1
    # Zero within rounding: two tokens always have equal c, and constant x or A leaves noise. NaN is not zero.
    noise = 8 * eps * scopes.max(x.abs(), 0.0) * scopes.max(a.abs(), 0.0)
    std = variance.sqrt().masked_fill(variance <= noise.square(), 0)

    q = _exponents(c, std, scopes, weighting)
    max_q = scopes.max(q.where(valid, -torch.inf), -torch.inf)
    total = scopes.sum((q - scopes.gather(max_q)).exp().where(valid, 0))
    sum_of_weights = n if weighting.normalizer == "valid" else scopes.sum(torch.ones_like(ones))
    return ScopeMoments(mean_x, mean_a, std, max_q, sum_of_weights / total.where(n > 0, 1))


def weights_from_moments(
    logprobs: Tensor,  # [N], this and the next four as `covariance_weights`
    advantages: Tensor,
    valid: Tensor,
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
    moments: ScopeMoments,  # of the scopes
) -> CovarianceStats:
    x, a = logprobs.double(), advantages.double()
    c, da = _covariances(x, a, valid, scopes, sequences, weighting, moments.logprob, moments.advantage)
    kernel = (_exponents(c, moments.std, scopes, weighting) - scopes.gather(moments.max_exponent)).exp()
    weights = (kernel.where(valid, 0) * scopes.gather(moments.normalizer)).where(valid, 0)
    return CovarianceStats(weights, c, da, moments.std)


def _covariances(
    x: Tensor,  # [N]
    a: Tensor,  # [N]
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
    mean_x: Tensor,  # [S]
    mean_a: Tensor,  # [S]
) -> tuple[Tensor, Tensor]:  # [N] c, [N] deviations of a
    if weighting.centering == "scope":
        center = scopes.gather(mean_x)
    else:
        assert sequences is not None
        sum_x, lengths = sequences.sum(torch.stack([x, valid.double()]))
        center = sequences.gather(sum_x / lengths.clamp(min=1))
    da = (a - scopes.gather(mean_a)).where(valid, 0)
    return ((x - center) * da).where(valid, 0), da


def _exponents(c: Tensor, std: Tensor, scopes: Segments, weighting: CovarianceWeighting) -> Tensor:  # [N]
    bandwidth = scopes.gather(std + weighting.bandwidth_eps)
    return (-c.square() / (2 * bandwidth.square())).masked_fill(scopes.gather(std) == 0, 0)


def covariance_weights_grad(
    weights_grad: Tensor,  # [N] dL/dW
    stats: CovarianceStats,
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
) -> Tensor:  # [N] float64, dL/dlogprobs
    """The exact gradient through c, s2 and the normaliser. Scopes without variance have constant weights."""
    weights, c, da, std = stats
    u = weights_grad.double().where(valid, 0)
    varies = scopes.gather(std) != 0
    bandwidth = scopes.gather(std + weighting.bandwidth_eps).where(varies, 1)
    n, sum_w, sum_wu, sum_c = scopes.sum(torch.stack([valid.double(), weights, weights * u, c]))
    n = n.clamp(min=1)

    # W = constant * softmax(q) with q = -c^2 / (2 b^2) and b = sqrt(s2) + eps.
    mean_u = sum_wu / sum_w.where(sum_w != 0, 1)
    dq = (weights * (u - scopes.gather(mean_u))).where(varies, 0)
    db = scopes.sum(dq * c.square() / bandwidth**3)
    dvariance = db / (2 * std.where(std != 0, 1))
    mean_c = sum_c / n
    dc = -dq * c / bandwidth.square() + scopes.gather(dvariance * 2 / n) * (c - scopes.gather(mean_c))

    ddx = (dc * da).where(valid, 0)
    centered = scopes if weighting.centering == "scope" else sequences
    assert centered is not None
    sum_ddx, lengths = centered.sum(torch.stack([ddx, valid.double()]))
    return (ddx - centered.gather(sum_ddx / lengths.clamp(min=1))).where(valid, 0)
