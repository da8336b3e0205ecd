"""The custom operators: what a compiler need not look into. Each has a fake, for shapes and dtypes without the work.

`forward`, `plan` and `backward` call them with structured arguments, and take care of a head that is spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import engines, kernels
from .collectives import all_reduce_sum
from .config import CovarianceWeighting
from .covariance import CovarianceStats
from .engines.interface import Needs
from .inputs import HeadInputs, Precision, accumulator_dtype, check_values
from .kernels.interface import LogitTransform, RowStats
from .plan import BackwardPlan, min_probability
from .segments import Segments
from .token_terms import METRICS, TermOptions, TokenInputs, TokenTerms
from .vocab_parallel import VocabSlice, merge_stats


@torch.library.custom_op("covgrpo::head_forward", mutates_args=())
def head_forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    ignore_index: int,
    min_prob: float,
) -> tuple[Tensor, list[Tensor]]:
    """`RowStats` of N rows, and the engine's notes for a backward that has sparse rows (none where ``min_prob`` is 0).

    Raises ValueError for a target outside the vocabulary and for a temperature that is not positive, where the engine
    may read values: on a CPU."""
    inputs = HeadInputs(hidden, weight, bias, targets, temperature, LogitTransform(logit_scale, softcap))
    with engines.on_device(hidden.device):
        engine = engines.select(hidden.device, hidden.dtype)
        if engine.reads_values(hidden.device):
            check_values(targets, temperature, len(weight), ignore_index)
        stats, notes = engine.forward(inputs, entropy=entropy, ignore_index=ignore_index, min_prob=min_prob)
        return stats.packed, notes


@head_forward_op.register_fake
def _(hidden, weight, bias, targets, temperature, scale, softcap, entropy, ignore_index, min_prob):  # type: ignore[no-untyped-def]
    (rows,) = targets.shape
    notes = engines.select(hidden.device, hidden.dtype).note_shapes(rows, weight.shape[0], hidden.dtype, min_prob)
    stats = hidden.new_empty(4, rows, dtype=accumulator_dtype(hidden.dtype))
    return stats, [hidden.new_empty(shape, dtype=dtype) for shape, dtype in notes]


@torch.library.custom_op("covgrpo::plan_backward", mutates_args=())
def plan_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    stats: Tensor,
    notes: list[Tensor],
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    grad_tol: float,
    uniform: Tensor | None,
) -> list[Tensor]:
    """`BackwardPlan` of N rows, and what else the engine's backward takes."""
    inputs = HeadInputs(hidden, weight, bias, targets, temperature, LogitTransform(logit_scale, softcap))
    with engines.on_device(hidden.device):
        engine = engines.select(hidden.device, hidden.dtype)
        precision = Precision(grad_tol, uniform)
        plan, planned = engine.plan(inputs, RowStats(stats), notes, logprob_grad, entropy_grad, precision)
        return [*plan, *planned]


@plan_backward_op.register_fake
def _(hidden, weight, bias, targets, temperature, scale, softcap, stats, notes, g, e, grad_tol, uniform):  # type: ignore[no-untyped-def]
    engine = engines.select(hidden.device, hidden.dtype)
    shapes = engine.plan_shapes(targets.shape[0], notes, Precision(grad_tol, uniform))
    return [hidden.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


# It waits for the device, which a CUDA graph that is being captured cannot.
@torch.library.custom_op("covgrpo::head_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def head_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    stats: Tensor,
    notes: list[Tensor],
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    plan: list[Tensor],
    grad_scale: Tensor | None,
    min_prob: float,
    needs: list[bool],
    partial_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each rounded once to its input's dtype; with ``partial_hidden``
    dhidden is not rounded at all. [0] where not needed."""
    inputs = HeadInputs(hidden, weight, bias, targets, temperature, LogitTransform(logit_scale, softcap))
    with engines.on_device(hidden.device):
        engine = engines.select(hidden.device, hidden.dtype)
        return engine.backward(
            inputs, RowStats(stats), notes, logprob_grad, entropy_grad, *Planned.of(plan), grad_scale,
            min_prob=min_prob, needs=Needs(*needs), partial_hidden=partial_hidden,
        )  # fmt: skip


@head_backward_op.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    needs, partial_hidden = rest[-2:]
    shapes = (hidden.shape, weight.shape, () if bias is None else bias.shape)
    wanted = (needs[0], needs[1], needs[2] and bias is not None)
    hidden_dtype = accumulator_dtype(hidden.dtype) if partial_hidden else hidden.dtype
    return tuple(
        hidden.new_empty(shape if want else (0,), dtype=dtype)
        for shape, want, dtype in zip(shapes, wanted, (hidden_dtype, hidden.dtype, hidden.dtype), strict=True)
    )


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "covgrpo_kernels computes first derivatives only: its backward can't be differentiated again "
        "(create_graph=True); covgrpo_kernels.reference can"
    )


head_backward_op.register_autograd(_refuse_double_backward)


@torch.library.custom_op("covgrpo::segments_of_ids", mutates_args=())
def segments_op(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`segments_of_ids` by the kernels of the device."""
    with engines.on_device(ids.device):
        return kernels.select(ids.device).segments_of_ids(ids)


@segments_op.register_fake
def _(ids):  # type: ignore[no-untyped-def]
    tokens = ids.new_empty(ids.shape, dtype=torch.int64)
    return tokens, tokens.new_empty(ids.shape[0] + 1), torch.empty_like(tokens)


@torch.library.custom_op("covgrpo::segment_sums", mutates_args=())
def segment_sums_op(values: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
    """`segment_sums` by the kernels of the device."""
    with engines.on_device(values.device):
        return kernels.select(values.device).segment_sums(values, offsets, order)


@segment_sums_op.register_fake
def _(values, offsets, order):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape[0], offsets.shape[0] - 1, dtype=torch.float64)


@torch.library.custom_op("covgrpo::covariance_weights", mutates_args=())
def covariance_weights_op(
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
    """`CovarianceStats` of every scope."""
    weighting = CovarianceWeighting(
        centering=centering,  # type: ignore[arg-type]
        advantage_centering=advantage_centering,  # type: ignore[arg-type]
        normalizer=normalizer,  # type: ignore[arg-type]
        bandwidth_eps=bandwidth_eps,
    )
    sequences = Segments.of_tensors(sequence) if sequence else None
    with engines.on_device(logprobs.device):
        compute = kernels.select(logprobs.device).covariance_weights
        return compute(logprobs, advantages, valid, Segments.of_tensors(scope), sequences, weighting)


@covariance_weights_op.register_fake
def _(logprobs, advantages, valid, scope, *rest):  # type: ignore[no-untyped-def]
    per_token = (torch.empty_like(logprobs, dtype=torch.float64) for _ in range(3))
    return *per_token, logprobs.new_empty(scope[1].shape[0] - 1, dtype=torch.float64)


@torch.library.custom_op("covgrpo::covariance_weights_grad", mutates_args=())
def covariance_weights_grad_op(
    weights_grad: Tensor,  # [N]
    stats: list[Tensor],  # `CovarianceStats`
    valid: Tensor,  # [N] bool
    scope: list[Tensor],  # Segments.tensors() of the scopes
    sequence: list[Tensor],  # and of the sequences; empty where there are none
    centering: str,
    bandwidth_eps: float,
) -> Tensor:
    """[N] float64, the gradient of the weights in the log-probs."""
    weighting = CovarianceWeighting(centering=centering, bandwidth_eps=bandwidth_eps)  # type: ignore[arg-type]
    sequences = Segments.of_tensors(sequence) if sequence else None
    with engines.on_device(valid.device):
        compute = kernels.select(valid.device).covariance_weights_grad
        return compute(weights_grad, CovarianceStats(*stats), valid, Segments.of_tensors(scope), sequences, weighting)


@covariance_weights_grad_op.register_fake
def _(weights_grad, stats, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(stats[0])


@torch.library.custom_op("covgrpo::token_terms", mutates_args=())
def token_terms_op(
    inputs: list[Tensor | None],
    cispo: bool,
    ratio_low: float | None,
    ratio_high: float | None,
    dual_clip: float | None,
    penalty: float,
    max_length: int | None,
    beta: float,
    kl_estimator: str,
    entropy_coef: float,
    share_grad: bool,
    differentiate_weights: bool,
    metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`TokenTerms` of N tokens; ``inputs`` are the fields of `TokenInputs`, and the others those of `TermOptions`."""
    fields = TokenInputs._make(inputs)
    options = TermOptions(
        cispo, ratio_low, ratio_high, dual_clip, penalty, max_length, beta, kl_estimator, entropy_coef,
        share_grad, differentiate_weights, metrics,
    )  # fmt: skip
    with engines.on_device(fields.logprobs.device):
        return tuple(kernels.select(fields.logprobs.device).token_terms(fields, options))


@token_terms_op.register_fake
def _(inputs, *rest):  # type: ignore[no-untyped-def]
    logprobs, options = inputs[0], TermOptions(*rest)
    per_token = (True, options.share_grad, options.differentiate_weights, options.entropy_coef != 0)
    vectors = (logprobs.new_empty(logprobs.shape[0] if wanted else 0) for wanted in per_token)
    return logprobs.new_empty(()), *vectors, logprobs.new_empty(len(METRICS) if options.metrics else 0)


# ----------------------------------------------------------------------------------------- with structured arguments


def reads_values(hidden: Tensor) -> bool:
    """Whether values may be read, so that wrong ones can raise: on a CPU, where nothing waits for it. On a GPU a wrong
    value gives NaN."""
    return engines.select(hidden.device, hidden.dtype).reads_values(hidden.device)


def covariance_weights(
    logprobs: Tensor,  # [N], zero where masked
    advantages: Tensor,  # [N], zero where masked
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
) -> CovarianceStats:
    """`covariance.covariance_weights` by the kernels of the device."""
    stats = covariance_weights_op(
        logprobs, advantages, valid, scopes.tensors(), [] if sequences is None else sequences.tensors(),
        weighting.centering, weighting.advantage_centering, weighting.normalizer, weighting.bandwidth_eps,
    )  # fmt: skip
    return CovarianceStats(*stats)


class Planned(NamedTuple):
    """What the operator of the plan gives."""

    plan: BackwardPlan
    planned: list[Tensor]  # the engine's

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Planned:
        fields = len(BackwardPlan._fields)
        return cls(BackwardPlan(*tensors[:fields]), tensors[fields:])

    def tensors(self) -> list[Tensor]:
        return [*self.plan, *self.planned]

    def notes(self, scored: Scored) -> list[Tensor]:
        """What the backward takes of the engine's notes."""
        return [] if self.planned else scored.notes


def covariance_weights_grad(
    weights_grad: Tensor,  # [N] dL/dW
    stats: CovarianceStats,
    valid: Tensor,  # [N] bool
    scopes: Segments,
    sequences: Segments | None,
    weighting: CovarianceWeighting,
) -> Tensor:  # [N] float64, dL/dlogprobs
    """`covariance.covariance_weights_grad` by the kernels of the device."""
    return covariance_weights_grad_op(
        weights_grad, list(stats), valid, scopes.tensors(), [] if sequences is None else sequences.tensors(),
        weighting.centering, weighting.bandwidth_eps,
    )  # fmt: skip


def token_terms(inputs: TokenInputs, options: TermOptions) -> TokenTerms:
    """`token_terms.token_terms` by the kernels of the device."""
    return TokenTerms(*token_terms_op(list(inputs), *options))


class Scored(NamedTuple):
    """What a forward leaves for its backward."""

    stats: RowStats  # of N rows, over the whole vocabulary
    notes: list[Tensor]  # the engine's


def forward(
    inputs: HeadInputs,
    *,
    entropy: bool,
    ignore_index: int,
    precision: Precision,
    needs_grad: bool,
    vocab_slice: VocabSlice | None,
) -> Scored:
    """Log-probs and entropies of all rows."""
    # What a whole row leaves out sums to zero; what a slice of it leaves out does not, so that a spread head notes
    # nothing.
    may_be_sparse = needs_grad and precision.uniform is None and vocab_slice is None
    min_prob = min_probability(precision.grad_tol) if may_be_sparse else 0.0
    targets = inputs.targets
    if vocab_slice is not None:
        if reads_values(inputs.hidden):
            check_values(targets, None, vocab_slice.total, ignore_index)
        valid = targets != ignore_index
        is_here = valid & (vocab_slice.local_targets(targets, len(inputs.weight)) >= 0)
        # A row whose target is elsewhere gets any target: what else there is to know of the row does not depend on it.
        some = (targets - vocab_slice.first).where(is_here, 0)
        targets = some.where(valid & (len(inputs.weight) > 0), ignore_index)
    packed, notes = head_forward_op(
        inputs.hidden, inputs.weight, inputs.bias, targets, inputs.temperature, *inputs.transform,
        entropy, ignore_index, min_prob,
    )  # fmt: skip
    stats = RowStats(packed)
    if vocab_slice is not None:
        if not len(inputs.weight):
            packed[2] = torch.nan  # no logits, no maximum
        merged = merge_stats(stats, is_here, vocab_slice.group)
        stats = RowStats(merged.packed.where(valid, 0))
    return Scored(stats, notes)


def plan(
    inputs: HeadInputs,
    scored: Scored,
    logprob_grad: Tensor,  # [N]
    entropy_grad: Tensor | None,  # [N]
    precision: Precision,
) -> Planned:
    """What the backward does with each row."""
    planned = plan_backward_op(
        inputs.hidden, inputs.weight, inputs.bias, inputs.targets, inputs.temperature, *inputs.transform,
        scored.stats.packed, scored.notes, logprob_grad, entropy_grad, precision.grad_tol, precision.uniform,
    )  # fmt: skip
    return Planned.of(planned)


def backward(
    inputs: HeadInputs,
    scored: Scored,
    logprob_grad: Tensor,  # [N], as planned, like the next
    entropy_grad: Tensor | None,  # [N]
    planned: Planned,
    *,
    precision: Precision,
    needs: Sequence[bool],  # of hidden, weight and bias
    vocab_slice: VocabSlice | None,
    grad_scale: Tensor | None = None,  # [] what gradients are multiplied by
) -> tuple[Tensor | None, ...]:  # [N, D], [V, D], [V]; None where not needed
    """Gradients of this rank's slice of the head, and the whole gradient of the hidden states, which all ranks have."""
    plan = planned.plan
    targets = inputs.targets
    if vocab_slice is not None:
        targets = vocab_slice.local_targets(targets, len(inputs.weight))
    hidden_grad, *head_grads = head_backward_op(
        inputs.hidden, inputs.weight, inputs.bias, targets, inputs.temperature, *inputs.transform,
        scored.stats.packed, planned.notes(scored), plan.weigh(logprob_grad),
        None if entropy_grad is None else plan.weigh(entropy_grad), planned.tensors(), grad_scale,
        min_probability(precision.grad_tol), list(needs), vocab_slice is not None,
    )  # fmt: skip
    if vocab_slice is not None and needs[0]:
        hidden_grad = all_reduce_sum(hidden_grad, vocab_slice.group).to(inputs.hidden.dtype)
    return tuple(x if need else None for x, need in zip((hidden_grad, *head_grads), needs, strict=True))
