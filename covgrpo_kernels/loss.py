"""`covgrpo_loss`: one pass over the vocabulary forward, the policy objective on [N] vectors, one pass backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backward_plan import BackwardPlan, Kept, plan_backward
from .collectives import check_process_group
from .config import IGNORE_INDEX, CovarianceWeighting, CovGRPOConfig, KLCov, check_flag
from .distributed import GroupMoments, VocabularySlice
from .layout import Segments, Tokens, check_tensor, flatten_floats, flatten_tokens, valid_tokens
from .logprob import draw_chance, positive, prepare_head, run_backward, run_forward
from .objective import METRICS, policy_objective
from .tiles.interface import Head, Moments, Results
from .weighting import weighting_scopes, with_moments


class CovGRPOOutput(NamedTuple):
    loss: Tensor  # [] float32 (float64 for float64 inputs), the only one with a gradient
    logprobs: Tensor  # [B, T] or [N]; zero where masked, NaN where not scored
    entropy: Tensor | None  # likewise, nats; None without metrics and entropy_coef
    weights: Tensor  # [B, T] or [N]; zero where masked
    metrics: dict[str, Tensor]  # [] each, on the device


_METRICS = (*METRICS, "rows/live_fraction", "rows/dense_fraction", "rows/grad_error_bound", "rows/invalid_targets")


class _Settings(NamedTuple):
    config: CovGRPOConfig
    normalizer: float | Tensor | None
    generator: torch.Generator | None
    metrics: bool
    moments: Moments | None
    vocabulary: VocabularySlice | None

    @property
    def with_entropy(self) -> bool:
        return self.metrics or self.config.entropy_coef != 0


def _scored(tokens: Tokens, settings: _Settings) -> Tensor:  # [N] bool
    """Rows worth a log-prob. Without metrics, KL and entropy a zero advantage has no influence, unless a token
    that has some needs the row: in its weighting scope, or in its sequence for a sequence's ratio."""
    config, valid = settings.config, tokens.valid
    if settings.metrics or config.beta != 0 or config.entropy_coef != 0:
        return valid
    kind = config.token_weighting
    if isinstance(kind, KLCov):  # its penalty needs no advantage
        return valid
    matters = valid & (tokens.advantages != 0)
    if config.importance_level == "sequence":
        assert tokens.sequences is not None
        matters = _anywhere(matters, tokens.sequences)
    if isinstance(kind, CovarianceWeighting):
        matters = _anywhere(matters, weighting_scopes(tokens, kind))
    elif kind is not None:
        matters = matters.any().expand_as(matters)
    return valid & matters


def _anywhere(flag: Tensor, segments: Segments) -> Tensor:
    return segments.spread(segments.sum(flag.float())) > 0


class _CovGRPO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: Tensor | None,  # [N]
        old: Tensor | None,  # [N], zero where masked, as are the next two
        ref: Tensor | None,  # [N]
        rollout: Tensor | None,  # [N]
        chance: Tensor | None,  # [N]
        tokens: Tokens,
        head: Head,
        grad_tol: float,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        scored = _scored(tokens, settings)
        targets = targets.where(scored, IGNORE_INDEX)
        keep = chance is None and any(ctx.needs_input_grad[:3])
        results, kept, local_targets = run_forward(
            hidden, weight, bias, targets, temperature, head,
            settings.with_entropy, IGNORE_INDEX, grad_tol, keep, chance, settings.vocabulary,
        )  # fmt: skip
        x, entropy = results.logprob, results.entropy
        objective = policy_objective(
            x, entropy, tokens,
            old=None if old is None else old.where(scored, 0), ref=ref, rollout=rollout,
            config=settings.config, normalizer=settings.normalizer, generator=settings.generator,
            metrics=settings.metrics, moments=settings.moments,
        )  # fmt: skip
        g, e = objective.logprob_grad, objective.entropy_grad
        plan = plan_backward(results, kept, targets, g, e, head, temperature, grad_tol, chance)
        g, e = plan.boosted(g), None if e is None else plan.boosted(e)
        ctx.save_for_backward(hidden, weight, bias, local_targets, temperature, g, e, *results, *kept, *plan.tensors())
        ctx.head, ctx.grad_tol, ctx.vocabulary = head, grad_tol, settings.vocabulary

        logprobs = x.where(scored | ~tokens.valid, torch.nan)
        metrics = x.new_empty(0)
        if settings.metrics:
            vocab = len(weight) if settings.vocabulary is None else settings.vocabulary.total
            rows = {
                "rows/live_fraction": (plan.dense | plan.sparse).sum() / tokens.valid.sum().clamp(min=1),
                "rows/dense_fraction": plan.dense.sum() / tokens.valid.sum().clamp(min=1),
                "rows/grad_error_bound": plan.error_bound,
                "rows/invalid_targets": (scored & ((targets < 0) | (targets >= vocab))).sum(),
            }
            by_name = objective.metrics | rows
            metrics = torch.stack([by_name[name].to(x.dtype) for name in _METRICS])
        ctx.mark_non_differentiable(logprobs, entropy, objective.weights, metrics)
        return objective.loss, logprobs, entropy, objective.weights, metrics

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperature, g, e, *rest = ctx.saved_tensors
        results, kept, plan = Results(*rest[:4]), Kept(*rest[4:7]), BackwardPlan(*rest[7:])
        grads = run_backward(
            hidden, weight, bias, targets, temperature, ctx.head, results, kept,
            g * loss_grad, None if e is None else e * loss_grad, plan, ctx.grad_tol,
            list(ctx.needs_input_grad[:3]), ctx.vocabulary,
        )  # fmt: skip
        return *grads, *[None] * 10


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
        ref_logprobs: as ``targets``, of the KL reference.
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
            are the rank's own. Numbering groups over ranks waits for the device, before the forward.
        sequence_group: ranks over which each response is spread (sequence parallelism), a part of ``process_group`` or
            all of it: equal ``sequence_ids``, or without them rows, are then parts of one response.

    Returns:
        CovGRPOOutput. Only ``loss`` carries a gradient, once differentiable, in hidden, weight and bias.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on a CPU also a target outside [0, V). On a GPU such
        a target gives NaN and is counted in the metric ``rows/invalid_targets``.
    """
    config = _checked_config(config)
    check_flag("metrics", metrics)
    x = prepare_head(hidden, weight, targets, bias, temperature, logit_scale, softcap, grad_tol, vocab_group)
    valid = valid_tokens("targets", targets, mask) & (x.targets != IGNORE_INDEX)
    dtype = torch.promote_types(x.hidden.dtype, torch.float32)
    tokens = flatten_tokens(
        targets, advantages, valid, dtype=dtype,
        group_ids=group_ids, group_size=group_size, sequence_ids=sequence_ids,
        process_group=check_process_group("process_group", process_group),
        sequence_group=check_process_group("sequence_group", sequence_group),
    )  # fmt: skip
    tokens, group_moments = with_moments(tokens, moments, config.token_weighting, group_ids, targets)
    if isinstance(config.token_weighting, CovarianceWeighting):
        weighting_scopes(tokens, config.token_weighting)
    if tokens.sequences is None and (config.loss_type in ("grpo", "dr_grpo") or config.importance_level == "sequence"):
        raise ValueError("sequence_ids must be given for packed tokens with this config, got None")
    if config.beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given where beta is {config.beta:g}, got None")
    chance = draw_chance(grad_mode, generator, targets, x.vocabulary)
    if normalizer is not None:
        normalizer = _checked_normalizer(normalizer, targets, dtype)

    loss, logprobs, entropy, weights, values = _CovGRPO.apply(
        x.hidden, x.weight, x.bias, x.targets, x.temperature,
        flatten_floats("old_logprobs", old_logprobs, targets, valid, dtype),
        flatten_floats("ref_logprobs", ref_logprobs, targets, valid, dtype),
        flatten_floats("rollout_weights", rollout_weights, targets, valid, dtype),
        chance, tokens, x.head, x.grad_tol,
        _Settings(config, normalizer, generator, metrics, group_moments, x.vocabulary),
    )  # fmt: skip
    shape = targets.shape
    return CovGRPOOutput(
        loss,
        logprobs.reshape(shape),
        entropy.reshape(shape) if metrics or config.entropy_coef != 0 else None,
        weights.reshape(shape),
        dict(zip(_METRICS, values.unbind(), strict=True)) if metrics else {},
    )


def _checked_config(config: CovGRPOConfig | None) -> CovGRPOConfig:
    if config is not None and not isinstance(config, CovGRPOConfig):
        raise TypeError(f"config must be a CovGRPOConfig, got {type(config).__name__}")
    return CovGRPOConfig() if config is None else config


def _checked_normalizer(normalizer: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(normalizer, Tensor):
        return positive("normalizer", normalizer)
    check_tensor("normalizer", normalizer, like)
    if normalizer.is_complex():
        raise TypeError(f"normalizer must be real, got {normalizer.dtype}")
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or one element, got {list(normalizer.shape)}")
    if normalizer.device.type == "cpu" and not torch.compiler.is_compiling():
        positive("normalizer", normalizer.item())
    return normalizer.detach().reshape(()).to(dtype)


class CovGRPOLoss(nn.Module):
    """`covgrpo_loss` with the settings of a run; takes the tensors of a step.

    Args:
        config: see `CovGRPOConfig`; None: the paper's.
        temperature, logit_scale, softcap, metrics, grad_tol, grad_mode: as `covgrpo_loss`; keywords of a call override.
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
        """See `covgrpo_loss`, whose other keywords ``inputs`` may hold."""
        return covgrpo_loss(hidden, weight, targets, advantages, mask, config=self.config, **(self.settings | inputs))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in {"config": self.config, **self.settings}.items())
