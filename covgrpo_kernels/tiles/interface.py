"""What every backend of the tile operations takes and gives.

A tile is a contiguous [R, C] slice of the raw products h_t . W_v in float32 (float64 for float64 inputs), R rows
by C vocabulary entries from ``first`` on; the operations overwrite it. C is a multiple of BLOCK, or less than it.
A backend is a module with the functions ``new_state``, ``fold``, ``finish``, ``grad`` and ``group_weights`` of
`eager.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Entries folded together before they join a row's running statistics. Fixed, so that the order of every sum, and
# with it every bit, is the same however the vocabulary is cut into tiles.
BLOCK = 1024


class Head(NamedTuple):
    """What turns raw products into logits: softcap(scale * (product + bias)) / temperature."""

    scale: float
    softcap: float | None
    temperature: float


class State(NamedTuple):
    """Running statistics of R rows. The maximum stays out of the sums, so that 1 - p of a confident token and
    its entropy have no cancellation."""

    maximum: Tensor  # [R] largest logit m so far
    total: Tensor  # [R] sum of exp(z - m) over the other entries
    moment: Tensor  # [R] sum of exp(z - m) (m - z) over the other entries; stays zero without entropy
    target: Tensor  # [R] logit of the target, NaN until its tile came


class GroupWeights(NamedTuple):
    """All float64: these are a few numbers per token, and differences of log-probs are what they are made of."""

    weights: Tensor  # [N] W_t, zero where masked
    covariance: Tensor  # [N] c_t, zero where masked
    advantage_deviation: Tensor  # [N] A_t less its mean, zero where masked
    std: Tensor  # [bound] sqrt(s2) of each scope, zero where it is zero within rounding
