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
        segment, offsets, order = segments_op(ids.contiguous())
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

    def sum(self, values: Tensor) -> Tensor:  # [N] -> [bound], or [M, N] -> [M, bound]
        """float64, since a long sum in float32 would lose digits. Several values at once cost little more than one."""
        stacked = values if values.ndim == 2 else values.unsqueeze(0)
        sums = all_reduce_sum(segment_sums_op(stacked, self.offsets, self.order), self.process_group)
        return sums if values.ndim == 2 else sums.squeeze(0)

    def max(self, value: Tensor, initial: float) -> Tensor:  # [N] -> [bound]
        in_order = value if self.order is None else value[self.order]
        largest = torch.segment_reduce(in_order, "max", offsets=self.offsets, initial=initial, unsafe=True)
        return all_reduce_max(largest, self.process_group)

    def gather(self, value: Tensor) -> Tensor:  # [bound] -> [N]
        return value[self.segment]


def segments_of_ids(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(segment, offsets, order) of integer ids [N], as `Segments` has them. The number of a segment is the place of its
    last token among the tokens sorted by id: numbers without gaps would take a prefix sum."""
    in_order, order = ids.sort(stable=True)
    segment = torch.searchsorted(in_order, ids, right=True) - 1
    # The place at which the ids that are equal to the one at this place begin: all numbers in between are empty.
    begin = torch.searchsorted(in_order, in_order)
    return segment, torch.nn.functional.pad(begin, (0, 1), value=len(ids)), order


def segment_sums(
    values: Tensor,  # [M, N] floating or bool
    offsets: Tensor,  # [S + 1] int64
    order: Tensor | None,  # [N] int64
) -> Tensor:  # [M, S] float64
    """Sums over the tokens of each segment, in their order."""
    in_order = (values if order is None else values[:, order]).double()
    sums = [torch.segment_reduce(row, "sum", offsets=offsets, initial=0.0, unsafe=True) for row in in_order]
    return torch.stack(sums)


# Within the operators the kernels are imported late: they import this module themselves.


@torch.library.custom_op("covgrpo::segments_of_ids", mutates_args=())
def segments_op(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`segments_of_ids` by the kernels of the device."""
    from . import engines, kernels

    with engines.on_device(ids.device):
        return kernels.select(ids.device).segments_of_ids(ids)


@segments_op.register_fake
def _(ids):  # type: ignore[no-untyped-def]
    tokens = ids.new_empty(ids.shape, dtype=torch.int64)
    return tokens, tokens.new_empty(ids.shape[0] + 1), torch.empty_like(tokens)


@torch.library.custom_op("covgrpo::segment_sums", mutates_args=())
def segment_sums_op(values: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
    """`segment_sums` by the kernels of the device."""
    from . import engines, kernels

    with engines.on_device(values.device):
        return kernels.select(values.device).segment_sums(values, offsets, order)


@segment_sums_op.register_fake
def _(values, offsets, order):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape[0], offsets.shape[0] - 1, dtype=torch.float64)
