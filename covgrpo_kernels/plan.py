"""What the backward does with each row, decided on [N] vectors and the kept entries before it starts (no host sync).

A row is *dense*: it enters the matrix products. Or *sparse*: the entries the forward kept, those more probable than a
floor, have their gradient each, and the rest of the row, its tail, is replaced by one distribution for all rows times
what makes the row's sum zero. Or it is left out. Errors are bounded in the Frobenius norm, which is what rounding dZ to
a dtype is measured in, and in which a tail of many small entries is as small as it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles.eager import capping
from .tiles.interface import CAPACITY, LOG_ZERO, TAIL_ROWS, Candidates, Coefficients, Head, Results


class Kept(NamedTuple):
    """What the forward kept of R rows."""

    found: Tensor  # [R] int32 entries that reached the threshold; where they are more than K none is kept
    entries: Tensor  # [R, K] int32
    logits: Tensor  # [R, K]

    @classmethod
    def of(cls, candidates: Candidates) -> Kept:
        """In the order of the entries, so that sums over them have one; nothing of rows that have lost some."""
        _, found, entries, logits = candidates
        capacity = entries.shape[1]
        there = torch.arange(capacity, device=found.device) < found.where(found <= capacity, 0).unsqueeze(1)
        in_order, order = entries.where(there, torch.iinfo(entries.dtype).max).sort(1)
        return cls(found, in_order.where(there, 0), logits.gather(1, order).where(there, 0))

    def rows(self, chosen: Tensor) -> Kept:
        return Kept._make(value[chosen] for value in self)


class SparseRows(NamedTuple):
    """dL/dproducts of R rows: of each kept entry, and of all others together."""

    entries: Tensor  # [R, K + 1] int64, the target last
    values: Tensor  # [R, K + 1]
    used: Tensor  # [R, K + 1] bool
    tail: Tensor  # [R]
    mass: Tensor  # [R] probability of the others


class BackwardPlan(NamedTuple):
    dense: Tensor  # [N] bool, rows that enter the matrix products
    sparse: Tensor  # [N] bool, rows of which kept entries and the tail stand for all
    tail_rows: Tensor  # [TAIL_ROWS] dense rows that the tail is made of, or [0] where nothing is sparse
    error_bound: Tensor  # [] float64, the certificate: |error in dZ|_F <= error_bound * |dZ|_F; unbiased: of its RMS
    boost: Tensor | None = None  # [N] what the coefficients of the rows are multiplied with; None: 1

    def boosted(self, coefficient: Tensor) -> Tensor:
        return coefficient if self.boost is None else coefficient * self.boost.to(coefficient.dtype)

    def tensors(self) -> list[Tensor]:
        """What the backward's operator takes, of boosted coefficients."""
        return [self.dense, self.sparse, self.tail_rows, self.error_bound]


def resolve_grad_tol(grad_tol: float | str, dtype: torch.dtype) -> float:
    """``"auto"`` is an eighth of the input dtype's machine epsilon: half of what rounding dZ to it costs. With twice
    as much the head of the minimal loop's policy moved further from that of an exact run than rounding moved it, in two
    seeds of five steps (Adam makes whole steps of small gradients); with this `bench training` sees no difference."""
    if grad_tol == "auto":
        return torch.finfo(dtype).eps / 8
    if isinstance(grad_tol, (str, bool)) or not isinstance(grad_tol, (int, float)):
        raise TypeError(f"grad_tol must be a number or 'auto', got {grad_tol!r}")
    if not 0 <= grad_tol < 1:
        raise ValueError(f"grad_tol must be at least 0 and less than 1, got {grad_tol!r}")
    return float(grad_tol)


def probability_floor(grad_tol: float) -> float:
    """Entries less probable than this are a row's tail; 0 where there is to be none.

    A tail of mass m contributes at most sqrt(m * floor) to the row's error; m is some hundredths of 1 - p in a
    policy's batch, so that this floor spends about the tolerance. A higher one than 1e-4 saves nothing: there are few
    entries above it anyway. With a much lower one most rows would have more than CAPACITY."""
    floor = 25 * grad_tol**2
    return min(floor, 1e-4) if floor >= 1e-6 else 0.0


def sparse_rows(
    kept: Kept,
    results: Results,  # of R rows
    targets: Tensor,  # [R]
    logprob_grad: Tensor,  # [R] g
    entropy_grad: Tensor | None,  # [R] e
    head: Head,
    temperature: Tensor | None,  # [R]
    floor: float,
) -> SparseRows:
    coefficients = Coefficients.of(results, logprob_grad, entropy_grad)
    found, entries, z = kept
    entries = entries.long()
    places = torch.arange(entries.shape[1], device=entries.device)
    used = places < found.where(found <= len(places), 0).unsqueeze(1)
    used &= (z >= floors(results, floor).unsqueeze(1)) & (entries != targets.unsqueeze(1))
    log_p = (z - results.maximum.unsqueeze(1)) - results.log_total.unsqueeze(1)
    p = log_p.exp().where(used, 0)
    per_p = logprob_grad.unsqueeze(1)
    if entropy_grad is not None:
        log_p = log_p.clamp(min=LOG_ZERO)
        per_p = per_p + entropy_grad.unsqueeze(1) * (log_p + results.entropy.unsqueeze(1))
    dz = torch.cat([-p * per_p, coefficients.at_target.unsqueeze(1)], 1)
    tail = -dz.sum(1)
    mass = (-torch.expm1(results.logprob) - p.sum(1)).clamp(min=0)

    slope = torch.full_like(tail, head.scale) if temperature is None else head.scale / temperature
    dz = dz * slope.unsqueeze(1)
    if head.softcap is not None:
        at_target = (results.logprob + results.log_total) + results.maximum
        z = torch.cat([z, at_target.unsqueeze(1)], 1)
        dz = dz * capping(z, head.softcap, None if temperature is None else temperature.unsqueeze(1))
    used = torch.nn.functional.pad(used, (0, 1), value=True)
    return SparseRows(
        torch.cat([entries, targets.unsqueeze(1)], 1), dz.where(used, 0), used,
        tail * slope, mass,
    )  # fmt: skip


def floors(results: Results, floor: float) -> Tensor:  # [R]
    """The logits of entries as probable as the floor. One number for all who compare with it."""
    return results.maximum + (results.log_total + math.log(floor))


def tail_weights(logprob_grad: Tensor, entropy_grad: Tensor | None) -> Tensor:  # [R]
    """How much the tails of rows matter, and by which they are mixed."""
    return logprob_grad.abs() if entropy_grad is None else logprob_grad.abs() + entropy_grad.abs()


def plan_backward(
    results: Results,  # of N rows
    kept: Kept,
    targets: Tensor,  # [N]
    logprob_grad: Tensor,  # [N] g
    entropy_grad: Tensor | None,  # [N] e
    head: Head,
    temperature: Tensor | None,  # [N]
    grad_tol: float,
    chance: Tensor | None = None,  # [N] uniform in [0, 1)
) -> BackwardPlan:
    """Rows with g = e = 0 are out, always. Of the others, those with the smallest bounds on the squared error of their
    row of dZ, as sparse ones where they can be and else left out, until the sum is ``grad_tol`` squared times a lower
    bound on |dZ|_F squared.

    A row of dL/dz sums to zero and has the L1 norm 2|g|(1 - p), and at most 2|e|H more from the entropy: its L2 norm is
    at most that over the square root of 2. In a tail of mass m every p is below the floor f, and p (|g| + |e|
    (|log p| + H))^2 grows with p below 1/10: the sum of squares is at most m times its value at f. What stands for the
    tail is its sum times a distribution whose sum of squares is at most its largest entry, f over the mean mass of the
    rows it is made of. Both have one sign where there is no entropy coefficient, so that their squares add up; with one
    twice them. Softcap only shrinks all of this.

    With ``chance`` no row is sparse, and rows of a small bound are left out at random: `_keep_at_random`.
    """
    logprob, entropy, maximum, log_total = results
    live = logprob_grad != 0
    if entropy_grad is not None:
        live = live | (entropy_grad != 0)
    none = torch.zeros_like(live)
    no_rows = torch.zeros(0, dtype=torch.int64, device=live.device)
    if grad_tol == 0.0:
        return BackwardPlan(live, none, no_rows, torch.zeros((), dtype=torch.float64, device=live.device))

    t = 1.0 if temperature is None else temperature
    slope = abs(head.scale) / t
    upper = math.sqrt(2) * (torch.expm1(logprob) * logprob_grad).abs()
    if entropy_grad is not None:
        upper = upper + math.sqrt(2) * entropy_grad.abs() * entropy
    at_target = Coefficients.of(results, logprob_grad, entropy_grad).at_target
    if head.softcap is not None:
        at_target = at_target * capping(logprob + log_total + maximum, head.softcap, temperature)
    bound = (upper * slope).double().square()
    norm = (at_target * slope).double().square()

    if chance is not None:
        return _keep_at_random(live, bound.sqrt(), norm, grad_tol, chance)
    floor = probability_floor(grad_tol)
    can_be_sparse, tail_rows = none, no_rows
    if kept.entries.shape[1] and len(live) > TAIL_ROWS and floor > 0:
        rows = sparse_rows(kept, results, targets, logprob_grad, entropy_grad, head, temperature, floor)
        can_be_sparse = live & (kept.found <= CAPACITY) & rows.values.isfinite().all(1)
        norm = torch.linalg.vector_norm(rows.values, dim=1, dtype=torch.float64).square()
        weights = tail_weights(logprob_grad, entropy_grad)
        # What a subtraction leaves of 1 - p is known to some roundings of it.
        mass = rows.mass - torch.expm1(logprob) * (16 * torch.finfo(logprob.dtype).eps)
        # Where there are not so many, all of them are dense: no row without a gradient is ever in the tail.
        tail_rows = (weights * mass * slope).where(can_be_sparse, -1.0).topk(TAIL_ROWS).indices
        mixed = weights[tail_rows]
        largest = (floor * mixed.sum() / (mixed * rows.mass[tail_rows]).sum()).clamp(max=1)
        per_p = logprob_grad.abs()
        if entropy_grad is not None:
            per_p = per_p + entropy_grad.abs() * (entropy - math.log(floor))
        of_tail = mass.double() * floor * (per_p * slope).double().square() + rows.tail.double().square() * largest
        bound = (of_tail if entropy_grad is None else 2 * of_tail).where(can_be_sparse, bound)
        bound[tail_rows] = torch.inf

    bound = bound.where(live, 0)
    total = norm.where(live, 0).sum()
    in_order, order = bound.sort()
    within = torch.zeros_like(live).scatter_(0, order, in_order.cumsum(0) <= grad_tol**2 * total)
    error = bound.where(within, 0).sum()
    sparse = live & within & can_be_sparse
    return BackwardPlan(live & ~within, sparse, tail_rows, (error / total).sqrt().where(error > 0, 0))


def _keep_at_random(
    live: Tensor,  # [N]
    bound: Tensor,  # [N] float64, on the norm of the row of dZ
    norm: Tensor,  # [N] float64, its square from below
    grad_tol: float,
    chance: Tensor,  # [N]
) -> BackwardPlan:
    """Each row is kept with a probability proportional to its bound u, min(1, u / c), and multiplied by the inverse, so
    that the expected gradient is the exact one. Of all such choices this has the least variance, sum of u^2 (c / u - 1)
    over rows with u < c: c is as large as ``grad_tol`` squared of |dZ|_F squared allows."""
    u = bound.where(live, 0)
    total = norm.where(live, 0).sum()
    in_order = u.sort().values
    # Between two bounds that follow each other the variance is linear in c.
    c = (grad_tol**2 * total + in_order.square().cumsum(0)) / in_order.cumsum(0)
    following = torch.nn.functional.pad(in_order[1:], (0, 1), value=torch.inf)
    c = torch.minimum(c, following).where(c >= in_order, 0)
    c = c.amax() if len(c) else c.sum()
    probability = u / c
    at_random = probability < 1
    variance = (c * u - u.square()).where(at_random & (u > 0), 0).sum()
    kept = live & ~(chance >= probability)  # a NaN is kept
    none, no_rows = torch.zeros_like(live), torch.zeros(0, dtype=torch.int64, device=live.device)
    boost = (1 / probability).where(at_random & kept, 1)
    return BackwardPlan(kept, none, no_rows, (variance / total).sqrt().where(variance > 0, 0), boost)
