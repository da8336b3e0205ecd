"""forward: the streaming forward as a single kernel, logits never leaving the multiprocessor.

A contender to the vendor's GEMM into a tile and `fold`, which is the default: it saves one write and one read of
every raw product, and pays with a matrix product of Triton's instead of the vendor's. It has not been timed on
hardware; it stays only if hardware shows that it is faster.

A row's bits do not depend on the rows it shares a batch with: each is the same sum over the depth, block after block,
folded tile after tile within a split of the vocabulary, and merged over all splits at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..interface import NO_MAX, OnlineSoftmax
from .configs import FORWARD, MERGE, architecture
from .numerics import inverse, logit, online_softmax_block

_NO_MAX = tl.constexpr(NO_MAX)


# One program per multiprocessor, each of many work items; elsewhere one per item.
_PERSISTENT = ("sm_90", "sm_100", "interpreter")
# Row blocks that are worked on together, one split after the other: their hidden states (16 MiB at a depth of 4096)
# and the weights of the splits at hand have to stay in the L2 cache.
_GROUP = 16


def traffic(rows: int, depth: int, vocab: int, itemsize: int) -> tuple[int, int, int]:
    """(bytes read, bytes written, floating-point operations) at least: inputs once, statistics once. Statistics of
    the splits are left out: there are 16 bytes a row and split, which the merge finds in the L2 cache."""
    return (rows + vocab) * depth * itemsize + rows * 8, rows * 4 * max(itemsize, 4), 2 * rows * depth * vocab


@triton.jit
def _halves(x):  # type: ignore[no-untyped-def]
    """Left and right half of the columns of [R, C]."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _slices(x, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One, two or four pieces of the columns of [R, C], from left to right."""
    if SLICES == 1:
        return (x,)
    elif SLICES == 2:
        return _halves(x)
    else:
        left, right = _halves(x)
        return _halves(left) + _halves(right)


@triton.jit(
    do_not_specialize=["n_rows", "splits"],
    do_not_specialize_on_alignment=["targets", "temperature", "partial"],
)
def forward_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D], or its descriptor with blocks [B_R, B_D]
    weight,  # [V, D], or its descriptor with blocks [B_V, B_D]
    bias,  # [V] or None
    targets,  # [N] int64
    temperature,  # [N] or None
    partial,  # [4, S, N]: maximum, total, moment and target of every split of the vocabulary
    n_rows,
    depth,  # D
    vocab,  # V
    splits,  # S, at most the number of tiles
    hidden_stride,
    weight_stride,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    B_R: tl.constexpr,
    B_V: tl.constexpr,
    B_D: tl.constexpr,
    SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    B_S: tl.constexpr = B_V // SLICES
    row_blocks = tl.cdiv(n_rows, B_R)
    tiles = tl.cdiv(vocab, B_V)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        first_block = item // (GROUP * splits) * GROUP
        in_group = item % (GROUP * splits)
        group = tl.minimum(row_blocks - first_block, GROUP)
        split = in_group // group
        o_r = (first_block + in_group % group) * B_R
        i_r = o_r.to(tl.int64) + tl.arange(0, B_R)
        m_r = i_r < n_rows
        y = tl.load(targets + i_r, mask=m_r, other=-1)
        y = tl.where((y >= 0) & (y < vocab), y, -1).to(tl.int32)
        if temperature is not None:
            t = tl.load(temperature + i_r, mask=m_r, other=1.0).to(ACCUMULATOR)
            per_temperature = inverse(t)[:, None]
        else:
            per_temperature = None

        m = tl.full([B_R], _NO_MAX, ACCUMULATOR)
        s = tl.zeros([B_R], ACCUMULATOR)
        u = tl.zeros([B_R], ACCUMULATOR)
        target = tl.full([B_R], float("nan"), ACCUMULATOR)
        first_tile = split * (tiles // splits) + tl.minimum(split, tiles % splits)
        end_tile = first_tile + tiles // splits + (split < tiles % splits).to(tl.int32)
        for tile in range(first_tile, end_tile):
            o_v = tile * B_V
            x = tl.zeros([B_R, B_V], ACCUMULATOR)
            for o_d in range(0, depth, B_D):
                if DESCRIPTORS:
                    b_h = hidden.load([o_r, o_d])
                    b_w = weight.load([o_v, o_d])
                else:
                    i_v = o_v.to(tl.int64) + tl.arange(0, B_V)
                    i_d = o_d + tl.arange(0, B_D)
                    m_d = (i_d < depth)[None, :]
                    o_h = i_r[:, None] * hidden_stride + i_d[None, :]
                    o_w = i_v[:, None] * weight_stride + i_d[None, :]
                    b_h = tl.load(hidden + o_h, mask=m_r[:, None] & m_d, other=0.0)
                    b_w = tl.load(weight + o_w, mask=(i_v < vocab)[:, None] & m_d, other=0.0)
                if UPCAST:
                    b_h, b_w = b_h.to(tl.float32), b_w.to(tl.float32)
                x = tl.dot(b_h, b_w.T, x, input_precision="ieee", out_dtype=ACCUMULATOR)

            slices = _slices(x, SLICES)
            for i in tl.static_range(SLICES):
                o_s = o_v + i * B_S
                i_s = o_s + tl.arange(0, B_S)
                m_s = i_s < vocab
                b = tl.load(bias + i_s, mask=m_s, other=0.0).to(ACCUMULATOR)[None, :] if bias is not None else None
                z, _ = logit(slices[i], b, per_temperature, SCALE, CAP)
                z = tl.where(m_s[None, :], z, float("-inf"))
                here = (y >= o_s) & (y < o_s + B_S)
                # Most slices have no row's target. The branch also keeps the compiler from interleaving slices, for
                # which the registers do not suffice.
                if tl.max(here.to(tl.int32), 0) > 0:
                    z_y = tl.sum(tl.where(i_s[None, :] == y[:, None], z, 0.0), 1)
                    target = tl.where(here, z_y, target)
                m, s, u = online_softmax_block(z, m, s, u, ENTROPY)

        o_p = split.to(tl.int64) * n_rows + i_r
        plane = splits.to(tl.int64) * n_rows
        tl.store(partial + o_p, m, mask=m_r)
        tl.store(partial + plane + o_p, s, mask=m_r)
        tl.store(partial + 2 * plane + o_p, u, mask=m_r)
        tl.store(partial + 3 * plane + o_p, target, mask=m_r)


@triton.jit(do_not_specialize=["n_rows", "splits"], do_not_specialize_on_alignment=["partial", "merged"])
def merge_kernel(  # type: ignore[no-untyped-def]
    partial,  # [4, S, N]
    merged,  # [4, N]
    n_rows,
    splits,  # S
    ENTROPY: tl.constexpr,
    B_R: tl.constexpr,
    B_S: tl.constexpr,  # at least S
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    i_s = tl.arange(0, B_S)[:, None]
    m_r = i_r < n_rows
    m_b = (i_s < splits) & m_r[None, :]
    o_b = i_s.to(tl.int64) * n_rows + i_r[None, :]
    plane = splits.to(tl.int64) * n_rows
    mb = tl.load(partial + o_b, mask=m_b, other=_NO_MAX)
    sb = tl.load(partial + plane + o_b, mask=m_b, other=0.0)
    ub = tl.load(partial + 2 * plane + o_b, mask=m_b, other=0.0)
    target_b = tl.load(partial + 3 * plane + o_b, mask=m_b, other=float("nan"))

    m = tl.max(mb, 0)
    gap = m[None, :] - mb
    w = tl.where(m_b, tl.exp(-gap), 0.0)
    at_max = m_b & (gap == 0.0)
    # The maxima join the sum of the others, all but one of those that are the largest.
    ties = tl.sum(at_max.to(mb.dtype), 0) - 1.0
    s = tl.sum(w * sb + tl.where(at_max, 0.0, w), 0) + ties
    u = tl.sum(w * (ub + gap * (sb + 1.0)), 0) if ENTROPY else tl.zeros([B_R], mb.dtype)
    # One split at most has the target.
    has = target_b == target_b
    target = tl.sum(tl.where(has, target_b, 0.0), 0)
    target = tl.where(tl.max(has.to(tl.int32), 0) > 0, target, float("nan"))

    n = n_rows.to(tl.int64)
    tl.store(merged + i_r, m, mask=m_r)
    tl.store(merged + n + i_r, s, mask=m_r)
    tl.store(merged + 2 * n + i_r, u, mask=m_r)
    tl.store(merged + 3 * n + i_r, target, mask=m_r)


@cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after the other: any number does.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _describable(x: Tensor) -> bool:  # [R, C]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(1) == 1


def forward(
    hidden: Tensor,  # [N, D] float16, bfloat16 or float32; float64 under the interpreter
    weight: Tensor,  # [V, D] of the same dtype
    bias: Tensor | None,  # [V] of any floating dtype
    targets: Tensor,  # [N] int64
    temperature: Tensor | None,  # [N] float32 or float64
    *,
    scale: float,
    softcap: float | None,
    entropy: bool,
    splits: int | None = None,
) -> OnlineSoftmax:  # of N rows, float32; float64 for float64 inputs
    """The running statistics of every row over the whole vocabulary; a target outside [0, V) gives NaN.

    ``splits``: pieces of the vocabulary that are folded side by side and then merged; None chooses. Rows that start
    at no multiple of 16 bytes take masked loads of single elements, which are slow. Raises TypeError for dtypes that
    there is no kernel for, ValueError where the elements of a row of ``hidden`` or ``weight`` are not contiguous."""
    device, dtype = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
    name = architecture(device)
    if hidden.itemsize not in FORWARD[name] or weight.dtype != hidden.dtype:
        raise TypeError(f"no forward kernel on {name} for {hidden.dtype} hidden states and {weight.dtype} weights")
    for argument, x in (("hidden", hidden), ("weight", weight)):
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"rows of {argument} must be contiguous, got strides {x.stride()}")
    (rows, depth), vocab = hidden.shape, len(weight)
    if rows == 0 or vocab == 0:
        return OnlineSoftmax.empty(rows, dtype, device)

    blocks = FORWARD[name][hidden.itemsize]
    programs = _multiprocessors(device)
    # One for each multiprocessor: a single row block keeps all of them busy, and more row blocks are equal shares.
    # Not a function of the rows, or a row's bits would depend on its batch.
    splits = min(splits or programs, triton.cdiv(vocab, blocks["B_V"]))
    items = triton.cdiv(rows, blocks["B_R"]) * splits
    operands: list[Any] = [hidden, weight]
    descriptors = bool(blocks["DESCRIPTORS"]) and _describable(hidden) and _describable(weight)
    if descriptors:
        operands = [
            TensorDescriptor.from_tensor(hidden, [blocks["B_R"], blocks["B_D"]]),
            TensorDescriptor.from_tensor(weight, [blocks["B_V"], blocks["B_D"]]),
        ]
    partial = torch.empty(4, splits, rows, dtype=dtype, device=device)
    forward_kernel[(min(programs, items) if name in _PERSISTENT else items,)](
        *operands, bias, targets, temperature, partial,
        rows, depth, vocab, splits, hidden.stride(0), weight.stride(0),
        SCALE=scale, CAP=softcap, ENTROPY=entropy,
        ACCUMULATOR=tl.float64 if dtype == torch.float64 else tl.float32,
        # The interpreter's products of bfloat16 are wrong.
        UPCAST=triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16,
        GROUP=_GROUP, **(blocks | dict(DESCRIPTORS=descriptors)),
    )  # fmt: skip
    if splits == 1:
        return OnlineSoftmax(partial[:, 0])
    merged = torch.empty(4, rows, dtype=dtype, device=device)
    merge_kernel[(triton.cdiv(rows, MERGE["B_R"]),)](
        partial, merged, rows, splits, ENTROPY=entropy, B_S=triton.next_power_of_2(splits), **MERGE
    )
    return OnlineSoftmax(merged)
