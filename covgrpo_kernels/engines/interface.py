"""What an engine takes and gives.

An engine makes the products of hidden states and the head, and everything that needs them tile by tile.
`engines.select` chooses one by device and dtype; nothing above knows which."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..inputs import HeadInputs, Precision, accumulator_dtype
from ..kernels.interface import RowStats
from ..plan import BackwardPlan


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGrads(NamedTuple):
    """Gradients of the inputs, [0] where not wanted. Each is rounded once to its input's dtype."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]


# Shapes and dtypes of tensors, for the fakes of the operators.
Shapes = list[tuple[tuple[int, ...], torch.dtype]]


class Engine(Protocol):
    def reads_values(self, device: torch.device) -> bool:
        """Whether the host may look at values."""
        ...

    def forward(
        self, inputs: HeadInputs, *, entropy: bool, ignore_index: int, min_prob: float
    ) -> tuple[RowStats, list[Tensor]]:
        """Statistics of N rows, zero where the target is ``ignore_index``, and notes for the backward: what this engine
        keeps of vocabulary ids that may be more probable than ``min_prob`` (0: nothing)."""
        ...

    def note_shapes(self, rows: int, vocab: int, dtype: torch.dtype, min_prob: float) -> Shapes:
        """Of these notes."""
        ...

    def plan(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],
        logprob_grad: Tensor,  # [N]
        entropy_grad: Tensor | None,  # [N]
        precision: Precision,
    ) -> tuple[BackwardPlan, list[Tensor]]:
        """What the backward does with each row, and what else this engine's backward takes, instead of the notes: these
        are then free after the plan. Where it is nothing the backward takes the notes."""
        ...

    def plan_shapes(self, rows: int, notes: list[Tensor], precision: Precision) -> Shapes:
        """Of the fields of the plan, and of the rest."""
        ...

    def backward(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],  # none where the plan has tensors of the engine's own
        logprob_grad: Tensor,  # [N]
        entropy_grad: Tensor | None,  # [N]
        plan: BackwardPlan,
        planned: list[Tensor],
        grad_scale: Tensor | None,  # []
        *,
        min_prob: float,
        needs: Needs,
        partial_hidden: bool,
    ) -> HeadGrads:
        """Gradients of the coefficients that were planned, times ``grad_scale``. With ``partial_hidden`` the gradient
        of hidden is a part of a sum over ranks: it is not rounded yet."""
        ...


def empty_grads(inputs: HeadInputs, needs: Needs, partial_hidden: bool) -> HeadGrads:
    hidden_dtype = accumulator_dtype(inputs.hidden.dtype) if partial_hidden else inputs.hidden.dtype

    def like(value: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        if value is None or not needed:
            return inputs.hidden.new_empty(0, dtype=dtype)
        return torch.empty_like(value, dtype=dtype, memory_format=torch.contiguous_format)

    return HeadGrads(
        like(inputs.hidden, needs.hidden, hidden_dtype),
        like(inputs.weight, needs.weight, inputs.weight.dtype),
        like(inputs.bias, needs.bias, inputs.weight.dtype),
    )
