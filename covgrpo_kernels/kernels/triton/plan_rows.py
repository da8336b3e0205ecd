"""plan_rows: what the choice between dense, sparse and dropped needs to know of every row, in one launch.

It also prepares the sparse form of each row: its candidates are sorted by vocabulary id, because they come in any order
and the order of every sum has to be fixed, and the gradient of each takes the place of its logit.

Bytes: reads and writes 8 for each candidate that a row has room for, and some 80 more a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import LOG_ZERO, Candidates
from .configs import options
from .numerics import expm1, inverse, sort_rows

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_SQRT_2 = tl.constexpr(math.sqrt(2))
# What a subtraction leaves of 1 - p is known up to this share of it.
_MASS_ERROR = tl.constexpr(16 * torch.finfo(torch.float32).eps)

# The values of `RowPlan.kind`. NO_GRADIENT: both coefficients are zero. LIVE: has a gradient, but cannot be sparse.
# SPARSE_POSSIBLE: all of its candidates are known and everything about it is finite. TAIL_ROW: is dense, and its tail
# stands for the tails of sparse rows (`assign_tails`).
NO_GRADIENT, LIVE, SPARSE_POSSIBLE, TAIL_ROW = range(4)
_NO_GRADIENT, _LIVE = tl.constexpr(NO_GRADIENT), tl.constexpr(LIVE)
_SPARSE_POSSIBLE = tl.constexpr(SPARSE_POSSIBLE)

# Sorts after every vocabulary id.
_LAST_KEY = tl.constexpr(0x7FFFFFFF << 32)


class RowPlan(NamedTuple):
    """What is known of N rows before it is decided what happens to them. Gradients are in the raw products h_t . W_v,
    except for ``at_target``. The *tail* of a row is all of its entries but the kept ones and its target."""

    kind: Tensor  # [N] int8: NO_GRADIENT, LIVE, SPARSE_POSSIBLE or TAIL_ROW
    kept: Tensor  # [N] int32 number of entries with a gradient of their own, without the target
    vocab_ids: Tensor | None  # [N, K] int32 of the kept entries, ascending; beyond ``kept`` there is nothing of use
    values: Tensor | None  # [N, K] float32 gradients of the kept entries; beyond ``kept`` zero
    per_row: Tensor  # [6, N] float32 and
    bounds: Tensor  # [3, N] float64: what the properties name

    @property
    def target_value(self) -> Tensor:  # [N]
        """Gradient of the target's entry."""
        return self.per_row[0]

    @property
    def at_target(self) -> Tensor:  # [N]
        """Gradient in the target's logit, as `dlogits` takes it."""
        return self.per_row[1]

    @property
    def tail(self) -> Tensor:  # [N]
        """Gradient of the whole tail: minus the sum of the others, before the softcap's slope."""
        return self.per_row[2]

    @property
    def mass(self) -> Tensor:  # [N]
        """Probability of the tail, rounded up."""
        return self.per_row[3]

    @property
    def tail_weight(self) -> Tensor:  # [N]
        """The size of the tail; -1 where a row cannot be sparse."""
        return self.per_row[4]

    @property
    def log_floor(self) -> Tensor:  # [N]
        """Logarithm of the probability that every entry of the tail is below."""
        return self.per_row[5]

    @property
    def bound(self) -> Tensor:  # [N]
        """On the squared norm of the row's gradient, so of its error where it is dropped."""
        return self.bounds[0]

    @property
    def norm(self) -> Tensor:  # [N]
        """Lower bound on the squared norm of the row's gradient."""
        return self.bounds[1]

    @property
    def tail_bound(self) -> Tensor:  # [N]
        """On the squared norm of the gradient of the tail."""
        return self.bounds[2]


@triton.jit
def _row_coefficients(x, h, g, e):  # type: ignore[no-untyped-def]
    """Of rows with the log-prob x, the entropy h and the coefficients g and e (or None): the gradient in the target's
    logit, an upper bound on the norm of the gradient in all logits, |g| + |e|, and whether there is a gradient."""
    at_target = -expm1(x) * g
    upper = _SQRT_2 * tl.abs(at_target)
    size = tl.abs(g)
    live = g != 0.0
    if e is not None:
        live = live | (e != 0.0)
        # Not tl.maximum, which would take a NaN away.
        log_p_y = tl.where(x < _LOG_ZERO, _LOG_ZERO, x)
        at_target -= e * tl.exp(x) * (log_p_y + h)
        upper += _SQRT_2 * tl.abs(e) * h
        size += tl.abs(e)
    return at_target, upper, size, live


@triton.jit
def _slopes(temperature, i_r, m_r, SCALE: tl.constexpr, CAP: tl.constexpr, B_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """The derivative of a row's logits in its products but for the softcap, and what a logit is multiplied by to be the
    tanh in it (1 without one)."""
    slope = tl.full([B_R], SCALE, tl.float32)
    per_cap = tl.full([B_R], 1.0 if CAP is None else 1.0 / CAP, tl.float32)
    if temperature is not None:
        t = tl.load(temperature + i_r, mask=m_r, other=1.0)
        slope = SCALE * inverse(t)
        per_cap *= t
    return slope, per_cap


@triton.jit
def _squared_bounds(upper, target_value, slope):  # type: ignore[no-untyped-def]
    """Upper and lower bound on the squared norm of a row's gradient, infinite where anything is not finite."""
    bound = upper.to(tl.float64) * tl.abs(slope).to(tl.float64)
    bound *= bound
    norm = target_value.to(tl.float64) * target_value.to(tl.float64)
    norm = tl.where(bound < float("inf"), norm, float("inf"))
    # A bound of zero where the row is not zero is a number that underflowed.
    return tl.where((bound > 0.0) | (norm == 0.0), bound, float("inf")), norm


@triton.jit
def _sorted_candidates(found, vocab_ids, logits, targets, i_r, m_r, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's candidates without its target, by vocabulary id: ids and logits, how many, and whether none is lost."""
    i_k = tl.arange(0, K)
    o_k = i_r[:, None] * K + i_k[None, :]
    n_found = tl.load(found + i_r, mask=m_r, other=0)
    complete = n_found <= K
    m_k = (m_r & complete)[:, None] & (i_k[None, :] < n_found[:, None])
    v = tl.load(vocab_ids + o_k, mask=m_k, other=0)
    z = tl.load(logits + o_k, mask=m_k, other=0.0)
    y = tl.load(targets + i_r, mask=m_r, other=-1).to(tl.int32)
    m_k = m_k & (v != y[:, None])
    # Ids are distinct within a row, so that sorting them with the bits of the logit below takes the logit along.
    key = (v.to(tl.int64) << 32) | (z.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    key = sort_rows(tl.where(m_k, key, _LAST_KEY))
    count = tl.sum(m_k.to(tl.int32), 1)
    z = key.to(tl.int32).to(tl.float32, bitcast=True)
    return (key >> 32).to(tl.int32), tl.where(i_k[None, :] < count[:, None], z, 0.0), count, complete


@triton.jit
def _candidate_gradients(z, m_k, m, l, h, g, e):  # type: ignore[no-untyped-def]
    """Probabilities of the candidates with the logits z, and the gradients in them; zero outside of the mask."""
    log_p = (z - m[:, None]) - l[:, None]
    p = tl.where(m_k, tl.exp(log_p), 0.0)
    if e is not None:
        log_p = tl.where(log_p < _LOG_ZERO, _LOG_ZERO, log_p)
        dz = -p * (e[:, None] * (log_p + h[:, None]) + g[:, None])
    else:
        dz = -p * g[:, None]
    return p, tl.where(m_k, dz, 0.0)


@triton.jit
def _tail_bound(mass, log_floor, h, g, e, slope):  # type: ignore[no-untyped-def]
    """On the sum of squares of the gradient of a tail: its mass times the value at the floor, since p (|g| + |e| (|log
    p| + H))^2 grows with p below 1/10."""
    largest = tl.abs(g)
    if e is not None:
        largest += tl.abs(e) * (h - log_floor)
    per_p = largest.to(tl.float64) * tl.abs(slope).to(tl.float64)
    return mass.to(tl.float64) * tl.exp(log_floor).to(tl.float64) * per_p * per_p


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "found", "vocab_ids", "logits", "min_logits", "stats", "targets", "logprob_grad", "entropy_grad", "temperature",
        "kind", "kept", "per_row", "bounds",
    ],
)  # fmt: skip
def plan_rows_kernel(  # type: ignore[no-untyped-def]
    found,  # [N] int32, or None as are the next three: no row can be sparse
    vocab_ids,  # [N, K] int32, sorted in place
    logits,  # [N, K], replaced by gradients
    min_logits,  # [N]
    stats,  # [4, N]: logprob, entropy, maximum, log_sum
    targets,  # [N] int64
    logprob_grad,  # [N]
    entropy_grad,  # [N] or None
    temperature,  # [N] or None
    kind,  # [N] int8
    kept,  # [N] int32
    per_row,  # [6, N] float32: target_value, at_target, tail, mass, tail_weight, log_floor
    bounds,  # [3, N] float64: bound, norm, tail_bound
    n_rows,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    K: tl.constexpr,
    B_R: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * B_R + tl.arange(0, B_R)
    m_r = i_r < n_rows
    n = n_rows.to(tl.int64)
    x = tl.load(stats + i_r, mask=m_r, other=0.0)
    h = tl.load(stats + n + i_r, mask=m_r, other=0.0)
    m = tl.load(stats + 2 * n + i_r, mask=m_r, other=0.0)
    l = tl.load(stats + 3 * n + i_r, mask=m_r, other=0.0)
    g = tl.load(logprob_grad + i_r, mask=m_r, other=0.0)
    e = tl.load(entropy_grad + i_r, mask=m_r, other=0.0) if entropy_grad is not None else None
    at_target, upper, size, live = _row_coefficients(x, h, g, e)
    slope, per_cap = _slopes(temperature, i_r, m_r, SCALE, CAP, B_R)
    target_value = at_target * slope
    if CAP is not None:
        capped = ((x + l) + m) * per_cap
        target_value *= 1.0 - capped * capped
    bound, norm = _squared_bounds(upper, target_value, slope)
    state = tl.where(live, _LIVE, _NO_GRADIENT)
    count = tl.zeros([B_R], tl.int32)
    tail = tl.zeros([B_R], tl.float32)
    mass = tail
    log_floor = tail
    tail_weight = tail - 1.0
    tail_bound = tail.to(tl.float64)
    if found is not None:
        v, z, count, complete = _sorted_candidates(found, vocab_ids, logits, targets, i_r, m_r, K)
        o_k = i_r[:, None] * K + tl.arange(0, K)[None, :]
        p, dz = _candidate_gradients(z, tl.arange(0, K)[None, :] < count[:, None], m, l, h, g, e)
        tail = -(tl.sum(dz, 1) + at_target) * slope
        # Rounded up, so that no tail that is made a distribution by it adds up to more than one.
        not_p = -expm1(x)
        mass = tl.maximum(not_p - tl.sum(p, 1), 0.0) + _MASS_ERROR * not_p
        values = dz * slope[:, None]
        if CAP is not None:
            values *= 1.0 - (z * per_cap[:, None]) * (z * per_cap[:, None])
        # In float64: squares of the coefficients of a mean over many tokens are below what float32 can hold.
        squares = values.to(tl.float64)
        norm += tl.sum(squares * squares, 1)
        log_floor = (tl.load(min_logits + i_r, mask=m_r, other=0.0) - m) - l
        tail_bound = _tail_bound(mass, log_floor, h, g, e, slope)
        # Comparisons with NaN are false: what is not finite is not sparse.
        norm = tl.where(tl.abs(tail) < float("inf"), norm, float("inf"))
        finite = (norm < float("inf")) & (tail_bound < float("inf"))
        possible = live & complete & finite
        state = tl.where(possible, _SPARSE_POSSIBLE, state)
        tail_weight = tl.where(possible, size * mass * tl.abs(slope), -1.0)
        tl.debug_barrier()  # every thread has read what is written over
        tl.store(vocab_ids + o_k, v, mask=m_r[:, None])
        tl.store(logits + o_k, values, mask=m_r[:, None])

    tl.store(kind + i_r, state.to(tl.int8), mask=m_r)
    tl.store(kept + i_r, count, mask=m_r)
    tl.store(per_row + i_r, target_value, mask=m_r)
    tl.store(per_row + n + i_r, at_target, mask=m_r)
    tl.store(per_row + 2 * n + i_r, tail, mask=m_r)
    tl.store(per_row + 3 * n + i_r, mass, mask=m_r)
    tl.store(per_row + 4 * n + i_r, tail_weight, mask=m_r)
    tl.store(per_row + 5 * n + i_r, log_floor, mask=m_r)
    tl.store(bounds + i_r, tl.where(live, bound, 0.0), mask=m_r)
    tl.store(bounds + n + i_r, tl.where(live, norm, 0.0), mask=m_r)
    tl.store(bounds + 2 * n + i_r, tail_bound, mask=m_r)


def plan_rows(
    candidates: Candidates | None,  # of N rows; None: no row can be sparse
    stats: Tensor,  # [4, N] float32: logprob, entropy, maximum, log_sum
    targets: Tensor,  # [N] int64
    logprob_grad: Tensor,  # [N] float32
    entropy_grad: Tensor | None,  # [N] float32
    temperature: Tensor | None,  # [N] float32
    *,
    scale: float,
    softcap: float | None,
) -> RowPlan:
    """What `sparse_entries` and the first part of `plan_backward` compute, of all rows. The candidates are consumed:
    their vocabulary ids are sorted in place and their logits replaced by gradients, as they are the only tensors of a
    size that matters. K is a power of two. Without candidates nothing is known of tails."""
    n_rows, device = len(targets), targets.device
    found, vocab_ids, logits, min_logits = (None, None, None, None) if candidates is None else candidates
    kind = torch.empty(n_rows, dtype=torch.int8, device=device)
    kept = torch.empty(n_rows, dtype=torch.int32, device=device)
    per_row = torch.empty(6, n_rows, dtype=torch.float32, device=device)
    bounds = torch.empty(3, n_rows, dtype=torch.float64, device=device)
    if n_rows:
        plan_rows_kernel[lambda meta: (triton.cdiv(n_rows, meta["B_R"]),)](
            found=found, vocab_ids=vocab_ids, logits=logits, min_logits=min_logits, stats=stats, targets=targets,
            logprob_grad=logprob_grad, entropy_grad=entropy_grad, temperature=temperature, kind=kind, kept=kept,
            per_row=per_row, bounds=bounds, n_rows=n_rows,
            SCALE=scale, CAP=softcap, K=1 if vocab_ids is None else vocab_ids.shape[1], **options("plan_rows", device),
        )  # fmt: skip
    return RowPlan(kind, kept, vocab_ids, logits, per_row, bounds)
