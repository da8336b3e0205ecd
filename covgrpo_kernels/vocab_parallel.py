"""A head whose vocabulary is spread over ranks, as in Megatron's tensor parallelism."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_counts
from .kernels.interface import RowStats


class VocabSlice(NamedTuple):
    """This rank's part of the head: consecutive slices of any sizes, in the order of the ranks."""

    group: dist.ProcessGroup
    first: int  # vocabulary id of this rank's first row
    total: int  # size of the whole vocabulary

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> VocabSlice:  # [V of this rank, D]
        counts = all_counts(len(weight), weight.device, group)
        return cls(group, sum(counts[: group.rank()]), sum(counts))

    def local_targets(self, targets: Tensor, vocab: int) -> Tensor:  # [N] -> [N]
        """Targets as ids of this rank's slice of ``vocab`` ids; -1 where the target is on another rank."""
        local = targets - self.first
        return local.where((local >= 0) & (local < vocab), -1)


def merge_stats(
    stats: RowStats,  # of N rows over this rank's slice of the vocabulary
    is_here: Tensor,  # [N] bool, the target is in this rank's slice
    group: dist.ProcessGroup,
) -> RowStats:
    """Statistics over the whole vocabulary, the same bits on every rank.

    The distribution is a mixture of the ranks' distributions. The one with the largest share leads and the others are
    added to it, so that 1 - p and the entropy of a token that the policy is sure of have no cancellation here either.
    """
    mine = torch.cat([stats.packed, is_here.to(stats.packed.dtype).unsqueeze(0)])
    mine[0] = mine[0].where(is_here, 0)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group)
    logprob, entropy, maximum, log_sum, has_target = torch.stack(gathered, 1)  # [ranks, N] each

    # A slice without a finite logit has no share; if no slice has one, there is no distribution.
    empty = maximum.isnan() & log_sum.isfinite()
    size = (maximum + log_sum).where(~empty, -torch.inf)
    lead = size.argmax(0, keepdim=True)
    top, top_log_sum = maximum.gather(0, lead), log_sum.gather(0, lead)
    log_ratio = ((maximum - top) + (log_sum - top_log_sum)).where(~empty, -torch.inf)  # of shares, to the leader's
    rest = log_ratio.exp().scatter(0, lead, 0).sum(0, keepdim=True)
    log_share = log_ratio - rest.log1p()
    share = log_share.exp()
    some = ~empty.all(0)
    mixed_entropy = (share * (entropy - log_share)).where(share != 0, 0).sum(0).where(some, torch.nan)
    of_target = (logprob.where(~empty, 0) + log_ratio).where(has_target > 0, 0)
    target_logprob = of_target.sum(0) - rest.log1p().squeeze(0)
    target_logprob = target_logprob.where((has_target > 0).any(0) & some, torch.nan)
    merged_log_sum = (top_log_sum + rest.log1p()).squeeze(0)
    return RowStats(torch.stack([target_logprob, mixed_entropy, top.squeeze(0), merged_log_sum]))
