"""dlogits: from a tile of raw products to their gradient, rounded once to the dtype of the next product.

Bytes: reads the tile once, and a few numbers a row; writes as many entries.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..interface import LOG_ZERO, Coefficients, Tile
from .configs import options, tuned
from .numerics import inverse, logit, rounded

_LOG_ZERO = tl.constexpr(LOG_ZERO)


@tuned("dlogits", key=["width"], restored=["tile"])
@triton.jit(
    do_not_specialize=["n_rows", "first"],
    do_not_specialize_on_alignment=[
        "rows", "targets", "temperature", "maximum", "log_sum", "at_target", "logprob_grad", "entropy_grad",
        "entropy", "log_floor",
    ],
)  # fmt: skip
def dlogits_kernel(  # type: ignore[no-untyped-def]
    tile,  # [R, C]
    out,  # [R, C], may be the tile: every program reads what it writes before it does
    rows,  # [R] int64 where in the tensors of the rows the row stands, or None: N is R
    targets,  # [N] int64
    bias,  # [C] or None
    temperature,  # [N] or None
    maximum,  # [N], as are the next three
    log_sum,
    at_target,
    logprob_grad,
    entropy_grad,  # [N] or None
    entropy,  # [N]
    log_floor,  # [N] or None: no tails
    n_rows,  # R
    width,  # C
    first,
    log_min_prob,
    TAILS: tl.constexpr,  # T
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    B_R: tl.constexpr,
    B_C: tl.constexpr,
):
    # The first T rows of the tile are not looked at; what belongs there is made with the next T.
    i_o = TAILS + tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    i_c = tl.program_id(1) * B_C + tl.arange(0, B_C)
    m_r, m_c = i_o < n_rows, i_c < width
    m_b = m_r[:, None] & m_c[None, :]
    o_b = i_o[:, None] * width + i_c[None, :]
    i_r = tl.load(rows + i_o, mask=m_r, other=0) if rows is not None else i_o
    x = tl.load(tile + o_b, mask=m_b, other=0.0)
    b = tl.load(bias + i_c, mask=m_c, other=0.0)[None, :] if bias is not None else None
    if temperature is not None:
        per_temperature = inverse(tl.load(temperature + i_r, mask=m_r, other=1.0))[:, None]
    else:
        per_temperature = None
    z, slope = logit(x, b, per_temperature, SCALE, CAP)

    m = tl.load(maximum + i_r, mask=m_r, other=0.0)[:, None]
    l = tl.load(log_sum + i_r, mask=m_r, other=0.0)[:, None]
    g = tl.load(logprob_grad + i_r, mask=m_r, other=0.0)[:, None]
    log_p = (z - m) - l
    column = tl.load(targets + i_r, mask=m_r, other=-1) - first
    is_target = i_c[None, :] == column[:, None]
    if TAILS > 0:  # noqa: SIM102
        if tl.program_id(0) * B_R < TAILS:
            in_tail = (z < m + (l + tl.load(log_floor + i_r, mask=m_r, other=0.0)[:, None])) & (is_target == 0)
            q = tl.exp(log_p - log_min_prob)
            if CAP is not None:
                q *= slope / SCALE if per_temperature is None else slope / (per_temperature * SCALE)
            q = tl.where(in_tail, q, 0.0)
            tl.store(out + o_b - TAILS * width, rounded(q, out), mask=m_b & (i_o < 2 * TAILS)[:, None])
    if entropy_grad is not None:
        e = tl.load(entropy_grad + i_r, mask=m_r, other=0.0)[:, None]
        h = tl.load(entropy + i_r, mask=m_r, other=0.0)[:, None]
        # Not tl.maximum, which would take a NaN away.
        log_p = tl.where(log_p < _LOG_ZERO, _LOG_ZERO, log_p)
        dz = -tl.exp(log_p) * (e * (log_p + h) + g)
    else:
        dz = -tl.exp(log_p) * g
    y = tl.load(at_target + i_r, mask=m_r, other=0.0)[:, None]
    dz = tl.where(is_target, y, dz) * slope
    tl.store(out + o_b, rounded(dz, out), mask=m_b)


def dlogits(
    products: Tensor,  # [R, C]
    tile: Tile,  # targets and temperature [N]
    coefficients: Coefficients,  # of N rows
    out: Tensor,  # [R, C], of any floating dtype; may be the products
    rows: Tensor | None = None,  # [R] int64
    tails: int = 0,
    min_prob: float = 1.0,
    log_floor: Tensor | None = None,  # [N]; with tails
) -> None:
    """From a tile of raw products to dL/dproducts:
    (g (1[v = y] - p) - e p (log p + H)) * softcap' * scale / temperature.

    With ``rows`` the targets, temperatures and coefficients are those of N rows, of which the tile holds these. With
    T = ``tails`` the first T rows of the tile are not looked at, and the first T rows of ``out`` become the tails of
    the T rows that follow: p * softcap' / min_prob where log p is below ``log_floor`` and the entry is not the target,
    zero elsewhere. (Divided by ``min_prob`` and without scale and temperature, they stay in the range of float16.)"""
    n_rows, width = products.shape
    dlogits_kernel[lambda meta: (triton.cdiv(n_rows - tails, meta["B_R"]), triton.cdiv(width, meta["B_C"]))](
        tile=products, out=out, rows=rows, targets=tile.targets, bias=tile.bias, temperature=tile.temperature,
        maximum=coefficients.maximum, log_sum=coefficients.log_sum, at_target=coefficients.at_target,
        logprob_grad=coefficients.logprob_grad,
        entropy=coefficients.entropy if coefficients.has_entropy else None,
        entropy_grad=coefficients.entropy_grad if coefficients.has_entropy else None, log_floor=log_floor,
        n_rows=n_rows, width=width, first=tile.first, log_min_prob=math.log(min_prob), TAILS=tails,
        SCALE=tile.transform.scale, CAP=tile.transform.softcap, **options("dlogits", products.device),
    )  # fmt: skip
