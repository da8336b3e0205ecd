"""The general engine: the device's own matrix products around the kernels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..inputs import accumulator_dtype
from ..kernels.eager import tail_probabilities
from ..kernels.interface import OnlineSoftmax, Tile
from ..sparse import Tails, WeightRows
from .collecting import CandidateCollector
from .interface import HeadGrads, Needs
from .products import multiply_
from .rows import LoadedBlocks, Rows
from .streaming import DenseRows, StreamingEngine
from .tiling import TileShape, chunked_tile, largest_tile, vocab_slices


class Chunked(StreamingEngine):
    """``tile``: the largest tile; None: what the device is good at."""

    def __init__(self, kernels: ModuleType, tile: tuple[int, int] | None = None) -> None:
        self.kernels, self.tile = kernels, tile

    def operand_dtype(self, rows: Rows) -> torch.dtype:
        """Of operands of a product whose result is in the accumulator's dtype. On a CPU, PyTorch has such products of
        float32 operands only; casting a slice to it is exact."""
        return rows.dtype if rows.device.type == "cuda" else accumulator_dtype(rows.dtype)

    def multiply_(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        multiply_(a, b, out, add=add)

    def _tile_shape(self, rows: Rows, count: int) -> TileShape:
        vocab, depth = rows.weight.shape
        largest = largest_tile(depth, rows.device) if self.tile is None else TileShape(*self.tile)
        kind = "cuda" if rows.device.type == "cuda" else "cpu"
        return chunked_tile(largest, count, depth, vocab, kind, rows.dtype, self.kernels.TILE_BUFFERS)

    def online_softmax(
        self, rows: Rows, running: OnlineSoftmax, collector: CandidateCollector | None, entropy: bool
    ) -> None:
        operand, dtype = self.operand_dtype(rows), accumulator_dtype(rows.dtype)
        shape = self._tile_shape(rows, rows.total)
        workspace = torch.empty(min(shape.rows, len(rows)) * shape.vocab, dtype=dtype, device=rows.device)
        blocks = LoadedBlocks(rows, shape.rows, operand)
        for a, b in vocab_slices(len(rows.weight), shape.vocab):
            if collector is not None:
                collector.raise_thresholds(running)
            weight, bias = _slice_of_head(rows, a, b, operand, dtype)
            for block, hidden in blocks:
                products = workspace[: len(hidden) * (b - a)].view(len(hidden), b - a)
                self.multiply_(hidden, weight.t(), products)
                tile = Tile(rows.targets[block], a, rows.transform, bias, _of(rows.temperature, block))
                collecting = None if collector is None else collector.take(block)
                self.kernels.online_softmax_(products, tile, running.take(block), entropy, collecting)

    def dense_backward(self, dense: DenseRows, hidden_sum: Tensor | None, grads: HeadGrads, needs: Needs) -> None:
        rows, tails = dense.rows, dense.sparse.tails
        operand, dtype = self.operand_dtype(rows), accumulator_dtype(rows.dtype)
        count = tails.rows + len(rows)
        shape = self._tile_shape(rows, count)
        blocks = LoadedBlocks(rows, max(shape.rows, 2 * tails.rows), operand, tails.states)
        workspace = _Workspace(blocks, shape.vocab, operand, dtype)
        weight_sum = None
        if needs.weight and rows.dtype != dtype:
            weight_sum = torch.empty(min(shape.vocab, len(rows.weight)), rows.depth, dtype=dtype, device=rows.device)

        slices = list(vocab_slices(len(rows.weight), shape.vocab))
        edges = [*(a for a, _ in slices), len(rows.weight)]
        sparse_rows = dense.sparse.weight_rows(edges, needs.weight, needs.bias)
        for (a, b), of_sparse in zip(slices, sparse_rows, strict=True):
            weight, bias = _slice_of_head(rows, a, b, operand, dtype)
            slice_sum = grads.weight[a:b] if weight_sum is None else weight_sum[: b - a]
            bias_sum = torch.zeros(b - a, dtype=dtype, device=rows.device) if needs.bias else None
            for block, states in blocks:
                dz = self._dlogits(dense, states, weight, bias, a, block, workspace)
                if bias_sum is not None:
                    bias_sum += _bias_sum(dz, tails, block, dtype)
                if hidden_sum is not None:
                    self.multiply_(dz, weight, hidden_sum[block], add=a > 0)
                if needs.weight:
                    self.multiply_(dz.t(), states, slice_sum, add=block.start > 0)
            _write_head(grads, needs, slice(a, b), slice_sum, bias_sum, of_sparse, dense.scale)

    def _dlogits(
        self,
        dense: DenseRows,
        states: Tensor,  # [F + R, D] of this block, where the first block begins with the F states of the tails
        weight: Tensor,  # [C, D]
        bias: Tensor | None,  # [C]
        first: int,
        block: slice,
        workspace: _Workspace,
    ) -> Tensor:  # [F + R, C]
        """The tails, where the block has them, and dL/dproducts of its rows, in the dtype of operands."""
        rows, tails = dense.rows, dense.sparse.tails
        front = tails.rows if block.start == 0 else 0
        own = slice(block.start + front - tails.rows, block.stop - tails.rows)  # of the rows alone
        products, dz = workspace.take(len(states), front, len(weight))
        self.multiply_(states[front:], weight.t(), products)
        tile = Tile(rows.targets[own], first, rows.transform, bias, _of(rows.temperature, own))
        if front:
            with_tail = slice(0, front)
            dz[:front] = tail_probabilities(
                products[:front],
                tile._replace(targets=rows.targets[with_tail], temperature=_of(rows.temperature, with_tail)),
                dense.coefficients.take(with_tail),
                tails.min_logits,
                tails.scale,
            )
        self.kernels.dlogits(products, tile, dense.coefficients.take(own), dz[front:])
        return dz


class _Workspace:
    """Products of a tile, and dL/dproducts of it in the dtype of operands: in the same memory where that is the same
    dtype."""

    def __init__(self, blocks: LoadedBlocks, vocab: int, operand: torch.dtype, dtype: torch.dtype) -> None:
        size = max(block.stop - block.start for block in blocks.blocks) * vocab
        device = blocks.rows.device
        self._dlogits = torch.empty(size, dtype=operand, device=device)
        self._products = self._dlogits if operand == dtype else torch.empty(size, dtype=dtype, device=device)

    def take(self, count: int, front: int, width: int) -> tuple[Tensor, Tensor]:
        """([count - front, C] products, [count, C] dL/dproducts)."""
        first, end = front * width, count * width
        products = self._products[first:end].view(count - front, width)
        return products, self._dlogits[:end].view(count, width)


def _of(value: Tensor | None, rows: slice) -> Tensor | None:
    return None if value is None else value[rows]


def _slice_of_head(
    rows: Rows, a: int, b: int, operand: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:  # [C, D], [C]
    bias = None if rows.bias is None else rows.bias[a:b].to(dtype).contiguous()
    return rows.weight[a:b].to(operand), bias


def _bias_sum(dz: Tensor, tails: Tails, block: slice, dtype: torch.dtype) -> Tensor:  # [C]
    if block.start > 0 or not tails.rows:
        return dz.sum(0, dtype=dtype)
    return dz[tails.rows :].sum(0, dtype=dtype) + tails.bias_counts @ dz[: tails.rows].to(dtype)


def _write_head(
    grads: HeadGrads,
    needs: Needs,
    ids: slice,  # of the vocabulary
    weight_sum: Tensor,  # [C, D]
    bias_sum: Tensor | None,  # [C]
    sparse: WeightRows,
    scale: Tensor,
) -> None:
    """The sparse rows' share added, scaled and rounded once."""
    if needs.weight:
        if sparse.weight is not None and len(sparse.vocab_ids):
            weight_sum[sparse.vocab_ids] += sparse.weight
        torch.mul(weight_sum, scale, out=grads.weight[ids])
    if bias_sum is not None:
        bias_sum[sparse.vocab_ids] += sparse.bias
        torch.mul(bias_sum, scale, out=grads.bias[ids])
