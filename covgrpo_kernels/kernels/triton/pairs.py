"""The kept entries of all sparse rows as a list of (vocabulary id, row, value), ordered for dW.

`list_pairs` writes it row by row, a stable sort by vocabulary id follows, and `place_pairs` brings rows and values into
that order and finds where the ids of each block begin. So the order of every sum over pairs is fixed: by row.

Bytes: reads 8 for each kept entry; writes 12 a pair, then reads 16 and writes 8, besides what the sort does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import SPARSE
from .configs import options
from .plan_rows import RowPlan
from .row_classes import RowClasses

_SPARSE = tl.constexpr(SPARSE)

# Vocabulary ids whose pairs are found together. Blocks of dW are multiples of it.
PAIR_BLOCK = 64


class Pairs(NamedTuple):
    """P pairs by vocabulary id, and for each id by row."""

    vocab_ids: Tensor  # [P] int32
    rows: Tensor  # [P] int32
    values: Tensor  # [P] float32
    offsets: Tensor  # [V / PAIR_BLOCK rounded up, + 1] int32: where the pairs of each block begin, and the end


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "row_class", "place", "kept", "vocab_ids", "values", "targets", "target_value", "pair_ids", "pair_rows",
        "pair_values",
    ],
)  # fmt: skip
def list_pairs_kernel(  # type: ignore[no-untyped-def]
    row_class,  # [N] int8
    place,  # [N] int32
    kept,  # [N] int32
    vocab_ids,  # [N, K] int32
    values,  # [N, K]
    targets,  # [N] int64
    target_value,  # [N]
    pair_ids,  # [P] int32
    pair_rows,  # [P] int32
    pair_values,  # [P]
    n_rows,
    K: tl.constexpr,
    B_R: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    m_r = i_r < n_rows
    m_r = m_r & (tl.load(row_class + i_r, mask=m_r, other=0) == _SPARSE)
    first = tl.load(place + i_r, mask=m_r, other=0)
    n_kept = tl.load(kept + i_r, mask=m_r, other=0)
    i_k = tl.arange(0, K)
    m_k = m_r[:, None] & (i_k[None, :] < n_kept[:, None])
    o_k = i_r[:, None] * K + i_k[None, :]
    at = first[:, None] + i_k[None, :]
    tl.store(pair_ids + at, tl.load(vocab_ids + o_k, mask=m_k, other=0), mask=m_k)
    tl.store(pair_values + at, tl.load(values + o_k, mask=m_k, other=0.0), mask=m_k)
    tl.store(pair_rows + at, tl.broadcast_to(i_r.to(tl.int32)[:, None], B_R, K), mask=m_k)
    last = first + n_kept
    tl.store(pair_ids + last, tl.load(targets + i_r, mask=m_r, other=0).to(tl.int32), mask=m_r)
    tl.store(pair_values + last, tl.load(target_value + i_r, mask=m_r, other=0.0), mask=m_r)
    tl.store(pair_rows + last, i_r.to(tl.int32), mask=m_r)


@triton.jit(
    do_not_specialize=["n_pairs", "n_blocks", "steps"],
    do_not_specialize_on_alignment=["sorted_ids", "order", "rows", "values", "sorted_rows", "sorted_values", "offsets"],
)
def place_pairs_kernel(  # type: ignore[no-untyped-def]
    sorted_ids,  # [P] int32
    order,  # [P] int64, where they stand in the list
    rows,  # [P] int32 of the list, as are the values
    values,  # [P]
    sorted_rows,  # [P] int32
    sorted_values,  # [P]
    offsets,  # [B + 1] int32
    n_pairs,
    n_blocks,  # B
    steps,  # of a search among P numbers
    PAIR_BLOCK: tl.constexpr,
    B_P: tl.constexpr,
):
    i_p = tl.program_id(0) * B_P + tl.arange(0, B_P)
    m_p = i_p < n_pairs
    at = tl.load(order + i_p, mask=m_p, other=0)
    tl.store(sorted_rows + i_p, tl.load(rows + at, mask=m_p, other=0), mask=m_p)
    tl.store(sorted_values + i_p, tl.load(values + at, mask=m_p, other=0.0), mask=m_p)
    # The program's share of the blocks: by halves, the first pair whose id is not before the block.
    low = tl.zeros([B_P], tl.int32)
    high = low + n_pairs
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        is_before = is_open & (tl.load(sorted_ids + middle, mask=is_open, other=0) < i_p * PAIR_BLOCK)
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    tl.store(offsets + i_p, low, mask=i_p <= n_blocks)


def list_pairs(
    rows: RowPlan,  # of N rows
    classes: RowClasses,  # of N rows
    targets: Tensor,  # [N] int64
    n_pairs: int,  # P, of the counts
    vocab: int,  # V
) -> Pairs:
    """The pairs of the sparse rows. ``n_pairs`` is at least 1."""
    assert rows.vocab_ids is not None
    (n_rows, capacity), device = rows.vocab_ids.shape, targets.device
    # Each in memory of its own, since those that are not sorted are free after this.
    ids, pair_rows, sorted_rows = (torch.empty(n_pairs, dtype=torch.int32, device=device) for _ in range(3))
    values, sorted_values = (torch.empty(n_pairs, dtype=torch.float32, device=device) for _ in range(2))
    list_pairs_kernel[lambda meta: (triton.cdiv(n_rows, meta["B_R"]),)](
        row_class=classes.row_class, place=classes.place, kept=rows.kept, vocab_ids=rows.vocab_ids, values=rows.values,
        targets=targets, target_value=rows.target_value, pair_ids=ids, pair_rows=pair_rows, pair_values=values,
        n_rows=n_rows, K=capacity, **options("list_pairs", device),
    )  # fmt: skip
    sorted_ids, order = ids.sort(stable=True)
    n_blocks = triton.cdiv(vocab, PAIR_BLOCK)
    offsets = torch.empty(n_blocks + 1, dtype=torch.int32, device=device)
    place_pairs_kernel[lambda meta: (triton.cdiv(max(n_pairs, n_blocks + 1), meta["B_P"]),)](
        sorted_ids=sorted_ids, order=order, rows=pair_rows, values=values, sorted_rows=sorted_rows,
        sorted_values=sorted_values, offsets=offsets, n_pairs=n_pairs, n_blocks=n_blocks, steps=n_pairs.bit_length(),
        PAIR_BLOCK=PAIR_BLOCK, **options("place_pairs", device),
    )  # fmt: skip
    return Pairs(sorted_ids, sorted_rows, sorted_values, offsets)
