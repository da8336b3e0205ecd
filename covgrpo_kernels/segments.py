"""Partitions of a batch's tokens: groups and sequences, and sums over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_ids, all_reduce_max, all_reduce_sum


class Segments(NamedTuple):
    """A partition of N tokens into at most ``bound`` segments (some may be empty).

    Sums have the same bits in every run, need no host synchronisation, and a NaN in one segment stays there. Where
    segments are spread over ranks (``process_group``), sums and maxima are over all ranks, all of which must call them.
    """

    segment: Tensor  # [N] int64 in [0, bound), the segment of each token
    offsets: Tensor  # [bound + 1] int64, where each segment begins among the tokens sorted by segment
    order: Tensor | None  # [N] int64, the tokens in that order; None: they are sorted already
    bound: int
    process_group: dist.ProcessGroup | None = None  # ranks that share the segments, under the same numbers

    @classmethod
    def of(
        cls, segment: Tensor, bound: int, process_group: dist.ProcessGroup | None = None, *, is_sorted: bool = False
    ) -> Segments:
        order = None if is_sorted else segment.argsort(stable=True)
        in_order = segment if order is None else segment[order]
        offsets = torch.searchsorted(in_order, torch.arange(bound + 1, device=segment.device))
        return cls(segment, offsets, order, bound, process_group)

    @classmethod
    def of_ids(cls, ids: Tensor, process_group: dist.ProcessGroup | None = None) -> Segments:
        """From arbitrary integer ids. The bound is the number of tokens, so that the number of distinct ids need not be
        read from the device; over ranks, which have to agree on the numbers, it is read."""
        if process_group is not None:
            every = all_ids(ids, process_group)
            return cls.of(torch.searchsorted(every, ids.long().contiguous()), len(every), process_group)
        order = ids.argsort(stable=True)
        in_order = ids[order]
        dense = torch.zeros_like(order)
        dense[1:] = (in_order[1:] != in_order[:-1]).cumsum(0)
        segment = torch.empty_like(order).scatter_(0, order, dense)
        offsets = torch.searchsorted(dense, torch.arange(len(ids) + 1, device=ids.device))
        return cls(segment, offsets, order, len(ids))

    @classmethod
    def whole(cls, tokens: int, device: torch.device, process_group: dist.ProcessGroup | None = None) -> Segments:
        return cls.of(torch.zeros(tokens, dtype=torch.int64, device=device), 1, process_group, is_sorted=True)

    def tensors(self) -> list[Tensor]:
        """As arguments of a custom operator."""
        return [self.segment, self.offsets, *([] if self.order is None else [self.order])]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor]) -> Segments:
        segment, offsets, *order = tensors
        return cls(segment, offsets, order[0] if order else None, len(offsets) - 1)

    def _reduce(self, value: Tensor, how: str, initial: float) -> Tensor:
        in_order = value if self.order is None else value[self.order]
        return torch.segment_reduce(in_order, how, offsets=self.offsets, initial=initial, unsafe=True)

    def sum(self, value: Tensor) -> Tensor:  # [N] -> [bound]
        """Added up in float64, since a long sum in float32 would lose digits."""
        return all_reduce_sum(self._reduce(value.double(), "sum", 0.0), self.process_group).to(value.dtype)

    def max(self, value: Tensor, initial: float) -> Tensor:  # [N] -> [bound]
        return all_reduce_max(self._reduce(value, "max", initial), self.process_group)

    def gather(self, value: Tensor) -> Tensor:  # [bound] -> [N]
        return value[self.segment]
