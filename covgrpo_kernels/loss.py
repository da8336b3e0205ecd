"""`covgrpo_loss`: log-probs from the head, the policy objective on [N] vectors, gradients back through the head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import operators
from .checks import check_flag, check_positive, check_tensor
from .config import IGNORE_INDEX, ClipCov, CovarianceWeighting, CovGRPOConfig, HighEntropy, KLCov, Steer
from .covariance import ScopeMoments
from .group_moments import GroupMoments
from .inputs import (
    HeadInputs,
    Precision,
    Tokens,
    accumulator_dtype,
    check_layout,
    flatten_floats,
    flatten_tokens,
    prepare_head,
    valid_tokens,
)
from .kernels.interface import LogitTransform, RowStats
from .objective import policy_objective
from .plan import BackwardPlan
from .segments import Segments
from .token_terms import METRICS
from .vocab_parallel import VocabSlice
from .weighting import check_ids, weighting_scopes, with_moments


class CovGRPOOutput(NamedTuple):
    """What `covgrpo_loss` returns.

    Attributes:
        loss: [], float32 (float64 for float64 inputs); the only one with a gradient, once differentiable.
        logprobs: of the shape of ``targets``, [B, T] or [N], in the dtype of ``loss``, nats; zero where masked, NaN
            where not scored.
        entropy: likewise; None without ``metrics`` and ``entropy_coef``.
        weights: likewise, the weight of each token; zero where masked.
        metrics: tensors [] on the device; empty without ``metrics``.
    """

    loss: Tensor  # [] float32 (float64 for float64 inputs), the only one with a gradient
    logprobs: Tensor  # [B, T] or [N]; zero where masked, NaN where not scored
    entropy: Tensor | None  # likewise, nats; None without metrics and entropy_coef
    weights: Tensor  # [B, T] or [N]; zero where masked
    metrics: dict[str, Tensor]  # [] each, on the device


_ROW_METRICS = ("live_fraction", "dense_fraction", "grad_error_bound", "invalid_targets", "invalid_advantages")
_METRICS = (*METRICS, *(f"rows/{name}" for name in _ROW_METRICS))


class _Batch(NamedTuple):
    """What the objective takes besides log-probs and entropies; [N] tensors are zero where masked."""

    tokens: Tokens
    old: Tensor | None  # [N] log-probs
    ref: Tensor | None  # [N] log-probs
    rollout: Tensor | None  # [N] weights
    moments: ScopeMoments | None
    normalizer: float | Tensor | None


class _Settings(NamedTuple):
    config: CovGRPOConfig
    generator: torch.Generator | None
    metrics: bool
    needs_grad: bool
    vocab_slice: VocabSlice | None

    @property
    def with_entropy(self) -> bool:
        return self.metrics or self.config.entropy_coef != 0

    @property
    def needs_entropy(self) -> bool:
        return self.with_entropy or isinstance(self.config.token_weighting, (Steer, HighEntropy))


def _scored(tokens: Tokens, settings: _Settings) -> Tensor:  # [N] bool
    """Rows worth a log-prob. Without metrics, KL and entropy a zero advantage has no influence, unless a token
    that has some needs the row: in its weighting scope, or in its sequence for a sequence's ratio."""
    config, valid = settings.config, tokens.valid
    if settings.metrics or config.beta != 0 or config.entropy_coef != 0:
        return valid
    kind = config.token_weighting
    # A penalty needs no advantage; and whose entropy is among the highest depends on all tokens, also of other ranks.
    if isinstance(kind, (KLCov, HighEntropy)):
        return valid
    matters = tokens.advantages != 0  # they are zero where masked
    if config.importance_level == "sequence":
        assert tokens.sequences is not None
        matters = _anywhere(matters, tokens.sequences)
    of_batch = isinstance(kind, ClipCov) or (isinstance(kind, CovarianceWeighting) and kind.scope == "batch")
    if isinstance(kind, CovarianceWeighting) and not (of_batch and tokens.process_group is None):
        matters = _anywhere(matters, weighting_scopes(tokens, kind))
    elif of_batch:
        matters = matters.any().expand_as(matters)
    return valid & matters


def _anywhere(flag: Tensor, segments: Segments) -> Tensor:
    return segments.gather(segments.sum(flag) > 0)


class _CovGRPO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: Tensor | None,  # [N]
        transform: LogitTransform,
        precision: Precision,
        batch: _Batch,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        tokens = batch.tokens
        is_scored = _scored(tokens, settings)
        targets = targets.where(is_scored, IGNORE_INDEX)
        inputs = HeadInputs(hidden, weight, bias, targets, temperature, transform)
        scored = operators.forward(
            inputs, entropy=settings.needs_entropy, ignore_index=IGNORE_INDEX, precision=precision,
            needs_grad=settings.needs_grad, vocab_slice=settings.vocab_slice,
        )  # fmt: skip
        x, entropy = scored.stats.logprob, scored.stats.entropy
        objective = policy_objective(
            x, entropy, tokens,
            old=batch.old, ref=batch.ref, rollout=batch.rollout,
            config=settings.config, normalizer=batch.normalizer, generator=settings.generator,
            metrics=settings.metrics, moments=batch.moments,
        )  # fmt: skip
        g, e = objective.logprob_grad, objective.entropy_grad
        planned = operators.plan(inputs, scored, g, e, precision)
        notes = planned.notes(scored)
        ctx.save_for_backward(
            hidden, weight, bias, targets, temperature, g, e, scored.stats.packed, *notes, *planned.tensors()
        )
        ctx.notes, ctx.transform, ctx.grad_tol, ctx.vocab_slice = (
            len(notes),
            transform,
            precision.grad_tol,
            settings.vocab_slice,
        )

        logprobs = x.clone() if is_scored is tokens.valid else x.masked_fill(is_scored != tokens.valid, torch.nan)
        metrics = x.new_empty(0)
        if settings.metrics:
            vocab = len(weight) if settings.vocab_slice is None else settings.vocab_slice.total
            metrics = torch.cat([objective.metrics, _row_metrics(planned.plan, tokens, targets, vocab).to(x.dtype)])
        ctx.set_materialize_grads(False)  # else zeros are written for what has no gradient
        ctx.mark_non_differentiable(logprobs, entropy, objective.weights, metrics)
        return objective.loss, logprobs, entropy, objective.weights, metrics

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if loss_grad is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden, weight, bias, targets, temperature, g, e, packed, *rest = ctx.saved_tensors
        notes, planned = rest[: ctx.notes], operators.Planned.of(rest[ctx.notes :])
        grads = operators.backward(
            HeadInputs(hidden, weight, bias, targets, temperature, ctx.transform),
            operators.Scored(RowStats(packed), notes),
            g,
            e,
            planned,
            precision=Precision(ctx.grad_tol, None),
            needs=ctx.needs_input_grad[:3],
            vocab_slice=ctx.vocab_slice,
            grad_scale=loss_grad,
        )
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _row_metrics(
    plan: BackwardPlan,
    tokens: Tokens,
    targets: Tensor,  # [N]
    vocab: int,
) -> Tensor:  # [len(_ROW_METRICS)] float64
    valid = tokens.valid
    outside = valid & ((targets < 0) | (targets >= vocab))
    flags = [plan.dense | plan.sparse, plan.dense, outside, valid & tokens.advantages.isnan(), valid]
    counts = torch.stack(flags).sum(1, dtype=torch.float64)
    fractions = counts[:2] / counts[4].clamp(min=1)
    return torch.cat([fractions, plan.error_bound.unsqueeze(0), counts[2:4]])


def covgrpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    sequence_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    config: CovGRPOConfig | None = None,
    normalizer: float | Tensor | None = None,
    metrics: bool = True,
    generator: torch.Generator | None = None,
    grad_tol: float | str = "auto",
    grad_mode: str = "bounded",
    moments: GroupMoments | None = None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> CovGRPOOutput:
    """The CW-GRPO policy loss (arXiv 2605.11538) from hidden states and the head, without the logits.

    Either padded, one response a row: hidden [B, T, D], or packed: hidden [N, D]. ``hidden[..., t, :]`` is the
    state that predicts ``targets[..., t]``.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, grad_tol, grad_mode, vocab_group: as `linear_logprob`.
        targets: [B, T] or [N] integer ids of the sampled tokens; -100 masks a token too.
        advantages: [B] or [B, T]; [N] packed; floating.
        mask: as ``targets``, nonzero where a token counts. Whatever stands under zeros, NaN included, has no
            influence. None: all do but those with target -100.
        group_ids: integers, [B] or as ``targets``: which prompt a response answers. A group must be whole
            within the call, unless ``process_group`` or ``moments`` are given.
        group_size: instead, responses per prompt, where rows of one group follow each other.
        sequence_ids: integers as ``targets``: which response a packed token is of.
        old_logprobs: as ``targets``, of the policy that sampled; None: the current ones, ratio 1.
        ref_logprobs: as ``targets``, of the KL reference. Where ``beta`` is 0 they enter the metric ``kl`` only.
        rollout_weights: [B] or as ``targets``: multiply the policy term (truncated importance sampling).
        config: what is computed; None: `CovGRPOConfig.paper()`.
        normalizer: replaces the number of sequences (grpo, dr_grpo) or valid tokens (bnpo, dapo, cispo) in the
            denominator: pass that of all micro-batches and ranks to make accumulation exact.
        metrics: compute metrics (device tensors, no synchronisation). Without them, rows that influence nothing
            (zero advantage in the whole scope, no KL, no entropy) are not scored: their log-prob is NaN.
        generator: for the random choices of Clip-Cov and of ``grad_mode="unbiased"``, on the device of ``hidden``.
        moments: statistics of groups that are spread over micro-batches, of the same weighting; ``group_ids`` are
            then those of the whole batch. `GroupMoments`.
        process_group: ranks over which the batch is spread, all of which make this call. Weights and the denominator
            are those of the whole batch and the losses of the ranks add up to its loss: under DDP and FSDP, which
            average gradients, multiply by the number of ranks. Equal ``group_ids`` are the same group; with
            ``group_size`` the rows of the ranks follow each other. Metrics, and the choices of Clip-Cov and KL-Cov,
            are the rank's own. Numbering groups over ranks waits for the device, before the forward, and so does
            comparing entropies for ``"high_entropy"``, after it.
        sequence_group: ranks over which each response is spread (sequence parallelism), a part of ``process_group`` or
            all of it: equal ``sequence_ids``, or without them rows, are then parts of one response.

    Returns:
        CovGRPOOutput. Only ``loss`` carries a gradient, once differentiable, in hidden, weight and bias.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on a CPU also a target outside [0, V) and a NaN among the
            advantages of valid tokens. On a GPU these give NaN and are counted in the metrics ``rows/invalid_targets``
            and ``rows/invalid_advantages``.
    """
    config = _checked_config(config)
    check_flag("metrics", metrics)
    head = prepare_head(
        hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        grad_tol=grad_tol, grad_mode=grad_mode, generator=generator, vocab_group=vocab_group,
    )  # fmt: skip
    check_layout("targets", targets)
    valid = head.inputs.targets != IGNORE_INDEX
    if mask is not None:
        valid = valid & valid_tokens("targets", targets, mask)
    dtype = accumulator_dtype(head.inputs.hidden.dtype)
    tokens = flatten_tokens(
        targets, advantages, valid, dtype=dtype, group_ids=group_ids, group_size=group_size,
        sequence_ids=sequence_ids, process_group=process_group, sequence_group=sequence_group,
    )  # fmt: skip
    tokens, group_moments = with_moments(tokens, moments, config.token_weighting, group_ids, targets)
    _check_against_config(config, tokens, ref_logprobs)
    batch = _Batch(
        tokens,
        flatten_floats("old_logprobs", old_logprobs, targets, valid, dtype, per_token=True),
        flatten_floats("ref_logprobs", ref_logprobs, targets, valid, dtype, per_token=True),
        flatten_floats("rollout_weights", rollout_weights, targets, valid, dtype),
        group_moments,
        None if normalizer is None else _checked_normalizer(normalizer, targets, dtype),
    )
    if not torch.compiler.is_compiling() and operators.reads_values(head.inputs.hidden):
        _check_advantages(tokens)
    settings = _Settings(config, generator, metrics, head.needs_grad, head.vocab_slice)
    loss, logprobs, entropy, weights, values = _CovGRPO.apply(*head.inputs, head.precision, batch, settings)
    return CovGRPOOutput(
        loss,
        logprobs.reshape(targets.shape),
        entropy.reshape(targets.shape) if settings.with_entropy else None,
        weights.reshape(targets.shape),
        dict(zip(_METRICS, values.unbind(), strict=True)) if metrics else {},
    )


def _checked_config(config: CovGRPOConfig | None) -> CovGRPOConfig:
    if config is not None and not isinstance(config, CovGRPOConfig):
        raise TypeError(f"config must be a CovGRPOConfig, got {type(config).__name__}")
    return CovGRPOConfig() if config is None else config


def _check_advantages(tokens: Tokens) -> None:
    count = int((tokens.valid & tokens.advantages.isnan()).sum())
    if count:
        raise ValueError(f"advantages must be numbers, got NaN for {count} valid tokens")


def _check_against_config(config: CovGRPOConfig, tokens: Tokens, ref_logprobs: Tensor | None) -> None:
    """That what this configuration needs was given."""
    if isinstance(config.token_weighting, CovarianceWeighting):
        check_ids(tokens, config.token_weighting)
    if tokens.sequences is None and (config.loss_type in ("grpo", "dr_grpo") or config.importance_level == "sequence"):
        raise ValueError("sequence_ids must be given for packed tokens with this config, got None")
    if config.beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given where beta is {config.beta:g}, got None")


def _checked_normalizer(normalizer: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(normalizer, Tensor):
        return check_positive("normalizer", normalizer)
    check_tensor("normalizer", normalizer, like)
    if normalizer.is_complex():
        raise TypeError(f"normalizer must be real, got {normalizer.dtype}")
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or one element, got {list(normalizer.shape)}")
    if normalizer.device.type == "cpu" and not torch.compiler.is_compiling():
        check_positive("normalizer", normalizer.item())
    return normalizer.detach().reshape(()).to(dtype)


class CovGRPOLoss(nn.Module):
    """`covgrpo_loss` with the settings of a run; takes the tensors of a step.

    Args:
        config: see `CovGRPOConfig`; None: the paper's.
        temperature, logit_scale, softcap, metrics, grad_tol, grad_mode: as `covgrpo_loss`; keywords of a call override.

    Raises:
        TypeError: ``config`` is something else. All other arguments are checked by a call.
    """

    def __init__(
        self,
        config: CovGRPOConfig | None = None,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        metrics: bool = True,
        grad_tol: float | str = "auto",
        grad_mode: str = "bounded",
    ) -> None:
        super().__init__()
        self.config = _checked_config(config)
        self.settings: dict[str, Any] = dict(
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            metrics=metrics,
            grad_tol=grad_tol,
            grad_mode=grad_mode,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        **inputs: Any,
    ) -> CovGRPOOutput:
        """What `covgrpo_loss` returns, whose other keywords ``inputs`` may hold.

        Args:
            hidden: [B, T, D] or [N, D].
            weight: [V, D].
            targets, mask: [B, T] or [N].
            advantages: [B], [B, T] or [N].

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        return covgrpo_loss(hidden, weight, targets, advantages, mask, config=self.config, **(self.settings | inputs))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in {"config": self.config, **self.settings}.items())
