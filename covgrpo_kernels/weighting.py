"""Token weights: the covariance weights (arXiv 2605.11538), their exact gradient, and the choices of Clip-Cov and
KL-Cov (arXiv 2505.22617)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import tiles
from .collectives import check_process_group
from .config import ClipCov, CovarianceWeighting, KLCov
from .distributed import GroupMoments
from .layout import Segments, Tokens, check_floating, check_tensor, flatten, flatten_tokens, valid_tokens
from .tiles import eager
from .tiles.interface import GroupWeights, Moments


def weighting_scopes(tokens: Tokens, weighting: CovarianceWeighting) -> Segments:
    """The segments that a weighting's statistics are taken over. Raises ValueError where an id is missing."""
    needs_sequences = weighting.centering == "sequence" or weighting.advantage_centering == "response"
    if needs_sequences and tokens.sequences is None:
        raise ValueError("sequence_ids must be given for packed tokens with this weighting, got None")
    if weighting.scope == "batch":
        return Segments.whole(len(tokens.valid), tokens.valid.device, tokens.process_group)
    if tokens.groups is None:
        raise ValueError("group_ids or group_size must be given for a weighting of scope 'group', got neither")
    return tokens.groups


@torch.library.custom_op("covgrpo::group_weights", mutates_args=())
def group_weights_op(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scope: list[Tensor],  # Segments.tensors() of the scopes
    sequence: list[Tensor],  # and of the sequences; empty where there are none
    centering: str,
    advantage_centering: str,
    normalizer: str,
    bandwidth_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`GroupWeights` of every scope. An operator, so that compilers need not look into a backend's kernels."""
    weighting = CovarianceWeighting(
        centering=centering,
        advantage_centering=advantage_centering,
        normalizer=normalizer,
        bandwidth_eps=bandwidth_eps,
    )
    sequences = Segments.of_tensors(sequence) if sequence else None
    with tiles.on_device(logprobs.device):
        ops = tiles.select(logprobs.device)
        return ops.group_weights(logprobs, advantages, valid, Segments.of_tensors(scope), sequences, weighting)


@group_weights_op.register_fake
def _(logprobs, advantages, valid, scope, *rest):  # type: ignore[no-untyped-def]
    per_token = (torch.empty_like(logprobs, dtype=torch.float64) for _ in range(3))
    return *per_token, logprobs.new_empty(len(scope[1]) - 1, dtype=torch.float64)


def group_weights(
    logprobs: Tensor,  # [N], zero where masked
    tokens: Tokens,
    weighting: CovarianceWeighting,
    moments: Moments | None = None,
) -> tuple[GroupWeights, Segments]:
    """Of each token, and the scopes that statistics were taken over, or that ``moments`` are of."""
    scopes = weighting_scopes(tokens, weighting)
    batch = (logprobs, tokens.advantages, tokens.valid, scopes, tokens.sequences, weighting)
    if moments is not None:
        return eager.weights_of_moments(*batch, moments), scopes
    if any(part is not None and part.process_group is not None for part in (scopes, tokens.sequences)):
        return eager.group_weights(*batch), scopes  # the kernels take no part in collectives
    values = group_weights_op(
        logprobs, tokens.advantages, tokens.valid, scopes.tensors(),
        [] if tokens.sequences is None else tokens.sequences.tensors(),
        weighting.centering, weighting.advantage_centering, weighting.normalizer, weighting.bandwidth_eps,
    )  # fmt: skip
    return GroupWeights(*values), scopes


def group_weights_grad(
    weights_grad: Tensor,  # [N] dL/dW
    result: GroupWeights,
    scopes: Segments,
    tokens: Tokens,
    weighting: CovarianceWeighting,
) -> Tensor:  # [N] float64, dL/dlogprobs
    """The exact gradient through c, s2 and the normaliser. Scopes without variance have constant weights."""
    weights, c, da, std = result
    valid = tokens.valid
    u = weights_grad.double().where(valid, 0)
    varies = scopes.spread(std) != 0
    bandwidth = scopes.spread(std + weighting.bandwidth_eps).where(varies, 1)
    n = scopes.sum(valid.double()).clamp(min=1)

    # W = goal * softmax(q) with q = -c^2 / (2 b^2) and b = sqrt(s2) + eps.
    mean_u = scopes.sum(weights * u) / scopes.sum(weights).where(scopes.sum(weights) != 0, 1)
    dq = (weights * (u - scopes.spread(mean_u))).where(varies, 0)
    db = scopes.sum(dq * c.square() / bandwidth**3)
    dvariance = db / (2 * std.where(std != 0, 1))
    mean_c = scopes.sum(c) / n
    dc = -dq * c / bandwidth.square() + scopes.spread(dvariance * 2 / n) * (c - scopes.spread(mean_c))

    ddx = (dc * da).where(valid, 0)
    if weighting.centering == "scope":
        centred, lengths = scopes, n
    else:
        assert tokens.sequences is not None
        centred, lengths = tokens.sequences, tokens.sequences.sum(valid.double()).clamp(min=1)
    return (ddx - centred.spread(centred.sum(ddx) / lengths)).where(valid, 0)


def with_moments(
    tokens: Tokens,
    moments: GroupMoments | None,
    weighting: CovarianceWeighting | ClipCov | KLCov | None,
    group_ids: Tensor | None,
    like: Tensor,  # [B, T] or [N]
) -> tuple[Tokens, Moments | None]:
    """The tokens with their groups as the moments number them, and the moments. Raises TypeError or ValueError, naming
    the argument, for moments of something else."""
    if moments is None:
        return tokens, None
    if not isinstance(moments, GroupMoments):
        raise TypeError(f"moments must be GroupMoments, got {type(moments).__name__}")
    if weighting != moments.weighting:
        raise ValueError(f"moments must be of the weighting {weighting}, got {moments.weighting}")
    if tokens.process_group is not None:
        raise ValueError("process_group must be None where moments are given, which know all ranks by `reduce`")
    if moments.weighting.scope == "group":
        if group_ids is None:
            raise ValueError("group_ids must be given where moments are, got None")
        ids = flatten("group_ids", group_ids, like.shape).long()
        tokens = tokens._replace(groups=moments.scopes(ids, tokens.valid))
    return tokens, moments.values()


def batch_covariance(logprobs: Tensor, tokens: Tokens) -> Tensor:  # [N] float64
    """(x - mean x)(A - mean A) over all valid tokens of the call, on each rank its own (arXiv 2505.22617 eq. 8)."""
    weighting, tokens = CovarianceWeighting(scope="batch"), tokens._replace(process_group=None)
    return group_weights(logprobs, tokens._replace(sequences=None), weighting)[0].covariance


def clip_cov_choice(
    covariance: Tensor,  # [N]
    eligible: Tensor,  # [N] bool: valid and not clipped by PPO
    valid: Tensor,  # [N] bool
    weighting: ClipCov,
    generator: torch.Generator | None,
) -> Tensor:  # [N] bool
    """The random tokens whose policy term Clip-Cov removes."""
    draw = torch.rand(len(valid), generator=generator, device=valid.device)
    candidate = (covariance > weighting.low) & (covariance < weighting.high) & eligible
    wanted = (valid.sum() * weighting.ratio).floor().clamp(min=1)
    order = draw.where(candidate, 2.0).argsort()
    first = torch.arange(len(valid), device=valid.device) < wanted
    return torch.zeros_like(valid).scatter_(0, order, first) & candidate


def kl_cov_choice(covariance: Tensor, valid: Tensor, weighting: KLCov) -> Tensor:  # [N] bool
    """The tokens of highest covariance, which KL-Cov penalises."""
    wanted = (valid.sum() * weighting.fraction).floor().clamp(min=1)
    order = covariance.where(valid, -torch.inf).argsort(descending=True, stable=True)
    first = torch.arange(len(valid), device=valid.device) < wanted
    return torch.zeros_like(valid).scatter_(0, order, first) & valid


class CovarianceWeights(NamedTuple):
    """What `covariance_weights` returns with ``return_covariance=True``."""

    weights: Tensor  # of logprobs' shape, zero where masked
    covariance: Tensor  # likewise: (x - mean x)(A - mean A), in nats times advantage


class _CovarianceWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, tokens: Tokens, weighting: CovarianceWeighting, moments: Moments | None
    ) -> tuple[Tensor, Tensor]:
        result, ctx.scopes = group_weights(logprobs, tokens, weighting, moments)
        ctx.save_for_backward(*result)
        ctx.tokens, ctx.weighting = tokens, weighting
        covariance = result.covariance.to(logprobs.dtype).where(tokens.valid, 0)
        ctx.mark_non_differentiable(covariance)
        return result.weights.to(logprobs.dtype), covariance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights_grad: Tensor, _covariance_grad: Tensor) -> tuple[Tensor | None, ...]:
        result = GroupWeights(*ctx.saved_tensors)
        grad = group_weights_grad(weights_grad, result, ctx.scopes, ctx.tokens, ctx.weighting)
        return grad.to(weights_grad.dtype), None, None, None


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
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    return_covariance: Literal[False] = False,
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
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    return_covariance: Literal[True],
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
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    return_covariance: bool = False,
) -> Tensor | CovarianceWeights:
    """W_t = n softmax(-c_t^2 / (2 s2)) over each scope: the token weights of CW-GRPO (arXiv 2605.11538), for a
    trainer that keeps its own loss: multiply the token's advantage by its weight.

    Args:
        logprobs: [B, T] or packed [N], floating, in nats.
        advantages: [B] or [B, T]; [N] packed.
        mask: as ``logprobs``, nonzero where a token counts; None: all do. What stands under zeros has no
            influence, NaN included.
        group_ids: integers, [B] or as ``logprobs``: which prompt a response answers, in any order.
        group_size: instead, responses per prompt, where rows of one group follow each other.
        sequence_ids: integers [N] for packed tokens, where the weighting needs sequences.
        weighting: which reading of the paper; the default is `CovarianceWeighting()`.
        moments, process_group, sequence_group: as `covgrpo_loss`. With differentiated weights the gradient is that of
            the sum over the ranks, which all have to run the backward.
        return_covariance: return `CovarianceWeights`, which has the covariances c_t as well, without gradient.

    Returns:
        Weights of ``logprobs``' shape in its dtype (float32 for 16-bit ones), zero where masked, 1 in scopes
        without variance. Without gradient unless ``weighting.differentiate_weights``. A NaN or inf in a valid
        token makes the weights of its scope NaN.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    weighting = CovarianceWeighting() if weighting is None else weighting
    if not isinstance(weighting, CovarianceWeighting):
        raise TypeError(f"weighting must be a CovarianceWeighting, got {type(weighting).__name__}")
    check_floating("logprobs", check_tensor("logprobs", logprobs))
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    valid = valid_tokens("logprobs", logprobs, mask)
    tokens = flatten_tokens(
        logprobs, advantages, valid, dtype=dtype,
        group_ids=group_ids, group_size=group_size, sequence_ids=sequence_ids,
        process_group=check_process_group("process_group", process_group),
        sequence_group=check_process_group("sequence_group", sequence_group),
    )  # fmt: skip
    tokens, values = with_moments(tokens, moments, weighting, group_ids, logprobs)
    x = logprobs.reshape(-1).to(dtype).where(valid, 0)
    if not weighting.differentiate_weights:
        x = x.detach()
    weights, covariance = (v.reshape(logprobs.shape) for v in _CovarianceWeights.apply(x, tokens, weighting, values))
    return CovarianceWeights(weights, covariance) if return_covariance else weights
