"""online_softmax_: one pass over a tile of raw products into the running softmax of its rows.

Bytes: reads the tile once, and a few numbers a row; writes four numbers a row, and eight bytes for each candidate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Collecting, OnlineSoftmax, Tile
from .configs import options, tuned
from .numerics import inverse, logit, online_softmax_block


@tuned("online_softmax", key=["width", "ENTROPY"], restored=["maximum", "sums", "entropy_sum", "target", "found"])
@triton.jit(
    do_not_specialize=["n_rows", "first"],
    do_not_specialize_on_alignment=[
        "targets", "temperature", "maximum", "sums", "entropy_sum", "target",
        "min_logits", "found", "vocab_ids", "logits",
    ],
)  # fmt: skip
def online_softmax_kernel(  # type: ignore[no-untyped-def]
    tile,  # [R, C]
    targets,  # [R] int64
    bias,  # [C] or None
    temperature,  # [R] or None
    maximum,  # [R], as are the next three: updated
    sums,
    entropy_sum,
    target,
    min_logits,  # [R] what candidates have to reach; this and the next three are None where none are wanted
    found,  # [R]
    vocab_ids,  # [R, CAPACITY], as the next
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
    s = tl.load(sums + i_r, mask=m_r, other=0.0)
    u = tl.load(entropy_sum + i_r, mask=m_r, other=0.0)
    if temperature is not None:
        per_row = inverse(tl.load(temperature + i_r, mask=m_r, other=1.0))
        per_temperature = per_row[:, None]
    else:
        per_row = None
        per_temperature = None
    if min_logits is not None:
        limit = tl.load(min_logits + i_r, mask=m_r, other=float("inf"))
        n = tl.load(found + i_r, mask=m_r, other=0)

    for o_c in range(0, width, B_C):
        i_c = o_c + tl.arange(0, B_C)
        m_c = i_c < width
        x = tl.load(tile + i_r[:, None] * width + i_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
        b = tl.load(bias + i_c, mask=m_c, other=0.0)[None, :] if bias is not None else None
        z, _ = logit(x, b, per_temperature, SCALE, CAP)
        z = tl.where(m_c[None, :], z, float("-inf"))
        m, s, u = online_softmax_block(z, m, s, u, ENTROPY)
        if min_logits is not None:
            hit = (z >= limit[:, None]).to(tl.int32)
            if tl.max(tl.max(hit, axis=1), axis=0) > 0:
                place = n[:, None] + tl.cumsum(hit, axis=1) - 1
                kept = (hit > 0) & (place < CAPACITY)
                row = i_r[:, None] * CAPACITY
                tl.store(vocab_ids + row + place, tl.broadcast_to((first + i_c)[None, :], B_R, B_C), mask=kept)
                tl.store(logits + row + place, z, mask=kept)
                n += tl.sum(hit, axis=1)

    tl.store(maximum + i_r, m, mask=m_r)
    tl.store(sums + i_r, s, mask=m_r)
    if ENTROPY:
        tl.store(entropy_sum + i_r, u, mask=m_r)
    if min_logits is not None:
        tl.store(found + i_r, n, mask=m_r)

    column = tl.load(targets + i_r, mask=m_r, other=-1) - first
    here = m_r & (column >= 0) & (column < width)
    x_y = tl.load(tile + i_r * width + column, mask=here, other=0.0)
    b_y = tl.load(bias + column, mask=here, other=0.0) if bias is not None else None
    z_y, _ = logit(x_y, b_y, per_row, SCALE, CAP)
    tl.store(target + i_r, z_y, mask=here)


def online_softmax_(
    products: Tensor,  # [R, C]
    tile: Tile,
    running: OnlineSoftmax,  # of R rows, updated in place
    entropy: bool,
    collecting: Collecting | None = None,  # of R rows, updated in place
) -> None:
    """Adds a tile of raw products to the running softmax of its rows, VOCAB_BLOCK ids after VOCAB_BLOCK ids. Of a row
    that has no room for all its candidates of a tile, some are lost."""
    rows, width = products.shape
    min_logits = found = vocab_ids = logits = None
    if collecting is not None:
        min_logits, (found, vocab_ids, logits, floors) = collecting
        min_logits = torch.maximum(min_logits, floors)
    online_softmax_kernel[lambda meta: (triton.cdiv(rows, meta["B_R"]),)](
        tile=products, targets=tile.targets, bias=tile.bias, temperature=tile.temperature,
        maximum=running.maximum, sums=running.sum, entropy_sum=running.entropy_sum, target=running.target,
        min_logits=min_logits, found=found, vocab_ids=vocab_ids, logits=logits,
        CAPACITY=0 if vocab_ids is None else vocab_ids.shape[1],
        n_rows=rows, width=width, first=tile.first, SCALE=tile.transform.scale, CAP=tile.transform.softcap,
        ENTROPY=entropy, **options("online_softmax", products.device),
    )  # fmt: skip
    if collecting is not None:
        collecting.candidates.drop_smaller_half_()
