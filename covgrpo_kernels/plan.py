"""What the backward does with each row, decided on [N] vectors and the candidates before it starts, without a host
sync.

- *dense*: the row enters the matrix products.
- *sparse*: its most probable entries, those above the row's own floor, have their gradient each. The rest of the row,
  its tail, is replaced by a mixture of the tails of dense rows, scaled so that the row sums to zero.
- *dropped*: the row gets no gradient.

Errors are bounded in the Frobenius norm: it is what the rounding of dL/dlogits to a dtype is measured in, and a tail of
many small entries is small in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import HeadInputs, Precision
from .kernels.interface import DENSE, DROPPED, SPARSE, TAIL_ROWS, Candidates, Coefficients, RowStats
from .sparse import SparseEntries, sparse_entries, tail_mix

# In the budget for errors no row counts for more than this many times the mean. Below 16 the ordinary spread of a
# policy's tokens would be cut off; with 32 it is not, and one token in 32 may be of any size without buying errors in
# the others.
MAX_SHARE_OF_BUDGET = 32


class BackwardPlan(NamedTuple):
    row_class: Tensor  # [N] int8: DROPPED, SPARSE or DENSE
    tail_rows: (
        Tensor  # [TAIL_ROWS] int64, dense rows whose tails stand for those of sparse rows; [0] where none can be sparse
    )
    error_bound: Tensor  # [] float64: |error in dL/dlogits|_F <= error_bound * |dL/dlogits|_F; unbiased mode: its RMS
    inverse_prob: Tensor  # [N] what coefficients are multiplied by in the unbiased mode; [0] in the other

    @property
    def dense(self) -> Tensor:  # [N] bool
        return self.row_class == DENSE

    @property
    def sparse(self) -> Tensor:  # [N] bool
        return self.row_class == SPARSE

    @classmethod
    def all_dense(cls, live: Tensor) -> BackwardPlan:  # [N] bool
        """Of the rows that are live; the others are dropped."""
        none = torch.zeros(0, dtype=torch.int64, device=live.device)
        zero = torch.zeros((), dtype=torch.float64, device=live.device)
        return cls(live.to(torch.int8) * DENSE, none, zero, zero.new_zeros(0))

    def weigh(self, coefficient: Tensor) -> Tensor:  # [N]
        """The coefficients that the backward takes."""
        if not len(self.inverse_prob):
            return coefficient
        return coefficient * self.inverse_prob.to(coefficient.dtype)


def min_probability(grad_tol: float, factor: float = 4.0) -> float:
    """Vocabulary ids less probable than this belong to a row's tail; 0 where there is to be none. The floor of a row
    that has no room for all of the others is higher.

    A tail of mass m and floor f contributes at most sqrt(m f) to the row's error, and m is some hundredths of 1 - p in
    a policy's batch. So with f = 25 grad_tol^2 the rows' own tails take some tenths of the tolerance, and borrowed ones
    the rest. A lower floor makes both smaller: 4 grad_tol^2 halves the error that is left, for ten more entries a row,
    which is little where an entry costs next to nothing (``factor``). Above 1e-4 nothing is saved, since few ids are
    more probable than that anyway; below 1e-6 there is no room. With a tolerance below 2e-4 hardly a row would be
    sparse."""
    return min(max(factor * grad_tol**2, 1e-6), 1e-4) if grad_tol >= 2e-4 else 0.0


def can_have_tails(rows: int, capacity: int, grad_tol: float) -> bool:
    return capacity > 0 and rows > TAIL_ROWS and min_probability(grad_tol) > 0


def backward_plan_shapes(rows: int, capacity: int, precision: Precision) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of the fields of the plan."""
    unbiased = precision.uniform is not None
    tails = TAIL_ROWS if not unbiased and can_have_tails(rows, capacity, precision.grad_tol) else 0
    return [
        ((rows,), torch.int8),
        ((tails,), torch.int64),
        ((), torch.float64),
        ((rows if unbiased and precision.grad_tol else 0,), torch.float64),
    ]


def plan_backward(
    inputs: HeadInputs,  # N rows
    stats: RowStats,
    candidates: Candidates,
    logprob_grad: Tensor,  # [N] g
    entropy_grad: Tensor | None,  # [N] e
    precision: Precision,
) -> BackwardPlan:
    """Rows with g = e = 0 are dropped, always. Of the others, those with the smallest bounds on the squared error of
    their row of dL/dlogits are sparse where they can be and else dropped, while the sum of the bounds is at most
    ``grad_tol`` squared times a lower bound on |dL/dlogits|_F squared.

    In the unbiased mode no row is sparse, and rows of a small bound are dropped at random: `_drop_at_random`.
    """
    live = logprob_grad != 0
    if entropy_grad is not None:
        live = live | (entropy_grad != 0)
    if precision.grad_tol == 0.0:
        return BackwardPlan.all_dense(live)
    bound, norm = _row_bounds(inputs, stats, logprob_grad, entropy_grad)
    if precision.uniform is not None:
        return _drop_at_random(live, bound, norm, precision.grad_tol, precision.uniform)

    plan = BackwardPlan.all_dense(live)
    finite = bound.isfinite() & norm.isfinite()
    can_be_sparse = torch.zeros_like(live)
    if can_have_tails(len(live), candidates.capacity, precision.grad_tol):
        entries = sparse_entries(inputs, stats, candidates, logprob_grad, entropy_grad)
        finite &= entries.values.isfinite().all(1) & entries.tail.isfinite()
        can_be_sparse = live & finite & (candidates.found <= candidates.capacity)
        norm = torch.linalg.vector_norm(entries.values, dim=1, dtype=torch.float64).square()
        tail_rows, sparse_bound = _choose_tails(inputs, stats, entries, can_be_sparse, logprob_grad, entropy_grad)
        plan = plan._replace(tail_rows=tail_rows)
        bound = sparse_bound.where(can_be_sparse, bound)
    return _within_budget(plan, live, finite, can_be_sparse, bound, norm, precision.grad_tol)


def _row_bounds(
    inputs: HeadInputs, stats: RowStats, g: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor]:  # [N], [N] float64
    """An upper bound on the squared L2 norm of each row of dL/dproducts, and a lower bound: its entry at the target.

    A row of dL/dlogits sums to zero and has the L1 norm 2|g|(1 - p), and from the entropy at most 2|e|H more; its L2
    norm is at most that over the square root of 2. A softcap only makes it smaller."""
    slope = inputs.transform.size_of_slope(inputs.temperature)
    upper = (torch.expm1(stats.logprob) * g).abs()
    if e is not None:
        upper = upper + e.abs() * stats.entropy
    at_target = Coefficients.of(stats, g, e).at_target
    if inputs.transform.softcap is not None:
        target_logit = stats.logprob + stats.log_sum + stats.maximum
        at_target = at_target * inputs.transform.softcap_slope(target_logit, inputs.temperature)
    return 2 * (upper * slope).double().square(), (at_target * slope).double().square()


def _choose_tails(
    inputs: HeadInputs,
    stats: RowStats,
    entries: SparseEntries,
    can_be_sparse: Tensor,  # [N] bool
    g: Tensor,
    e: Tensor | None,
) -> tuple[Tensor, Tensor]:  # [TAIL_ROWS] int64, [N] float64
    """(rows whose tails are used, bound on the squared error of each row as a sparse one).

    The rows with the heaviest tails are dense anyway and give theirs; `sparse.tail_mix` says how a row mixes them.

    In a tail of mass m every p is below the row's own floor f, and p (|g| + |e| (|log p| + H))^2 grows with p below
    1/10: the sum of squares is at most m times its value at f. What replaces the tail is its sum times a mixture of the
    tails of other rows, each divided by its mass. The sum of a distribution's squares is at most its largest entry, and
    that of this mixture is at most the mixture of f / m of the rows that give the tails. Both have one sign where there
    is no entropy coefficient, so that their squares add up; with one, twice them. A softcap only makes all of this
    smaller."""
    slope = inputs.transform.size_of_slope(inputs.temperature)
    # What a subtraction leaves of 1 - p is known up to a few roundings of it.
    mass = entries.mass - torch.expm1(stats.logprob) * (16 * torch.finfo(stats.packed.dtype).eps)
    # A row of a huge coefficient is dense anyway, and its tail may have next to no mass.
    coefficient = (g.abs() if e is None else g.abs() + e.abs()).double().where(can_be_sparse, 0)
    most = budget_total(coefficient.square()) * MAX_SHARE_OF_BUDGET / (coefficient > 0).sum().clamp(min=1)
    # Where fewer rows than that can be sparse, all of them are dense: a tail is never that of a row without a gradient.
    weight = (torch.minimum(coefficient, most.sqrt()) * mass * slope).where(can_be_sparse, -1.0)
    tail_rows = weight.topk(TAIL_ROWS).indices
    largest = (entries.floor / mass)[tail_rows].clamp(max=1).double()
    largest = tail_mix(inputs.hidden, inputs.hidden[tail_rows]).double() @ largest
    per_p = g.abs()
    if e is not None:
        per_p = per_p + e.abs() * (stats.entropy - entries.floor.log())
    own_tail = mass.double() * entries.floor * (per_p * slope).double().square()
    borrowed_tail = entries.tail.double().square() * largest
    bound = own_tail + borrowed_tail if e is None else 2 * (own_tail + borrowed_tail)
    bound[tail_rows] = torch.inf
    return tail_rows, bound


def _within_budget(
    plan: BackwardPlan,
    live: Tensor,  # [N] bool
    finite: Tensor,  # [N] bool
    can_be_sparse: Tensor,  # [N] bool
    bound: Tensor,  # [N] float64, on the squared error of the row if it is sparse, or else dropped
    norm: Tensor,  # [N] float64, a lower bound on the squared norm of the row
    grad_tol: float,
) -> BackwardPlan:
    """A row that is not finite is dense and takes part in no sum: no gradient is quieter than the exact one."""
    # A bound of zero where the row is not zero is a square that underflowed.
    bound = bound.where(finite & ((bound > 0) | (norm == 0)), torch.inf).where(live, 0)
    norm = norm.where(live & finite, 0)
    ascending, order = bound.sort()
    budget = grad_tol**2 * budget_total(norm)
    within = torch.zeros_like(live).scatter_(0, order, ascending.cumsum(0) <= budget)
    error = bound.where(within, 0).sum()
    error_bound = (error / norm.sum()).sqrt().where(error > 0, 0).where((finite | ~live).all(), torch.inf)
    row_class = torch.where(live & ~within, DENSE, torch.where(live & can_be_sparse, SPARSE, DROPPED))
    return plan._replace(row_class=row_class.to(torch.int8), error_bound=error_bound)


def budget_total(norm: Tensor) -> Tensor:  # [N] float64, finite -> []
    """The sum of squared norms in which no row counts for more than s = MAX_SHARE_OF_BUDGET times the mean: the largest
    T with T = sum of min(norm, s * T / n), where n rows have a norm. A token with a coefficient a million times the
    others' then buys no errors in theirs. T is at most the sum of all norms, so that the bound holds for that too.

    If the j largest rows count as if they were at the limit, T is at most (sum of the others) / (1 - j * s / n), for
    any j for which that is positive; for the number of rows that are above the limit it is equal to it."""
    if not len(norm):
        return norm.sum()
    share = MAX_SHARE_OF_BUDGET / (norm > 0).sum().clamp(min=1).double()
    others = norm.sort().values.cumsum(0).flip(0)
    left = 1 - share * torch.arange(len(norm), dtype=torch.float64, device=norm.device)
    return (others / left).where(left > 0, torch.inf).amin()


def _drop_at_random(
    live: Tensor,  # [N] bool
    bound: Tensor,  # [N] float64, on the squared norm of the row of dL/dlogits
    norm: Tensor,  # [N] float64, a lower bound on it
    grad_tol: float,
    uniform: Tensor,  # [N]
) -> BackwardPlan:
    """Each row is kept with a probability proportional to its bound u, min(1, u / c), and multiplied by the inverse, so
    that the expected gradient is the exact one. Of all such choices this has the least variance, the sum of u^2 (c / u
    - 1) over the rows with u < c: c is as large as ``grad_tol`` squared of |dL/dlogits|_F squared allows. A row that is
    not finite is kept."""
    finite = bound.isfinite() & norm.isfinite()
    u = bound.sqrt().where(live & finite, 0)
    total = norm.where(live & finite, 0).sum()
    ascending = u.sort().values
    # Between two consecutive bounds the variance is linear in c.
    c = (grad_tol**2 * total + ascending.square().cumsum(0)) / ascending.cumsum(0)
    following = torch.nn.functional.pad(ascending[1:], (0, 1), value=torch.inf)
    c = torch.minimum(c, following).where(c >= ascending, 0)
    c = c.amax() if len(c) else c.sum()
    probability = u / c
    at_random = finite & (probability < 1)
    variance = (c * u - u.square()).where(at_random & (u > 0), 0).sum()
    kept = live & ~(at_random & (uniform >= probability))
    error_bound = (variance / total).sqrt().where(variance > 0, 0)
    inverse_prob = (1 / probability).where(at_random & kept, 1)
    return BackwardPlan.all_dense(kept)._replace(error_bound=error_bound, inverse_prob=inverse_prob)
