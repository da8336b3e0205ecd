"""Tails of sparse rows: each is replaced by a mixture of the tails of T heavy rows, which are dense anyway.

`assign_tails` mixes them by how similar the hidden states are, and bounds the error.
`sum_tail_states` adds up what the sparse rows of each tail contribute to dW: dW of all tails is Q^T S, with Q [T, V]
the tails of the heavy rows (`dlogits`) and S [T, D] these sums. `gather_states` puts S and the hidden states of the
dense rows into one matrix.

Bytes: the first two read the hidden states once each, the second those of sparse rows only; the third reads and writes
those of dense rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import SPARSE
from .configs import options
from .numerics import dot_of_parts, operand, rounded
from .plan_rows import SPARSE_POSSIBLE, TAIL_ROW, RowPlan

_SPARSE_POSSIBLE, _TAIL_ROW, _SPARSE = tl.constexpr(SPARSE_POSSIBLE), tl.constexpr(TAIL_ROW), tl.constexpr(SPARSE)

# Sums over rows are cut into at most so many parts: these fill a device, and are added in a second step.
_MAX_PARTS = 32


class TailPlan(NamedTuple):
    """The tails of N rows, and what the choice between dense, sparse and dropped compares."""

    shares: Tensor  # [N, T] float32: the row's tail is the sum of the heavy rows' tails, so many times each
    kind: Tensor  # [N] int8 as in RowPlan, with TAIL_ROW set
    bound: Tensor  # [N] float64 on the squared error where the row is not dense; inf for a tail row


@triton.jit
def _inverse_norm(square):  # type: ignore[no-untyped-def]
    """1 / sqrt(x); 0 where rounding has left nothing of x."""
    return tl.where(square > 0.0, 1.0 / tl.sqrt(square), 0.0)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "tail_rows", "tail", "mass", "log_floor", "plan_kind", "plan_bound", "tail_bound", "shares",
        "kind", "bound",
    ],
)  # fmt: skip
def assign_tails_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]
    tail_rows,  # [T] int64
    tail,  # [N], as are the next five: of the row plan
    mass,
    log_floor,
    plan_kind,
    plan_bound,
    tail_bound,
    shares,  # [N, T]
    kind,  # [N] int8
    bound,  # [N] float64
    n_rows,
    depth,  # D
    hidden_stride,
    SHARPNESS: tl.constexpr,
    ENTROPY: tl.constexpr,
    T: tl.constexpr,
    B_R: tl.constexpr,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    m_r = i_r < n_rows
    state = tl.load(plan_kind + i_r, mask=m_r, other=0)
    possible = state == _SPARSE_POSSIBLE
    i_t = tl.arange(0, T)
    i_h = tl.load(tail_rows + i_t)
    products = tl.zeros([B_R, T], tl.float32)
    gram = tl.zeros([T, T], tl.float32)
    squares = tl.zeros([B_R], tl.float32)
    for o_d in range(0, depth, B_D):
        i_d = o_d + tl.arange(0, B_D)
        m_d = (i_d < depth)[None, :]
        b_r = tl.load(hidden + i_r[:, None] * hidden_stride + i_d[None, :], mask=possible[:, None] & m_d, other=0.0)
        b_h = tl.load(hidden + i_h[:, None] * hidden_stride + i_d[None, :], mask=m_d, other=0.0)
        b_r, b_h = operand(b_r), operand(b_h)
        products = tl.dot(b_r, b_h.T, products, input_precision="ieee")
        gram = tl.dot(b_h, b_h.T, gram, input_precision="ieee")
        x = b_r.to(tl.float32)
        squares += tl.sum(x * x, 1)

    # The cosine between the states less the mean of the heavy ones: all have a large part in common.
    with_mean = tl.sum(products, 1) / T
    mean_h = tl.sum(gram, 0) / T
    mean_square = tl.sum(mean_h, 0) / T
    squares_h = tl.sum(tl.where(i_t[:, None] == i_t[None, :], gram, 0.0), 0)
    length = _inverse_norm(squares - 2.0 * with_mean + mean_square)
    length_h = _inverse_norm(squares_h - 2.0 * mean_h + mean_square)
    cosine = (products - with_mean[:, None] - mean_h[None, :] + mean_square) * length[:, None] * length_h[None, :]
    if SHARPNESS is None:
        mix = (i_t[None, :] == tl.argmax(cosine, 1)[:, None]).to(tl.float32)
    else:
        mix = tl.exp(SHARPNESS * (cosine - tl.max(cosine, 1)[:, None]))
        mix /= tl.sum(mix, 1)[:, None]

    mass_h = tl.load(mass + i_h)
    per_tail = tl.where(mass_h > 0.0, 1.0 / mass_h, 0.0)
    size = tl.load(tail + i_r, mask=m_r, other=0.0)
    tl.store(shares + i_r[:, None] * T + i_t[None, :], size[:, None] * mix * per_tail[None, :], mask=m_r[:, None])

    # What stands for the tail is its sum times a mixture of distributions, whose sums of squares are at most their
    # largest entries, the floors of the heavy rows over their masses. Both have one sign where there is no entropy
    # coefficient, so that their squares add up; with one twice them.
    largest = tl.minimum(tl.exp(tl.load(log_floor + i_h)) / mass_h, 1.0)
    largest = tl.sum(mix * largest[None, :], 1).to(tl.float64)
    error = tl.load(tail_bound + i_r, mask=m_r, other=0.0) + size.to(tl.float64) * size.to(tl.float64) * largest
    if ENTROPY:
        error *= 2.0
    # A row without a gradient may be among the heavy ones where there are too few others; it is none of them.
    is_heavy = possible & (tl.max((i_r[:, None] == i_h[None, :]).to(tl.int32), 1) > 0)
    error = tl.where(possible, error, tl.load(plan_bound + i_r, mask=m_r, other=0.0))
    tl.store(bound + i_r, tl.where(is_heavy, float("inf"), error), mask=m_r)
    tl.store(kind + i_r, tl.where(is_heavy, _TAIL_ROW, state).to(tl.int8), mask=m_r)


def assign_tails(
    rows: RowPlan,  # of N rows
    tail_rows: Tensor,  # [T] int64; T is a power of two from 16 on
    hidden: Tensor,  # [N, D]
    *,
    entropy: bool,
    sharpness: float | None,
) -> TailPlan:
    """The tails that each row uses if it becomes sparse, and the bound on its error. A row's similarity to a heavy row
    is the cosine of the angle between their hidden states, less the mean of the heavy rows' states. The tails are mixed
    by the softmax of ``sharpness`` times the similarities; None: the tail of the most similar row alone. ``entropy``:
    whether there are coefficients of entropies."""
    (n_rows, depth), n_tails = hidden.shape, len(tail_rows)
    shares = torch.empty(n_rows, n_tails, dtype=torch.float32, device=hidden.device)
    kind, bound = torch.empty_like(rows.kind), torch.empty_like(rows.bound)
    assign_tails_kernel[lambda meta: (triton.cdiv(n_rows, meta["B_R"]),)](
        hidden=hidden, tail_rows=tail_rows, tail=rows.tail, mass=rows.mass,
        log_floor=rows.log_floor, plan_kind=rows.kind, plan_bound=rows.bound, tail_bound=rows.tail_bound,
        shares=shares, kind=kind, bound=bound, n_rows=n_rows, depth=depth, hidden_stride=hidden.stride(0),
        SHARPNESS=sharpness, ENTROPY=entropy, T=n_tails, **options("assign_tails", hidden.device),
    )  # fmt: skip
    return TailPlan(shares, kind, bound)


@triton.jit(
    do_not_specialize=["n_rows", "part_rows"],
    do_not_specialize_on_alignment=["shares", "row_class", "sums", "sums_of_shares"],
)
def tail_states_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]
    shares,  # [N, T]
    row_class,  # [N] int8
    sums,  # [P, T, D] float32
    sums_of_shares,  # [P, T] float32
    n_rows,
    depth,  # D
    hidden_stride,
    part_rows,  # rows of a part
    T: tl.constexpr,
    B_K: tl.constexpr,
    B_D: tl.constexpr,
):
    part = tl.program_id(1)
    i_t = tl.arange(0, T)
    i_d = tl.program_id(0) * B_D + tl.arange(0, B_D)
    m_d = i_d < depth
    total = tl.zeros([T, B_D], tl.float32)
    total_share = tl.zeros([T], tl.float32)
    begin = part * part_rows
    for o_r in range(begin, tl.minimum(begin + part_rows, n_rows), B_K):
        i_r = o_r + tl.arange(0, B_K)
        # Other rows may hold anything, NaN included: they are not read.
        m_r = i_r < n_rows
        m_r = m_r & (tl.load(row_class + i_r, mask=m_r, other=0) == _SPARSE)
        o_s = i_r.to(tl.int64)[None, :] * T + i_t[:, None]
        a = tl.load(shares + o_s, mask=m_r[None, :], other=0.0)
        o_h = i_r.to(tl.int64)[:, None] * hidden_stride + i_d[None, :]
        b = tl.load(hidden + o_h, mask=m_r[:, None] & m_d[None, :], other=0.0)
        total = dot_of_parts(a, b, total)
        total_share += tl.sum(a, 1)
    i_p = part.to(tl.int64) * T + i_t
    tl.store(sums + i_p[:, None] * depth + i_d[None, :], total, mask=m_d[None, :])
    if tl.program_id(0) == 0:
        tl.store(sums_of_shares + i_p, total_share)


def sum_tail_states(
    hidden: Tensor,  # [N, D]
    shares: Tensor,  # [N, T]
    row_class: Tensor,  # [N] int8, of `classify_rows`
) -> tuple[Tensor, Tensor]:
    """Sums over the sparse rows for each tail, in parts that `gather_states` adds: of share * hidden states, [P, T, D],
    and of shares, [P, T]; both float32, rows in order."""
    (n_rows, depth), n_tails, device = hidden.shape, shares.shape[1], hidden.device
    cut = options("tail_states", device)
    part_rows = triton.cdiv(triton.cdiv(n_rows, _MAX_PARTS), cut["B_K"]) * cut["B_K"]
    n_parts = triton.cdiv(n_rows, part_rows)
    sums = torch.empty(n_parts, n_tails, depth, dtype=torch.float32, device=device)
    sums_of_shares = torch.empty(n_parts, n_tails, dtype=torch.float32, device=device)
    tail_states_kernel[(triton.cdiv(depth, cut["B_D"]), n_parts)](
        hidden=hidden, shares=shares, row_class=row_class, sums=sums, sums_of_shares=sums_of_shares,
        n_rows=n_rows, depth=depth, hidden_stride=hidden.stride(0), part_rows=part_rows,
        T=n_tails, **cut,
    )  # fmt: skip
    return sums, sums_of_shares


@triton.jit(
    do_not_specialize=["n_rows", "n_parts"],
    do_not_specialize_on_alignment=["rows", "sums", "sums_of_shares", "bias_factors"],
)
def gather_states_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]
    rows,  # [R] int64
    sums,  # [P, T, D], or None as is the next, and T = 0: no tails
    sums_of_shares,  # [P, T]
    states,  # [R, D]
    bias_factors,  # [T]
    n_rows,  # R
    depth,  # D
    hidden_stride,
    n_parts,  # P
    min_prob,
    T: tl.constexpr,
    B_R: tl.constexpr,
    B_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    i_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_d = (i_d < depth)[None, :]
    o_s = i[:, None] * depth + i_d[None, :]
    is_row = (i >= T) & (i < n_rows)
    place = tl.load(rows + i, mask=is_row, other=0)
    x = tl.load(hidden + place[:, None] * hidden_stride + i_d[None, :], mask=is_row[:, None] & m_d, other=0.0)
    tl.store(states + o_s, x, mask=is_row[:, None] & m_d)
    if T > 0:  # noqa: SIM102
        if tl.program_id(0) * B_R < T:
            total = tl.zeros([B_R, B_D], tl.float32)
            share = tl.zeros([B_R], tl.float32)
            m_t = i < T
            for part in range(n_parts):
                i_p = part * T + i
                total += tl.load(sums + i_p[:, None] * depth + i_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
                share += tl.load(sums_of_shares + i_p, mask=m_t, other=0.0)
            tl.store(states + o_s, rounded(total * min_prob, states), mask=m_t[:, None] & m_d)
            if tl.program_id(1) == 0:
                tl.store(bias_factors + i, share * min_prob, mask=m_t)


def gather_states(
    hidden: Tensor,  # [N, D]
    rows: Tensor,  # [R] int64, of `classify_rows`
    parts: tuple[Tensor, Tensor] | None,  # of `sum_tail_states`; None: the rows have no tails before them
    out: Tensor | None = None,  # [at least R, D], contiguous, into whose first rows the states go; None: new memory
    *,
    min_prob: float,
) -> tuple[Tensor, Tensor | None]:
    """The states [R, D] that dW's products take, in the dtype of the hidden states: S of the tails in the first T rows,
    then hidden states of dense rows. And what multiplies the first T rows of dZ in the gradient of the bias, [T]
    float32 (the others count once); None without tails. Both include ``min_prob``, by which `dlogits` divides the
    tails."""
    depth, device = hidden.shape[1], hidden.device
    sums, sums_of_shares = (None, None) if parts is None else parts
    n_parts, n_tails = (0, 0) if sums_of_shares is None else sums_of_shares.shape
    states = torch.empty(len(rows), depth, dtype=hidden.dtype, device=device) if out is None else out[: len(rows)]
    factors = None if parts is None else torch.empty(n_tails, dtype=torch.float32, device=device)
    if len(rows):
        gather_states_kernel[lambda meta: (triton.cdiv(len(rows), meta["B_R"]), triton.cdiv(depth, meta["B_D"]))](
            hidden=hidden, rows=rows, sums=sums, sums_of_shares=sums_of_shares, states=states, bias_factors=factors,
            n_rows=len(rows), depth=depth, hidden_stride=hidden.stride(0), n_parts=n_parts, min_prob=min_prob,
            T=n_tails, **options("gather_states", device),
        )  # fmt: skip
    return states, factors
