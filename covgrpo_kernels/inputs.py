"""From a trainer's tensors to flat ones: argument checks, and tokens as segments (groups, sequences)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_counts, all_ids, all_max, all_sum

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Segments(NamedTuple):
    """A partition of N tokens into at most ``bound`` segments, with sums that are the same bits every run:
    no atomics, no host sync, and one segment's NaN stays in it. Where segments are spread over ranks, sums and maxima
    are over all of them, and every rank has to take them."""

    segment: Tensor  # [N] int64, of each token, in [0, bound)
    offsets: Tensor  # [bound + 1] int64, into the tokens sorted by segment
    order: Tensor | None  # [N] int64, the stable sort; None: sorted already
    bound: int
    process_group: dist.ProcessGroup | None = None  # the ranks that share the segments, by the same numbers

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
        """Arbitrary integer ids. At most as many segments as tokens, so that no count has to be read back; over ranks,
        which have to agree on the numbers, it is."""
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
        """As arguments of an operator."""
        return [self.segment, self.offsets, *([] if self.order is None else [self.order])]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor]) -> Segments:
        segment, offsets, *order = tensors
        return cls(segment, offsets, order[0] if order else None, len(offsets) - 1)

    def _reduce(self, value: Tensor, how: str, initial: float) -> Tensor:
        in_order = value if self.order is None else value[self.order]
        return torch.segment_reduce(in_order, how, offsets=self.offsets, initial=initial, unsafe=True)

    def sum(self, value: Tensor) -> Tensor:  # [N] -> [bound]
        """In float64: one token after the other, a long float32 sum would lose digits."""
        return all_sum(self._reduce(value.double(), "sum", 0.0), self.process_group).to(value.dtype)

    def max(self, value: Tensor, initial: float) -> Tensor:  # [N] -> [bound]
        return all_max(self._reduce(value, "max", initial), self.process_group)

    def spread(self, value: Tensor) -> Tensor:  # [bound] -> [N]
        return value[self.segment]


class Tokens(NamedTuple):
    """One batch, flat."""

    advantages: Tensor  # [N] float32 or float64, zero where masked
    valid: Tensor  # [N] bool
    groups: Segments | None
    sequences: Segments | None
    process_group: dist.ProcessGroup | None = None  # the ranks whose tokens the batch consists of

    def count_valid(self) -> Tensor:  # [] int64
        """Valid tokens of the batch."""
        return all_sum(self.valid.sum(), self.process_group)

    def count_sequences(self) -> Tensor:  # [] int64
        """Sequences of the batch that have a valid token."""
        assert self.sequences is not None
        there = (self.sequences.sum(self.valid.float()) > 0).sum()
        shared = 1 if self.sequences.process_group is None else self.sequences.process_group.size()
        return all_sum(there, self.process_group) // shared  # each rank that shares one has counted it


def check_tensor(name: str, value: object, like: Tensor | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    return value


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def check_integer(name: str, value: Tensor) -> None:
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be of an integer dtype, got {value.dtype}")


def flatten(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """[B] or [B, T] for shape [B, T], [N] for shape [N], to [N]."""
    if value.shape == shape:
        return value.reshape(-1)
    if len(shape) == 2 and value.shape == shape[:1]:
        return value.unsqueeze(1).expand(shape).reshape(-1)
    expected = f"{list(shape)}" + (f" or {list(shape[:1])}" if len(shape) == 2 else "")
    raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")


def flatten_floats(name: str, value: Tensor | None, like: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor | None:
    """An optional per-token or per-sequence input to [N], zero where masked, whatever stood there."""
    if value is None:
        return None
    check_floating(name, check_tensor(name, value, like))
    return flatten(name, value.detach(), like.shape).to(dtype).where(valid, 0)


def valid_tokens(name: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """[N] bool: the mask, or all of them, checked against ``like``, the argument ``name``."""
    if like.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [B, T] or [N], got {list(like.shape)}")
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool).reshape(-1)
    if check_tensor("mask", mask, like).shape != like.shape:
        raise ValueError(f"mask must have shape {list(like.shape)}, got {list(mask.shape)}")
    return mask.reshape(-1) != 0


def flatten_tokens(
    like: Tensor,  # [B, T] or [N]: targets or log-probs
    advantages: Tensor,  # [B], [B, T] or [N]
    valid: Tensor,  # [N]
    *,
    dtype: torch.dtype,
    group_ids: Tensor | None,
    group_size: int | None,
    sequence_ids: Tensor | None,
    process_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> Tokens:
    """Checks the layout and makes it flat.

    Raises ValueError or TypeError, naming the argument, for advantages, ids or sizes that fit no layout.
    """
    shape = like.shape
    flat_advantages = flatten_floats("advantages", check_tensor("advantages", advantages), like, valid, dtype)
    assert flat_advantages is not None
    process_group = sequence_group if process_group is None else process_group

    if group_ids is not None and group_size is not None:
        raise ValueError("group_size must be None where group_ids is given, got both")
    flat_groups = None
    if group_ids is not None:
        check_integer("group_ids", check_tensor("group_ids", group_ids, like))
        flat_groups = flatten("group_ids", group_ids, shape)
    elif group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
        if len(shape) != 2 or sequence_ids is not None or sequence_group is not None:
            raise ValueError(
                f"group_size needs [B, T] rows of one response each, got {list(shape)}; "
                "packed tokens and parts of sequences take group_ids"
            )
        if group_size < 1 or (process_group is None and shape[0] % group_size):
            raise ValueError(f"group_size must divide the {shape[0]} rows, got {group_size}")
    if sequence_ids is not None:
        check_integer("sequence_ids", check_tensor("sequence_ids", sequence_ids, like))
        if sequence_ids.shape != shape:
            raise ValueError(f"sequence_ids must have shape {list(shape)}, got {list(sequence_ids.shape)}")

    sequences = None
    if sequence_ids is not None:
        sequences = Segments.of_ids(sequence_ids.reshape(-1), sequence_group)
    elif len(shape) == 2:
        index = torch.arange(like.numel(), device=like.device) // max(shape[1], 1)
        if sequence_group is not None and len(set(all_counts(shape[0], like.device, sequence_group))) > 1:
            raise ValueError(f"sequence_group must share its rows, or get sequence_ids: here are {shape[0]} rows")
        sequences = Segments.of(index, shape[0], sequence_group, is_sorted=True)

    groups = None
    if flat_groups is not None:
        groups = Segments.of_ids(flat_groups, process_group)
    elif group_size is not None:
        rows_of_ranks = [shape[0]] if process_group is None else all_counts(shape[0], like.device, process_group)
        rows, before = sum(rows_of_ranks), 0 if process_group is None else sum(rows_of_ranks[: process_group.rank()])
        if rows % group_size:
            raise ValueError(f"group_size must divide the {rows} rows of all ranks, got {group_size}")
        index = (before + torch.arange(like.numel(), device=like.device) // max(shape[1], 1)) // group_size
        groups = Segments.of(index, rows // group_size, process_group, is_sorted=True)
    return Tokens(flat_advantages, valid, groups, sequences, process_group)
