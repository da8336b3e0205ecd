"""The engine for GPUs and 16-bit operands: few launches, all of them long.

A step of it, and what waits for what:

- forward: one persistent kernel over the rows whose target counts; how many these are stays on the device.
- plan: the most probable vocabulary ids of each row are found again from the largest logits that the forward left for
  each row and 256 ids, then one kernel each for the rows' sparse form, their tails, and what happens to which row.
- backward: the host reads three counts, its only wait; then the dense rows' products by PyTorch, and one kernel each
  for the gradient of the head and of the hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..inputs import HeadInputs, Precision
from ..kernels.interface import DENSE, PEAK_WIDTH, TAIL_ROWS, Candidates, Coefficients, RowStats, Tile
from ..plan import (
    MAX_SHARE_OF_BUDGET,
    BackwardPlan,
    backward_plan_shapes,
    can_have_tails,
    min_probability,
    plan_backward,
)
from ..sparse import MIX_SHARPNESS
from .interface import HeadGrads, Needs, Shapes, empty_grads
from .products import multiply_
from .scaling import to_unit_scale
from .tiling import WORKSPACE_BYTES, vocab_slices

if TYPE_CHECKING:  # the modules need triton
    from ..kernels.triton.pairs import Pairs
    from ..kernels.triton.plan_rows import RowPlan
    from ..kernels.triton.row_classes import RowClasses
    from ..kernels.triton.tails import TailPlan

# Entries that a sparse row has room for besides its target, a power of two. Twice as many would take half a KiB a token
# more, where peaks and entries have 1.5 KiB together.
_CAPACITY = 64

# Of `min_probability`: higher than elsewhere, since most entries below are alone in a tile of products made again.
_FLOOR_FACTOR = 25.0

# Vocabulary ids of a slab are a multiple of this, so that the blocks of `head_grad` and its pairs begin with it.
_SLAB_MULTIPLE = 256


class _Planned(NamedTuple):
    """What the plan hands to the backward besides `BackwardPlan`. K is zero where no row can be sparse."""

    kept: Tensor  # [N] int32 entries of a row in its sparse form, without the target
    vocab_ids: Tensor  # [N, K] int32
    values: Tensor  # [N, K] dL/dproducts of these
    per_row: Tensor  # [6, N] of `RowPlan`
    shares: Tensor  # [N, T] what the row takes of each tail
    place: Tensor  # [N] int32 of a dense row among the dense ones, of a sparse row's first pair
    rows: Tensor  # [N + T] int64 the dense rows
    counts: Tensor  # [3] int64 dense rows, sparse rows, pairs
    unit_scale: Tensor  # [1] the power of two that coefficients were divided by; [0] for 1

    @property
    def at_target(self) -> Tensor:  # [N] as `Coefficients`
        return self.per_row[1]

    @property
    def log_floor(self) -> Tensor:  # [N]
        return self.per_row[5]


class FusedGpu:
    def __init__(self, dtype: torch.dtype) -> None:
        self._is_scaled = dtype == torch.float16

    def reads_values(self, device: torch.device) -> bool:
        return False

    def forward(
        self, inputs: HeadInputs, *, entropy: bool, ignore_index: int, min_prob: float
    ) -> tuple[RowStats, list[Tensor]]:
        from ..kernels.triton.forward import forward

        stats, rows, place, count, peaks = forward(
            inputs.hidden, _row_contiguous(inputs.weight), inputs.bias, inputs.targets, inputs.temperature,
            scale=inputs.transform.scale, softcap=inputs.transform.softcap, entropy=entropy,
            ignore_index=ignore_index, peaks=min_prob > 0,
        )  # fmt: skip
        return RowStats(stats), [] if peaks is None else [peaks, rows, place, count]

    def note_shapes(self, rows: int, vocab: int, dtype: torch.dtype, min_prob: float) -> Shapes:
        if not min_prob:
            return []
        tiles = -(-vocab // PEAK_WIDTH)
        return [
            ((tiles, rows), torch.bfloat16),
            ((rows,), torch.int32),
            ((rows,), torch.int32),
            ((1,), torch.int32),
        ]

    def plan(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],
        logprob_grad: Tensor,  # [N]
        entropy_grad: Tensor | None,  # [N]
        precision: Precision,
    ) -> tuple[BackwardPlan, list[Tensor]]:
        from ..kernels.triton import plan_rows, row_classes

        g, e, unit_scale = logprob_grad, entropy_grad, logprob_grad.new_empty(0)
        if self._is_scaled:
            scale, g, e = to_unit_scale(g, e)
            unit_scale = scale.reshape(1)
        sparse = precision.uniform is None and can_have_tails(len(g), self._capacity(notes), precision.grad_tol)
        min_prob = min_probability(precision.grad_tol, _FLOOR_FACTOR)
        rows = plan_rows.plan_rows(
            self._collect(inputs, stats, notes, g, e, min_prob) if sparse else None,
            stats.packed, inputs.targets, g, e, inputs.temperature,
            scale=inputs.transform.scale, softcap=inputs.transform.softcap,
        )  # fmt: skip
        kind, bound, grad_tol = rows.kind, rows.bound, precision.grad_tol
        shares, tail_rows, drawn = g.new_empty(len(g), 0), None, None
        if sparse:
            tail_rows, (shares, kind, bound) = self._assign_tails(inputs, rows, g, e)
        elif precision.uniform is not None:
            # The dice are PyTorch's; the rows that they keep are dense, whatever their bound.
            none = Candidates.empty(len(g), 0, g.dtype, g.device)
            drawn = plan_backward(inputs, stats, none, g, e, precision)
            kind = (drawn.row_class == DENSE).to(torch.int8) * plan_rows.LIVE
            bound, grad_tol = torch.full_like(bound, torch.inf), 0.0
        classes = row_classes.classify_rows(bound, rows.norm, kind, rows.kept, tail_rows, grad_tol, MAX_SHARE_OF_BUDGET)
        planned = _Planned(
            rows.kept,
            rows.kept.new_empty(len(g), 0) if rows.vocab_ids is None else rows.vocab_ids,
            g.new_empty(len(g), 0) if rows.values is None else rows.values,
            rows.per_row, shares, classes.place, classes.rows, classes.counts, unit_scale,
        )  # fmt: skip
        plan = BackwardPlan(
            classes.row_class,
            inputs.targets.new_empty(0) if tail_rows is None else tail_rows,
            classes.error_bound if drawn is None else drawn.error_bound,
            rows.bounds.new_empty(0) if drawn is None else drawn.inverse_prob,
        )
        return plan, list(planned)

    def plan_shapes(self, rows: int, notes: list[Tensor], precision: Precision) -> Shapes:
        capacity = self._capacity(notes)
        sparse = precision.uniform is None and can_have_tails(rows, capacity, precision.grad_tol)
        k, tails = (capacity, TAIL_ROWS) if sparse else (0, 0)
        return [
            *backward_plan_shapes(rows, capacity, precision),
            *(((rows,), torch.int32), ((rows, k), torch.int32), ((rows, k), torch.float32)),
            *(((6, rows), torch.float32), ((rows, tails), torch.float32)),
            *(((rows,), torch.int32), ((rows + tails,), torch.int64), ((3,), torch.int64)),
            ((1 if self._is_scaled else 0,), torch.float32),
        ]

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
        if not len(inputs.targets) or not inputs.weight.numel():
            return HeadGrads(*(grad.zero_() for grad in grads))
        step = _Step(inputs, _Planned(*planned), plan, min_prob)
        step.set_coefficients(stats, logprob_grad, entropy_grad, grad_scale)
        hidden_products = step.dense_products(grads, needs)
        if needs.hidden:
            step.write_hidden(grads.hidden, hidden_products)
        return grads

    def _capacity(self, notes: list[Tensor]) -> int:
        return _CAPACITY if notes else 0

    def _collect(
        self, inputs: HeadInputs, stats: RowStats, notes: list[Tensor], g: Tensor, e: Tensor | None, min_prob: float
    ) -> Candidates:
        """Of the rows that have a gradient, in any order."""
        from ..kernels.triton.collect import collect, largest

        peaks, rows, place, count = notes
        found = collect(
            inputs.hidden, _row_contiguous(inputs.weight), inputs.bias, inputs.temperature, rows, place, count, peaks,
            stats.packed, g, e, 2 * _CAPACITY, min_prob=min_prob, scale=inputs.transform.scale,
            softcap=inputs.transform.softcap,
        )  # fmt: skip
        return Candidates(*largest(*found, _CAPACITY))

    def _assign_tails(
        self, inputs: HeadInputs, rows: RowPlan, g: Tensor, e: Tensor | None
    ) -> tuple[Tensor, TailPlan]:  # [TAIL_ROWS] int64
        from ..kernels.triton import tail_weights, tails

        weights = tail_weights.tail_weights(g, e, rows.tail_weight, MAX_SHARE_OF_BUDGET)
        tail_rows = weights.topk(TAIL_ROWS).indices
        assigned = tails.assign_tails(
            rows, tail_rows, _row_contiguous(inputs.hidden), entropy=e is not None, sharpness=MIX_SHARPNESS
        )
        return tail_rows, assigned


class _Step:
    """One backward: what its parts share."""

    def __init__(self, inputs: HeadInputs, planned: _Planned, plan: BackwardPlan, min_prob: float) -> None:
        self.inputs, self.planned, self.plan = inputs, planned, plan
        self.hidden, self.weight = _row_contiguous(inputs.hidden), _row_contiguous(inputs.weight)
        self.min_prob = min_prob or 1.0  # zero: nothing is sparse, and any number does
        dense, sparse, self.pairs = planned.counts.tolist()  # the only wait for the device
        self.rows = planned.rows[:dense]  # [R]
        self.has_sparse = sparse > 0
        self.tails = TAIL_ROWS if self.has_sparse else 0

    def set_coefficients(self, stats: RowStats, g: Tensor, e: Tensor | None, grad_scale: Tensor | None) -> None:
        """Of all N rows, and what the gradients are to be multiplied by in the end."""
        unit_scale = self.planned.unit_scale
        if len(unit_scale):
            g, e = g / unit_scale, None if e is None else e / unit_scale
        if len(self.plan.inverse_prob):
            self.coefficients = Coefficients.of(stats, g, e)
        else:
            per_row = [stats.maximum, stats.log_sum, self.planned.at_target, g]
            self.coefficients = Coefficients(torch.stack(per_row if e is None else [*per_row, stats.entropy, e]))
        self.scale = unit_scale.reshape(()) if len(unit_scale) else None
        if grad_scale is not None and (self.has_sparse or self.scale is not None):
            # The values of sparse rows were planned without it, and coefficients of unit scale stay below what float16
            # holds.
            self.scale = grad_scale.float() if self.scale is None else self.scale * grad_scale
        elif grad_scale is not None:
            self.coefficients.packed[2:4].mul_(grad_scale)
            self.coefficients.packed[5:].mul_(grad_scale)

    def dense_products(self, grads: HeadGrads, needs: Needs) -> Tensor:  # [R, D] float32
        """Writes the gradients of weight and bias. Returns the products of dL/dproducts, tails first, with the head."""
        from ..kernels.triton import pairs, tails

        inputs, depth, vocab = self.inputs, self.hidden.shape[1], len(self.weight)
        some_pairs = parts = None
        if self.has_sparse:
            parts = tails.sum_tail_states(self.hidden, self.planned.shares, self.plan.row_class)
            if needs.weight or needs.bias:
                some_pairs = pairs.list_pairs(self._row_plan(), self._classes(), inputs.targets, self.pairs, vocab)
        # The gradient of the hidden states is written last, and has room for these until then.
        has_room = len(grads.hidden) >= len(self.rows) and grads.hidden.dtype == self.hidden.dtype
        room = grads.hidden if has_room else None
        states, bias_factors = tails.gather_states(self.hidden, self.rows, parts, room, min_prob=self.min_prob)
        products = states.new_empty(len(states) if needs.hidden else 0, depth, dtype=torch.float32)
        beside = [*self.planned, *(some_pairs or ()), products] if self.has_sparse else []
        for a, b in vocab_slices(vocab, self._slab_width(len(states), vocab, beside), 1):
            dz = self._dlogits(states, a, b)
            if needs.hidden and len(states):
                multiply_(dz, self.weight[a:b], products, add=a > 0)
            self._write_head(grads, needs, dz, states, some_pairs, bias_factors, a, b)
            del dz  # there is no room for it beside the next one
        return products

    def _dlogits(self, states: Tensor, a: int, b: int) -> Tensor:  # [R, C]
        from ..kernels.triton.dlogits import dlogits

        inputs = self.inputs
        dz = states.new_empty(len(states), b - a)
        if len(states):
            logits = states.new_empty(len(states), b - a, dtype=torch.float32)
            multiply_(states, self.weight[a:b].t(), logits)
            bias = None if inputs.bias is None else inputs.bias[a:b].float()
            tile = Tile(inputs.targets, a, inputs.transform, bias, inputs.temperature)
            log_floor = self.planned.log_floor if self.tails else None
            dlogits(logits, tile, self.coefficients, dz, self.rows, self.tails, self.min_prob, log_floor)
        return dz

    def _write_head(
        self,
        grads: HeadGrads,
        needs: Needs,
        dz: Tensor,  # [R, C]
        states: Tensor,  # [R, D]
        some_pairs: Pairs | None,
        bias_factors: Tensor | None,  # [T]
        a: int,
        b: int,
    ) -> None:
        from ..kernels.triton.head_grad import head_grad

        weight = grads.weight[a:b] if needs.weight else None
        bias = grads.bias[a:b] if needs.bias else None
        if weight is not None and some_pairs is None and self.scale is None and len(states):
            # Rounded once, but where cuBLAS adds up parts of a sum in the dtype of the operands, which PyTorch lets it
            # (docs/numerics.md).
            torch.mm(dz.t(), states, out=weight)
            weight = None
        if weight is not None or bias is not None:
            head_grad(dz, states, self.hidden, some_pairs, bias_factors, self.scale, weight, bias, first=a)

    def write_hidden(self, grad_hidden: Tensor, products: Tensor) -> None:
        from ..kernels.triton.hidden_grad import hidden_grad

        sparse = (self._row_plan(), self.planned.shares) if self.has_sparse else None
        hidden_grad(
            self._classes(), sparse, self.inputs.targets, self.weight, products, self.scale, grad_hidden,
            min_prob=self.min_prob,
        )  # fmt: skip

    def _slab_width(self, rows: int, vocab: int, beside: list[Tensor]) -> int:
        """Vocabulary ids at a time: as many as the workspace has room for ``beside`` these, but at least a quarter of
        it, of logits in float32 and dL/dproducts in 16 bits. Slabs of equal width, since a narrow one costs as many
        launches as a wide one."""
        workspace = WORKSPACE_BYTES["cuda"]
        workspace = max(workspace - sum(x.nbytes for x in beside), workspace // 4)
        most = max(workspace // (6 * max(rows, 1)) // _SLAB_MULTIPLE, 1)
        slabs = -(-vocab // (most * _SLAB_MULTIPLE))
        return -(-vocab // (slabs * _SLAB_MULTIPLE)) * _SLAB_MULTIPLE

    def _row_plan(self) -> RowPlan:
        from ..kernels.triton.plan_rows import RowPlan

        p = self.planned
        unused = self.plan.row_class
        return RowPlan(unused, p.kept, p.vocab_ids, p.values, p.per_row, unused)

    def _classes(self) -> RowClasses:
        from ..kernels.triton.row_classes import RowClasses

        p = self.planned
        return RowClasses(self.plan.row_class, p.place, p.rows, p.counts, self.plan.error_bound)


def _row_contiguous(matrix: Tensor) -> Tensor:
    """A copy where the elements of a row are not side by side, as those of a transposed head are not."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] < 2 else matrix.contiguous()
