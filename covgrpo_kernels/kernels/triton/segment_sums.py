"""segment_sums: sums of several values over the tokens of each segment, in float64, a program a segment.

Bytes: reads M values and an index a token; writes M float64 a segment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import options


@triton.jit(
    do_not_specialize=["n_segments", "row_stride"],
    do_not_specialize_on_alignment=["values", "offsets", "order", "sums"],
)
def segment_sums_kernel(  # type: ignore[no-untyped-def]
    values,  # [M, N] floating or bool
    offsets,  # [S + 1] int64
    order,  # [N] int64 or None: the tokens are sorted by segment
    sums,  # [M, S] float64
    n_segments,
    row_stride,  # of the values
    stride,
    B_T: tl.constexpr,
):
    i_s, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin, end = tl.load(offsets + i_s), tl.load(offsets + i_s + 1)
    sum_b = tl.zeros([B_T], tl.float64)
    for o_t in range(begin, end, B_T):
        i_t = o_t + tl.arange(0, B_T)
        m_t = i_t < end
        if order is not None:
            i_t = tl.load(order + i_t, mask=m_t, other=0)
        sum_b += tl.load(values + i_m * row_stride + i_t * stride, mask=m_t, other=0).to(tl.float64)
    tl.store(sums + i_m * n_segments + i_s, tl.sum(sum_b, 0))


def segment_sums(
    values: Tensor,  # [M, N] floating or bool
    offsets: Tensor,  # [S + 1] int64
    order: Tensor | None,  # [N] int64
) -> Tensor:  # [M, S] float64
    """Sums over the tokens of each segment."""
    segments = len(offsets) - 1
    sums = torch.empty(len(values), segments, dtype=torch.float64, device=values.device)
    if segments:
        segment_sums_kernel[(segments, len(values))](
            values=values, offsets=offsets, order=order, sums=sums, n_segments=segments,
            row_stride=values.stride(0), stride=values.stride(1), **options("sums", values.device),
        )  # fmt: skip
    return sums
