"""The part of the backward that needs no pass over the vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import tiles
from .backward_plan import BackwardPlan, Kept, SparseRows, floors, sparse_rows, tail_weights
from .tiles.interface import BLOCK, Head, Results


class SparsePart:
    """The sparse rows' share of the gradients: what is kept of them, each entry by itself, and their tails, which enter
    the products as one row before the dense ones."""

    def __init__(
        self,
        plan: BackwardPlan,
        chosen: Tensor,  # [S] the sparse rows
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [N], as are the next four
        temperature: Tensor | None,
        results: Results,
        g: Tensor,
        e: Tensor | None,
        head: Head,
        kept: Kept,
        floor: float,
    ) -> None:
        self.chosen, self.hidden, self.weight, self.dtype = chosen, hidden, weight, g.dtype
        self.ops = tiles.select(hidden.device)

        def of(rows: Tensor) -> SparseRows:
            t, e_ = (None if x is None else x[rows] for x in (temperature, e))
            results_ = Results._make(r[rows] for r in results)
            return sparse_rows(kept.rows(rows), results_, targets[rows], g[rows], e_, head, t, floor)

        rows = of(chosen)
        # By token, and for each by entry; by entry, and for each by token: the order of every sum is fixed.
        token, place = rows.used.nonzero(as_tuple=True)
        entry, value = rows.entries[token, place], rows.values[token, place]
        order = entry.argsort(stable=True)
        self.w_tokens, self.w_values = chosen[token[order]], value[order]
        self.touched, counts = entry[order].unique_consecutive(return_counts=True)
        self.w_offsets = pad(counts.cumsum(0), (1, 0))
        order = order[token[order].argsort(stable=True)]
        self.h_entries, self.h_values = entry[order], value[order]
        self.h_offsets = pad(rows.used.sum(1).cumsum(0), (1, 0))

        # The tail's row is a sum that is at most 1, so that it keeps its digits in 16 bit; times ``size`` it adds up to
        # 1 and stands for the tail of every row, times that row's ``tails``.
        mixed = plan.tail_rows
        weights = tail_weights(g, e)[mixed]
        floors_ = floors(Results._make(r[mixed] for r in results), floor)
        share = weights / (weights.sum() * floor)
        share = share.where(weights.sum() != 0, 0)  # a gradient of zero from outside
        total = (share * of(mixed).mass).sum()
        self.size = (1 / total).where(total != 0, 0)
        self.tails = rows.tail
        self.tail = tuple(pad(x, (1, 0)).contiguous() for x in (share, floors_))
        self.bias = self.tails.sum() * self.size
        self.state = hidden.new_zeros(hidden.shape[1], dtype=self.dtype)
        for i in range(0, len(chosen), BLOCK):
            self.state += self.tails[i : i + BLOCK] @ hidden[chosen[i : i + BLOCK]].to(self.dtype)
        self.state *= self.size

    def of_slices(self, edges: list[int]) -> list[tuple[slice, slice]]:
        """The touched entries from each edge to the next, and their values."""
        places = torch.searchsorted(self.touched, torch.tensor(edges, device=self.touched.device))
        both = zip(places.tolist(), self.w_offsets[places].tolist(), strict=True)  # the only wait for a GPU
        return [(slice(a, c), slice(b, d)) for (a, b), (c, d) in itertools.pairwise(both)]

    def weight_rows(self, entries: slice, values: slice) -> Tensor:
        """[n, D] gradients of the touched entries of a slice."""
        offsets = self.w_offsets[entries.start : entries.stop + 1] - values.start
        out = self.hidden.new_empty(len(offsets) - 1, self.hidden.shape[1], dtype=self.dtype)
        self.ops.sparse_product(self.w_values[values], self.w_tokens[values], offsets, self.hidden, out)
        return out

    @cached_property
    def bias_rows(self) -> Tensor:
        """[n] gradients of the bias, of all touched entries."""
        out, ones = self.w_values.new_empty(len(self.touched), 1), self.w_values.new_ones(1, 1)
        self.ops.sparse_product(self.w_values, torch.zeros_like(self.w_tokens), self.w_offsets, ones, out)
        return out.squeeze(1)

    def hidden_rows(self, tail_product: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """([n] rows, [n, D] their gradients), some rows at a time; ``tail_product`` [D] is the tail's row times W."""
        of_tail = tail_product * self.size
        for i in range(0, len(self.chosen), BLOCK):
            offsets = self.h_offsets[i : i + BLOCK + 1]
            part = slice(int(offsets[0]), int(offsets[-1]))
            out = self.hidden.new_empty(len(offsets) - 1, self.hidden.shape[1], dtype=self.dtype)
            self.ops.sparse_product(self.h_values[part], self.h_entries[part], offsets - offsets[0], self.weight, out)
            yield self.chosen[i : i + BLOCK], out.addcmul_(self.tails[i : i + BLOCK].unsqueeze(1), of_tail)
