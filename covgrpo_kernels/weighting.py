"""Token weights: `covariance_weights` (arXiv 2605.11538), the choices of Clip-Cov and KL-Cov (arXiv 2505.22617), the
weights of STEER (arXiv 2510.10150) and of the 80/20 rule (arXiv 2506.01939)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import operators
from .checks import check_flag, check_floating, check_tensor, check_type
from .collectives import all_reduce_max, all_values
from .config import ClipCov, CovarianceWeighting, HighEntropy, KLCov, Steer, Weighting
from .covariance import CovarianceStats, ScopeMoments, weights_from_moments
from .covariance import covariance_weights as covariance_weights_in_torch
from .covariance import covariance_weights_grad as covariance_weights_grad_in_torch
from .group_moments import GroupMoments
from .inputs import (
    Tokens,
    accumulator_dtype,
    check_sequence_ids,
    flatten,
    flatten_floats,
    flatten_tokens,
    valid_tokens,
)
from .segments import Segments
from .token_terms import importance_ratio


class CovarianceWeights(NamedTuple):
    """What `covariance_weights` returns with ``return_covariance=True``.

    Attributes:
        weights: of the shape of ``logprobs``, [B, T] or [N]; zero where masked.
        covariance: likewise, (x - mean x)(A - mean A) in nats times the unit of the advantages; without a gradient.
    """

    weights: Tensor  # [B, T] or [N], zero where masked
    covariance: Tensor  # likewise, c_t in nats times advantage; without a gradient


def check_ids(tokens: Tokens, weighting: CovarianceWeighting) -> None:
    """Raises ValueError where an id that the weighting needs is missing."""
    check_sequence_ids(tokens, weighting)
    if weighting.scope == "group" and tokens.groups is None:
        raise ValueError("group_ids or group_size must be given for a weighting of scope 'group', got neither")


def weighting_scopes(tokens: Tokens, weighting: CovarianceWeighting) -> Segments:
    """The segments that a weighting's statistics are taken over. Raises ValueError where an id is missing."""
    check_ids(tokens, weighting)
    if weighting.scope == "batch":
        return Segments.whole(len(tokens.valid), tokens.valid.device, tokens.process_group)
    assert tokens.groups is not None
    return tokens.groups


def _in_process(*partitions: Segments | None) -> bool:
    """Whether kernels can compute statistics of these partitions: they take part in no collectives."""
    return all(partition is None or partition.process_group is None for partition in partitions)


def covariance_stats(
    logprobs: Tensor,  # [N], zero where masked
    tokens: Tokens,
    weighting: CovarianceWeighting,
    moments: ScopeMoments | None = None,
) -> tuple[CovarianceStats, Segments]:
    """Weights and covariances of each token, and the scopes that their statistics were taken over (with ``moments``,
    the scopes that these are of)."""
    scopes = weighting_scopes(tokens, weighting)
    batch = (logprobs, tokens.advantages, tokens.valid, scopes, tokens.sequences, weighting)
    if moments is not None:
        return weights_from_moments(*batch, moments), scopes
    if not _in_process(scopes, tokens.sequences):
        return covariance_weights_in_torch(*batch), scopes
    return operators.covariance_weights(*batch), scopes


def covariance_weights_grad(
    weights_grad: Tensor,  # [N] dL/dW
    stats: CovarianceStats,
    scopes: Segments,
    tokens: Tokens,
    weighting: CovarianceWeighting,
) -> Tensor:  # [N] dL/dlogprobs, in the dtype of ``weights_grad``
    """The exact gradient of what `covariance_stats` gives."""
    in_process = _in_process(scopes, tokens.sequences)
    compute = operators.covariance_weights_grad if in_process else covariance_weights_grad_in_torch
    grad = compute(weights_grad, stats, tokens.valid, scopes, tokens.sequences, weighting)
    return grad.to(weights_grad.dtype)


def with_moments(
    tokens: Tokens,
    moments: GroupMoments | None,
    weighting: Weighting | None,
    group_ids: Tensor | None,
    like: Tensor,  # [B, T] or [N]
) -> tuple[Tokens, ScopeMoments | None]:
    """The tokens with their groups as the moments number them, and the moments.

    Raises TypeError or ValueError, naming the argument, for moments of something else.
    """
    if moments is None:
        return tokens, None
    check_type("moments", moments, GroupMoments)
    if weighting != moments.weighting:
        raise ValueError(f"moments must be of the weighting {weighting}, got {moments.weighting}")
    if tokens.process_group is not None:
        raise ValueError(
            "process_group and sequence_group must be None where moments are given, which know all ranks by `reduce`"
        )
    if moments.weighting.scope == "group":
        if group_ids is None:
            raise ValueError("group_ids must be given where moments are, got None")
        ids = flatten("group_ids", group_ids, like.shape).long()
        tokens = tokens._replace(groups=moments.scopes(ids, tokens.valid))
    return tokens, moments.values()


def batch_covariance(logprobs: Tensor, tokens: Tokens) -> Tensor:  # [N] float64
    """(x - mean x)(A - mean A) over all valid tokens of the call, on each rank its own (arXiv 2505.22617 eq. 8)."""
    weighting, tokens = CovarianceWeighting(scope="batch"), tokens._replace(process_group=None)
    return covariance_stats(logprobs, tokens._replace(sequences=None), weighting)[0].covariance


def clip_cov_choice(
    covariance: Tensor,  # [N]
    eligible: Tensor,  # [N] bool: valid and not clipped by PPO
    valid: Tensor,  # [N] bool
    weighting: ClipCov,
    generator: torch.Generator | None,
) -> Tensor:  # [N] bool
    """The random tokens whose policy term Clip-Cov removes."""
    draw = torch.rand(len(valid), generator=generator, device=valid.device, dtype=torch.float32)
    candidate = (covariance > weighting.low) & (covariance < weighting.high) & eligible
    order = draw.where(candidate, 2.0).argsort()
    return _first_of(order, _share_of(valid, weighting.ratio)) & candidate


def kl_cov_choice(covariance: Tensor, valid: Tensor, weighting: KLCov) -> Tensor:  # [N] bool
    """The tokens of highest covariance, which KL-Cov penalises."""
    order = covariance.where(valid, -torch.inf).argsort(descending=True, stable=True)
    return _first_of(order, _share_of(valid, weighting.fraction)) & valid


def weights_by_entropy(
    logprobs: Tensor,  # [N], zero where masked, as the next two
    entropy: Tensor,  # [N]
    old: Tensor | None,  # [N]
    tokens: Tokens,
    weighting: Steer | HighEntropy,
) -> Tensor:  # [N], zero where masked
    """The weights of STEER or of the 80/20 rule, as their classes describe them."""
    if isinstance(weighting, Steer):
        return _steer_weights(logprobs, entropy, old, tokens, weighting)
    return _high_entropy_weights(entropy, tokens, weighting)


def _steer_weights(
    logprobs: Tensor,  # [N]
    entropy: Tensor,  # [N]
    old: Tensor | None,  # [N]
    tokens: Tokens,
    weighting: Steer,
) -> Tensor:  # [N]
    ratio = importance_ratio(logprobs, old, None, None)
    change = (tokens.advantages * ratio * torch.expm1(logprobs) * (logprobs + entropy)).abs()
    change = change.nan_to_num(nan=0.0, posinf=0.0)
    largest = torch.nn.functional.pad(change, (0, 1), value=weighting.min_change).amax()
    largest = all_reduce_max(largest, tokens.process_group)
    weights = (change * (math.log(weighting.min_weight) / largest)).exp().clamp(weighting.min_weight, 1)
    return weights * tokens.valid


def _high_entropy_weights(entropy: Tensor, tokens: Tokens, weighting: HighEntropy) -> Tensor:  # [N]
    # A NaN is no high entropy, but belongs to a valid token.
    ranked = entropy.nan_to_num(nan=torch.finfo(entropy.dtype).min).where(tokens.valid, -torch.inf)
    of_all = ranked if tokens.process_group is None else all_values(ranked, tokens.process_group)
    descending = torch.nn.functional.pad(of_all, (0, 1), value=-torch.inf).sort(descending=True).values
    count = tokens.count_valid().double()
    # Rounded up, but for what is rounding in the product itself.
    last = (count * weighting.fraction + 0.9999).floor().clamp(min=1).long() - 1
    threshold = descending.gather(0, last.reshape(1))
    weight = count / (of_all >= threshold).sum()
    return weight.to(entropy.dtype).where(tokens.valid & (ranked >= threshold), 0)


def _share_of(valid: Tensor, share: float) -> Tensor:  # []
    """max(int(share * number of valid tokens), 1), on the device."""
    return (valid.sum(dtype=torch.float64) * share).floor().clamp(min=1)


def _first_of(order: Tensor, count: Tensor) -> Tensor:  # [N] bool
    """The first ``count`` tokens in that order."""
    is_first = torch.arange(len(order), device=order.device) < count
    return torch.zeros_like(is_first).scatter_(0, order, is_first)


class _CovarianceWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,  # [N]
        tokens: Tokens,
        weighting: CovarianceWeighting,
        moments: ScopeMoments | None,
    ) -> tuple[Tensor, Tensor]:  # [N] weights, [N] covariances
        stats, ctx.scopes = covariance_stats(logprobs, tokens, weighting, moments)
        ctx.save_for_backward(*stats)
        ctx.tokens, ctx.weighting = tokens, weighting
        weights, covariance = stats.weights.to(logprobs.dtype), stats.covariance.to(logprobs.dtype)
        ctx.mark_non_differentiable(covariance)
        return weights, covariance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        stats = CovarianceStats(*ctx.saved_tensors)
        grad = covariance_weights_grad(weights_grad, stats, ctx.scopes, ctx.tokens, ctx.weighting)
        return grad, None, None, None


@overload
def covariance_weights(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    sequence_ids: Tensor | None = None,
    weighting: CovarianceWeighting | None = None,
    return_covariance: Literal[False] = False,
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> Tensor: ...


@overload
def covariance_weights(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    sequence_ids: Tensor | None = None,
    weighting: CovarianceWeighting | None = None,
    return_covariance: Literal[True],
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> CovarianceWeights: ...


def covariance_weights(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    sequence_ids: Tensor | None = None,
    weighting: CovarianceWeighting | None = None,
    return_covariance: bool = False,
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> Tensor | CovarianceWeights:
    """W_t = n softmax(-c_t^2 / (2 s2)) over each scope: the token weights of CW-GRPO (arXiv 2605.11538), for a
    trainer that keeps its own loss: multiply each token's advantage by its weight.

    Args:
        logprobs: [B, T] or packed [N], floating, in nats.
        advantages: [B] or [B, T]; [N] packed.
        mask: as ``logprobs``, nonzero where a token counts; None: all do. What stands under zeros has no
            influence, NaN included.
        group_ids: integers, [B] or as ``logprobs``: which prompt a response answers, in any order.
        group_size: instead, responses per prompt, where rows of one group follow each other.
        sequence_ids: integers [N] for packed tokens, where the weighting needs sequences.
        weighting: which reading of the paper; the default is `CovarianceWeighting()`.
        return_covariance: return the covariances c_t too, in nats times the unit of the advantages.
        moments, process_group, sequence_group: as `covgrpo_loss`. With differentiated weights the gradient is that of
            the sum over the ranks, all of which have to run the backward.

    Returns:
        Weights of ``logprobs``' shape in its dtype (float32 for 16-bit ones), zero where masked, 1 in scopes
        without variance. Without gradient unless ``weighting.differentiate_weights``. A NaN or inf in a valid
        token makes the weights of its scope NaN. With ``return_covariance``, CovarianceWeights(weights, covariance).

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    weighting = CovarianceWeighting() if weighting is None else weighting
    check_type("weighting", weighting, CovarianceWeighting)
    check_flag("return_covariance", return_covariance)
    check_floating("logprobs", logprobs)
    dtype = accumulator_dtype(logprobs.dtype)
    valid = valid_tokens("logprobs", logprobs, mask)
    tokens = flatten_tokens(
        logprobs, advantages, valid, dtype=dtype, group_ids=group_ids, group_size=group_size,
        sequence_ids=sequence_ids, process_group=process_group, sequence_group=sequence_group,
    )  # fmt: skip
    tokens, values = with_moments(tokens, moments, weighting, group_ids, logprobs)
    x = logprobs.reshape(-1).to(dtype).where(valid, 0)
    if not weighting.differentiate_weights:
        x = x.detach()
    weights, covariance = (
        value.reshape(logprobs.shape) for value in _CovarianceWeights.apply(x, tokens, weighting, values)
    )
    return CovarianceWeights(weights, covariance) if return_covariance else weights


def entropy_weights(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    weighting: Steer | HighEntropy,
    old_logprobs: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The token weights of STEER (arXiv 2510.10150) or of the 80/20 rule (arXiv 2506.01939), for a trainer that keeps
    its own loss: multiply each token's advantage by its weight. `Steer` and `HighEntropy` say what they are, and what
    is read into the papers.

    Args:
        logprobs: [B, T] or packed [N], floating, in nats, of the policy that is trained.
        entropy: as ``logprobs``, nats: both as `linear_logprob` gives them with ``entropy=True``.
        advantages: [B] or [B, T]; [N] packed.
        mask: as ``logprobs``, nonzero where a token counts; None: all do. What stands under zeros has no
            influence, NaN included.
        weighting: `Steer` or `HighEntropy`.
        old_logprobs: as ``logprobs``, of the policy that sampled; None: ``logprobs``. Read by `Steer` alone.
        process_group: ranks over which the batch is spread, all of which make this call.

    Returns:
        Weights of ``logprobs``' shape in its dtype (float32 for 16-bit ones), zero where masked. Without gradient.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    if not isinstance(weighting, (Steer, HighEntropy)):
        raise TypeError(f"weighting must be a Steer or HighEntropy, got {type(weighting).__name__}")
    check_floating("logprobs", logprobs)
    dtype = accumulator_dtype(logprobs.dtype)
    valid = valid_tokens("logprobs", logprobs, mask)
    tokens = flatten_tokens(
        logprobs, advantages, valid, dtype=dtype, group_ids=None, group_size=None, sequence_ids=None,
        process_group=process_group, sequence_group=None,
    )  # fmt: skip
    x = flatten_floats("logprobs", logprobs, logprobs, valid, dtype)
    h = flatten_floats("entropy", check_tensor("entropy", entropy), logprobs, valid, dtype, per_token=True)
    old = flatten_floats("old_logprobs", old_logprobs, logprobs, valid, dtype, per_token=True)
    assert x is not None
    assert h is not None
    return weights_by_entropy(x, h, old, tokens, weighting).reshape(logprobs.shape)
