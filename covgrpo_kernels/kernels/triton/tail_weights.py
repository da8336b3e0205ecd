"""tail_weights: by which the rows are chosen whose tails stand for those of the sparse rows, in one launch of one
program.

Bytes: reads 9 and writes 4 a row, some rows several times, by one multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import options
from .numerics import counted_total


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["logprob_grad", "entropy_grad", "tail_weight", "squares", "out"],
)
def tail_weights_kernel(  # type: ignore[no-untyped-def]
    logprob_grad,  # [N]
    entropy_grad,  # [N] or None
    tail_weight,  # [N] of the row plan: (|g| + |e|) * mass * slope, -1 where the row cannot be sparse
    squares,  # [N] float64, for (|g| + |e|)^2 of the rows that can be sparse
    out,  # [N]
    n_rows,
    LARGEST_SHARE: tl.constexpr,
    B_R: tl.constexpr,
):
    i_b = tl.arange(0, B_R)
    for o_r in range(0, n_rows, B_R):
        i_r = o_r + i_b
        m_r = i_r < n_rows
        size = tl.abs(tl.load(logprob_grad + i_r, mask=m_r, other=0.0))
        if entropy_grad is not None:
            size += tl.abs(tl.load(entropy_grad + i_r, mask=m_r, other=0.0))
        possible = tl.load(tail_weight + i_r, mask=m_r, other=-1.0) >= 0.0
        square = tl.where(possible, size.to(tl.float64) * size.to(tl.float64), 0.0)
        tl.store(squares + i_r, square, mask=m_r)
    tl.debug_barrier()  # every thread reads what others have written
    _, counted, n_counted, _ = counted_total(squares, n_rows, LARGEST_SHARE, B_R)
    most = counted * LARGEST_SHARE / tl.maximum(n_counted, 1).to(tl.float64)
    for o_r in range(0, n_rows, B_R):
        i_r = o_r + i_b
        m_r = i_r < n_rows
        square = tl.load(squares + i_r, mask=m_r, other=0.0)
        weight = tl.load(tail_weight + i_r, mask=m_r, other=0.0)
        factor = tl.where(square > most, tl.sqrt(most / square), 1.0)
        tl.store(out + i_r, tl.where(weight > 0.0, weight * factor.to(tl.float32), weight), mask=m_r)


def tail_weights(
    logprob_grad: Tensor,  # [N] float32
    entropy_grad: Tensor | None,  # [N] float32
    tail_weight: Tensor,  # [N] float32 of `plan_rows`
    largest_share: float,
) -> Tensor:  # [N] float32
    """The weights with no coefficient larger than the root of ``largest_share`` times the mean square, as
    `plan.budget_total` counts it: a row of a huge coefficient is dense anyway, and its tail may have next to no
    mass."""
    n_rows = len(tail_weight)
    out = torch.empty_like(tail_weight)
    squares = torch.empty(n_rows, dtype=torch.float64, device=tail_weight.device)
    tail_weights_kernel[(1,)](
        logprob_grad=logprob_grad, entropy_grad=entropy_grad, tail_weight=tail_weight, squares=squares, out=out,
        n_rows=n_rows, LARGEST_SHARE=largest_share, **options("classify_rows", tail_weight.device),
    )  # fmt: skip
    return out
