"""Statistics of groups that are spread over micro-batches or ranks."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from .checks import check_floating, check_process_group, check_type
from .collectives import all_ids
from .config import CovarianceWeighting
from .covariance import ScopeMoments, scope_moments
from .inputs import accumulator_dtype, check_sequence_ids, flatten, flatten_tokens, valid_tokens
from .segments import Segments


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
        check_type("weighting", weighting, CovarianceWeighting)
        if weighting.differentiate_weights:
            raise ValueError("weighting must not have differentiate_weights: other micro-batches get no gradient")
        if weighting.scope == "group" and group_ids is None:
            raise ValueError("group_ids must be given for a weighting of scope 'group', got None")
        check_floating("logprobs", logprobs)
        dtype = accumulator_dtype(logprobs.dtype)
        valid = valid_tokens("logprobs", logprobs, mask)
        tokens = flatten_tokens(
            logprobs, advantages, valid, dtype=dtype, group_ids=group_ids, group_size=None, sequence_ids=sequence_ids
        )
        check_sequence_ids(tokens, weighting)
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
        if any(part._process_group is not None for part in (self, *others)):
            raise ValueError("others must be merged before reduce, got moments of several ranks")
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
    def _table(self) -> tuple[Tensor, ScopeMoments]:
        """Ids [S] ascending, and their moments [S + 1], the last one NaN."""
        x, a, valid, ids, sequence = self._batch
        group = self._process_group
        every = ids.unique() if group is None else all_ids(ids, group)
        scopes = Segments.of(torch.searchsorted(every, ids.contiguous()), len(every), group)
        moments = scope_moments(x, a, valid, scopes, Segments.of_ids(sequence), self.weighting)
        return every, ScopeMoments._make(pad(value, (0, 1), value=torch.nan) for value in moments)

    def values(self) -> ScopeMoments:
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
