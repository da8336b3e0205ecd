"""select_rows, gather_rows: which rows are scored, and their hidden states in a contiguous buffer. How many rows there
are stays on the device, so that nothing waits for it and a CUDA graph can hold it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import options


@triton.jit(
    do_not_specialize=["n_tokens", "ignore_index"],
    do_not_specialize_on_alignment=["targets", "rows", "place", "count"],
)
def select_rows_kernel(  # type: ignore[no-untyped-def]
    targets,  # [N] int64
    rows,  # [N] int32
    place,  # [N] int32
    count,  # [1] int32
    n_tokens,  # N
    ignore_index,
    B_N: tl.constexpr,  # tokens of a program
    B_C: tl.constexpr,  # tokens that are counted at a time
):
    # Every program counts the valid rows before its own, so that none waits for another. At 131,072 tokens the last
    # one reads 1 MiB from the L2 cache.
    first = tl.program_id(0) * B_N
    before = tl.zeros([B_C], tl.int32)
    for o in range(0, first, B_C):
        i = o + tl.arange(0, B_C)
        m = i < first
        before += (m & (tl.load(targets + i, mask=m, other=0) != ignore_index)).to(tl.int32)
    n_before = tl.sum(before, 0)

    i_n = first + tl.arange(0, B_N)
    m_n = i_n < n_tokens
    valid = (m_n & (tl.load(targets + i_n, mask=m_n, other=0) != ignore_index)).to(tl.int32)
    at = n_before + tl.cumsum(valid, 0) - 1
    tl.store(rows + at, i_n, mask=valid > 0)
    tl.store(place + i_n, tl.where(valid > 0, at, -1), mask=m_n)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count, n_before + tl.sum(valid, 0))


@triton.jit(do_not_specialize=["first", "room"], do_not_specialize_on_alignment=["rows", "count"])
def gather_rows_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]
    rows,  # [N] int32
    count,  # [1] int32
    out,  # [R, P]
    first,
    room,  # R
    depth,  # D
    padded,  # P
    row_stride,
    column_stride,
    B_R: tl.constexpr,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    i_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_r = i_r < tl.minimum(room, tl.load(count) - first)
    row = tl.load(rows + first + i_r, mask=m_r, other=0).to(tl.int64)
    o_h = row[:, None] * row_stride + i_d.to(tl.int64)[None, :] * column_stride
    x = tl.load(hidden + o_h, mask=m_r[:, None] & (i_d < depth)[None, :], other=0.0)
    o_b = i_r.to(tl.int64)[:, None] * padded + i_d[None, :]
    tl.store(out + o_b, x, mask=(i_r < room)[:, None] & (i_d < padded)[None, :])


def padded_depth(depth: int, itemsize: int) -> int:
    """Elements of a row of the buffer: a multiple of 16 bytes, as the hardware's copies of blocks (TMA) need it."""
    unit = 16 // itemsize
    return max(triton.cdiv(depth, unit), 1) * unit


def select_rows(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are scored: those whose target is not ``ignore_index``.

    ``targets``: [N] int64, contiguous. Returns ``rows`` [N] int32, the scored tokens in ascending order (what follows
    them is undefined); ``place`` [N] int32, where each token stands in that list, or -1; and ``count`` [1] int32, how
    many they are. One launch."""
    (tokens,) = targets.shape
    rows, place = (targets.new_empty(tokens, dtype=torch.int32) for _ in range(2))
    count = targets.new_empty(1, dtype=torch.int32)
    blocks = options("select", targets.device)
    select_rows_kernel[(max(triton.cdiv(tokens, blocks["B_N"]), 1),)](
        targets, rows, place, count, tokens, ignore_index, **blocks
    )
    return rows, place, count


def gather_rows(hidden: Tensor, rows: Tensor, count: Tensor, first: int, out: Tensor) -> None:
    """Copies the hidden states of the scored tokens ``first``, ``first + 1``, ... into the rows of a buffer, so that
    neither the strides of the input nor tokens that are not scored concern the kernel that multiplies.

    ``hidden``: [N, D] of any strides. ``rows``, ``count``: of `select_rows`. ``out``: [R, P] of the same dtype,
    contiguous, P = `padded_depth`. Columns from D on are zero, and rows for which there is no token. One launch."""
    room, padded = out.shape
    blocks = options("gather", hidden.device)
    gather_rows_kernel[(triton.cdiv(room, blocks["B_R"]), triton.cdiv(padded, blocks["B_D"]))](
        hidden, rows, count, out, first, room, hidden.shape[1], padded, *hidden.stride(), **blocks
    )
