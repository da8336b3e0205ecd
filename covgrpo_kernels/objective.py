"""The policy objective on [N] vectors: loss, the coefficients dL/dx and dL/dH in closed form, and metrics.

`reference.py` specifies it and autograd through the reference checks the derivatives.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ClipCov, CovarianceWeighting, CovGRPOConfig, KLCov
from .covariance import ScopeMoments, covariance_weights_grad
from .inputs import Tokens
from .segments import Segments
from .weighting import batch_covariance, clip_cov_choice, covariance_stats, kl_cov_choice

COVARIANCE_QUANTILES = {"q01": 0.01, "q20": 0.2, "q50": 0.5, "q80": 0.8, "q99": 0.99}
METRICS = (
    *("loss/policy", "loss/kl", "loss/entropy", "entropy", "kl", "ratio/mean", "ratio/max", "ratio/non_finite"),
    *("weight/mean", "weight/min", "weight/max", "weight/ess", "clip/low", "clip/high", "clip/dual"),
    *("covariance/mean", "covariance/std", *(f"covariance/{q}" for q in COVARIANCE_QUANTILES)),
)


class Objective(NamedTuple):
    loss: Tensor  # []
    logprob_grad: Tensor  # [N] g = dL/dx
    entropy_grad: Tensor | None  # [N] e = dL/dH; None without entropy_coef
    weights: Tensor  # [N]
    metrics: dict[str, Tensor]  # []; empty where not asked for


def _count(valid: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:  # [bound]
    return segments.sum(valid.to(dtype))


def _token_shares(
    tokens: Tokens,
    config: CovGRPOConfig,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # [N]
    """What a token's loss is multiplied with before the sum over all tokens."""
    valid, sequences = tokens.valid, tokens.sequences
    if config.loss_type in ("grpo", "dr_grpo"):
        assert sequences is not None
        total = tokens.count_sequences().clamp(min=1) if normalizer is None else normalizer
        if config.loss_type == "grpo":
            lengths = _count(valid, sequences, dtype)
            # One division after the other: the product of a length and a large normalizer may overflow.
            return torch.where(valid, 1 / sequences.gather(lengths.clamp(min=1)) / total, 0)
        assert config.max_completion_length is not None
        return valid.to(dtype) / config.max_completion_length / total
    total = tokens.count_valid().clamp(min=1) if normalizer is None else normalizer
    return valid.to(dtype) / total


def policy_objective(
    x: Tensor,  # [N] log-probs, zero where masked
    entropy: Tensor,  # [N] zero where masked
    tokens: Tokens,
    *,
    old: Tensor | None,  # [N] zero where masked, as are the next two
    ref: Tensor | None,  # [N]
    rollout: Tensor | None,  # [N]
    config: CovGRPOConfig,
    normalizer: float | Tensor | None,
    generator: torch.Generator | None,
    metrics: bool,
    moments: ScopeMoments | None = None,
) -> Objective:
    valid, a0, sequences = tokens.valid, tokens.advantages, tokens.sequences
    kind = config.token_weighting
    share = _token_shares(tokens, config, normalizer, x.dtype)
    zero = torch.zeros_like(x)

    log_ratio = zero if old is None else x - old
    lengths = None
    if config.importance_level == "sequence":
        assert sequences is not None
        lengths = _count(valid, sequences, x.dtype).clamp(min=1)
        log_ratio = sequences.gather(sequences.sum(log_ratio) / lengths)
    ratio = log_ratio.exp()
    clips = not isinstance(kind, KLCov)
    low = 1 - config.clip_low if clips and config.clip_low is not None else None
    high = 1 + config.clip_high if clips and config.clip_high is not None else None
    within = ratio if low is None and high is None else ratio.clamp(low, high)

    # Token weights.
    weights = valid.to(x.dtype)
    penalised: Tensor | None = None
    covariance: Tensor | None = None
    weights_grad = None
    if isinstance(kind, CovarianceWeighting):
        weighted, scopes = covariance_stats(x, tokens, kind, moments)
        weights, covariance = weighted.weights.to(x.dtype), weighted.covariance
        if kind.differentiate_weights:
            weights_grad = partial(
                covariance_weights_grad,
                stats=weighted, valid=valid, scopes=scopes, sequences=sequences, weighting=kind,
            )  # fmt: skip
    elif isinstance(kind, ClipCov):
        covariance = batch_covariance(x, tokens)
        eligible = valid & ~(within * a0 < ratio * a0)
        weights = weights.masked_fill(clip_cov_choice(covariance, eligible, valid, kind, generator), 0)
    elif isinstance(kind, KLCov):
        covariance = batch_covariance(x, tokens)
        penalised = kl_cov_choice(covariance, valid, kind)

    # The policy term is -slope * a (times x for CISPO); dx and da are its derivatives in x and in a. A token of zero
    # advantage has no such term, whatever its ratio.
    has_term = a0 != 0
    a = (weights * a0).where(has_term, 0)
    policy_ratio, within = ratio.where(has_term, 1), within.where(has_term, 1)
    bounded = torch.zeros_like(valid)
    if config.loss_type == "cispo":
        clipped = bounded if high is None else ratio > high
        slope = policy_ratio if high is None else policy_ratio.clamp(max=high)
        policy_x = x.where(has_term, 0)
        policy, dx, da = -slope * a * policy_x, -slope * a, -slope * policy_x
    else:
        clipped = within * a < policy_ratio * a
        slope = within.where(clipped, policy_ratio)
        if config.dual_clip is not None:
            bounded = (a < 0) & (slope > config.dual_clip)
            slope = slope.masked_fill(bounded, config.dual_clip)
        policy, da = -slope * a, -slope
        dx = (-policy_ratio * a).masked_fill(clipped | bounded, 0)

    policy_share = share
    if rollout is not None:
        # Where there is no term to multiply, an infinite weight must not make one.
        counts = has_term if penalised is None else has_term | penalised
        policy_share = share * rollout.where(counts, 1)
    g = policy_share * dx
    if lengths is not None and config.loss_type != "cispo":
        # The ratio is its sequence's: each of its log-probs moves the loss of all its tokens.
        assert sequences is not None
        g = sequences.gather(sequences.sum(g.where(valid, 0)) / lengths)
    if isinstance(kind, KLCov):
        assert penalised is not None
        gap = zero if old is None else x - old
        policy = policy + (kind.coef * gap.abs()).where(penalised, 0)
        g = g + policy_share * (kind.coef * gap.sign()).where(penalised, 0)
    if weights_grad is not None:
        g = g + weights_grad(policy_share * da * a0).to(x.dtype)

    kl = zero
    if ref is not None and (metrics or config.beta != 0):
        d = ref - x
        if config.kl_estimator == "k1":
            kl, kl_grad = -d, torch.ones_like(d)
        elif config.kl_estimator == "k2":
            kl, kl_grad = d.square() / 2, -d
        else:
            kl, kl_grad = torch.expm1(d) - d, -torch.expm1(d)
        if config.beta != 0:
            g = g + share * config.beta * kl_grad

    def total(value: Tensor) -> Tensor:
        return value.where(valid, 0).sum()

    policy_loss = total(policy_share * policy)
    kl_loss = config.beta * total(share * kl) if config.beta != 0 else zero.sum()
    entropy_loss = -config.entropy_coef * total(share * entropy)  # NaN for a NaN, whatever the coefficient: it shows
    results = {}
    if metrics:
        results = {
            "loss/policy": policy_loss,
            "loss/kl": kl_loss,
            "loss/entropy": entropy_loss,
            **_token_metrics(valid, entropy, kl, ratio),
            **_clip_metrics(valid, clipped, bounded, ratio),
            **weighting_metrics(weights, _group_covariance(x, tokens) if covariance is None else covariance, valid),
        }
    return Objective(
        policy_loss + kl_loss + entropy_loss,
        g.where(valid, 0),
        None if config.entropy_coef == 0 else -config.entropy_coef * share,
        weights,
        results,
    )


def _mean(value: Tensor, valid: Tensor) -> Tensor:
    return value.where(valid, 0).sum() / valid.sum().clamp(min=1)


def _extreme(value: Tensor, valid: Tensor, sign: float) -> Tensor:
    """The maximum (sign 1) or minimum (-1) over valid tokens, zero where there are none."""
    padded = torch.cat([(sign * value).where(valid, -torch.inf), value.new_full((1,), -torch.inf)])
    return (sign * padded.amax()).where(valid.any(), 0)


def _token_metrics(valid: Tensor, entropy: Tensor, kl: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    return {
        "entropy": _mean(entropy, valid),
        "kl": _mean(kl, valid),
        "ratio/mean": _mean(ratio, valid),
        "ratio/max": _extreme(ratio, valid, 1.0),
        "ratio/non_finite": (valid & ~ratio.isfinite()).sum().to(ratio.dtype),
    }


def _clip_metrics(valid: Tensor, clipped: Tensor, bounded: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    return {
        "clip/low": _mean((clipped & (ratio < 1)).to(ratio.dtype), valid),
        "clip/high": _mean((clipped & (ratio > 1)).to(ratio.dtype), valid),
        "clip/dual": _mean(bounded.to(ratio.dtype), valid),
    }


def _group_covariance(x: Tensor, tokens: Tokens) -> Tensor:  # [N]
    """Where the weighting looks at none: per group where groups are known, else over the batch."""
    weighting = CovarianceWeighting(scope="batch" if tokens.groups is None else "group")
    return covariance_stats(x, tokens, weighting)[0].covariance


def weighting_metrics(
    weights: Tensor,  # [N], zero where masked
    covariance: Tensor,  # [N]
    valid: Tensor,  # [N] bool
) -> dict[str, Tensor]:
    """What the weights and the covariances under them are like over the valid tokens."""
    n = valid.sum()
    mean = _mean(covariance, valid)
    last = (n - 1).clamp(min=0)
    nearest = torch.stack([(last * q).round().long() for q in COVARIANCE_QUANTILES.values()])
    in_order = torch.cat([covariance.where(valid, torch.inf), covariance.new_full((1,), torch.inf)]).sort().values
    quantiles = in_order.gather(0, nearest).where(n > 0, 0)
    squares = (weights.square().sum() * n.clamp(min=1)).clamp(min=torch.finfo(weights.dtype).tiny)
    metrics = {
        "weight/mean": _mean(weights, valid),
        "weight/min": _extreme(weights, valid, -1.0),
        "weight/max": _extreme(weights, valid, 1.0),
        "weight/ess": weights.sum().square() / squares,  # (sum W)^2 / sum W^2, as a share of the tokens
        "covariance/mean": mean,
        "covariance/std": _mean((covariance - mean).square(), valid).sqrt(),
        **{f"covariance/{name}": q for name, q in zip(COVARIANCE_QUANTILES, quantiles.unbind(), strict=True)},
    }
    return {name: value.to(weights.dtype) for name, value in metrics.items()}
