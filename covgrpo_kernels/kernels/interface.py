"""What kernels take and give.

A *tile* is a contiguous [R, C] block of the raw products h_t . W_v in float32 (float64 for float64 inputs): R rows by C
vocabulary ids, of which ``Tile.first`` is the first. C is a multiple of VOCAB_BLOCK, or smaller than it. Kernels may
overwrite the products. All other tensors are contiguous along their last dimension.

A set of kernels is a module with these functions (`eager.py` has their signatures and is their specification):

- on a tile: ``online_softmax_`` (updates the running softmax of each row) and ``dlogits`` (products to their gradient);
- without a tile: ``covariance_weights``, ``covariance_weights_grad``, ``segment_sums``, ``segments_of_ids``,
  ``sparse_product`` and ``token_terms``;
- ``TILE_BUFFERS``, the number of tile-sized temporaries that the first two allocate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Vocabulary ids that are reduced together before they join a row's running softmax. It is fixed so that the order of
# every sum, and with it every bit of a result, does not depend on how the vocabulary is cut into tiles.
VOCAB_BLOCK = 1024

# The maximum of no logit at all: smaller than every finite logit, and unlike -inf it can be subtracted without a NaN.
NO_MAX = -1e30
# The logarithm of zero: its exponential is zero in float64 too, and the product of the two is zero and not NaN.
LOG_ZERO = -1e3

# The most entries of a row that keep a gradient each in the backward. Of the tokens that a recorded policy of 2.2 nats
# sampled 45%, 33%, 22%, 10% are dense with 64, 128, 256, 512, and a step of 2,048 of them (D = 576, V = 49152, C++)
# takes 0.91, 0.89, 0.87, 0.85 s; at temperature 0.6 0.65, 0.63, 0.63, 0.64 s. An entry and token is 8 bytes: beyond 128
# a percent or two of time would cost twice the memory.
MAX_CANDIDATES = 128
# Dense rows whose tails stand for the tails of all sparse rows: as many as a vector of the C++ kernels has lanes.
TAIL_ROWS = 16
# Vocabulary ids whose largest logit a forward on a GPU leaves for the backward. Narrower costs memory (two bytes a row
# and peak), wider costs products: the backward makes those of all of these ids again where one is probable.
PEAK_WIDTH = 256

# What happens to a row in the backward: the values of `BackwardPlan.row_class`.
DROPPED, SPARSE, DENSE = range(3)


class LogitTransform(NamedTuple):
    """From a raw product to a logit: softcap(scale * (product + bias)) / temperature of the row."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, products: Tensor, bias: Tensor | None, temperature: Tensor | None) -> Tensor:
        """Logits of products [R, C] with bias [C] and temperature [R], in place."""
        if bias is not None:
            products.add_(bias)
        if self.softcap is not None:
            products.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            products.mul_(self.scale)
        if temperature is not None:
            products.div_(temperature.unsqueeze(1))
        return products

    def linear_slope(self, temperature: Tensor | None) -> Tensor | float:
        """dlogit/dproduct of each row, [R] or one number, without the slope of the softcap."""
        return self.scale if temperature is None else self.scale / temperature

    def size_of_slope(self, temperature: Tensor | None) -> Tensor | float:
        """The absolute value of `linear_slope`."""
        slope = self.linear_slope(temperature)
        return slope.abs() if isinstance(slope, Tensor) else abs(slope)

    def softcap_slope(self, logits: Tensor, temperature: Tensor | None) -> Tensor:
        """The derivative of softcap, 1 - tanh^2, as a function of the logits; of their shape. Only with a softcap."""
        assert self.softcap is not None
        capped = logits / self.softcap
        if temperature is not None:
            capped.mul_(temperature if logits.ndim == 1 else temperature.unsqueeze(1))
        return capped.square_().neg_().add_(1)


class Tile(NamedTuple):
    """What belongs to a tile of products besides the products."""

    targets: Tensor  # [R] int64
    first: int  # the vocabulary id of the first column
    transform: LogitTransform
    bias: Tensor | None  # [C]
    temperature: Tensor | None  # [R]


class RowStats(NamedTuple):
    """Statistics of R rows over the whole vocabulary, in one tensor so that rows are taken by one operation.

    A row without a finite logit has no distribution: its log-prob, its entropy and its maximum are NaN.
    """

    packed: Tensor  # [4, R]

    @property
    def logprob(self) -> Tensor:  # [R] of the target, nats
        return self.packed[0]

    @property
    def entropy(self) -> Tensor:  # [R] nats; meaningless where the softmax was computed without entropy
        return self.packed[1]

    @property
    def maximum(self) -> Tensor:  # [R] the largest logit
        return self.packed[2]

    @property
    def log_sum(self) -> Tensor:  # [R] log of the sum of exp(logit - maximum) over the vocabulary
        return self.packed[3]

    def take(self, rows: Tensor | slice) -> RowStats:
        return RowStats(self.packed[:, rows])

    def min_logits(self, min_prob: float) -> Tensor:  # [R]
        """The logit of an entry whose probability is ``min_prob``."""
        return self.maximum + (self.log_sum + math.log(min_prob))

    def probability(self, logits: Tensor) -> Tensor:  # [R] -> [R]
        return ((logits - self.maximum) - self.log_sum).exp()


class OnlineSoftmax(NamedTuple):
    """The running softmax of R rows. The maximum is kept out of both sums: 1 - p and the entropy of a token that the
    policy is sure of then have no cancellation."""

    packed: Tensor  # [4, R]

    @property
    def maximum(self) -> Tensor:  # [R] largest logit m so far
        return self.packed[0]

    @property
    def sum(self) -> Tensor:  # [R] sum of exp(z - m) over the other logits z
        return self.packed[1]

    @property
    def entropy_sum(self) -> Tensor:  # [R] sum of exp(z - m) (m - z) over the other logits; zero without entropy
        return self.packed[2]

    @property
    def target(self) -> Tensor:  # [R] logit of the target, NaN until its tile came
        return self.packed[3]

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> OnlineSoftmax:
        start = torch.tensor([NO_MAX, 0.0, 0.0, math.nan], dtype=dtype, device=device)
        return cls(start.unsqueeze(1).repeat(1, rows))

    def take(self, rows: slice) -> OnlineSoftmax:
        """A view: updates reach the whole."""
        return OnlineSoftmax(self.packed[:, rows])

    def stats(self) -> RowStats:
        m, s, u, target = self.packed
        log_sum = s.log1p()
        # Of a row without a finite logit the log of the sum is a finite number all the same.
        maximum, entropy = (value.where(m != NO_MAX, torch.nan) for value in (m, log_sum + u / (1 + s)))
        return RowStats(torch.stack([(target - maximum) - log_sum, entropy, maximum, log_sum]))


class Candidates(NamedTuple):
    """Entries of R rows that the backward may need one by one: all whose logit reaches the row's floor.

    While they are collected, in any order, a row that has no room for one more keeps the larger half of those it has,
    and its floor rises above all that went. Equal logits stay or go together, so that what is left in the end is the
    same in whatever order they came."""

    found: Tensor  # [R] int32, how many there are; where they are more than K the row has lost some
    vocab_ids: Tensor  # [R, K] int32
    logits: Tensor  # [R, K]
    min_logits: Tensor  # [R] the floor

    @classmethod
    def empty(cls, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Candidates:
        found = torch.zeros(rows, dtype=torch.int32, device=device)
        vocab_ids = torch.zeros(rows, capacity, dtype=torch.int32, device=device)
        min_logits = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        return cls(found, vocab_ids, torch.zeros(rows, capacity, dtype=dtype, device=device), min_logits)

    @property
    def capacity(self) -> int:
        return self.vocab_ids.shape[1]

    def present(self) -> Tensor:  # [R, K] bool
        """Which places are in use; none in rows that have lost candidates."""
        complete = self.found.where(self.found <= self.capacity, 0)
        return torch.arange(self.capacity, device=self.found.device) < complete.unsqueeze(1)

    def take(self, rows: Tensor | slice) -> Candidates:
        return Candidates._make(value[rows] for value in self)

    def drop_smaller_half_(self) -> None:
        """In rows with more than K / 2 candidates the K / 2 largest stay, or fewer where the next is equal to some."""
        kept = largest_candidates(self, self.logits.where(self.present(), -torch.inf), self.capacity // 2)
        self.found.copy_(kept.found.where(self.found <= self.capacity, self.found))
        self.vocab_ids[:, : kept.capacity] = kept.vocab_ids
        self.logits[:, : kept.capacity] = kept.logits
        self.min_logits.copy_(kept.min_logits)

    def most_probable(self, min_logits: Tensor) -> Candidates:  # [R]
        """At most K / 2 of each row, those that reach ``min_logits`` alone, in ascending order of their ids so that
        sums over them have one order; unused places are zero. The floor of a row that had more is in the middle
        between the smallest that stays and the largest that goes: a logit that is computed again, with its sum in
        another order, is then on the same side of it."""
        kept = largest_candidates(self, self.logits.where(self.present(), -torch.inf), self.capacity // 2)
        smallest = kept.logits.where(kept.present(), torch.inf).amin(1)
        middle = kept.min_logits + (smallest - kept.min_logits) / 2
        floor = torch.maximum(min_logits, middle.where(kept.found > 0, kept.min_logits))
        stays = kept.present() & (kept.logits >= floor.unsqueeze(1))
        ascending, order = kept.vocab_ids.where(stays, torch.iinfo(torch.int32).max).sort(1)
        kept = Candidates(stays.sum(1, dtype=torch.int32), ascending, kept.logits.gather(1, order), floor)
        present = kept.present()
        return Candidates(
            kept.found.where(self.found <= self.capacity, kept.capacity + 1),
            kept.vocab_ids.where(present, 0),
            kept.logits.where(present, 0),
            kept.min_logits,
        )


def largest_candidates(candidates: Candidates, logits: Tensor, count: int) -> Candidates:  # [R, K] -> [R, count]
    """The largest of each row in descending order, their ``logits`` being -inf in places that are not in use. Where
    there are more, the floor is the next larger number to the largest that goes."""
    largest, place = logits.topk(count + 1)
    next_largest = largest[:, count:]
    above = next_largest.nextafter(torch.full_like(next_largest, torch.inf)).squeeze(1)
    return Candidates(
        (largest > next_largest).sum(1, dtype=torch.int32),
        candidates.vocab_ids.gather(1, place[:, :count]),
        largest[:, :count],
        torch.maximum(candidates.min_logits, above),
    )


class Collecting(NamedTuple):
    """Where ``online_softmax_`` collects candidates of R rows."""

    min_logits: Tensor  # [R] what a logit has to reach, besides the floor of the row's candidates
    candidates: Candidates


class Coefficients(NamedTuple):
    """What dL/dlogits of R rows takes besides the logits, in one tensor: the first four rows of it, and all six where
    there is a gradient of the entropy."""

    packed: Tensor  # [4 or 6, R]

    @property
    def maximum(self) -> Tensor:  # [R] as `RowStats`, like the next
        return self.packed[0]

    @property
    def log_sum(self) -> Tensor:
        return self.packed[1]

    @property
    def at_target(self) -> Tensor:  # [R] dL/dlogit of the target; 1 - p comes from the log-prob, without cancellation
        return self.packed[2]

    @property
    def logprob_grad(self) -> Tensor:  # [R] g = dL/dlogprob
        return self.packed[3]

    @property
    def entropy(self) -> Tensor:  # [R]; this and the next only where `has_entropy`
        return self.packed[4]

    @property
    def entropy_grad(self) -> Tensor:  # [R] e = dL/dentropy
        return self.packed[5]

    @property
    def has_entropy(self) -> bool:
        return len(self.packed) == 6

    @classmethod
    def of(cls, stats: RowStats, logprob_grad: Tensor, entropy_grad: Tensor | None) -> Coefficients:
        logprob = stats.logprob
        at_target = -torch.expm1(logprob) * logprob_grad
        if entropy_grad is None:
            return cls(torch.stack([stats.maximum, stats.log_sum, at_target, logprob_grad]))
        at_target = at_target - entropy_grad * logprob.exp() * (logprob.clamp(min=LOG_ZERO) + stats.entropy)
        return cls(torch.stack([stats.maximum, stats.log_sum, at_target, logprob_grad, stats.entropy, entropy_grad]))

    def take(self, rows: slice | Tensor) -> Coefficients:
        return Coefficients(self.packed[:, rows])
