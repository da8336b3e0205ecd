"""What ranks tell each other. Every collective is called by all ranks of its group, whatever they hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _all_reduce(value, dist.ReduceOp.SUM, group)


def all_reduce_max(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _all_reduce(value, dist.ReduceOp.MAX, group)


def _all_reduce(value: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return value
    value = value.contiguous().clone()
    dist.all_reduce(value, operation, group)
    return value


def all_counts(count: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """The number of each rank, in their order. Waits for the device."""
    mine = torch.tensor([count], dtype=torch.int64, device=device)
    counts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(counts, mine, group)
    return torch.cat(counts).tolist()


def all_values(values: Tensor, group: dist.ProcessGroup) -> Tensor:  # [N] of each rank
    """The values of all ranks in their order, the same on all. Waits for the device."""
    counts = all_counts(len(values), values.device, group)
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group)
    return torch.cat([each[:n] for each, n in zip(gathered, counts, strict=True)])


def all_ids(ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[G] every id that any rank has, ascending, the same on all. Waits for the device."""
    return all_values(ids.long().unique(), group).unique()
