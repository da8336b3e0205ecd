"""forward: log-probs and entropies of all tokens by one persistent matrix product that folds its own results, so that
logits never leave the multiprocessor.

    select_rows -> rows, place, count          which tokens are scored
    gather_rows -> a contiguous buffer         their hidden states
    forward_kernel -> partial statistics       of each row and each split of the vocabulary, and the peaks
    merge_kernel -> statistics of all tokens

The last three run once for every chunk of rows. The forward kernel was measured on an H200 as a prototype with the same
blocks: 1.02 to 1.09 times the time of the bare product at a depth of 4096, 1.36 to 1.42 times at 896, where a product
that writes its logits and a second kernel that reads them took 1.32 and 1.84 times.

A row's bits depend neither on the rows it shares a batch with nor on the chunks: each row is the same sum over the
depth, block after block, folded tile after tile within a split of the vocabulary, and merged over all splits at once.

**Peaks.** Where a backward may follow, the kernel also leaves the largest logit of every row and every
`PEAK_WIDTH` = 256 entries of the vocabulary, as bfloat16 that is never below it. `collect` finds the probable entries
of each row from these. Noting these entries here, before the normaliser of the row is known, made the kernel 30 to 100%
slower.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import interface
from ..interface import NO_MAX
from . import configs
from .configs import architecture, describable, options
from .numerics import (
    inverse,
    log1p,
    logit,
    online_softmax_block_with_maximum,
    operand,
    round_up_to_bfloat16,
    slices_of,
)
from .select_rows import gather_rows, padded_depth, select_rows

_NO_MAX = tl.constexpr(NO_MAX)

# Where programs stay on their multiprocessor and take one work item after the other; elsewhere there is a program for
# every item.
_PERSISTENT = ("sm_90", "sm_100", "interpreter")
# Row blocks that are worked on together, one split after the other: their hidden states (16 MiB at a depth of 4096)
# and the weights of the splits at hand have to stay in the L2 cache. 16 were as fast as 8 and 32, or faster.
_GROUP = tl.constexpr(16)
# Of gathered hidden states and partial statistics together. What more rows would gain is one launch of each kernel.
WORKSPACE_BYTES = 128 << 20


def traffic(rows: int, depth: int, vocab: int, itemsize: int) -> tuple[int, int, int]:
    """(bytes read, bytes written, floating-point operations) at least: inputs once, statistics once. Statistics of
    the splits are left out: there are 16 bytes a row and split, which the merge finds in the L2 cache."""
    return (rows + vocab) * depth * itemsize + rows * 8, rows * 4 * max(itemsize, 4), 2 * rows * depth * vocab


@triton.jit
def _work_item(item, row_blocks, splits):  # type: ignore[no-untyped-def]
    """Row block and split of the vocabulary: the row blocks of a group go through a split together."""
    first_block = item // (splits * _GROUP) * _GROUP
    in_group = item % (splits * _GROUP)
    group = tl.minimum(row_blocks - first_block, _GROUP)
    return first_block + in_group % group, in_group // group


@triton.jit
def _tiles_of_split(split, splits, vocab, B_P: tl.constexpr, B_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first tile and the one after the last. Splits begin where a peak does, so that each peak is of one program,
    whatever the width of its tiles."""
    units = tl.cdiv(vocab, B_P)
    first_unit = split * (units // splits) + tl.minimum(split, units % splits)
    end_unit = first_unit + units // splits + (split < units % splits).to(tl.int32)
    return first_unit * (B_P // B_V), tl.minimum(end_unit * (B_P // B_V), tl.cdiv(vocab, B_V))


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x, hidden, weight, o_r, n_rows, o_v, depth, vocab, hidden_stride, weight_stride, B_D: tl.constexpr
):
    """x [B_R, B_V] + hidden[o_r:] @ weight[o_v:].T, summed over the depth from left to right."""
    for o_d in range(0, depth, B_D):
        if hidden.dtype.is_ptr():
            i_r = o_r.to(tl.int64) + tl.arange(0, x.shape[0])
            i_v = (o_v + tl.arange(0, x.shape[1])).to(tl.int64)
            i_d = o_d + tl.arange(0, B_D)
            m_d = (i_d < depth)[None, :]
            o_h = i_r[:, None] * hidden_stride + i_d[None, :]
            o_w = i_v[:, None] * weight_stride + i_d[None, :]
            b_h = tl.load(hidden + o_h, mask=(i_r < n_rows)[:, None] & m_d, other=0.0)
            b_w = tl.load(weight + o_w, mask=(i_v < vocab)[:, None] & m_d, other=0.0)
        else:
            b_h = hidden.load([o_r, o_d])
            b_w = weight.load([o_v, o_d])
        x = tl.dot(operand(b_h), operand(b_w).T, x, input_precision="ieee", out_dtype=x.dtype)
    return x


@triton.jit
def _fold_tile(  # type: ignore[no-untyped-def]
    x, o_v, running, y, bias, per_temperature, vocab,
    SCALE: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The running softmax, the target's logit and the peak of each row with the logits of a tile, slice by slice."""
    B_S: tl.constexpr = x.shape[1] // SLICES
    m, s, u, target, peak = running
    slices = slices_of(x, SLICES)
    for i in tl.static_range(SLICES):
        o_s = o_v + i * B_S
        i_s = o_s + tl.arange(0, B_S)
        m_s = i_s < vocab
        b = tl.load(bias + i_s, mask=m_s, other=0.0).to(x.dtype)[None, :] if bias is not None else None
        z, _ = logit(slices[i], b, per_temperature, SCALE, CAP)
        z = tl.where(m_s[None, :], z, float("-inf"))
        here = (y >= o_s) & (y < o_s + B_S)
        # Most slices have no row's target. The branch also keeps the compiler from interleaving slices, for which the
        # registers do not suffice.
        if tl.max(here.to(tl.int32), 0) > 0:
            z_y = tl.sum(tl.where(i_s[None, :] == y[:, None], z, 0.0), 1)
            target = tl.where(here, z_y, target)
        largest = tl.max(z, 1)
        peak = tl.maximum(peak, largest)
        m, s, u = online_softmax_block_with_maximum(z, largest, m, s, u, ENTROPY)
    return m, s, u, target, peak


@triton.jit(
    do_not_specialize=["first", "room", "n_tokens", "splits"],
    do_not_specialize_on_alignment=["targets", "temperature", "rows", "count", "partial", "peaks"],
)
def forward_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [R, P] gathered, or its descriptor with blocks [B_R, B_D]
    weight,  # [V, D], or, where hidden is described, its descriptor with blocks [B_V, B_D]
    bias,  # [V] or None
    targets,  # [N] int64
    temperature,  # [N] or None
    rows,  # [N] int32: the token of each scored row
    count,  # [1] int32: scored rows
    partial,  # [3 or 4, S, R]: maximum, total, target and with ENTROPY moment of each split of the vocabulary
    peaks,  # [V / B_P, N] bfloat16 or None
    first,  # the scored row that is the buffer's first
    room,  # R
    n_tokens,  # N
    depth,  # D
    vocab,  # V
    splits,  # S, at most V / B_P
    hidden_stride,  # P
    weight_stride,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    B_P: tl.constexpr,  # entries that share a peak: a multiple of B_V
    B_R: tl.constexpr,
    B_V: tl.constexpr,
    B_D: tl.constexpr,
    SLICES: tl.constexpr,
):
    ACCUMULATOR: tl.constexpr = partial.dtype.element_ty
    TILES: tl.constexpr = B_P // B_V
    n_rows = tl.minimum(room, tl.load(count) - first)
    row_blocks = tl.cdiv(tl.maximum(n_rows, 0), B_R)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _work_item(item, row_blocks, splits)
        o_r = row_block * B_R
        i_r = o_r.to(tl.int64) + tl.arange(0, B_R)
        m_r = i_r < n_rows
        row = tl.load(rows + first + i_r, mask=m_r, other=0)
        y = tl.load(targets + row, mask=m_r, other=-1)
        y = tl.where((y >= 0) & (y < vocab), y, -1).to(tl.int32)
        if temperature is not None:
            t = tl.load(temperature + row, mask=m_r, other=1.0).to(ACCUMULATOR)
            per_temperature = inverse(t)[:, None]
        else:
            per_temperature = None

        m = tl.full([B_R], _NO_MAX, ACCUMULATOR)
        s = tl.zeros([B_R], ACCUMULATOR)
        u = tl.zeros([B_R], ACCUMULATOR)
        target = tl.full([B_R], float("nan"), ACCUMULATOR)
        peak = tl.full([B_R], float("-inf"), ACCUMULATOR)
        first_tile, end_tile = _tiles_of_split(split, splits, vocab, B_P, B_V)
        for tile in range(first_tile, end_tile):
            o_v = tile * B_V
            x = tl.zeros([B_R, B_V], ACCUMULATOR)
            x = _products(x, hidden, weight, o_r, n_rows, o_v, depth, vocab, hidden_stride, weight_stride, B_D)
            m, s, u, target, peak = _fold_tile(
                x, o_v, (m, s, u, target, peak), y, bias, per_temperature, vocab, SCALE, CAP, ENTROPY, SLICES
            )
            if peaks is not None:
                o_p = (tile // TILES) * n_tokens.to(tl.int64) + first + i_r
                # Of several tiles that share a peak the last one leaves it.
                last = (tile % TILES == TILES - 1) | (tile == end_tile - 1)
                tl.store(peaks + o_p, round_up_to_bfloat16(peak), mask=m_r & last)
                peak = tl.where(last, float("-inf"), peak)

        o_b = split.to(tl.int64) * room + i_r
        plane = splits.to(tl.int64) * room
        tl.store(partial + o_b, m, mask=m_r)
        tl.store(partial + plane + o_b, s, mask=m_r)
        tl.store(partial + 2 * plane + o_b, target, mask=m_r)
        if ENTROPY:
            tl.store(partial + 3 * plane + o_b, u, mask=m_r)


@triton.jit(
    do_not_specialize=["first", "room", "n_tokens", "splits"],
    do_not_specialize_on_alignment=["partial", "place", "stats"],
)
def merge_kernel(  # type: ignore[no-untyped-def]
    partial,  # [3 or 4, S, R]
    place,  # [N] int32
    stats,  # [4, N]
    first,
    room,  # R
    n_tokens,  # N
    splits,  # S
    ENTROPY: tl.constexpr,
    B_R: tl.constexpr,
    B_S: tl.constexpr,  # at least S
):
    i_n = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    m_n = i_n < n_tokens
    i_p = tl.load(place + i_n, mask=m_n, other=-1)
    i_r = i_p - first
    m_r = (i_p >= first) & (i_r < room)
    i_s = tl.arange(0, B_S)[:, None]
    m_b = (i_s < splits) & m_r[None, :]
    o_b = i_s.to(tl.int64) * room + i_r[None, :]
    plane = splits.to(tl.int64) * room
    mb = tl.load(partial + o_b, mask=m_b, other=_NO_MAX)
    sb = tl.load(partial + plane + o_b, mask=m_b, other=0.0)
    target_b = tl.load(partial + 2 * plane + o_b, mask=m_b, other=float("nan"))

    m = tl.max(mb, 0)
    gap = m[None, :] - mb
    w = tl.where(m_b, tl.exp(-gap), 0.0)
    at_max = m_b & (gap == 0.0)
    # The maxima join the sum of the others, all but one of those that are the largest.
    ties = tl.sum(at_max.to(mb.dtype), 0) - 1.0
    s = tl.where(m_r, tl.sum(w * sb + tl.where(at_max, 0.0, w), 0) + ties, 0.0)
    # One split at most has the target.
    has = target_b == target_b
    target = tl.sum(tl.where(has, target_b, 0.0), 0)
    target = tl.where(tl.max(has.to(tl.int32), 0) > 0, target, float("nan"))

    log_sum = log1p(s)
    maximum = tl.where(m == _NO_MAX, float("nan"), m)
    logprob = (target - maximum) - log_sum
    entropy = log_sum
    if ENTROPY:
        ub = tl.load(partial + 3 * plane + o_b, mask=m_b, other=0.0)
        entropy += tl.sum(w * (ub + gap * (sb + 1.0)), 0) * inverse(1.0 + s)
    entropy = tl.where(m == _NO_MAX, float("nan"), entropy)
    # Tokens that are not scored are of the first chunk, whose `first` is zero; those of other chunks of theirs.
    written = m_r | (m_n & (i_p < 0) & (i_r == i_p))
    plane = n_tokens.to(tl.int64)
    tl.store(stats + i_n, tl.where(m_r, logprob, 0.0), mask=written)
    tl.store(stats + plane + i_n, tl.where(m_r, entropy, 0.0), mask=written)
    tl.store(stats + 2 * plane + i_n, tl.where(m_r, maximum, 0.0), mask=written)
    tl.store(stats + 3 * plane + i_n, tl.where(m_r, log_sum, 0.0), mask=written)


@cache
def multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after the other: any number does.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check_operands(hidden: Tensor, weight: Tensor) -> None:
    """Raises TypeError for dtypes that there is no kernel for, ValueError where the elements of a row of ``weight`` are
    not contiguous."""
    name = architecture(hidden.device)
    if hidden.itemsize not in configs.FORWARD[name] or weight.dtype != hidden.dtype:
        raise TypeError(f"no kernel on {name} for {hidden.dtype} hidden states and {weight.dtype} weights")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"rows of weight must be contiguous, got strides {weight.stride()}")


def splits_of(vocab: int, device: torch.device) -> int:
    """Pieces of the vocabulary that are folded side by side and then merged. One for each multiprocessor: a single row
    block keeps all of them busy, and more row blocks are equal shares. Not a function of the rows, or a row's bits
    would depend on its batch."""
    return max(min(multiprocessors(device), triton.cdiv(vocab, interface.PEAK_WIDTH)), 1)


def chunk_rows(tokens: int, bytes_of_a_row: int) -> int:
    """Rows of a chunk: as few and as equal chunks as keep within `WORKSPACE_BYTES`, of whole groups of row blocks."""
    unit = _GROUP.value * 128
    most = max(WORKSPACE_BYTES // bytes_of_a_row // unit, 1) * unit
    chunks = max(triton.cdiv(tokens, most), 1)
    return tokens if chunks == 1 else triton.cdiv(triton.cdiv(tokens, chunks), unit) * unit


def launches(tokens: int, rows_of_a_chunk: int) -> int:
    """Kernels that a forward launches: four, and three more for each further chunk of rows."""
    return 1 + 3 * triton.cdiv(tokens, max(rows_of_a_chunk, 1)) if tokens else 1


def partial_statistics(
    hidden: Tensor,  # [R, P] of `gather_rows`
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    temperature: Tensor | None,  # [N]
    rows: Tensor,  # [N] int32
    count: Tensor,  # [1] int32
    first: int,
    partial: Tensor,  # [3, S, R], or with ``entropy`` [4, S, R]: written
    peaks: Tensor | None,  # [V / PEAK_WIDTH, N] bfloat16: written, columns of the rows of this chunk
    *,
    scale: float,
    softcap: float | None,
    entropy: bool,
) -> None:
    """Of each scored row and each of S splits of the vocabulary: the largest logit, the sum of the exponentials of the
    others less it, the target's logit (NaN in all splits but its own) and the moment of the entropy. One launch."""
    (room, padded), (vocab, depth), splits = hidden.shape, weight.shape, partial.shape[1]
    name = architecture(hidden.device)
    blocks = dict(configs.forward_blocks(name, hidden.itemsize, depth))
    operands: list[Any] = [hidden, weight]
    if blocks.pop("DESCRIPTORS") and describable(weight):
        operands = [
            TensorDescriptor.from_tensor(hidden, [blocks["B_R"], blocks["B_D"]]),
            TensorDescriptor.from_tensor(weight, [blocks["B_V"], blocks["B_D"]]),
        ]
    items = triton.cdiv(room, blocks["B_R"]) * splits
    forward_kernel[(min(multiprocessors(hidden.device), items) if name in _PERSISTENT else items,)](
        *operands, bias, targets, temperature, rows, count, partial, peaks,
        first, room, len(targets), depth, vocab, splits, padded, weight.stride(0),
        SCALE=scale, CAP=softcap, ENTROPY=entropy, B_P=interface.PEAK_WIDTH, **blocks,
    )  # fmt: skip


def merge(partial: Tensor, place: Tensor, first: int, stats: Tensor, *, entropy: bool) -> None:
    """Statistics of the tokens of one chunk from those of the splits.

    ``partial``: [3 or 4, S, R] of `partial_statistics`. ``place``: [N] int32 of `select_rows`. ``first``: the scored
    row that is the first of the chunk. ``stats``: [4, N], written: of the tokens of the chunk, and in the first chunk
    zeros of those that are not scored. One launch."""
    (_, splits, room), tokens, blocks = partial.shape, len(place), options("merge", partial.device)
    merge_kernel[(triton.cdiv(tokens, blocks["B_R"]),)](
        partial, place, stats, first, room, tokens, splits,
        ENTROPY=entropy, B_S=triton.next_power_of_2(splits), **blocks,
    )  # fmt: skip


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    entropy: bool,
    ignore_index: int = -100,
    peaks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Log-probs and entropies of the targets under softmax(softcap(scale * (hidden @ weight.T + bias)) / temperature).

    ``hidden``: [N, D] float16, bfloat16 or float32 of any strides; float64 under the interpreter. ``weight``: [V, D] of
    the same dtype; rows that do not start at a multiple of 16 bytes take slow loads. ``bias``: [V] of any floating
    dtype. ``targets``: [N] int64; where ``ignore_index`` stands, the token is not scored. ``temperature``: [N] float32
    or float64. These three are contiguous. Rows are cut into chunks that keep within `WORKSPACE_BYTES`.

    Returns ``(stats, rows, place, count, peaks)``:

    - ``stats`` [4, N] float32 (float64 for float64 inputs): log-prob of the target, entropy in nats (meaningless unless
      asked for), largest logit m, and log of the sum of exp(z - m). Zeros where the token is not scored. A target
      outside [0, V) has a log-prob of NaN; a row without a finite logit has log-prob, entropy and maximum
      NaN.
    - ``rows``, ``place``, ``count`` of `select_rows`.
    - ``peaks`` [V / PEAK_WIDTH, N] bfloat16 where asked for, else None: column i has the largest logit of scored row i
      among each PEAK_WIDTH entries, rounded up; NaN is left out. Columns from ``count`` on are undefined.

    `launches` of kernels, nothing else runs on the device, and the host waits for nothing. Raises what
    `check_operands` does."""
    check_operands(hidden, weight)
    device, dtype = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
    (tokens, depth), vocab = hidden.shape, len(weight)
    rows, place, count = select_rows(targets, ignore_index)
    stats = torch.empty(4, tokens, dtype=dtype, device=device)
    tiles = triton.cdiv(vocab, interface.PEAK_WIDTH)
    largest = torch.empty(tiles, tokens, dtype=torch.bfloat16, device=device) if peaks else None
    planes, splits, padded = 4 if entropy else 3, splits_of(vocab, device), padded_depth(depth, hidden.itemsize)
    bytes_of_a_row = padded * hidden.itemsize + planes * splits * dtype.itemsize
    room = chunk_rows(tokens, bytes_of_a_row)
    gathered = torch.empty(room, padded, dtype=hidden.dtype, device=device)
    partial = torch.empty(planes, splits, room, dtype=dtype, device=device)
    for first in range(0, tokens, max(room, 1)):
        gather_rows(hidden, rows, count, first, gathered)
        partial_statistics(
            gathered, weight, bias, targets, temperature, rows, count, first, partial, largest,
            scale=scale, softcap=softcap, entropy=entropy,
        )  # fmt: skip
        merge(partial, place, first, stats, entropy=entropy)
    return stats, rows, place, count, largest
