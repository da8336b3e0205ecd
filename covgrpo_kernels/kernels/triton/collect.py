"""collect: the most probable entries of each row, found again after the forward from the peaks that it left.

    limits_kernel -> the least logit of each row that is collected
    count_kernel -> how many rows of each tile (of PEAK_WIDTH entries) have a peak that reaches it
    ends_kernel -> where the list of each tile ends, and its work items
    list_kernel -> the rows of each tile
    products_kernel -> the products of the listed (row, tile) pairs once more, and the entries that reach the limit

and with the whole of each row known,

    largest_kernel -> the largest of these entries, and the floor that follows

A policy's row has two to three such tiles of five hundred, so that the products are a small part of a forward: 0.13 to
0.31 ms for 8,192 tokens on an H200. What is collected costs the forward nothing but the peaks, and a forward without a
backward nothing at all.

**Floors.** A row keeps the K largest of its entries that reach the minimum that is asked for, as
`interface.Candidates.most_probable` does. Which these are is only known when they were collected, in some more room. So
in a row in which more than MAX_TILES peaks reach the minimum the limit rises until no more do: no row costs more than
MAX_TILES tiles of products, however flat it is, and the list of pairs has room for all. Both follow from the row's
logits alone, never from the order in which programs run.

**Rows that are left out.** The consumer has to compute such a row in full; its ``found`` is larger than the room. Those
are rows with more entries than room that reach the limit, and rows of which so many peaks are equal that no limit is
high enough: none of their products are made.

**Rounding.** A logit here is a sum of the same exact products as in the forward, in an order of its own. Each of the
two sums is within D eps sum_d |h_d w_d| of the true one, eps = 2^-23 (some sqrt(D) instead of D in practice), times
scale / temperature. So an entry that near to the minimum can be collected or missed, whichever side it was on in the
forward. Either makes a consistent row: whatever stands for the entries that were not collected is derived from those
that were, and an entry that was missed exceeds the floor by no more than that rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import interface
from . import configs
from .configs import architecture, describable, options
from .forward import check_operands, multiprocessors
from .numerics import inverse, logit, operand, slices_of, sort_rows

# Of `collect`.
LAUNCHES = 5


# Tiles whose products are made again for one row: a twentieth of the vocabulary's where that has 151,936 ids, for which
# a dense row makes three products each. On recorded states of a 135M model at temperature 1 (2.2 nats) a row has 58
# entries above the limit that follows, and one of a hundred more than 128; with 48 tiles one of five has.
MAX_TILES = 32
# Halvings of the interval in which a floor is sought. It is at most 32 nats wide, so that what is found is less than a
# hundredth of a nat too high.
_HALVINGS = tl.constexpr(12)


@triton.jit
def _peaks_that_reach(peaks, i_p, limit, wanted, n_tokens, tiles, B_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row how many peaks reach the limit, and the largest."""
    count = tl.zeros([B_T, i_p.shape[0]], tl.int32)
    largest = tl.full([B_T, i_p.shape[0]], float("-inf"), tl.float32)
    for o_t in range(0, tiles, B_T):
        i_t = o_t + tl.arange(0, B_T)
        o_b = i_t.to(tl.int64)[:, None] * n_tokens + i_p[None, :]
        m_b = (i_t < tiles)[:, None] & wanted[None, :]
        peak = tl.load(peaks + o_b, mask=m_b, other=float("-inf")).to(tl.float32)
        # What stands for a tile beyond the last would reach a limit of -inf.
        count += ((peak >= limit[None, :]) & m_b).to(tl.int32)
        largest = tl.maximum(largest, peak)
    return tl.sum(count, 0), tl.max(largest, 0)


@triton.jit(
    do_not_specialize=["n_tokens"],
    do_not_specialize_on_alignment=[
        "peaks", "place", "stats", "logprob_grad", "entropy_grad", "limits", "floors", "found",
    ],
)  # fmt: skip
def limits_kernel(  # type: ignore[no-untyped-def]
    peaks,  # [T, N] bfloat16
    place,  # [N] int32
    stats,  # [4, N]: logprob, entropy, maximum, log_sum
    logprob_grad,  # [N]
    entropy_grad,  # [N] or None
    limits,  # [N], by place: written; NaN, which nothing reaches, for rows that are left out
    floors,  # [N] by token: written, the logit of the smallest probability that is asked for or more
    found,  # [N] int32: written
    n_tokens,  # N
    tiles,  # T
    log_min_prob: tl.float64,
    ROOM: tl.constexpr,
    MAX_TILES: tl.constexpr,
    B_N: tl.constexpr,
    B_T: tl.constexpr,
):
    i_n = tl.program_id(0) * B_N + tl.arange(0, B_N)
    m_n = i_n < n_tokens
    i_p = tl.load(place + i_n, mask=m_n, other=-1)
    maximum = tl.load(stats + 2 * n_tokens + i_n, mask=m_n, other=0.0)
    log_sum = tl.load(stats + 3 * n_tokens + i_n, mask=m_n, other=0.0)
    limit = maximum + (log_sum + log_min_prob).to(maximum.dtype)
    has_grad = tl.load(logprob_grad + i_n, mask=m_n, other=0.0) != 0.0
    if entropy_grad is not None:
        has_grad = has_grad | (tl.load(entropy_grad + i_n, mask=m_n, other=0.0) != 0.0)
    limit = tl.where(has_grad, limit, float("inf"))
    wanted = (i_p >= 0) & (limit < float("inf"))
    pairs, largest = _peaks_that_reach(peaks, i_p, limit, wanted, n_tokens, tiles, B_T)
    is_flat = wanted & (pairs > MAX_TILES)
    if tl.max(is_flat.to(tl.int32), 0) > 0:
        high = largest.to(limit.dtype)
        low = tl.where(limit > high - 32.0, limit, high - 32.0)
        for _ in range(_HALVINGS):
            middle = low + (high - low) * 0.5
            pairs = _peaks_that_reach(peaks, i_p, middle, is_flat, n_tokens, tiles, B_T)[0]
            low = tl.where(pairs > MAX_TILES, middle, low)
            high = tl.where(pairs > MAX_TILES, high, middle)
        limit = tl.where(is_flat, high, limit)
        pairs = _peaks_that_reach(peaks, i_p, limit, wanted, n_tokens, tiles, B_T)[0]
    too_many = wanted & (pairs > MAX_TILES)
    tl.store(found + i_n, tl.where(too_many, ROOM + 1, 0), mask=m_n)
    tl.store(floors + i_n, limit, mask=m_n)
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


@triton.jit(do_not_specialize_on_alignment=["counts", "ends", "item_ends"])
def ends_kernel(  # type: ignore[no-untyped-def]
    counts,  # [T] int32
    ends,  # [T] int64: written, where the pairs of each tile end
    item_ends,  # [T] int32: written, likewise of work items of B_R pairs
    tiles,  # T
    B_R: tl.constexpr,
    B_T: tl.constexpr,
):
    pairs_before = tl.zeros([], tl.int64)
    items_before = tl.zeros([], tl.int32)
    for o_t in range(0, tiles, B_T):
        i_t = o_t + tl.arange(0, B_T)
        n = tl.load(counts + i_t, mask=i_t < tiles, other=0)
        items = tl.cdiv(n, B_R)
        tl.store(ends + i_t, pairs_before + tl.cumsum(n.to(tl.int64), 0), mask=i_t < tiles)
        tl.store(item_ends + i_t, items_before + tl.cumsum(items, 0), mask=i_t < tiles)
        pairs_before += tl.sum(n.to(tl.int64), 0)
        items_before += tl.sum(items, 0)


@triton.jit(
    do_not_specialize=["n_tokens"],
    do_not_specialize_on_alignment=["peaks", "limits", "rows", "count", "ends", "pairs"],
)
def list_kernel(  # type: ignore[no-untyped-def]
    peaks,  # [T, N] bfloat16
    limits,  # [N]
    rows,  # [N] int32
    count,  # [1] int32
    ends,  # [T] int64
    pairs,  # [MAX_TILES * N] int32: written, the token of each pair
    n_tokens,  # N
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
        tl.store(pairs + so_far + tl.cumsum(hit.to(tl.int32), 0) - 1, row, mask=hit)
        so_far += tl.sum(hit.to(tl.int32), 0)


@triton.jit
def _item(item, item_ends, ends, tiles, B_T: tl.constexpr, B_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile of a work item, where its pairs are in the list, and which of the places are in use."""
    all_tiles = tl.arange(0, B_T)
    all_ends = tl.load(item_ends + all_tiles, mask=all_tiles < tiles, other=2147483647)
    i_t = tl.sum((all_ends <= item).to(tl.int32), 0)
    first_item = tl.load(item_ends + i_t - 1, mask=i_t > 0, other=0)
    first_pair = tl.load(ends + i_t - 1, mask=i_t > 0, other=0)
    i_p = first_pair + (item - first_item) * B_R + tl.arange(0, B_R)
    return i_t, i_p, i_p < tl.load(ends + i_t)


@triton.jit
def _tile_products(  # type: ignore[no-untyped-def]
    hidden, weight, row, m_p, o_v, depth, vocab, row_stride, column_stride, weight_stride,
    ACCUMULATOR: tl.constexpr, B_V: tl.constexpr, B_D: tl.constexpr,
):  # fmt: skip
    """Of these rows with the B_V entries from ``o_v`` on."""
    i_v = (o_v + tl.arange(0, B_V)).to(tl.int64)
    x = tl.zeros([row.shape[0], B_V], ACCUMULATOR)
    for o_d in range(0, depth, B_D):
        i_d = o_d + tl.arange(0, B_D)
        m_d = (i_d < depth)[None, :]
        o_h = row[:, None] * row_stride + i_d.to(tl.int64)[None, :] * column_stride
        b_h = tl.load(hidden + o_h, mask=m_p[:, None] & m_d, other=0.0)
        if weight.dtype.is_ptr():
            o_w = i_v[:, None] * weight_stride + i_d[None, :]
            b_w = tl.load(weight + o_w, mask=(i_v < vocab)[:, None] & m_d, other=0.0)
        else:
            b_w = weight.load([o_v, o_d])
        x = tl.dot(operand(b_h), operand(b_w).T, x, input_precision="ieee", out_dtype=ACCUMULATOR)
    return x


@triton.jit
def _append(hit, row, i_s, z, found, vocab_ids, logits, ROOM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries behind those that the rows have. Which entry of a row comes first depends on the order of programs."""
    rows = tl.broadcast_to(row[:, None], hit.shape)
    at = tl.atomic_add(found + rows, 1, mask=hit, sem="relaxed")
    fits = hit & (at < ROOM)
    o_k = rows.to(tl.int64) * ROOM + at
    tl.store(vocab_ids + o_k, tl.broadcast_to(i_s[None, :], hit.shape), mask=fits)
    tl.store(logits + o_k, z, mask=fits)


@triton.jit(
    do_not_specialize=["tiles"],
    do_not_specialize_on_alignment=[
        "temperature", "limits", "ends", "item_ends", "pairs", "found", "vocab_ids", "logits",
    ],
)  # fmt: skip
def products_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]
    weight,  # [V, D], or its descriptor with blocks [B_V, B_D]
    bias,  # [V] or None
    temperature,  # [N] or None
    limits,  # [N] by token
    ends,  # [T] int64
    item_ends,  # [T] int32
    pairs,  # [MAX_TILES * N] int32
    found,  # [N] int32: updated
    vocab_ids,  # [N, ROOM] int32: written
    logits,  # [N, ROOM]: written
    tiles,  # T
    depth,  # D
    vocab,  # V
    row_stride,
    column_stride,
    weight_stride,
    ROOM: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    B_T: tl.constexpr,  # at least T
    B_R: tl.constexpr,
    B_V: tl.constexpr,  # entries of a tile
    B_D: tl.constexpr,
    SLICES: tl.constexpr,
):
    ACCUMULATOR: tl.constexpr = logits.dtype.element_ty
    B_S: tl.constexpr = B_V // SLICES
    items = tl.load(item_ends + tiles - 1)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Found anew for each item: registers are dear here.
        i_t, i_p, m_p = _item(item, item_ends, ends, tiles, B_T, B_R)
        row = tl.load(pairs + i_p, mask=m_p, other=0).to(tl.int64)
        o_v = i_t * B_V
        x = _tile_products(
            hidden, weight, row, m_p, o_v, depth, vocab, row_stride, column_stride, weight_stride,
            ACCUMULATOR, B_V, B_D,
        )  # fmt: skip
        slices = slices_of(x, SLICES)
        for i in tl.static_range(SLICES):
            i_s = o_v + i * B_S + tl.arange(0, B_S)
            m_s = i_s < vocab
            # What belongs to the rows is loaded anew for each slice, too.
            row = tl.load(pairs + i_p, mask=m_p, other=0)
            limit = tl.load(limits + row, mask=m_p, other=float("inf"))
            if temperature is not None:
                t = tl.load(temperature + row, mask=m_p, other=1.0).to(ACCUMULATOR)
                per_temperature = inverse(t)[:, None]
            else:
                per_temperature = None
            b = tl.load(bias + i_s, mask=m_s, other=0.0).to(ACCUMULATOR)[None, :] if bias is not None else None
            z, _ = logit(slices[i], b, per_temperature, SCALE, CAP)
            hit = (z >= limit[:, None]) & m_p[:, None] & m_s[None, :]
            if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
                _append(hit, row, i_s, z, found, vocab_ids, logits, ROOM)


@triton.jit
def _rank(z):  # type: ignore[no-untyped-def]
    """Integers in the order of float32 numbers."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _of_rank(rank):  # type: ignore[no-untyped-def]
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["found", "vocab_ids", "logits", "floors", "largest_ids", "largest_logits"],
)
def largest_kernel(  # type: ignore[no-untyped-def]
    found,  # [N] int32: updated
    vocab_ids,  # [N, ROOM] int32
    logits,  # [N, ROOM] float32
    floors,  # [N]: updated
    largest_ids,  # [N, K] int32: written
    largest_logits,  # [N, K]: written
    n_rows,  # N
    ROOM: tl.constexpr,
    K: tl.constexpr,
    B_R: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    m_r = i_r < n_rows
    n_found = tl.load(found + i_r, mask=m_r, other=0)
    n = tl.where(n_found <= ROOM, n_found, 0)
    i_k = tl.arange(0, ROOM)[None, :]
    m_k = i_k < n[:, None]
    o_k = i_r[:, None] * ROOM + i_k
    v = tl.load(vocab_ids + o_k, mask=m_k, other=0)
    z = tl.load(logits + o_k, mask=m_k, other=0.0)
    # Descending, places that are not in use last. Ids are distinct within a row, so that equal logits have one order.
    key = ((-1 - _rank(z)).to(tl.int64) << 32) | v.to(tl.int64)
    key = sort_rows(tl.where(m_k, key, 0x7FFFFFFFFFFFFFFF))
    rank = -1 - (key >> 32).to(tl.int32)
    # Entries that are equal to the first that goes go, too.
    next_largest = tl.sum(tl.where(i_k == K, rank, 0), 1)
    has_more = n > K
    m_k = m_k & (i_k < K) & ((rank > next_largest[:, None]) | (has_more == 0)[:, None])
    z = _of_rank(rank)
    tl.store(largest_ids + i_r[:, None] * K + i_k, (key & 0x7FFFFFFF).to(tl.int32), mask=m_r[:, None] & m_k)
    tl.store(largest_logits + i_r[:, None] * K + i_k, z, mask=m_r[:, None] & m_k)
    count = tl.sum(m_k.to(tl.int32), 1)
    # In the middle of the gap, where rounding moves no logit to the other side.
    above = _of_rank(next_largest + 1)
    smallest = -tl.max(tl.where(m_k, -z, float("-inf")), 1)
    floor = tl.where(count > 0, above + (smallest - above) * 0.5, above)
    tl.store(floors + i_r, floor, mask=m_r & has_more)
    tl.store(found + i_r, tl.where(n_found <= ROOM, count, K + 1), mask=m_r)


def collect(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    rows: Tensor,
    place: Tensor,
    count: Tensor,
    peaks: Tensor,
    stats: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    room: int,
    *,
    min_prob: float,
    scale: float,
    softcap: float | None,
    max_tiles: int = MAX_TILES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each scored row the entries of the vocabulary whose logit reaches the row's floor.

    ``hidden``, ``weight``, ``bias``, ``temperature``, ``scale``, ``softcap``: of the forward. ``rows``, ``place``,
    ``count``, ``peaks``, ``stats``: what the forward returned. ``logprob_grad``, ``entropy_grad``: [N] of the dtype of
    ``stats``; nothing is wanted of rows in which both are zero. ``room``: entries that a row has room for.
    ``min_prob``: the probability that an entry has to reach. ``max_tiles``: of one row that are collected from.

    Returns ``(found, vocab_ids, logits, floors)``:

    - ``found`` [N] int32: entries that reach the floor. More than ``room`` where they are more, and where the row was
      left out (see above): such a row has to be dense, and nothing stands in the next two of it.
    - ``vocab_ids`` [N, room] int32, ``logits`` [N, room] float32 (float64): of the first ``found`` places of each row,
      in an order that is **not** the same in every run (tiles come in any order): sort a row by its vocab_ids before
      its entries are added up. Other places are undefined.
    - ``floors`` [N] of the dtype of ``stats``: the logit of ``min_prob``, or more where a row is so flat that it would
      take too many tiles; +inf for rows of which nothing is wanted.

    `LAUNCHES` kernels, nothing else runs on the device, and the host waits for nothing. Raises what `check_operands`
    does, ValueError for peaks of another vocabulary."""
    check_operands(hidden, weight)
    device, tokens, (vocab, depth) = hidden.device, len(hidden), weight.shape
    tiles = triton.cdiv(vocab, interface.PEAK_WIDTH)
    if peaks.shape != (tiles, tokens):
        raise ValueError(f"peaks must be of shape {(tiles, tokens)}, got {tuple(peaks.shape)}")
    found, vocab_ids, logits = (
        torch.empty(tokens, dtype=torch.int32, device=device),
        torch.empty(tokens, room, dtype=torch.int32, device=device),
        torch.empty(tokens, room, dtype=stats.dtype, device=device),
    )
    name = architecture(device)
    blocks = dict(configs.COLLECT[name][hidden.itemsize])
    limits, floors = torch.empty(2, tokens, dtype=stats.dtype, device=device)
    counts, item_ends = torch.empty(2, tiles, dtype=torch.int32, device=device)
    ends = torch.empty(tiles, dtype=torch.int64, device=device)
    pairs = torch.empty(max_tiles * tokens, dtype=torch.int32, device=device)
    of_limits = options("limits", device)
    limits_kernel[(triton.cdiv(tokens, of_limits["B_N"]),)](
        peaks, place, stats, logprob_grad, entropy_grad, limits, floors, found, tokens, tiles, math.log(min_prob),
        ROOM=room, MAX_TILES=max_tiles, **of_limits,
    )  # fmt: skip
    if not tiles:
        return found, vocab_ids, logits, floors
    count_kernel[(tiles,)](peaks, limits, count, counts, tokens, **options("count", device))
    ends_kernel[(1,)](counts, ends, item_ends, tiles, B_R=blocks["B_R"], **options("ends", device))
    list_kernel[(tiles,)](peaks, limits, rows, count, ends, pairs, tokens, **options("list", device))
    head: Any = weight
    if blocks.pop("DESCRIPTORS") and describable(weight):
        head = TensorDescriptor.from_tensor(weight, [interface.PEAK_WIDTH, blocks["B_D"]])
    # How many items there are is not known here: programs enough to keep every multiprocessor busy share them.
    products_kernel[(2 * multiprocessors(device),)](
        hidden, head, bias, temperature, floors, ends, item_ends, pairs, found, vocab_ids, logits,
        tiles, depth, vocab, *hidden.stride(), weight.stride(0),
        ROOM=room, SCALE=scale, CAP=softcap, B_T=triton.next_power_of_2(tiles), B_V=interface.PEAK_WIDTH, **blocks,
    )  # fmt: skip
    return found, vocab_ids, logits, floors


def largest(
    found: Tensor, vocab_ids: Tensor, logits: Tensor, floors: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of what `collect` returned, with logits in float32 and room for a power of two of them, at most the ``count``
    largest of each row and the floor that is left: `interface.Candidates.most_probable` but for the order. ``found``
    and ``floors`` are updated in place. Ids and logits are new, [N, count]; places from ``found`` on are undefined, and
    so are those of rows that were left out, in which ``found`` is more than ``count``. One launch."""
    tokens, room = vocab_ids.shape
    ids, z = vocab_ids.new_empty(tokens, count), logits.new_empty(tokens, count)
    blocks = options("largest", found.device)
    largest_kernel[(triton.cdiv(tokens, blocks["B_R"]),)](
        found, vocab_ids, logits, floors, ids, z, tokens, ROOM=room, K=count, **blocks
    )
    return found, ids, z, floors
