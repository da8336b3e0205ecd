"""sparse_product: a sparse matrix in CSR form times a dense one.

Bytes: reads D elements for each value, and 8 + 4 more; writes D numbers an output row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import options


@triton.jit(do_not_specialize_on_alignment=["values", "indices", "offsets"])
def sparse_product_kernel(  # type: ignore[no-untyped-def]
    values,  # [n]
    indices,  # [n] int64 rows of the matrix
    offsets,  # [S + 1] int64
    matrix,  # [*, D]
    out,  # [S, D]
    depth,  # D
    row_stride,
    column_stride,
    B_D: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_d = i_d < depth
    total = tl.zeros([B_D], dtype=out.dtype.element_ty)
    for k in range(tl.load(offsets + i_s), tl.load(offsets + i_s + 1)):
        row = tl.load(indices + k)
        x = tl.load(matrix + row * row_stride + i_d.to(tl.int64) * column_stride, mask=m_d, other=0.0)
        total += tl.load(values + k) * x.to(total.dtype)
    tl.store(out + i_s * depth + i_d, total, mask=m_d)


def sparse_product(
    values: Tensor,  # [n]
    indices: Tensor,  # [n] rows of the matrix
    offsets: Tensor,  # [S + 1] where the values of each output row begin, and the end
    matrix: Tensor,  # [*, D]
    out: Tensor,  # [S, D]
) -> None:
    """out[i] = sum of values[k] * matrix[indices[k]] over the values of output row i, in order."""
    rows, depth = out.shape
    if not rows:
        return
    sparse_product_kernel[lambda meta: (rows, triton.cdiv(depth, meta["B_D"]))](
        values=values, indices=indices, offsets=offsets, matrix=matrix, out=out, depth=depth,
        row_stride=matrix.stride(0), column_stride=matrix.stride(1), **options("sparse", out.device),
    )  # fmt: skip
