"""hidden_grad: the gradient of the hidden states of all rows, written once.

Bytes: reads D elements of the head for each entry of a sparse row, and D float32 numbers for each row that is dense or
sparse; writes D elements a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..interface import DENSE, SPARSE
from .configs import options
from .numerics import rounded
from .plan_rows import RowPlan
from .row_classes import RowClasses

_SPARSE, _DENSE = tl.constexpr(SPARSE), tl.constexpr(DENSE)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "row_class", "place", "kept", "vocab_ids", "values", "targets", "target_value", "shares", "scale",
    ],
)  # fmt: skip
def hidden_grad_kernel(  # type: ignore[no-untyped-def]
    row_class,  # [N] int8
    place,  # [N] int32
    kept,  # [N] int32, or None as are the next five: no row is sparse
    vocab_ids,  # [N, K] int32
    values,  # [N, K]
    targets,  # [N] int64
    target_value,  # [N]
    shares,  # [N, T]
    weight,  # [V, D]
    products,  # [R, D] float32, dZ times the head: of the tails, then of the dense rows
    scale,  # [] or None
    out,  # [N, D]
    n_rows,
    depth,  # D
    weight_stride,
    min_prob,
    K: tl.constexpr,
    T: tl.constexpr,
    B_R: tl.constexpr,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    i_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_r = i_r < n_rows
    m_d = (i_d < depth)[None, :]
    what = tl.load(row_class + i_r, mask=m_r, other=-1)
    is_dense = what == _DENSE
    at = tl.load(place + i_r, mask=is_dense, other=0).to(tl.int64)
    total = tl.load(products + at[:, None] * depth + i_d[None, :], mask=is_dense[:, None] & m_d, other=0.0)
    is_sparse = what == _SPARSE
    if vocab_ids is not None:  # noqa: SIM102
        if tl.max(is_sparse.to(tl.int32), 0) > 0:
            # Unrolled and without a branch, so that all of these loads are under way at once.
            for k in tl.static_range(T):
                factor = tl.load(shares + i_r * T + k, mask=is_sparse, other=0.0) * min_prob
                total += factor[:, None] * tl.load(products + k * depth + i_d[None, :], mask=m_d, other=0.0)
            v = tl.load(targets + i_r, mask=is_sparse, other=0)
            factor = tl.load(target_value + i_r, mask=is_sparse, other=0.0)
            x = tl.load(weight + v[:, None] * weight_stride + i_d[None, :], mask=is_sparse[:, None] & m_d, other=0.0)
            total += factor[:, None] * x.to(tl.float32)
            n_kept = tl.load(kept + i_r, mask=is_sparse, other=0)
            for k in range(tl.max(n_kept, 0)):
                m_k = k < n_kept
                v = tl.load(vocab_ids + i_r * K + k, mask=m_k, other=0).to(tl.int64)
                factor = tl.load(values + i_r * K + k, mask=m_k, other=0.0)
                x = tl.load(weight + v[:, None] * weight_stride + i_d[None, :], mask=m_k[:, None] & m_d, other=0.0)
                total += factor[:, None] * x.to(tl.float32)
    if scale is not None:
        total *= tl.load(scale)
    tl.store(out + i_r[:, None] * depth + i_d[None, :], rounded(total, out), mask=m_r[:, None] & m_d)


def hidden_grad(
    classes: RowClasses,  # of N rows
    sparse: tuple[RowPlan, Tensor] | None,  # of N rows, and their shares [N, T] of the tails; None: no row is sparse
    targets: Tensor,  # [N] int64
    weight: Tensor,  # [V, D]
    products: Tensor,  # [R, D] float32: dZ times the head, as `classify_rows` has listed the rows
    scale: Tensor | None,  # [] float32; None: 1
    out: Tensor,  # [N, D] of any floating dtype
    *,
    min_prob: float,
) -> None:
    """out = scale * the gradient of each row: of a dense row its product; of a sparse one the sum of its kept entries
    and of its shares of the tails' products, times ``min_prob``, by which `dlogits` divides tails; of a dropped one
    zero."""
    n_rows, depth = out.shape
    if not n_rows:
        return
    capacity, n_tails = 0, 0
    entries: tuple[Tensor | None, ...] = (None,) * 6
    if sparse is not None:
        rows, shares = sparse
        assert rows.vocab_ids is not None
        capacity, n_tails = rows.vocab_ids.shape[1], shares.shape[1]
        entries = (rows.kept, rows.vocab_ids, rows.values, targets, rows.target_value, shares)
    hidden_grad_kernel[lambda meta: (triton.cdiv(n_rows, meta["B_R"]), triton.cdiv(depth, meta["B_D"]))](
        classes.row_class, classes.place, *entries, weight, products, scale, out,
        n_rows, depth, weight.stride(0), min_prob, K=capacity, T=n_tails, **options("hidden_grad", out.device),
    )  # fmt: skip
