"""Sparse rows of dL/dproducts: the gradient at each candidate and at the target, and one number for the rest, the
tail."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from .inputs import HeadInputs
from .kernels.interface import LOG_ZERO, VOCAB_BLOCK, Candidates, Coefficients, RowStats

if TYPE_CHECKING:
    from .plan import BackwardPlan


class SparseEntries(NamedTuple):
    """dL/dproducts of R rows: of each candidate and of the target, and of all others together, the tail."""

    vocab_ids: Tensor  # [R, K + 1] int64, the target last
    values: Tensor  # [R, K + 1], zero where not used
    used: Tensor  # [R, K + 1] bool
    tail: Tensor  # [R] the sum over the tail
    mass: Tensor  # [R] its probability
    floor: Tensor  # [R] what every probability in it is below


def sparse_entries(
    inputs: HeadInputs,  # R rows, as the next four
    stats: RowStats,
    candidates: Candidates,
    logprob_grad: Tensor,  # [R] g
    entropy_grad: Tensor | None,  # [R] e
) -> SparseEntries:
    coefficients = Coefficients.of(stats, logprob_grad, entropy_grad)
    targets, temperature, transform = inputs.targets, inputs.temperature, inputs.transform
    z, vocab_ids = candidates.logits, candidates.vocab_ids.long()
    used = candidates.present() & (vocab_ids != targets.unsqueeze(1))
    log_p = (z - stats.maximum.unsqueeze(1)) - stats.log_sum.unsqueeze(1)
    p = log_p.exp().where(used, 0)
    per_p = logprob_grad.unsqueeze(1)
    if entropy_grad is not None:
        log_p = log_p.clamp(min=LOG_ZERO)
        per_p = per_p + entropy_grad.unsqueeze(1) * (log_p + stats.entropy.unsqueeze(1))
    dz = torch.cat([-p * per_p, coefficients.at_target.unsqueeze(1)], 1)
    tail = -dz.sum(1)
    mass = (-torch.expm1(stats.logprob) - p.sum(1)).clamp(min=0)

    slope = torch.as_tensor(transform.linear_slope(temperature), dtype=tail.dtype, device=tail.device).expand_as(tail)
    dz = dz * slope.unsqueeze(1)
    if transform.softcap is not None:
        target_logit = (stats.logprob + stats.log_sum) + stats.maximum
        dz = dz * transform.softcap_slope(torch.cat([z, target_logit.unsqueeze(1)], 1), temperature)
    used = pad(used, (0, 1), value=True)
    vocab_ids = torch.cat([vocab_ids, targets.unsqueeze(1)], 1)
    floor = stats.probability(candidates.min_logits)
    return SparseEntries(vocab_ids, dz.where(used, 0), used, tail * slope, mass, floor)


# What similarities are multiplied by before the softmax. At 10 two kinds of context with disjoint tails keep their own
# tails apart, and within one kind the mixture averages over what is particular to a single row.
MIX_SHARPNESS = 10.0


def tail_mix(hidden: Tensor, tail_hidden: Tensor) -> Tensor:  # [R, D], [T, D] -> [R, T] float32 or float64
    """How much each row takes of the T tails, since contexts alike have tails alike: the softmax of MIX_SHARPNESS times
    the cosine of the angle between its hidden state and that of the tail's row, less the mean of the T states."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    center = tail_hidden.to(dtype).mean(0)
    directions = normalize(tail_hidden.to(dtype) - center, dim=1)
    parts = [
        (normalize(block.to(dtype) - center, dim=1) @ directions.T * MIX_SHARPNESS).softmax(1)
        for block in hidden.split(VOCAB_BLOCK)
    ]
    return torch.cat(parts) if parts else directions.new_zeros(0, len(tail_hidden))


class Tails(NamedTuple):
    """The tails of T dense rows, which stand for those of the sparse rows.

    Tail k is a row Q_k of its own in the products: Q_k[v] = p[v] / min_prob times the slope of the softcap, of the k-th
    dense row, for its vocabulary ids below its floor ``min_logits`` that are not its target. Where the floor is not
    raised its entries are at most 1, elsewhere below 1e4, so that they keep their digits in 16 bits. An engine puts the
    tails in front of the dense rows for the products with dL/dproducts, and strips them afterwards."""

    states: (
        Tensor  # [T, D] float32 or float64: sum over the sparse rows of what they take of Q_k times their hidden state
    )
    min_logits: Tensor  # [T]
    bias_counts: Tensor  # [T] what Q_k counts in the gradient of the bias: the sum of what they take of it
    scale: float  # 1 / min_prob

    @property
    def rows(self) -> int:  # T
        return len(self.min_logits)


class WeightRows(NamedTuple):
    """The sparse rows' share in the gradients of a slice of the head: of the vocabulary ids that they touch."""

    vocab_ids: Tensor  # [n] int64, within the slice
    weight: Tensor | None  # [n, D]; None where not needed
    bias: Tensor  # [n]


class SparseGradient:
    """The sparse rows' share of the gradients, S rows: their entries in CSR form, by row for dL/dhidden and by
    vocabulary id for dL/dweight, and their tails. The order of every sum is fixed."""

    def __init__(
        self,
        plan: BackwardPlan,
        inputs: HeadInputs,  # N rows, as the next four
        stats: RowStats,
        candidates: Candidates,
        g: Tensor,
        e: Tensor | None,
        min_prob: float,
        kernels: ModuleType,
    ) -> None:
        """Waits for the device, which has to say how many sparse rows and entries there are."""
        self._inputs, self._kernels, self.dtype = inputs, kernels, g.dtype
        min_prob = min_prob or 1.0  # zero: nothing is sparse, and any number does

        def entries_of(rows: Tensor) -> SparseEntries:
            taken = inputs._replace(
                targets=inputs.targets[rows],
                temperature=None if inputs.temperature is None else inputs.temperature[rows],
            )
            e_rows = None if e is None else e[rows]
            return sparse_entries(taken, stats.take(rows), candidates.take(rows), g[rows], e_rows)

        self.rows = plan.sparse.nonzero().squeeze(1)  # [S]
        entries = entries_of(self.rows)
        row, place = entries.used.nonzero(as_tuple=True)
        vocab_id, value = entries.vocab_ids[row, place], entries.values[row, place]
        order = vocab_id.argsort(stable=True)
        self._by_id_rows, self._by_id_values = self.rows[row[order]], value[order]
        self.touched_ids, counts = vocab_id[order].unique_consecutive(return_counts=True)  # [n]
        self._by_id_offsets = pad(counts.cumsum(0), (1, 0))
        order = order[row[order].argsort(stable=True)]
        self._by_row_ids, self._by_row_values = vocab_id[order], value[order]
        self._by_row_offsets = pad(entries.used.sum(1).cumsum(0), (1, 0))

        self.tail_rows = plan.tail_rows if len(self.rows) else plan.tail_rows[:0]  # [T]
        mass = entries_of(self.tail_rows).mass
        size = (min_prob / mass).where(mass != 0, 0)  # size * Q_k sums to 1
        tail_hidden = inputs.hidden[self.tail_rows]
        self._tail = entries.tail.new_empty(len(self.rows), len(self.tail_rows))  # [S, T] what a row takes of each Q_k
        states = self._tail.new_zeros(len(self.tail_rows), inputs.hidden.shape[1])
        for i in range(0, len(self.rows), VOCAB_BLOCK):
            block = slice(i, i + VOCAB_BLOCK)
            hidden = inputs.hidden[self.rows[block]]
            self._tail[block] = entries.tail[block].unsqueeze(1) * tail_mix(hidden, tail_hidden) * size
            states += self._tail[block].T @ hidden.to(self.dtype)
        min_logits = candidates.min_logits[self.tail_rows]
        self.tails = Tails(states, min_logits, self._tail.sum(0), 1 / min_prob)

    def weight_rows(self, edges: list[int], need_weight: bool, need_bias: bool) -> Iterator[WeightRows]:
        """For each slice of the vocabulary, from each edge to the next. Waits for the device once."""
        places = torch.searchsorted(self.touched_ids, torch.tensor(edges, device=self.touched_ids.device))
        both = list(zip(places.tolist(), self._by_id_offsets[places].tolist(), strict=True))
        bias = self._bias_rows() if need_bias else self._by_id_values[:0]
        for edge, ((a, first), (b, end)) in zip(edges, itertools.pairwise(both), strict=False):
            weight = None
            if need_weight:
                weight = self._by_id_values.new_empty(b - a, self._inputs.hidden.shape[1])
                self._kernels.sparse_product(
                    self._by_id_values[first:end], self._by_id_rows[first:end],
                    self._by_id_offsets[a : b + 1] - first, self._inputs.hidden, weight,
                )  # fmt: skip
            yield WeightRows(self.touched_ids[a:b] - edge, weight, bias[a:b])

    def _bias_rows(self) -> Tensor:  # [n]
        out, ones = self._by_id_values.new_empty(len(self.touched_ids), 1), self._by_id_values.new_ones(1, 1)
        rows = torch.zeros_like(self._by_id_rows)
        self._kernels.sparse_product(self._by_id_values, rows, self._by_id_offsets, ones, out)
        return out.squeeze(1)

    def hidden_rows(self, tail_products: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """([n] rows, [n, D] their gradients), some rows at a time; ``tail_products`` [T, D] is Q @ weight."""
        offsets = [*self._by_row_offsets[::VOCAB_BLOCK].tolist(), len(self._by_row_values)]
        for i, (first, end) in zip(range(0, len(self.rows), VOCAB_BLOCK), itertools.pairwise(offsets), strict=False):
            block = slice(i, min(i + VOCAB_BLOCK, len(self.rows)))
            out = self._by_row_values.new_empty(block.stop - i, self._inputs.hidden.shape[1])
            self._kernels.sparse_product(
                self._by_row_values[first:end], self._by_row_ids[first:end],
                self._by_row_offsets[i : block.stop + 1] - first, self._inputs.weight, out,
            )  # fmt: skip
            yield self.rows[block], out.addmm_(self._tail[block], tail_products)
