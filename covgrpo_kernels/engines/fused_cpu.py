"""The engine for processors with AVX512-BF16: C++ that multiplies itself, so that logits stay in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import accumulator_dtype
from ..kernels.interface import VOCAB_BLOCK, OnlineSoftmax, Tile
from ..sparse import WeightRows
from .collecting import CandidateCollector
from .interface import HeadGrads, Needs
from .rows import LoadedBlocks, Rows
from .streaming import DenseRows, StreamingEngine
from .tiling import SMALLEST_FUSED_TILE, WORKSPACE_BYTES, TileShape, fit_tile, largest_tile, vocab_slices

# Vocabulary ids after which the thresholds of candidates are raised. The frequent ids stand first in a byte-pair
# vocabulary and make up most of the normaliser, so that later fewer ids reach the threshold in vain.
_RAISE_THRESHOLDS_AT = (4 * VOCAB_BLOCK, 32 * VOCAB_BLOCK)


class FusedCpu(StreamingEngine):
    """``tile``: the largest tile; None: what the processor is good at."""

    def __init__(self, tile: tuple[int, int] | None = None) -> None:
        from ..kernels import cpp

        self.kernels, self.tile = cpp, tile

    def _largest(self, rows: Rows) -> TileShape:
        return largest_tile(rows.depth, rows.device) if self.tile is None else TileShape(*self.tile)

    def online_softmax(
        self, rows: Rows, running: OnlineSoftmax, collector: CandidateCollector | None, entropy: bool
    ) -> None:
        vocab, depth = rows.weight.shape

        def bytes_needed(tile: TileShape) -> int:
            gathered = rows.dtype.itemsize * depth * tile.rows
            return self.kernels.fused_forward_bytes(tile.rows, vocab, depth, rows.dtype) + gathered

        # Only a few numbers of each row and VOCAB_BLOCK are kept: the head is one slice, and there is room for more
        # rows.
        start = self._largest(rows)
        start = start._replace(rows=max(min(4 * start.rows, len(rows)), 1))
        shape = fit_tile(start, bytes_needed, WORKSPACE_BYTES["cpu"], vocab, SMALLEST_FUSED_TILE)
        blocks = LoadedBlocks(rows, shape.rows, rows.dtype)
        size = self.kernels.fused_forward_bytes(shape.rows, vocab, depth, rows.dtype)
        workspace = torch.empty(size, dtype=torch.uint8)
        for a, b in vocab_slices(vocab, max(vocab, 1), 1, _RAISE_THRESHOLDS_AT if collector is not None else ()):
            if collector is not None:
                collector.raise_thresholds(running)
            for block, hidden in blocks:
                self.kernels.fused_forward(
                    hidden,
                    rows.weight[a:b],
                    _tile(rows.targets, rows.temperature, rows, block, a, b),
                    running.take(block),
                    entropy,
                    workspace,
                    keep_packed=a > 0 and blocks.is_single,
                    collecting=None if collector is None else collector.take(block),
                )

    def dense_backward(self, dense: DenseRows, hidden_sum: Tensor | None, grads: HeadGrads, needs: Needs) -> None:
        rows, tails = dense.rows, dense.sparse.tails
        vocab, depth = rows.weight.shape
        shape, size = self._backward_tile(dense, needs)
        blocks = LoadedBlocks(rows, shape.rows, rows.dtype, tails.states)
        workspace = torch.empty(size, dtype=torch.uint8)
        # Rows for the tails have neither targets nor coefficients of their own.
        padded = _PaddedRows(dense)
        weight_sum = None
        if needs.weight and rows.dtype != torch.float32 and not blocks.is_single:
            weight_sum = torch.empty(min(shape.vocab, vocab), depth, dtype=torch.float32)
        scale = dense.scale.item()
        slices = list(vocab_slices(vocab, shape.vocab, 1))
        edges = [*(a for a, _ in slices), vocab]
        sparse_rows = dense.sparse.weight_rows(edges, needs.weight, needs.bias)
        for (a, b), of_sparse in zip(slices, sparse_rows, strict=True):
            bias_sum = torch.zeros(b - a, dtype=torch.float32) if needs.bias else None
            slice_sum = grads.weight[a:b] if weight_sum is None else weight_sum[: b - a]
            for block, states in blocks:
                is_first, is_last = block.start == 0, block.stop == padded.count
                addend, addend_rows = _addend(of_sparse, b - a) if is_last else (None, None)
                self.kernels.fused_backward(
                    states,
                    rows.weight[a:b],
                    padded.tile(block, a, b),
                    padded.coefficients.take(block),
                    hidden_sum=None if hidden_sum is None else hidden_sum[block],
                    weight_sum=slice_sum if needs.weight and not (is_first and is_last) else None,
                    add_to_weight=needs.weight and not is_first,
                    weight_grad=grads.weight[a:b] if needs.weight and is_last else None,
                    weight_scale=scale,
                    bias_sum=bias_sum,
                    workspace=workspace,
                    keep_packed=a > 0 and blocks.is_single,
                    tails=(tails.min_logits, tails.bias_counts) if is_first and tails.rows else None,
                    tail_scale=tails.scale,
                    addend=addend,
                    addend_rows=addend_rows,
                )
            if bias_sum is not None:
                bias_sum[of_sparse.vocab_ids] += of_sparse.bias
                torch.mul(bias_sum, dense.scale, out=grads.bias[a:b])

    def _backward_tile(self, dense: DenseRows, needs: Needs) -> tuple[TileShape, int]:
        """The shape, and the bytes of the kernel's workspace."""
        rows, dtype = dense.rows, dense.rows.dtype
        vocab, depth = rows.weight.shape
        count = dense.sparse.tails.rows + len(rows)
        weight_sum = 0 if dtype == accumulator_dtype(dtype) else 4
        addend = 4 if len(dense.sparse.rows) else 0

        def bytes_needed(tile: TileShape) -> int:
            gathered = dtype.itemsize * depth * tile.rows
            sums = (weight_sum + addend) * tile.vocab * depth
            return self.kernels.fused_backward_bytes(tile.rows, tile.vocab, depth, dtype, needs) + gathered + sums

        largest = self._largest(rows)
        start = largest._replace(rows=max(min(largest.rows, count), 1, min(2 * dense.sparse.tails.rows, count)))
        shape = fit_tile(start, bytes_needed, WORKSPACE_BYTES["cpu"], vocab, SMALLEST_FUSED_TILE)
        return shape, self.kernels.fused_backward_bytes(shape.rows, shape.vocab, depth, dtype, needs)


class _PaddedRows:
    """Targets, temperatures and coefficients of the dense rows, behind as many unused places as there are tails."""

    def __init__(self, dense: DenseRows) -> None:
        self._rows, self._front = dense.rows, dense.sparse.tails.rows
        self.count = self._front + len(dense.rows)
        self._targets = self._pad(dense.rows.targets)
        self._temperature = None if dense.rows.temperature is None else self._pad(dense.rows.temperature)
        self.coefficients = dense.coefficients._replace(packed=self._pad(dense.coefficients.packed))

    def _pad(self, value: Tensor) -> Tensor:  # [..., R] -> [..., F + R]
        return torch.nn.functional.pad(value, (self._front, 0), value=1) if self._front else value

    def tile(self, block: slice, a: int, b: int) -> Tile:
        return _tile(self._targets, self._temperature, self._rows, block, a, b)


def _tile(targets: Tensor, temperature: Tensor | None, rows: Rows, block: slice, a: int, b: int) -> Tile:
    """``targets`` and ``temperature``: of as many rows as ``block`` counts, which need not be those of ``rows``."""
    bias = None if rows.bias is None else rows.bias[a:b].float()
    return Tile(targets[block], a, rows.transform, bias, None if temperature is None else temperature[block])


def _addend(sparse: WeightRows, width: int) -> tuple[Tensor | None, Tensor | None]:
    """The sparse rows' share of the gradient of the head, and [C] which of its rows belongs to each vocabulary id."""
    if sparse.weight is None or not len(sparse.vocab_ids):
        return None, None
    index = torch.full((width,), -1, dtype=torch.int32)
    index[sparse.vocab_ids] = torch.arange(len(sparse.vocab_ids), dtype=torch.int32)
    return sparse.weight, index
