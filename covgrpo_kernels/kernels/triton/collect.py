"""collect: the entries of each row that reach a logit, found again after the forward from the peaks that it left.

    limits_kernel -> the least logit of each row that can be collected, how many entries were found so far
    count_kernel -> how many rows of each tile (of PEAK_WIDTH entries) have a peak that reaches it
    ends_kernel -> where the list of each tile ends, and its work items
    list_kernel -> the rows of each tile
    products_kernel -> the products of the listed (row, tile) pairs once more, and the entries that reach the limit

A policy's row has two to three such tiles of five hundred, so that the products are a small part of a forward: 0.13 to
0.31 ms for 8,192 tokens on an H200. What is collected costs the forward nothing but the peaks, and a forward without a
backward nothing at all.

**Rows that are left out.** The consumer has to compute such a row in full; its ``found`` is larger than K.
A row has room for K entries. Where its peaks reach its limit in more than K tiles, it needs more (or nearly: peaks are
rounded up), and none of its products are made. So no row costs more than K tiles of products, however flat it is.
The list of pairs has room for `pairs_room` of them. Tiles are listed from left to right and the rows of a tile in
order; rows with a pair that no longer fits are left out. Both follow from the inputs alone, never from the order in
which programs run.

**Rounding.** A logit here is a sum of the same exact products as in the forward, in an order of its own. Each of the
two sums is within D eps sum_d |h_d w_d| of the true one, eps = 2^-23 (some sqrt(D) instead of D in practice), times
scale / temperature. So an entry that near to its limit can be collected or missed, whichever side it was on in the
forward. Either makes a consistent row: whatever stands for the entries that were not collected is derived from those
that were, and an entry that was missed exceeds the limit by no more than that rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .configs import architecture, describable, options
from .forward import accumulator_of, check_operands, multiprocessors, upcast
from .numerics import inverse, logit, slices_of

LAUNCHES = 5


def pairs_room(tokens: int) -> int:
    """(row, tile) pairs that there is room for, 4 bytes each."""
    return 32 * tokens + 8192


@triton.jit(
    do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["peaks", "place", "min_logits", "limits", "found"]
)
def limits_kernel(  # type: ignore[no-untyped-def]
    peaks,  # [T, N] bfloat16
    place,  # [N] int32
    min_logits,  # [N]
    limits,  # [N], by place: written; NaN, which nothing reaches, for rows that are left out
    found,  # [N] int32: written
    n_tokens,  # N
    tiles,  # T
    K: tl.constexpr,
    B_N: tl.constexpr,
    B_T: tl.constexpr,
):
    i_n = tl.program_id(0) * B_N + tl.arange(0, B_N)
    m_n = i_n < n_tokens
    i_p = tl.load(place + i_n, mask=m_n, other=-1)
    limit = tl.load(min_logits + i_n, mask=m_n, other=float("inf"))
    wanted = (i_p >= 0) & (limit < float("inf"))
    pairs = tl.zeros([B_T, B_N], tl.int32)
    for o_t in range(0, tiles, B_T):
        i_t = o_t + tl.arange(0, B_T)
        o_b = i_t.to(tl.int64)[:, None] * n_tokens + i_p[None, :]
        peak = tl.load(peaks + o_b, mask=(i_t < tiles)[:, None] & wanted[None, :], other=float("-inf"))
        # What stands for a tile beyond the last would reach a limit of -inf.
        pairs += ((peak.to(tl.float32) >= limit[None, :]) & (i_t < tiles)[:, None]).to(tl.int32)
    too_many = wanted & (tl.sum(pairs, 0) > K)
    tl.store(found + i_n, tl.where(too_many, K + 1, 0), mask=m_n)
    tl.store(limits + i_p, tl.where(wanted & ~too_many, limit, float("nan")), mask=i_p >= 0)


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["peaks", "limits", "count", "counts"])
def count_kernel(  # type: ignore[no-untyped-def]
    peaks,  # [T, N] bfloat16
    limits,  # [N]
    count,  # [1] int32: scored rows
    counts,  # [T] int32: written
    n_tokens,  # N
    B_R: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    n_rows = tl.load(count)
    pairs = tl.zeros([B_R], tl.int32)
    for o_r in range(0, n_rows, B_R):
        i_r = o_r + tl.arange(0, B_R)
        m_r = i_r < n_rows
        peak = tl.load(peaks + i_t * n_tokens + i_r, mask=m_r, other=0.0).to(tl.float32)
        pairs += (peak >= tl.load(limits + i_r, mask=m_r, other=float("nan"))).to(tl.int32)
    tl.store(counts + i_t, tl.sum(pairs, 0))


@triton.jit(do_not_specialize=["room"], do_not_specialize_on_alignment=["counts", "ends", "item_ends"])
def ends_kernel(  # type: ignore[no-untyped-def]
    counts,  # [T] int32
    ends,  # [T] int64: written, where the pairs of each tile end, room or not
    item_ends,  # [T] int32: written, likewise of work items of B_R listed pairs
    tiles,  # T
    room,
    B_R: tl.constexpr,
    B_T: tl.constexpr,
):
    pairs_before = tl.zeros([], tl.int64)
    items_before = tl.zeros([], tl.int32)
    for o_t in range(0, tiles, B_T):
        i_t = o_t + tl.arange(0, B_T)
        n = tl.load(counts + i_t, mask=i_t < tiles, other=0).to(tl.int64)
        end = pairs_before + tl.cumsum(n, 0)
        listed = tl.minimum(end, room) - tl.minimum(end - n, room)
        items = tl.cdiv(listed.to(tl.int32), B_R)
        tl.store(ends + i_t, end, mask=i_t < tiles)
        tl.store(item_ends + i_t, items_before + tl.cumsum(items, 0), mask=i_t < tiles)
        pairs_before += tl.sum(n, 0)
        items_before += tl.sum(items, 0)


@triton.jit(
    do_not_specialize=["n_tokens", "room"],
    do_not_specialize_on_alignment=["peaks", "limits", "rows", "count", "ends", "pairs", "found"],
)
def list_kernel(  # type: ignore[no-untyped-def]
    peaks,  # [T, N] bfloat16
    limits,  # [N]
    rows,  # [N] int32
    count,  # [1] int32
    ends,  # [T] int64
    pairs,  # [room] int32: written, the token of each pair
    found,  # [N] int32: updated
    n_tokens,  # N
    room,
    K: tl.constexpr,
    B_R: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    n_rows = tl.load(count)
    so_far = tl.load(ends + i_t - 1, mask=i_t > 0, other=0)
    for o_r in range(0, n_rows, B_R):
        i_r = o_r + tl.arange(0, B_R)
        m_r = i_r < n_rows
        peak = tl.load(peaks + i_t * n_tokens + i_r, mask=m_r, other=0.0).to(tl.float32)
        hit = peak >= tl.load(limits + i_r, mask=m_r, other=float("nan"))
        row = tl.load(rows + i_r, mask=hit, other=0)
        at = so_far + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(pairs + at, row, mask=hit & (at < room))
        tl.store(found + row, K + 1, mask=hit & (at >= room))
        so_far += tl.sum(hit.to(tl.int32), 0)


@triton.jit(
    do_not_specialize=["room", "tiles"],
    do_not_specialize_on_alignment=[
        "temperature", "min_logits", "ends", "item_ends", "pairs", "found", "vocab_ids", "logits",
    ],
)  # fmt: skip
def products_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]
    weight,  # [V, D], or its descriptor with blocks [B_V, B_D]
    bias,  # [V] or None
    temperature,  # [N] or None
    min_logits,  # [N]
    ends,  # [T] int64
    item_ends,  # [T] int32
    pairs,  # [room] int32
    found,  # [N] int32: updated
    vocab_ids,  # [N, K] int32: written
    logits,  # [N, K]: written
    tiles,  # T
    room,
    depth,  # D
    vocab,  # V
    row_stride,
    column_stride,
    weight_stride,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    B_T: tl.constexpr,  # at least T
    B_R: tl.constexpr,
    B_V: tl.constexpr,  # entries of a tile
    B_D: tl.constexpr,
    SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    B_S: tl.constexpr = B_V // SLICES
    items = tl.load(item_ends + tiles - 1)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Loaded anew for each item: registers are dear here.
        all_tiles = tl.arange(0, B_T)
        all_ends = tl.load(item_ends + all_tiles, mask=all_tiles < tiles, other=2147483647)
        i_t = tl.sum((all_ends <= item).to(tl.int32), 0)
        first_item = tl.load(item_ends + i_t - 1, mask=i_t > 0, other=0)
        first_pair = tl.load(ends + i_t - 1, mask=i_t > 0, other=0)
        end = tl.minimum(tl.load(ends + i_t), room)
        i_p = first_pair + (item - first_item) * B_R + tl.arange(0, B_R)
        m_p = i_p < end
        row = tl.load(pairs + i_p, mask=m_p, other=0).to(tl.int64)
        o_v = i_t * B_V
        i_v = (o_v + tl.arange(0, B_V)).to(tl.int64)
        x = tl.zeros([B_R, B_V], ACCUMULATOR)
        for o_d in range(0, depth, B_D):
            i_d = o_d + tl.arange(0, B_D)
            m_d = (i_d < depth)[None, :]
            o_h = row[:, None] * row_stride + i_d.to(tl.int64)[None, :] * column_stride
            b_h = tl.load(hidden + o_h, mask=m_p[:, None] & m_d, other=0.0)
            if DESCRIPTORS:
                b_w = weight.load([o_v, o_d])
            else:
                o_w = i_v[:, None] * weight_stride + i_d[None, :]
                b_w = tl.load(weight + o_w, mask=(i_v < vocab)[:, None] & m_d, other=0.0)
            if UPCAST:
                b_h, b_w = b_h.to(tl.float32), b_w.to(tl.float32)
            x = tl.dot(b_h, b_w.T, x, input_precision="ieee", out_dtype=ACCUMULATOR)

        slices = slices_of(x, SLICES)
        for i in tl.static_range(SLICES):
            i_s = o_v + i * B_S + tl.arange(0, B_S)
            m_s = i_s < vocab
            # What belongs to the rows is loaded anew for each slice, too.
            row = tl.load(pairs + i_p, mask=m_p, other=0)
            limit = tl.load(min_logits + row, mask=m_p, other=float("inf"))
            if temperature is not None:
                t = tl.load(temperature + row, mask=m_p, other=1.0).to(ACCUMULATOR)
                per_temperature = inverse(t)[:, None]
            else:
                per_temperature = None
            b = tl.load(bias + i_s, mask=m_s, other=0.0).to(ACCUMULATOR)[None, :] if bias is not None else None
            z, _ = logit(slices[i], b, per_temperature, SCALE, CAP)
            hit = (z >= limit[:, None]) & m_p[:, None] & m_s[None, :]
            if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
                # Which entry of a row comes first depends on the order of programs.
                rows = tl.broadcast_to(row[:, None], B_R, B_S)
                at = tl.atomic_add(found + rows, 1, mask=hit, sem="relaxed")
                fits = hit & (at < K)
                o_k = rows.to(tl.int64) * K + at
                tl.store(vocab_ids + o_k, tl.broadcast_to(i_s[None, :], B_R, B_S), mask=fits)
                tl.store(logits + o_k, z, mask=fits)


def collect(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor,
    place: Tensor,
    count: Tensor,
    peaks: Tensor,
    min_logits: Tensor,
    capacity: int,
    *,
    scale: float,
    softcap: float | None,
    room: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each scored row the entries of the vocabulary whose logit reaches the row's minimum.

    ``hidden``, ``weight``, ``bias``, ``temperature``, ``scale``, ``softcap``: of the forward. ``rows``, ``place``,
    ``count``, ``peaks``: what the forward returned. ``min_logits``: [N] float32 (float64 for float64 inputs) by token,
    +inf for rows of which nothing is wanted; NaN is taken for +inf. ``capacity``: K, entries that a row has room for.
    ``room``: of the list of pairs; None is `pairs_room`.

    Returns ``(found, vocab_ids, logits)``:

    - ``found`` [N] int32: entries that reach the minimum. More than K where they are more, and where the row was left
      out (see above): such a row has to be dense, and nothing stands in the next two of it.
    - ``vocab_ids`` [N, K] int32, ``logits`` [N, K] float32 (float64): of the first ``found`` places of each row, in an
      order that is **not** the same in every run (tiles come in any order): sort a row by its vocab_ids before its
      entries are added up. Other places are undefined.

    `LAUNCHES` kernels, nothing else runs on the device, and the host waits for nothing. Raises what `check_operands`
    does, ValueError for peaks of another vocabulary."""
    check_operands(hidden, weight)
    device, tokens, (vocab, depth) = hidden.device, len(hidden), weight.shape
    tiles = triton.cdiv(vocab, configs.PEAK_WIDTH)
    if peaks.shape != (tiles, tokens):
        raise ValueError(f"peaks must be of shape {(tiles, tokens)}, got {tuple(peaks.shape)}")
    found, vocab_ids, logits = (
        torch.empty(tokens, dtype=torch.int32, device=device),
        torch.empty(tokens, capacity, dtype=torch.int32, device=device),
        torch.empty(tokens, capacity, dtype=min_logits.dtype, device=device),
    )
    name = architecture(device)
    blocks = configs.COLLECT[name][hidden.itemsize]
    room = pairs_room(tokens) if room is None else room
    limits = torch.empty_like(min_logits)
    counts, item_ends = torch.empty(2, tiles, dtype=torch.int32, device=device)
    ends = torch.empty(tiles, dtype=torch.int64, device=device)
    pairs = torch.empty(room, dtype=torch.int32, device=device)
    of_limits = options("limits", device)
    limits_kernel[(triton.cdiv(tokens, of_limits["B_N"]),)](
        peaks, place, min_logits, limits, found, tokens, tiles, K=capacity, **of_limits
    )
    if not tiles:
        return found, vocab_ids, logits
    count_kernel[(tiles,)](peaks, limits, count, counts, tokens, **options("count", device))
    ends_kernel[(1,)](counts, ends, item_ends, tiles, room, B_R=blocks["B_R"], **options("ends", device))
    list_kernel[(tiles,)](
        peaks, limits, rows, count, ends, pairs, found, tokens, room, K=capacity, **options("list", device)
    )
    descriptors = bool(blocks["DESCRIPTORS"]) and describable(weight)
    operand: Any = weight
    if descriptors:
        operand = TensorDescriptor.from_tensor(weight, [configs.PEAK_WIDTH, blocks["B_D"]])
    # How many items there are is not known here: programs enough to keep every multiprocessor busy share them.
    products_kernel[(2 * multiprocessors(device),)](
        hidden, operand, bias, temperature, min_logits, ends, item_ends, pairs, found, vocab_ids, logits,
        tiles, room, depth, vocab, *hidden.stride(), weight.stride(0),
        K=capacity, SCALE=scale, CAP=softcap, ACCUMULATOR=accumulator_of(hidden.dtype), UPCAST=upcast(hidden.dtype),
        B_T=triton.next_power_of_2(tiles), B_V=configs.PEAK_WIDTH, **(blocks | dict(DESCRIPTORS=descriptors)),
    )  # fmt: skip
    return found, vocab_ids, logits
