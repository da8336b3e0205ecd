"""head_grad: the gradient of a slice of the head, [C, D] of dW and [C] of the bias, written once.

A program makes a block of dW: dZ^T times the states of the dense rows, whose first T are the tails, then the pairs of
its vocabulary ids as a one-hot matrix times gathered hidden states; it scales the sum, rounds it and stores it.

Bytes: reads dZ and the states once for each block in a row or column of blocks, mostly out of the L2 cache, and D
elements a pair; writes C * D elements.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import HEAD_GRAD, MANY_ROWS, architecture, describable
from .numerics import dot_of_parts, operand, rounded
from .pairs import PAIR_BLOCK, Pairs


@triton.jit(
    do_not_specialize=["n_rows", "first"],
    do_not_specialize_on_alignment=[
        "pair_ids", "pair_rows", "pair_values", "pair_offsets", "bias_factors", "scale", "bias_out",
    ],
)  # fmt: skip
def head_grad_kernel(  # type: ignore[no-untyped-def]
    dz,  # [R, C], or its descriptor with blocks [B_K, B_V]
    states,  # [R, D], or its descriptor with blocks [B_K, B_D]
    hidden,  # [N, D]
    pair_ids,  # [P] int32, or None as are the next three: no pairs
    pair_rows,  # [P] int32
    pair_values,  # [P]
    pair_offsets,  # of the slice's blocks of PAIR_BLOCK ids, and the end
    bias_factors,  # [T] or None
    scale,  # [] or None
    out,  # [C, D], or None
    bias_out,  # [C], or None
    n_rows,  # R
    width,  # C
    depth,  # D
    first,  # vocabulary id of the first column of dz
    hidden_stride,
    T: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    B_V: tl.constexpr,
    B_D: tl.constexpr,
    B_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    # Neighbours share a block of the vocabulary, so that its dZ and its pairs come out of the L2 cache.
    o_d = tl.program_id(0) * B_D
    o_v = tl.program_id(1) * B_V
    i_v = o_v.to(tl.int64) + tl.arange(0, B_V)
    i_d = o_d + tl.arange(0, B_D)
    m_v, m_d = i_v < width, i_d < depth
    total = tl.zeros([B_V, B_D], tl.float32)
    total_bias = tl.zeros([B_V], tl.float32)
    for o_k in range(0, n_rows, B_K):
        i_k = o_k + tl.arange(0, B_K)
        m_k = i_k < n_rows
        i_r = i_k.to(tl.int64)[:, None]
        if DESCRIPTORS:
            a = dz.load([o_k, o_v])
        else:
            a = tl.load(dz + i_r * width + i_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)
        a = operand(a)
        if out is not None:
            if DESCRIPTORS:
                b = states.load([o_k, o_d])
            else:
                b = tl.load(states + i_r * depth + i_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            total = tl.dot(a.T, operand(b), total, input_precision="ieee")
        if bias_out is not None:
            terms = a.to(tl.float32)
            if bias_factors is not None:
                terms *= tl.load(bias_factors + i_k, mask=i_k < T, other=1.0)[:, None]
            total_bias += tl.sum(terms, 0)
    if pair_ids is not None:
        block = o_v // PAIR_BLOCK
        begin = tl.load(pair_offsets + block)
        end = tl.load(pair_offsets + tl.minimum(block + B_V // PAIR_BLOCK, tl.cdiv(width, PAIR_BLOCK)))
        for o_k in range(begin, end, B_K):
            i_k = o_k + tl.arange(0, B_K)
            m_k = i_k < end
            r = tl.load(pair_rows + i_k, mask=m_k, other=0).to(tl.int64)
            v = tl.load(pair_ids + i_k, mask=m_k, other=-1) - first
            x = tl.load(pair_values + i_k, mask=m_k, other=0.0)
            a = tl.where(v[None, :] == i_v[:, None], x[None, :], 0.0)
            if out is not None:
                o_h = r[:, None] * hidden_stride + i_d[None, :]
                b = tl.load(hidden + o_h, mask=m_k[:, None] & m_d[None, :], other=0.0)
                total = dot_of_parts(a, b, total)
            if bias_out is not None:
                total_bias += tl.sum(a, 1)
    if scale is not None:
        factor = tl.load(scale)
        total *= factor
        total_bias *= factor
    if out is not None:
        o_out = i_v[:, None] * depth + i_d[None, :]
        tl.store(out + o_out, rounded(total, out), mask=m_v[:, None] & m_d[None, :])
    if bias_out is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(bias_out + i_v, rounded(total_bias, bias_out), mask=m_v)


def head_grad(
    dz: Tensor,  # [R, C], dtype of the hidden states; the first T rows are tails
    states: Tensor,  # [R, D], likewise; of `gather_states`
    hidden: Tensor,  # [N, D]
    pairs: Pairs | None,  # of the whole vocabulary
    bias_factors: Tensor | None,  # [T] float32 of `gather_states`
    scale: Tensor | None,  # [] float32; None: 1
    out: Tensor | None,  # [C, D] of any floating dtype; None: not needed
    bias_out: Tensor | None,  # [C], likewise
    *,
    first: int = 0,
) -> None:
    """out = scale * (dZ^T states + sum over pairs), bias_out = scale * (sum of the rows of dZ, tails times their
    factors, + sum over pairs): the gradients of the vocabulary ids from ``first``, a multiple of PAIR_BLOCK, on. R may
    be zero."""
    (rows, width), (_, depth), device = dz.shape, states.shape, hidden.device
    cut = dict(HEAD_GRAD[architecture(device)][hidden.itemsize]["many" if rows >= MANY_ROWS else "few"])
    operands: list[Any] = [dz, states]
    if cut["DESCRIPTORS"] and rows and describable(dz) and describable(states):
        operands = [
            TensorDescriptor.from_tensor(dz, [cut["B_K"], cut["B_V"]]),
            TensorDescriptor.from_tensor(states, [cut["B_K"], cut["B_D"]]),
        ]
    else:
        cut["DESCRIPTORS"] = False
    offsets = None if pairs is None else pairs.offsets[first // PAIR_BLOCK :]
    ids, pair_rows, values = (None,) * 3 if pairs is None else pairs[:3]
    blocks_d = 1 if out is None else triton.cdiv(depth, cut["B_D"])
    head_grad_kernel[(blocks_d, triton.cdiv(width, cut["B_V"]))](
        *operands, hidden, ids, pair_rows, values, offsets, bias_factors, scale, out, bias_out,
        rows, width, depth, first, hidden.stride(0),
        T=0 if bias_factors is None else len(bias_factors), PAIR_BLOCK=PAIR_BLOCK, **cut,
    )  # fmt: skip
