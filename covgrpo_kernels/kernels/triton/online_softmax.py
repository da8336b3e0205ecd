"""fold: one pass over a tile of raw products into the running statistics of its rows.

Bytes: reads the tile once, and a few numbers a row; writes four numbers a row, and eight bytes for each candidate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..interface import Candidates, Head, State
from .configs import options, tuned
from .numerics import fold_block, inverse, logit


def traffic(rows: int, columns: int, itemsize: int = 4) -> tuple[int, int]:
    """Bytes (read, written) of a tile, without what is one number a column."""
    return rows * columns * itemsize + rows * (4 * itemsize + 8), rows * 4 * itemsize


@tuned("fold", key=["width", "ENTROPY"], restored=["maximum", "total", "moment", "target", "found"])
@triton.jit(
    do_not_specialize=["n_rows", "first"],
    do_not_specialize_on_alignment=[
        "targets", "temperature", "maximum", "total", "moment", "target", "threshold", "found", "entries", "logits",
    ],
)  # fmt: skip
def fold_kernel(  # type: ignore[no-untyped-def]
    tile,  # [R, C]
    targets,  # [R] int64
    bias,  # [C] or None
    temperature,  # [R] or None
    maximum,  # [R], as are the next three: updated
    total,
    moment,
    target,
    threshold,  # [R], as is the next: of candidates, or None
    found,
    entries,  # [R, CAPACITY], as is the next
    logits,
    n_rows,
    width,  # C
    first,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    CAPACITY: tl.constexpr,
    B_R: tl.constexpr,
    B_C: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    m_r = i_r < n_rows
    m = tl.load(maximum + i_r, mask=m_r, other=0.0)
    s = tl.load(total + i_r, mask=m_r, other=0.0)
    u = tl.load(moment + i_r, mask=m_r, other=0.0)
    if temperature is not None:
        per_row = inverse(tl.load(temperature + i_r, mask=m_r, other=1.0))
        per_temperature = per_row[:, None]
    else:
        per_row = None
        per_temperature = None
    if threshold is not None:
        limit = tl.load(threshold + i_r, mask=m_r, other=float("inf"))
        n = tl.load(found + i_r, mask=m_r, other=0)

    for o_c in range(0, width, B_C):
        i_c = o_c + tl.arange(0, B_C)
        m_c = i_c < width
        x = tl.load(tile + i_r[:, None] * width + i_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
        b = tl.load(bias + i_c, mask=m_c, other=0.0)[None, :] if bias is not None else None
        z, _ = logit(x, b, per_temperature, SCALE, CAP)
        z = tl.where(m_c[None, :], z, float("-inf"))
        m, s, u = fold_block(z, m, s, u, ENTROPY)
        if threshold is not None:
            hit = (z >= limit[:, None]).to(tl.int32)
            if tl.max(tl.max(hit, axis=1), axis=0) > 0:
                place = n[:, None] + tl.cumsum(hit, axis=1) - 1
                kept = (hit > 0) & (place < CAPACITY)
                row = i_r[:, None] * CAPACITY
                tl.store(entries + row + place, tl.broadcast_to((first + i_c)[None, :], B_R, B_C), mask=kept)
                tl.store(logits + row + place, z, mask=kept)
                n += tl.sum(hit, axis=1)

    tl.store(maximum + i_r, m, mask=m_r)
    tl.store(total + i_r, s, mask=m_r)
    if ENTROPY:
        tl.store(moment + i_r, u, mask=m_r)
    if threshold is not None:
        tl.store(found + i_r, n, mask=m_r)

    column = tl.load(targets + i_r, mask=m_r, other=-1) - first
    here = m_r & (column >= 0) & (column < width)
    x_y = tl.load(tile + i_r * width + column, mask=here, other=0.0)
    b_y = tl.load(bias + column, mask=here, other=0.0) if bias is not None else None
    z_y, _ = logit(x_y, b_y, per_row, SCALE, CAP)
    tl.store(target + i_r, z_y, mask=here)


_NO_CANDIDATES = dict.fromkeys(Candidates._fields)


def fold(
    tile: Tensor,  # [R, C]
    state: State,  # of R rows, updated in place
    targets: Tensor,  # [R] int64
    first: int,
    head: Head,
    bias: Tensor | None,  # [C]
    temperature: Tensor | None,  # [R]
    entropy: bool,
    candidates: Candidates | None = None,  # of R rows, updated in place
) -> None:
    """Folds a tile of raw products into the running statistics, block after block from left to right."""
    rows, width = tile.shape
    fold_kernel[lambda meta: (triton.cdiv(rows, meta["B_R"]),)](
        tile=tile, targets=targets, bias=bias, temperature=temperature,
        maximum=state.maximum, total=state.total, moment=state.moment, target=state.target,
        **(_NO_CANDIDATES if candidates is None else candidates._asdict()),
        CAPACITY=0 if candidates is None else candidates.entries.shape[1],
        n_rows=rows, width=width, first=first, SCALE=head.scale, CAP=head.softcap, ENTROPY=entropy,
        **options("fold", tile.device),
    )  # fmt: skip
