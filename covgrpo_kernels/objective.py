"""The policy objective on [N] vectors: loss, the coefficients dL/dx and dL/dH in closed form, and metrics.

What a token's terms are made of is computed here: sequence lengths, sequence ratios, token weights. The terms
themselves are in `token_terms.py`. `reference.py` specifies the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .config import ClipCov, CovarianceWeighting, CovGRPOConfig, HighEntropy, KLCov, Steer, Weighting
from .covariance import CovarianceStats, ScopeMoments
from .inputs import Tokens
from .segments import Segments
from .token_terms import WEIGHTING_METRICS, TermOptions, TokenInputs, clip_ratio, importance_ratio, weighting_summary
from .weighting import (
    batch_covariance,
    clip_cov_choice,
    covariance_stats,
    covariance_weights_grad,
    kl_cov_choice,
    weights_by_entropy,
)


class Objective(NamedTuple):
    loss: Tensor  # []
    logprob_grad: Tensor  # [N] g = dL/dx
    entropy_grad: Tensor | None  # [N] e = dL/dH; None without entropy_coef
    weights: Tensor  # [N]
    metrics: Tensor  # [len(METRICS)], or [0] where not asked for


class _TokenWeights(NamedTuple):
    """What a weighting says of N tokens."""

    weights: Tensor | None  # [N]; None: 1
    covariance: Tensor | None  # [N] float64; None where the weighting looks at none
    penalised: Tensor | None = None  # [N] bool, the choice of KL-Cov
    stats: tuple[CovarianceStats, Segments] | None = None  # of the covariance weights, and their scopes


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
    valid, sequences, kind = tokens.valid, tokens.sequences, config.token_weighting
    by_sequence = config.importance_level == "sequence"
    lengths = None
    averages_sequences = config.loss_type in ("grpo", "dr_grpo")
    if by_sequence or averages_sequences:
        assert sequences is not None
        lengths = sequences.sum(valid)
    mean_log_ratio = None  # NaN of a sequence without a valid token, which nobody reads
    if by_sequence and old is not None:
        assert sequences is not None
        assert lengths is not None
        mean_log_ratio = sequences.sum(x - old) / lengths
    low, high = _ratio_bounds(config)

    if isinstance(kind, ClipCov):
        ratio = importance_ratio(x, old, None if sequences is None else sequences.segment, mean_log_ratio)
        is_clipped = clip_ratio(ratio, low, high) * tokens.advantages < ratio * tokens.advantages
        chosen = _clip_cov(x, tokens, kind, valid & ~is_clipped, generator)
    else:
        chosen = _token_weights(x, entropy, old, tokens, kind, moments)
    covariance = None
    if metrics:
        covariance = _group_covariance(x, tokens) if chosen.covariance is None else chosen.covariance

    divides_by_length = config.loss_type == "grpo"
    needs_segments = divides_by_length or mean_log_ratio is not None
    options = TermOptions(
        config.loss_type == "cispo", low, high, config.dual_clip, kind.coef if isinstance(kind, KLCov) else 0.0,
        config.max_completion_length if config.loss_type == "dr_grpo" else None,
        config.beta, config.kl_estimator, config.entropy_coef,
        share_grad=by_sequence and config.loss_type != "cispo",
        differentiate_weights=isinstance(kind, CovarianceWeighting) and kind.differentiate_weights,
        metrics=metrics,
    )  # fmt: skip
    terms = operators.token_terms(
        TokenInputs(
            x, entropy, _advantages(tokens, kind, chosen.weights), valid, old,
            ref if metrics or config.beta != 0 else None, rollout, chosen.weights, chosen.penalised, covariance,
            sequences.segment if sequences is not None and needs_segments else None,
            lengths if divides_by_length else None, mean_log_ratio,
            _total(tokens, lengths if averages_sequences else None, normalizer),
        ),
        options,
    )  # fmt: skip

    # By the options and not by what there is: a rank without tokens takes part in all sums over ranks.
    g = terms.logprob_grad
    if options.share_grad:
        # Each log-prob of a sequence moves the ratio, and with it the loss, of all tokens of the sequence.
        assert sequences is not None
        assert lengths is not None
        mean = sequences.sum(terms.shared_grad) / lengths
        g = g + sequences.gather(mean).to(g.dtype).where(valid, 0)
    if options.differentiate_weights:
        assert chosen.stats is not None
        assert isinstance(kind, CovarianceWeighting)
        stats, scopes = chosen.stats
        g = g + covariance_weights_grad(terms.weights_grad, stats, scopes, tokens, kind)
    return Objective(
        terms.loss,
        g,
        terms.entropy_grad if config.entropy_coef != 0 else None,
        valid.to(x.dtype) if chosen.weights is None else chosen.weights,
        terms.metrics,
    )


def _ratio_bounds(config: CovGRPOConfig) -> tuple[float | None, float | None]:
    if isinstance(config.token_weighting, KLCov):  # it has no PPO clip
        return None, None
    low, high = config.clip_low, config.clip_high
    return None if low is None else 1 - low, None if high is None else 1 + high


def _advantages(tokens: Tokens, kind: Weighting | None, weights: Tensor | None) -> Tensor:  # [N]
    """What Clip-Cov and the 80/20 rule leave out has no policy term, whatever its ratio and rollout weight are."""
    if not isinstance(kind, (ClipCov, HighEntropy)):
        return tokens.advantages
    assert weights is not None
    return tokens.advantages.where(weights != 0, 0)


def _total(tokens: Tokens, lengths: Tensor | None, normalizer: float | Tensor | None) -> Tensor:  # []
    """What the sum of the token losses over the batch is divided by."""
    if isinstance(normalizer, Tensor):
        return normalizer
    if normalizer is not None:
        return torch.full((), normalizer, dtype=torch.float64, device=tokens.valid.device)
    if lengths is not None:
        return tokens.count_sequences(lengths).clamp(min=1)
    return tokens.count_valid().clamp(min=1)


def _token_weights(
    x: Tensor,
    entropy: Tensor,
    old: Tensor | None,
    tokens: Tokens,
    kind: CovarianceWeighting | KLCov | Steer | HighEntropy | None,
    moments: ScopeMoments | None,
) -> _TokenWeights:
    if kind is None:
        return _TokenWeights(None, None)
    if isinstance(kind, (Steer, HighEntropy)):
        return _TokenWeights(weights_by_entropy(x, entropy, old, tokens, kind), None)
    if isinstance(kind, KLCov):
        covariance = batch_covariance(x, tokens)
        return _TokenWeights(None, covariance, kl_cov_choice(covariance, tokens.valid, kind))
    stats, scopes = covariance_stats(x, tokens, kind, moments)
    return _TokenWeights(stats.weights.to(x.dtype), stats.covariance, stats=(stats, scopes))


def _clip_cov(
    x: Tensor, tokens: Tokens, kind: ClipCov, eligible: Tensor, generator: torch.Generator | None
) -> _TokenWeights:
    covariance = batch_covariance(x, tokens)
    removed = clip_cov_choice(covariance, eligible, tokens.valid, kind, generator)
    return _TokenWeights((tokens.valid & ~removed).to(x.dtype), covariance)


def _group_covariance(x: Tensor, tokens: Tokens) -> Tensor:  # [N]
    """Where the weighting looks at none: per group where groups are known, else over the batch."""
    weighting = CovarianceWeighting(scope="batch" if tokens.groups is None else "group")
    return covariance_stats(x, tokens, weighting)[0].covariance


def weighting_metrics(
    weights: Tensor,  # [N], zero where masked
    covariance: Tensor,  # [N]
    valid: Tensor,  # [N] bool
) -> dict[str, Tensor]:
    """What the weights and the covariances under them are like over the valid tokens: the metrics ``weight/*`` and
    ``covariance/*`` of `covgrpo_loss`.

    Args:
        weights: [N] float32 or float64, zero where masked.
        covariance: [N], likewise, in nats times the unit of the advantages: both as `covariance_weights` gives them
            with ``return_covariance=True``, flat.
        valid: [N] bool.

    Returns:
        Tensors [] by name, on the device.
    """
    return dict(zip(WEIGHTING_METRICS, weighting_summary(weights, covariance, valid).unbind(), strict=True))
