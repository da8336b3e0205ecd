"""segments_of_ids: which segment each token belongs to, and where each segment begins, from arbitrary integer ids.

PyTorch sorts the ids; then one launch, in which every place among the sorted ids finds by bisection where its run of
equal ids begins and ends. A prefix sum would number the segments without gaps, but takes more launches.

Bytes: reads an id and an index a token, and log2(N) ids a bisection, from the cache; writes two int64 a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import options


@triton.jit(
    do_not_specialize=["n_tokens", "steps"], do_not_specialize_on_alignment=["ids", "order", "segment", "offsets"]
)
def segments_kernel(  # type: ignore[no-untyped-def]
    ids,  # [N] integers, ascending
    order,  # [N] int64, the token at each place
    segment,  # [N] int64
    offsets,  # [N + 1] int64
    n_tokens,
    steps,  # of a bisection of N places
    B_T: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * B_T + tl.arange(0, B_T)
    m_p = i_p < n_tokens
    own = tl.load(ids + i_p, mask=m_p, other=0)
    # Smaller ids are before ``begin``, and larger ones from ``end`` on. Both are in [low, high].
    low, high = i_p * 0, i_p * 0 + n_tokens
    begin, end = low, high
    end_low, begin_high = low, high
    for _ in range(steps):
        middle = (begin + begin_high) // 2
        inside = begin < begin_high
        smaller = inside & (tl.load(ids + middle, mask=m_p & inside, other=0) < own)
        begin, begin_high = tl.where(smaller, middle + 1, begin), tl.where(inside & ~smaller, middle, begin_high)
        middle = (end_low + end) // 2
        inside = end_low < end
        larger = inside & (tl.load(ids + middle, mask=m_p & inside, other=0) > own)
        end_low, end = tl.where(inside & ~larger, middle + 1, end_low), tl.where(larger, middle, end)
    tl.store(segment + tl.load(order + i_p, mask=m_p, other=0), end - 1, mask=m_p)
    tl.store(offsets + i_p, tl.where(m_p, begin, n_tokens), mask=i_p <= n_tokens)


def segments_of_ids(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(segment, offsets, order) of integer ids [N], as `Segments` has them."""
    tokens = len(ids)
    in_order, order = ids.sort(stable=True)
    segment, offsets = torch.empty_like(order), order.new_empty(tokens + 1)
    cut = options("segments", ids.device)
    segments_kernel[(triton.cdiv(tokens + 1, cut["B_T"]),)](
        ids=in_order, order=order, segment=segment, offsets=offsets, n_tokens=tokens, steps=tokens.bit_length(), **cut
    )
    return segment, offsets, order
