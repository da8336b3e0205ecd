"""Which rows the backward has to visit, decided on [N] vectors before it starts (no host sync)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles.interface import Head


class BackwardPlan(NamedTuple):
    live: Tensor  # [N] bool, rows that enter the matrix products
    error_bound: Tensor  # [] float64, the certificate: |error in dZ|_1 <= error_bound * |dZ|_1


def resolve_grad_tol(grad_tol: float | str, dtype: torch.dtype) -> float:
    """``"auto"`` is a quarter of the input dtype's machine epsilon: about what rounding dZ to it costs."""
    if grad_tol == "auto":
        return torch.finfo(dtype).eps / 4
    if isinstance(grad_tol, (str, bool)) or not isinstance(grad_tol, (int, float)):
        raise TypeError(f"grad_tol must be a number or 'auto', got {grad_tol!r}")
    if not 0 <= grad_tol < 1:
        raise ValueError(f"grad_tol must be at least 0 and less than 1, got {grad_tol!r}")
    return float(grad_tol)


def plan_backward(
    logprob: Tensor,  # [N]
    entropy: Tensor,  # [N]
    lse: Tensor,  # [N]
    logprob_grad: Tensor,  # [N] g
    entropy_grad: Tensor | None,  # [N] e
    head: Head,
    temperature: Tensor | None,  # [N]
    grad_tol: float,
) -> BackwardPlan:
    """Rows with g = e = 0 are out, always. Of the others, those with the smallest upper bounds on their row of
    dZ are left out while the bounds add up to at most ``grad_tol`` times a lower bound on the whole |dZ|_1.

    A row of dL/dz has the L1 norm 2|g|(1 - p), and at most 2|e|H more from the entropy; softcap only shrinks it.
    """
    live = logprob_grad != 0
    if entropy_grad is not None:
        live = live | (entropy_grad != 0)
    if grad_tol == 0.0:
        return BackwardPlan(live, torch.zeros((), dtype=torch.float64, device=logprob.device))

    t = 1.0 if temperature is None else temperature
    slope = abs(head.scale) / t
    log_prob_part = -torch.expm1(logprob) * logprob_grad
    upper = 2 * log_prob_part.abs()
    lower = upper
    if entropy_grad is not None:
        upper = upper + 2 * entropy_grad.abs() * entropy
        # A row sums to zero, so that its other entries weigh at least as much as the target's.
        at_target = log_prob_part - entropy_grad * logprob.exp() * (logprob + entropy)
        lower = 2 * at_target.abs()
    if head.softcap is not None:
        # The target's entry alone: how much softcap shrinks the others is not known.
        lower = lower / 2 * (1 - ((logprob + lse) * t / head.softcap).square())
    upper = (upper * slope).where(live, 0).double()
    total = (lower * slope).where(live, 0).double().sum()

    in_order, order = upper.sort()
    skipped_in_order = in_order.cumsum(0) <= grad_tol * total
    skipped = torch.zeros_like(live).scatter_(0, order, skipped_in_order)
    error = upper.where(skipped, 0).sum()
    return BackwardPlan(live & ~skipped, (error / total).where(error > 0, 0))
