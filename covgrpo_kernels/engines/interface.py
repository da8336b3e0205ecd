"""What an engine takes and gives.

An engine makes the products of hidden states and the head, and everything that needs them tile by tile.
`engines.select` chooses one by device and dtype; nothing above knows which."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..inputs import HeadInputs, Precision
from ..kernels.interface import RowStats
from ..plan import BackwardPlan


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGrads(NamedTuple):
    """Gradients of the inputs, [0] where not wanted. Each is rounded once to its input's dtype."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]


class Engine(Protocol):
    def forward(
        self, inputs: HeadInputs, *, entropy: bool, ignore_index: int, min_prob: float
    ) -> tuple[RowStats, list[Tensor]]:
        """Statistics of N rows, zero where the target is ``ignore_index``, and notes for the backward: what this engine
        keeps of vocabulary ids that may be more probable than ``min_prob`` (0: nothing)."""
        ...

    def note_shapes(
        self, rows: int, vocab: int, dtype: torch.dtype, min_prob: float
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of these notes."""
        ...

    def plan(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],
        logprob_grad: Tensor,  # [N]
        entropy_grad: Tensor | None,  # [N]
        precision: Precision,
    ) -> BackwardPlan:
        """What the backward does with each row."""
        ...

    def backward(
        self,
        inputs: HeadInputs,
        stats: RowStats,
        notes: list[Tensor],
        logprob_grad: Tensor,  # [N]
        entropy_grad: Tensor | None,  # [N]
        plan: BackwardPlan,
        *,
        min_prob: float,
        needs: Needs,
        partial_hidden: bool,
    ) -> HeadGrads:
        """With ``partial_hidden`` the gradient of hidden is a part of a sum over ranks: it is not rounded yet."""
        ...
