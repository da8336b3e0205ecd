"""What every backend of the tile operations takes and gives.

A tile is a contiguous [R, C] slice of the raw products h_t . W_v in float32 (float64 for float64 inputs), R rows
by C vocabulary entries from ``first`` on; the operations may overwrite it. C is a multiple of BLOCK, or less than it.
All other tensors are contiguous too.
A backend is a module with the functions ``fold``, ``grad``, ``group_weights``, ``sparse_product`` and ``multiplies`` of
`eager.py` and the number ``TEMPORARIES``. One that multiplies some dtype itself has ``fold_products`` and
``grad_products`` of `cpp.py` too, which take hidden states and a slice of the head where the others take a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entries folded together before they join a row's running statistics. Fixed, so that the order of every sum, and
# with it every bit, is the same however the vocabulary is cut into tiles.
BLOCK = 1024

# Stands for the maximum of no entry: every finite logit is larger, and it can be subtracted without a NaN.
NO_MAX = -1e30
# Stands for the logarithm of zero: exp of it is zero in float64 too, and times zero it is zero and not NaN.
LOG_ZERO = -1e3


# Candidates that a row has room for. A row that has more is dense in the backward.
CAPACITY = 64
# Rows whose tails stand for those of all: with the row that has their place, a vector of the C++ backend.
TAIL_ROWS = 15


class Head(NamedTuple):
    """What turns raw products into logits: softcap(scale * (product + bias)) / temperature of the row."""

    scale: float
    softcap: float | None


class Results(NamedTuple):
    """What the forward gives of R rows. One without a finite logit has no distribution: log-prob and maximum NaN."""

    logprob: Tensor  # [R] of the target
    entropy: Tensor  # [R] nats; meaningless where the state was folded without entropy
    maximum: Tensor  # [R] largest logit
    log_total: Tensor  # [R] log of the sum of exp(z - maximum) over all entries


class State(NamedTuple):
    """Running statistics of R rows. The maximum stays out of the sums, so that 1 - p of a confident token and
    its entropy have no cancellation."""

    maximum: Tensor  # [R] largest logit m so far
    total: Tensor  # [R] sum of exp(z - m) over the other entries
    moment: Tensor  # [R] sum of exp(z - m) (m - z) over the other entries; stays zero without entropy
    target: Tensor  # [R] logit of the target, NaN until its tile came

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> State:
        zeros = torch.zeros(2, rows, dtype=dtype, device=device)
        maximum = torch.full((rows,), NO_MAX, dtype=dtype, device=device)
        return cls(maximum, zeros[0], zeros[1], torch.full_like(maximum, torch.nan))

    def rows(self, block: slice) -> State:
        return State._make(value[block] for value in self)

    def results(self) -> Results:
        m, s, u, target = self
        log_total = s.log1p()
        maximum = m.where(m != NO_MAX, torch.nan)
        return Results((target - maximum) - log_total, log_total + u / (1 + s), maximum, log_total)


class Candidates(NamedTuple):
    """Entries of R rows that the backward may need, noted while the logits are there: those that reach a threshold.
    In any order; those beyond the capacity are counted but lost."""

    threshold: Tensor  # [R] logit
    found: Tensor  # [R] int32
    entries: Tensor  # [R, K] int32
    logits: Tensor  # [R, K]

    @classmethod
    def empty(cls, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Candidates:
        found = torch.zeros(rows, dtype=torch.int32, device=device)
        entries = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        threshold = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        return cls(threshold, found, entries, torch.zeros(rows, capacity, dtype=dtype, device=device))

    def rows(self, block: slice) -> Candidates:
        return Candidates._make(value[block] for value in self)


class Coefficients(NamedTuple):
    """What the gradient of R rows takes besides the logits."""

    maximum: Tensor  # [R] of the forward's results, as is the next
    log_total: Tensor  # [R]
    at_target: Tensor  # [R] dL/dlogit of the target: from the log-prob, 1 - p without cancellation
    logprob_grad: Tensor  # [R] g = dL/dlogprob
    entropy: Tensor  # [R]
    entropy_grad: Tensor | None  # [R] e = dL/dentropy

    @classmethod
    def of(cls, results: Results, logprob_grad: Tensor, entropy_grad: Tensor | None) -> Coefficients:
        logprob, entropy, maximum, log_total = results
        at_target = -torch.expm1(logprob) * logprob_grad
        if entropy_grad is not None:
            at_target = at_target - entropy_grad * logprob.exp() * (logprob.clamp(min=LOG_ZERO) + entropy)
        return cls(maximum, log_total, at_target, logprob_grad, entropy, entropy_grad)

    def rows(self, block: slice) -> Coefficients:
        return Coefficients._make(None if value is None else value[block] for value in self)


class Moments(NamedTuple):
    """What the weight of a token is made of besides its own log-prob and advantage, of S scopes, float64."""

    logprob: Tensor  # [S] mean
    advantage: Tensor  # [S] mean
    std: Tensor  # [S] of the covariances; zero where it is zero within rounding
    peak: Tensor  # [S] largest exponent of the Gaussian
    factor: Tensor  # [S] what weights add up to over the sum of exp(exponent - peak)


class GroupWeights(NamedTuple):
    """All float64: these are a few numbers per token, and differences of log-probs are what they are made of."""

    weights: Tensor  # [N] W_t, zero where masked
    covariance: Tensor  # [N] c_t, zero where masked
    advantage_deviation: Tensor  # [N] A_t less its mean, zero where masked
    std: Tensor  # [bound] sqrt(s2) of each scope, zero where it is zero within rounding
