"""`linear_logprob`: log-probs and entropies from hidden states and the head, without the logits."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import operators
from .checks import check_flag, check_int
from .config import IGNORE_INDEX
from .inputs import HeadInputs, Precision, prepare_head
from .kernels.interface import LogitTransform, RowStats
from .vocab_parallel import VocabSlice


class LinearLogprob(NamedTuple):
    """What `linear_logprob` returns.

    Attributes:
        logprob: [...], of the shape of ``targets``; float32 (float64 for float64 inputs), nats.
        entropy: likewise; None unless asked for.
    """

    logprob: Tensor  # [...] float32 (float64 for float64 inputs)
    entropy: Tensor | None  # [...], likewise; None unless asked for


class _Settings(NamedTuple):
    entropy: bool
    ignore_index: int
    needs_grad: bool
    vocab_slice: VocabSlice | None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: Tensor | None,  # [N]
        transform: LogitTransform,
        precision: Precision,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        scored = operators.forward(
            HeadInputs(hidden, weight, bias, targets, temperature, transform),
            entropy=settings.entropy,
            ignore_index=settings.ignore_index,
            precision=precision,
            needs_grad=settings.needs_grad,
            vocab_slice=settings.vocab_slice,
        )
        return scored.stats.logprob, scored.stats.entropy, scored.stats.packed, *scored.notes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, targets, temperature, ctx.transform, precision, ctx.settings = inputs
        _, _, *scored = output
        ctx.mark_non_differentiable(*scored)
        ctx.set_materialize_grads(False)
        ctx.grad_tol = precision.grad_tol
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, precision.uniform, *scored)

    @staticmethod
    def backward(ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        hidden, weight, bias, targets, temperature, uniform, packed, *notes = ctx.saved_tensors
        inputs = HeadInputs(hidden, weight, bias, targets, temperature, ctx.transform)
        scored = operators.Scored(RowStats(packed), notes)
        settings, precision = ctx.settings, Precision(ctx.grad_tol, uniform)
        ignored = targets == settings.ignore_index
        g = torch.zeros_like(packed[0]) if logprob_grad is None else logprob_grad.masked_fill(ignored, 0)
        e = entropy_grad.masked_fill(ignored, 0) if settings.entropy and entropy_grad is not None else None
        planned = operators.plan(inputs, scored, g, e, precision)
        grads = operators.backward(
            inputs, scored, g, e, planned,
            precision=precision, needs=ctx.needs_input_grad[:3], vocab_slice=settings.vocab_slice,
        )  # fmt: skip
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


# `apply` asks for it in every call; found anew it would take as long as all checks of the arguments.
_LinearLogprob.forward.__signature__ = inspect.signature(_LinearLogprob.forward)  # type: ignore[attr-defined]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    grad_tol: float | str = "auto",
    grad_mode: str = "bounded",
    generator: torch.Generator | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> LinearLogprob:
    """Log-probs of the targets, and on request entropies, of softmax(softcap(scale * (h W^T + b)) / T), in nats.

    The logits never exist: they are computed slice by slice of the vocabulary, once forward and once backward.
    Differentiable once in hidden, weight and bias; each gradient is computed only if it is required.

    Args:
        hidden: [..., D] last hidden states; float32, bfloat16, float16 or float64.
        weight: [V, D] head, same dtype (under autocast both are cast, as `F.linear` does).
        targets: [...] integer token ids in [0, V), or ``ignore_index``.
        bias: [V], same dtype.
        temperature: a positive number, or a floating tensor [...] with one for each token.
        logit_scale: multiplies products and bias (Cohere, Granite).
        softcap: s of s * tanh(z / s), before the temperature (Gemma-2).
        entropy: compute entropies too; they are differentiable.
        ignore_index: rows with this target are not computed: zeros out, no gradient, whatever they hold.
        grad_tol: bound on the relative error of dL/dlogits in the Frobenius norm. Within it, the backward may replace
            the improbable entries of a row by the tails of similar rows, and drop rows. 0.0 is exact; ``"auto"`` is an
            eighth of the dtype's machine epsilon. The bound is on all rows together: it promises nothing for a single
            row, the sum over micro-batches, or Adam's steps on rarely used vocabulary (docs/numerics.md).
        grad_mode: ``"bounded"``, or ``"unbiased"``: rows of small gradient are dropped at random and the others
            multiplied so that the expected gradient is exact; ``grad_tol`` then bounds the root mean square of the
            error.
        generator: for the random numbers of that, on the device of ``hidden``; None: torch's default.
        vocab_group: ranks that share the head (Megatron's tensor parallelism). Each passes the same hidden states and
            targets, and its slice of weight and bias: consecutive slices of any sizes, in the order of the ranks.
            Outputs and the gradient of the hidden states are whole on every rank, those of weight and bias are the
            slice's. All ranks run forward and backward. No rows are sparse then, since that takes whole rows.

    Returns:
        LinearLogprob(logprob, entropy), [...] in float32 (float64 for float64 inputs); entropy is None unless
        asked for. Logits and all sums are float32 at least, whatever the input dtype; on a GPU a target
        outside [0, V) gives NaN.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on a CPU also a target outside [0, V).
    """
    check_flag("entropy", entropy)
    check_int("ignore_index", ignore_index)
    head = prepare_head(
        hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        grad_tol=grad_tol, grad_mode=grad_mode, generator=generator, vocab_group=vocab_group,
    )  # fmt: skip
    settings = _Settings(entropy, ignore_index, head.needs_grad, head.vocab_slice)
    logprob, h, *_ = _LinearLogprob.apply(*head.inputs, head.precision, settings)
    return LinearLogprob(logprob.reshape(targets.shape), h.reshape(targets.shape) if entropy else None)
