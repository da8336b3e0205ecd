"""Chosen rows of the inputs, read a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..inputs import HeadInputs
from ..kernels.interface import LogitTransform


class Rows:
    """R of the N rows that go through the head, ``index`` [R] of them; all rows where that is None, then without a
    copy."""

    def __init__(self, inputs: HeadInputs, index: Tensor | None) -> None:
        self._hidden, self.index = inputs.hidden, index
        self.weight, self.bias = inputs.weight, inputs.bias  # [V, D], [V]
        self.transform: LogitTransform = inputs.transform
        self.targets = self.take(inputs.targets)  # [R]
        self.temperature = None if inputs.temperature is None else self.take(inputs.temperature)  # [R]
        self.total = len(inputs.hidden)

    @classmethod
    def where(cls, inputs: HeadInputs, chosen: Tensor) -> Rows:  # [N] bool
        """Waits for the device, which has to say how many there are. While a graph is captured that is not possible,
        and all rows are taken."""
        if chosen.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return cls(inputs, None)
        index = chosen.nonzero().squeeze(1)
        return cls(inputs, None if len(index) == len(chosen) else index)

    def __len__(self) -> int:
        return self.total if self.index is None else len(self.index)

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def depth(self) -> int:
        return self._hidden.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._hidden.dtype

    def take(self, value: Tensor) -> Tensor:  # [N, ...] -> [R, ...]
        return value.contiguous() if self.index is None else value[self.index]

    def hidden(self, block: slice, dtype: torch.dtype) -> Tensor:  # [block, D]
        return (self._hidden[block] if self.index is None else self._hidden[self.index[block]]).to(dtype)

    def scatter(self, value: Tensor) -> Tensor:  # [R, ...] -> [N, ...], zero in other rows
        if self.index is None:
            return value
        return value.new_zeros(self.total, *value.shape[1:]).index_copy_(0, self.index, value)


class LoadedBlocks:
    """The hidden states of rows in blocks of ``rows_per_block``, in front of which other states may stand. A single
    block is loaded once and kept, more are loaded anew each time."""

    def __init__(self, rows: Rows, rows_per_block: int, dtype: torch.dtype, front: Tensor | None = None) -> None:
        self.rows, self.dtype = rows, dtype
        self.front = None if front is None else front.to(dtype)  # [F, D]
        self.front_rows = 0 if front is None else len(front)
        count = self.front_rows + len(rows)
        self.blocks = [slice(i, min(i + rows_per_block, count)) for i in range(0, count, rows_per_block)]
        self._only = self._load(self.blocks[0]) if len(self.blocks) == 1 else None

    @property
    def is_single(self) -> bool:
        return len(self.blocks) == 1

    def _load(self, block: slice) -> Tensor:
        f = self.front_rows
        states = self.rows.hidden(slice(max(block.start - f, 0), max(block.stop - f, 0)), self.dtype)
        if self.front is None or block.start >= f:
            return states
        return torch.cat([self.front[block], states])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, their hidden states) of each block."""
        for block in self.blocks:
            yield block, self._load(block) if self._only is None else self._only
