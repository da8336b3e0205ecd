"""classify_rows: which rows are dense, sparse and dropped, and where they are listed, in one launch of one program.

dense: enters the matrix products. sparse: its kept entries and a mixture of tails stand for it. dropped: no gradient.

Bytes: reads some 50 and writes 13 a row, all by one multiprocessor. (Not timed. That is little for thousands of rows.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import DENSE, DROPPED, SPARSE
from .configs import options
from .numerics import counted_total
from .plan_rows import NO_GRADIENT, SPARSE_POSSIBLE, TAIL_ROW

_DROPPED, _SPARSE, _DENSE = tl.constexpr(DROPPED), tl.constexpr(SPARSE), tl.constexpr(DENSE)
_NO_GRADIENT, _SPARSE_POSSIBLE = tl.constexpr(NO_GRADIENT), tl.constexpr(SPARSE_POSSIBLE)
_TAIL_ROW = tl.constexpr(TAIL_ROW)


class RowClasses(NamedTuple):
    """What happens to each of N rows."""

    row_class: Tensor  # [N] int8: DROPPED, SPARSE or DENSE
    place: Tensor  # [N] int32: of a dense row in ``rows``, of a sparse row's first pair in the list of pairs; else -1
    # [N + T] int64, of which R are set: the dense rows. Where there are sparse ones: the T tail rows, which hold the
    # places of the tails, the T tail rows once more, now as dense rows, then the other dense rows in their order.
    rows: Tensor
    counts: Tensor  # [3] int64: R, number of sparse rows, number of their pairs. The host reads these, once
    error_bound: Tensor  # [] float64: |error in dZ|_F <= error_bound * |dZ|_F; inf where dZ is not finite


@triton.jit
def _within(bound, i_r, last_bound, last_row):  # type: ignore[no-untyped-def]
    """Whether a row comes no later than the last one in the order of bounds, rows with equal bounds in their order. A
    bound that is NaN never does."""
    return (bound < last_bound) | ((bound == last_bound) & (i_r <= last_row))


@triton.jit
def _last_within(in_order, order, n_rows, allowed, B_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last of the rows that come first in the order of their bounds and whose sum is within what is allowed: its
    bound, which row it is, and the sum up to it."""
    i_b = tl.arange(0, B_R)
    before = tl.sum(tl.zeros([B_R], tl.float64), 0)
    error = before
    n_within = tl.sum(tl.zeros([B_R], tl.int32), 0)
    for o_r in range(0, n_rows, B_R):
        x = tl.load(in_order + o_r + i_b, mask=o_r + i_b < n_rows, other=float("inf"))
        so_far = before + tl.cumsum(x, 0)
        is_within = so_far <= allowed
        error = tl.maximum(error, tl.max(tl.where(is_within, so_far, 0.0), 0))
        n_within += tl.sum(is_within.to(tl.int32), 0)
        before += tl.sum(x, 0)
    last_bound = tl.load(in_order + n_within - 1, mask=n_within > 0, other=-1.0)
    last_row = tl.load(order + n_within - 1, mask=n_within > 0, other=-1)
    return last_bound, last_row, error


@triton.jit
def _classes(kind, bound, i_r, m_r, last_bound, last_row):  # type: ignore[no-untyped-def]
    """Of each row whether it is sparse, whether it is dense, and its kind."""
    k = tl.load(kind + i_r, mask=m_r, other=_NO_GRADIENT)
    is_within = _within(tl.load(bound + i_r, mask=m_r, other=float("inf")), i_r, last_bound, last_row)
    return (k == _SPARSE_POSSIBLE) & is_within, (k != _NO_GRADIENT) & (is_within == 0), k


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "in_order", "order", "bound", "norm", "kind", "kept", "tail_rows", "row_class", "place", "rows", "counts",
        "error_bound",
    ],
)  # fmt: skip
def classify_rows_kernel(  # type: ignore[no-untyped-def]
    in_order,  # [N] float64, the bounds in ascending order
    order,  # [N] int64, where they stand
    bound,  # [N] float64
    norm,  # [N] float64
    kind,  # [N] int8
    kept,  # [N] int32
    tail_rows,  # [T] int64, or None: no row is sparse
    row_class,  # [N] int8
    place,  # [N] int32
    rows,  # [N + T] int64
    counts,  # [3] int64
    error_bound,  # [] float64
    n_rows,
    GRAD_TOL: tl.constexpr,
    LARGEST_SHARE: tl.constexpr,
    T: tl.constexpr,
    B_R: tl.constexpr,
):
    i_b = tl.arange(0, B_R)
    total, counted, _, n_bad = counted_total(norm, n_rows, LARGEST_SHARE, B_R)
    # The rows up to this one are not dense.
    last_bound, last_row, error = _last_within(in_order, order, n_rows, counted * (GRAD_TOL * GRAD_TOL), B_R)
    relative = tl.sqrt(tl.where(error > 0.0, error / total, 0.0))
    tl.store(error_bound, tl.where(n_bad > 0, float("inf"), relative))

    n_sparse = tl.sum(tl.zeros([B_R], tl.int32), 0)
    if tail_rows is not None:
        for o_r in range(0, n_rows, B_R):
            i_r = o_r + i_b
            m_r = i_r < n_rows
            n_sparse += tl.sum(_classes(kind, bound, i_r, m_r, last_bound, last_row)[0].to(tl.int32), 0)

    n_first = tl.where(n_sparse > 0, 2 * T, 0)
    n_dense = n_first
    n_pairs = tl.sum(tl.zeros([B_R], tl.int32), 0)
    for o_r in range(0, n_rows, B_R):
        i_r = o_r + i_b
        m_r = i_r < n_rows
        is_sparse, is_dense, k = _classes(kind, bound, i_r, m_r, last_bound, last_row)
        # Where there are sparse rows, the tail rows have their places.
        listed = (is_dense & ((k != _TAIL_ROW) | (n_sparse == 0))).to(tl.int32)
        pairs = tl.where(is_sparse, tl.load(kept + i_r, mask=m_r, other=0) + 1, 0)
        at = n_dense + tl.cumsum(listed, 0) - 1
        first = n_pairs + tl.cumsum(pairs, 0) - pairs
        what = tl.where(is_sparse, _SPARSE, tl.where(is_dense, _DENSE, _DROPPED))
        tl.store(row_class + i_r, what.to(tl.int8), mask=m_r)
        has_place = m_r & ((is_dense == 0) | (listed > 0))
        tl.store(place + i_r, tl.where(is_sparse, first, tl.where(is_dense, at, -1)), mask=has_place)
        tl.store(rows + at, i_r.to(tl.int64), mask=listed > 0)
        n_dense += tl.sum(listed, 0)
        n_pairs += tl.sum(pairs, 0)
    if tail_rows is not None:
        i_t = tl.arange(0, T)
        m_t = i_t < n_sparse * T  # all of them, or none
        heavy = tl.load(tail_rows + i_t)
        tl.store(rows + i_t, heavy, mask=m_t)
        tl.store(rows + T + i_t, heavy, mask=m_t)
        tl.store(place + heavy, T + i_t, mask=m_t)
    tl.store(counts, n_dense.to(tl.int64))
    tl.store(counts + 1, n_sparse.to(tl.int64))
    tl.store(counts + 2, n_pairs.to(tl.int64))


def classify_rows(
    bound: Tensor,  # [N] float64 on the squared error where the row is not dense
    norm: Tensor,  # [N] float64, squared, of the row's gradient; zero without one
    kind: Tensor,  # [N] int8, of `plan_rows` or `assign_tails`
    kept: Tensor,  # [N] int32
    tail_rows: Tensor | None,  # [T] int64, T a power of two; None: no row is sparse
    grad_tol: float,
    largest_share: float | None = None,
) -> RowClasses:
    """Rows are sparse, where they can be, and else dropped, those of the smallest bounds first, while the sum of the
    bounds is within ``grad_tol`` squared times the sum of the norms. All others with a gradient are dense. In the sum
    of the norms no row counts for more than ``largest_share`` times the mean of the rows that have one, so that a few
    rows cannot make room for all others; None: every row counts in full. A row that is not finite is dense, and no part
    of the sum."""
    n_rows, device = len(bound), bound.device
    n_tails = 0 if tail_rows is None else len(tail_rows)
    row_class = torch.empty(n_rows, dtype=torch.int8, device=device)
    place = torch.empty(n_rows, dtype=torch.int32, device=device)
    rows = torch.empty(n_rows + n_tails, dtype=torch.int64, device=device)
    counts = torch.empty(3, dtype=torch.int64, device=device)
    error_bound = torch.empty((), dtype=torch.float64, device=device)
    in_order, order = bound.sort(stable=True)
    classify_rows_kernel[(1,)](
        in_order=in_order, order=order, bound=bound, norm=norm, kind=kind, kept=kept, tail_rows=tail_rows,
        row_class=row_class, place=place, rows=rows, counts=counts, error_bound=error_bound,
        n_rows=n_rows, GRAD_TOL=grad_tol, LARGEST_SHARE=largest_share, T=n_tails, **options("classify_rows", device),
    )  # fmt: skip
    return RowClasses(row_class, place, rows, counts, error_bound)
