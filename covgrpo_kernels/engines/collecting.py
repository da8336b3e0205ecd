"""Candidates noted while the logits exist, by engines that can't afford to make them again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..inputs import accumulator_dtype
from ..kernels.interface import MAX_CANDIDATES, Candidates, Collecting, OnlineSoftmax, RowStats
from .rows import Rows

# Elements of the temporary for the targets' logits, 4 MiB in float32.
_AT_ONCE = 1 << 20


class CandidateCollector:
    """Collects at most MAX_CANDIDATES of each row, the most probable ones, in twice the room.

    What a logit has to reach is ``min_prob`` of the best lower bound on the row's normaliser so far, the target's share
    or the running sum. It only rises, so that whatever is more probable than ``min_prob`` in the end has reached it."""

    def __init__(self, rows: Rows, dtype: torch.dtype, min_prob: float) -> None:
        self._candidates = Candidates.empty(len(rows), 2 * MAX_CANDIDATES, dtype, rows.device)
        self._min_prob, self._log_min_prob = min_prob, math.log(min_prob)
        target_logit = _target_logits(rows)
        # The tile's product of the same row and target may be rounded differently: by less than this, for products of
        # up to 1e4 terms in float32.
        self._at_least = target_logit - (0.1 + 1e-4 * target_logit.abs())
        self._min_logits = torch.empty_like(target_logit)

    def raise_thresholds(self, running: OnlineSoftmax) -> None:
        so_far = running.maximum + running.sum.log1p()
        torch.add(torch.maximum(self._at_least, so_far), self._log_min_prob, out=self._min_logits)

    def take(self, block: slice) -> Collecting:
        return Collecting(self._min_logits[block], self._candidates.take(block))

    def most_probable(self, stats: RowStats) -> Candidates:
        """Each row's, none of them less probable than ``min_prob``."""
        return self._candidates.most_probable(stats.min_logits(self._min_prob))


def _target_logits(rows: Rows) -> Tensor:  # [R]
    dtype = accumulator_dtype(rows.dtype)
    products = torch.empty(len(rows), dtype=dtype, device=rows.device)
    y = rows.targets.clamp(0, max(len(rows.weight) - 1, 0))
    step = max(1, _AT_ONCE // max(rows.depth, 1))
    for i in range(0, len(rows), step):
        part = slice(i, min(i + step, len(rows)))
        products[part] = (rows.hidden(part, dtype) * rows.weight[y[part]].to(dtype)).sum(1)
    bias = None if rows.bias is None else rows.bias[y].to(dtype).unsqueeze(1)
    return rows.transform.apply_(products.unsqueeze(1), bias, rows.temperature).squeeze(1)
