"""What is spread over ranks or micro-batches: statistics of groups, and the vocabulary of a head (Megatron-style)."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from .collectives import all_counts, all_ids, check_process_group
from .config import CovarianceWeighting
from .layout import Segments, check_floating, check_tensor, flatten, flatten_tokens, valid_tokens
from .tiles import eager
from .tiles.interface import Moments, Results


class _Batch(NamedTuple):
    """Tokens of one or several micro-batches, flat."""

    logprobs: Tensor  # [N], zero where masked, as is the next
    advantages: Tensor  # [N]
    valid: Tensor  # [N] bool
    groups: Tensor  # [N] int64 ids; zero where the scope is the batch
    sequences: Tensor  # [N] int64, every response by a number of its own


class GroupMoments:
    """The statistics of groups that are spread over micro-batches, or over ranks with different numbers of them.

    The weight of a token compares it with all the tokens of its group (arXiv 2605.11538), so that a micro-batch with a
    part of a group cannot know it. Before the first loss of a batch, `of` takes the log-probs of each micro-batch (the
    old ones, or those of a pass without gradients), `merge` joins them, and over ranks `reduce` exchanges the sums;
    then every `covgrpo_loss` and `covariance_weights` of a part takes them as ``moments``. Four numbers a token are
    kept. With the same log-probs the weights are those of the whole batch in one call.
    """

    def __init__(
        self, batch: _Batch, weighting: CovarianceWeighting, process_group: dist.ProcessGroup | None = None
    ) -> None:
        self._batch, self.weighting, self._process_group = batch, weighting, process_group

    @classmethod
    def of(
        cls,
        logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        group_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        weighting: CovarianceWeighting | None = None,
    ) -> GroupMoments:
        """Of one micro-batch.

        Args:
            logprobs, advantages, mask, group_ids, sequence_ids: as `covariance_weights` takes them. ``group_ids`` are
                those of the whole batch; a response is whole within a micro-batch.
            weighting: the one that the loss has; None: `CovarianceWeighting()`.

        Raises:
            TypeError, ValueError: a wrong argument, by name.
        """
        weighting = CovarianceWeighting() if weighting is None else weighting
        if not isinstance(weighting, CovarianceWeighting):
            raise TypeError(f"weighting must be a CovarianceWeighting, got {type(weighting).__name__}")
        if weighting.differentiate_weights:
            raise ValueError("weighting must not have differentiate_weights: other micro-batches get no gradient")
        if weighting.scope == "group" and group_ids is None:
            raise ValueError("group_ids must be given for a weighting of scope 'group', got None")
        check_floating("logprobs", check_tensor("logprobs", logprobs))
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        valid = valid_tokens("logprobs", logprobs, mask)
        tokens = flatten_tokens(
            logprobs, advantages, valid, dtype=dtype, group_ids=group_ids, group_size=None, sequence_ids=sequence_ids
        )
        by_response = weighting.centering == "sequence" or weighting.advantage_centering == "response"
        if by_response and tokens.sequences is None:
            raise ValueError("sequence_ids must be given for packed tokens with this weighting, got None")
        none = torch.zeros(len(valid), dtype=torch.int64, device=valid.device)
        ids = none if group_ids is None else flatten("group_ids", group_ids, logprobs.shape).long()
        return cls(
            _Batch(
                logprobs.detach().reshape(-1).to(dtype).where(valid, 0),
                tokens.advantages,
                valid,
                none if weighting.scope == "batch" else ids,
                none if tokens.sequences is None else tokens.sequences.segment,
            ),
            weighting,
        )

    def merge(self, *others: GroupMoments) -> GroupMoments:
        """Of the tokens of all, in this order. Raises TypeError or ValueError where they do not belong together."""
        for other in others:
            if not isinstance(other, GroupMoments):
                raise TypeError(f"others must be GroupMoments, got {type(other).__name__}")
            if other.weighting != self.weighting:
                raise ValueError(f"others must have the weighting {self.weighting}, got {other.weighting}")
        parts, first = [], 0
        for part in (self._batch, *(other._batch for other in others)):
            parts.append(part._replace(sequences=part.sequences + first))
            first += len(part.sequences)
        return GroupMoments(_Batch(*map(torch.cat, zip(*parts, strict=True))), self.weighting)

    def reduce(self, process_group: dist.ProcessGroup) -> GroupMoments:
        """Of the tokens of all ranks, which all call this, with equal ids for equal groups. Responses are whole on a
        rank. Raises TypeError for what is no process group."""
        if check_process_group("process_group", process_group) is None:
            raise TypeError("process_group must be a torch.distributed.ProcessGroup, got None")
        reduced = GroupMoments(self._batch, self.weighting, process_group)
        _ = reduced._table  # here, where every rank is
        return reduced

    @cached_property
    def _table(self) -> tuple[Tensor, Moments]:
        """Ids [S] ascending, and their moments [S + 1], the last one NaN."""
        x, a, valid, ids, sequence = self._batch
        group = self._process_group
        every = ids.unique() if group is None else all_ids(ids, group)
        scopes = Segments.of(torch.searchsorted(every, ids.contiguous()), len(every), group)
        moments = eager.scope_moments(x, a, valid, scopes, Segments.of_ids(sequence), self.weighting)
        return every, Moments._make(pad(value, (0, 1), value=torch.nan) for value in moments)

    def values(self) -> Moments:
        return self._table[1]

    def scopes(self, group_ids: Tensor, valid: Tensor) -> Segments:
        """Which of the values tokens [N] have. Raises ValueError on a CPU for a group that is not there; on a GPU its
        weights are NaN."""
        ids = self._table[0]
        place = torch.searchsorted(ids, group_ids.contiguous())
        found = ids.new_zeros(len(group_ids), dtype=torch.bool)
        if len(ids):
            found = ids[place.clamp(max=len(ids) - 1)] == group_ids
        if valid.device.type == "cpu" and (lost := valid & ~found).any():
            raise ValueError(f"group_ids must be among those of moments, got {group_ids[lost][0].item()}")
        return Segments.of(place.where(found, len(ids)), len(ids) + 1)


class VocabularySlice(NamedTuple):
    """A rank's part of a head: consecutive slices, of any sizes, in the order of the ranks."""

    group: dist.ProcessGroup
    first: int
    total: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> VocabularySlice:  # [V of this rank, D]
        counts = all_counts(len(weight), weight.device, group)
        return cls(group, sum(counts[: group.rank()]), sum(counts))


def merge_results(
    results: Results,  # of N rows over this rank's slice of the vocabulary; log-prob NaN where the target is elsewhere
    here: Tensor,  # [N] bool, the target is in this rank's slice
    group: dist.ProcessGroup,
) -> Results:
    """The results over the whole vocabulary, the same bits on every rank.

    The distribution is a mixture of those of the slices. That with the largest share leads and the others are added
    to it, so that what `Results` keeps without cancellation (1 - p and the entropy of a token the policy is sure of)
    stays so.
    """
    mine = torch.stack([results.logprob.where(here, 0), results.entropy, results.maximum, results.log_total])
    mine = torch.cat([mine, here.to(mine.dtype).unsqueeze(0)])
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group)
    logprob, entropy, maximum, log_total, here_ = torch.stack(gathered, 1)  # [R, N] each

    # A slice without a finite logit has no share; if none has one, there is no distribution.
    empty = maximum.isnan() & entropy.isfinite()
    size = (maximum + log_total).where(~empty, -torch.inf)
    lead = size.argmax(0, keepdim=True)
    top, top_total = maximum.gather(0, lead), log_total.gather(0, lead)
    distance = ((maximum - top) + (log_total - top_total)).where(~empty, -torch.inf)  # log of a share over the leader's
    others = distance.exp().scatter(0, lead, 0)
    rest = others.sum(0, keepdim=True)
    log_share = distance - rest.log1p()
    share = log_share.exp()
    mixed = (share * (entropy - log_share)).where(share != 0, 0).sum(0)
    of_target = (logprob + distance).where(here_ > 0, 0).sum(0) - rest.log1p().squeeze(0)
    of_target = of_target.where((here_ > 0).any(0), torch.nan)
    return Results(of_target, mixed, top.squeeze(0), (top_total + rest.log1p()).squeeze(0))
