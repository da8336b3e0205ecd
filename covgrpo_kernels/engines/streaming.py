"""Forward and backward of engines that go through the vocabulary slice by slice: what surrounds the products.

A subclass multiplies: it makes the running softmax of chosen rows, and from the coefficients of dense rows their
gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import HeadInputs, Precision, accumulator_dtype
from ..kernels.interface import MAX_CANDIDATES, Candidates, Coefficients, OnlineSoftmax, RowStats
from ..plan import BackwardPlan, backward_plan_shapes, plan_backward
from ..sparse import SparseGradient
from .collecting import CandidateCollector
from .interface import HeadGrads, Needs, Shapes, empty_grads
from .rows import Rows
from .scaling import to_unit_scale


class DenseRows(NamedTuple):
    """What a subclass multiplies in the backward."""

    rows: Rows  # R of them, those with a tail first
    coefficients: Coefficients  # of these
    sparse: SparseGradient  # its tails come before the rows, its weight rows are added to the products
    scale: Tensor  # [] what gradients are to be multiplied by


class StreamingEngine(ABC):
    kernels: ModuleType

    def reads_values(self, device: torch.device) -> bool:
        return device.type == "cpu"

    @abstractmethod
    def online_softmax(
        self, rows: Rows, running: OnlineSoftmax, collector: CandidateCollector | None, entropy: bool
    ) -> None:
        """Updates the running softmax of the rows with the whole vocabulary."""

    @abstractmethod
    def dense_backward(self, dense: DenseRows, hidden_sum: Tensor | None, grads: HeadGrads, needs: Needs) -> None:
        """Writes the gradients of weight and bias that are needed, scaled; and into ``hidden_sum`` [T + R, D], in the
        dtype of sums and not scaled, the products of dL/dproducts, tails first, with the head."""

    def forward(
        self, inputs: HeadInputs, *, entropy: bool, ignore_index: int, min_prob: float
    ) -> tuple[RowStats, list[Tensor]]:
        valid = inputs.targets != ignore_index
        rows, dtype = Rows.where(inputs, valid), accumulator_dtype(inputs.hidden.dtype)
        running = OnlineSoftmax.empty(len(rows), dtype, rows.device)
        collector = CandidateCollector(rows, dtype, min_prob) if len(rows) and min_prob else None
        if len(rows):
            self.online_softmax(rows, running, collector, entropy)
        stats = running.stats()
        candidates = Candidates.empty(len(rows), MAX_CANDIDATES if min_prob else 0, dtype, rows.device)
        if collector is not None:
            candidates = collector.most_probable(stats)
        packed = rows.scatter(stats.packed.T).T.contiguous()
        if rows.index is None:
            packed = packed.where(valid, 0)
        return RowStats(packed), [rows.scatter(value) for value in candidates]

    def note_shapes(self, rows: int, vocab: int, dtype: torch.dtype, min_prob: float) -> Shapes:
        shape, accumulator = (rows, MAX_CANDIDATES if min_prob else 0), accumulator_dtype(dtype)
        return [((rows,), torch.int32), (shape, torch.int32), (shape, accumulator), ((rows,), accumulator)]

    def plan(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],
        logprob_grad: Tensor,  # [N]
        entropy_grad: Tensor | None,  # [N]
        precision: Precision,
    ) -> tuple[BackwardPlan, list[Tensor]]:
        return plan_backward(inputs, stats, Candidates(*notes), logprob_grad, entropy_grad, precision), []

    def plan_shapes(self, rows: int, notes: list[Tensor], precision: Precision) -> Shapes:
        return backward_plan_shapes(rows, notes[1].shape[1], precision)

    def backward(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],
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
        needs = needs._replace(bias=needs.bias and inputs.bias is not None)
        grads = empty_grads(inputs, needs, partial_hidden)
        scale, g, e = to_unit_scale(logprob_grad, entropy_grad)
        scale = scale if grad_scale is None else scale * grad_scale
        sparse = SparseGradient(plan, inputs, stats, Candidates(*notes), g, e, min_prob, self.kernels)
        rows = Rows(inputs, _dense_index(plan, sparse))
        if not len(rows) or not len(inputs.weight):
            return HeadGrads(*(grad.zero_() for grad in grads))
        row_stats = stats if rows.index is None else stats.take(rows.index)
        coefficients = Coefficients.of(row_stats, rows.take(g), None if e is None else rows.take(e))
        hidden_sum = None
        if needs.hidden:
            hidden_sum = _hidden_sum(rows, sparse.tails.rows, grads.hidden, g.dtype)
        self.dense_backward(DenseRows(rows, coefficients, sparse, scale), hidden_sum, grads, needs)
        if hidden_sum is not None:
            _write_hidden(grads.hidden, hidden_sum, rows, sparse, scale)
        return grads


def _dense_index(plan: BackwardPlan, sparse: SparseGradient) -> Tensor | None:  # [R]
    """Rows that have a tail, then all other dense rows. None: all rows, in order. Waits for the device."""
    others = plan.dense.index_fill(0, sparse.tail_rows, False).nonzero().squeeze(1)
    index = torch.cat([sparse.tail_rows, others])
    return None if len(others) == len(plan.dense) else index


def _hidden_sum(rows: Rows, tails: int, grad_hidden: Tensor, dtype: torch.dtype) -> Tensor:  # [T + R, D]
    """In the first rows of the gradient itself where it has that dtype and there are no tails: nothing is allocated."""
    if grad_hidden.dtype == dtype and not tails:
        return grad_hidden[: len(rows)]
    return grad_hidden.new_empty(tails + len(rows), grad_hidden.shape[1], dtype=dtype)


# Rows that are scaled and moved at a time.
_ROWS_AT_ONCE = 1024


def _write_hidden(
    grad_hidden: Tensor,  # [N, D]
    hidden_sum: Tensor,  # [T + R, D]
    rows: Rows,
    sparse: SparseGradient,
    scale: Tensor,  # []
) -> None:
    tails = sparse.tails.rows
    if rows.index is None:
        torch.mul(hidden_sum, scale, out=grad_hidden)
    elif hidden_sum.data_ptr() == grad_hidden.data_ptr():
        hidden_sum.mul_(scale)
        _scatter_in_place(grad_hidden, rows.index)
    else:
        grad_hidden.zero_()
        for index, sums in sparse.hidden_rows(hidden_sum[:tails]):
            grad_hidden[index] = sums.mul_(scale).to(grad_hidden.dtype)
        for i in range(0, len(rows), _ROWS_AT_ONCE):
            sums = hidden_sum[tails + i : tails + i + _ROWS_AT_ONCE].mul_(scale)
            grad_hidden[rows.index[i : i + _ROWS_AT_ONCE]] = sums.to(grad_hidden.dtype)


def _scatter_in_place(gradient: Tensor, index: Tensor) -> None:
    """Moves row i of the first len(index) rows to row index[i] >= i, zeros elsewhere. From the last block to the first
    nothing is overwritten that has yet to move."""
    gradient[len(index) :] = 0
    for i in reversed(range(0, len(index), _ROWS_AT_ONCE)):
        rows = gradient[i : i + _ROWS_AT_ONCE][: len(index) - i].clone()
        gradient[i : i + len(rows)] = 0
        gradient[index[i : i + len(rows)]] = rows
