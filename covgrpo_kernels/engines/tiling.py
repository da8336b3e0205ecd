"""How the work is cut into tiles: rows by vocabulary ids, within a fixed workspace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..inputs import accumulator_dtype
from ..kernels.interface import VOCAB_BLOCK

# Bytes of all temporaries of a pass together, by type of device.
WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}


class TileShape(NamedTuple):
    rows: int
    vocab: int


# The smallest tiles that are still worth a product: of PyTorch's, and of the fused C++ kernels.
SMALLEST_TILE = TileShape(256, VOCAB_BLOCK)
SMALLEST_FUSED_TILE = TileShape(64, 256)


def largest_tile(depth: int, device: torch.device) -> TileShape:
    """The tile beyond which a matrix product gains nothing."""
    if device.type != "cuda":
        return TileShape(1024, 2 * VOCAB_BLOCK)
    return gpu_tile(depth, torch.cuda.get_device_properties(device).multi_processor_count)


def gpu_tile(depth: int, multiprocessors: int) -> TileShape:
    """Rows: one wave of 128 x 256 tiles over all multiprocessors in a product with 1,024 vocabulary ids. Vocabulary:
    doubled from 4,096 ids until a product takes 5e10 operations, some 0.1 ms, which hides launch costs."""
    rows, vocab = max(128, 32 * multiprocessors // 128 * 128), 4 * VOCAB_BLOCK
    while 2 * rows * vocab * depth < 5e10 and vocab < 16 * VOCAB_BLOCK:
        vocab *= 2
    return TileShape(rows, vocab)


def chunked_tile(
    largest: TileShape, rows: int, depth: int, vocab: int, device_type: str, dtype: torch.dtype, tile_buffers: int
) -> TileShape:
    """The largest tile such that everything that belongs to it fits the workspace, but at least `SMALLEST_TILE`.

    ``tile_buffers``: tile-sized temporaries of the kernels.
    """
    accumulator, given = accumulator_dtype(dtype).itemsize, dtype.itemsize
    operand = given if device_type == "cuda" else accumulator

    def bytes_needed(tile: TileShape) -> int:
        dlogits = operand if operand != accumulator else 0  # else in place of the products
        tile_bytes = accumulator * (1 + tile_buffers) + dlogits
        row_bytes = operand + given  # hidden states as loaded, and their gradient
        weight_slice = operand if operand != given else 0
        weight_grad_slice = accumulator if given != accumulator else 0
        per_vocab = weight_slice + weight_grad_slice
        return tile_bytes * tile.rows * tile.vocab + row_bytes * tile.rows * depth + per_vocab * tile.vocab * depth

    start = TileShape(max(min(largest.rows, rows), 1), largest.vocab)
    return fit_tile(start, bytes_needed, WORKSPACE_BYTES[device_type], vocab, SMALLEST_TILE)


def fit_tile(
    tile: TileShape, bytes_needed: Callable[[TileShape], int], limit: int, vocab: int, smallest: TileShape
) -> TileShape:
    """The tile, halved until it needs no more than the limit or is the smallest. Its width is a multiple of the
    smallest's, or the whole vocabulary."""
    while bytes_needed(tile) > limit and (tile.rows > smallest.rows or tile.vocab > smallest.vocab):
        if tile.rows > smallest.rows and (tile.rows > tile.vocab or tile.vocab <= smallest.vocab):
            tile = tile._replace(rows=max(smallest.rows, tile.rows // 2 // 128 * 128))
        else:
            tile = tile._replace(vocab=tile.vocab // 2)
    return tile if vocab > tile.vocab else tile._replace(vocab=max(vocab, 1))


def vocab_slices(
    vocab: int, width: int, multiple_of: int = VOCAB_BLOCK, also_at: tuple[int, ...] = ()
) -> Iterator[tuple[int, int]]:
    """(first, end) of slices of ``width`` ids, also cut at the ids ``also_at``. What is left over beyond a multiple of
    ``multiple_of`` is a slice of its own, so that every other slice consists of whole blocks."""
    whole = vocab - vocab % multiple_of
    edges = sorted({*range(0, whole, width), *(cut for cut in also_at if cut < whole), whole, vocab})
    return ((a, b) for a, b in itertools.pairwise(edges) if a < b)
