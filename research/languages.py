"""A head trained on two kinds of context that share no part of the vocabulary: two languages in one batch.

Hidden states are made up and stay as they are, so that the steps of the head show what its gradient lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from covgrpo_kernels import linear_logprob, reference

SIZE = 0.02  # standard deviation of the embeddings' own part, as in real heads
APART = 14.0  # nats between a language's vocabulary and the other's


@dataclass(frozen=True)
class Languages:
    tokens: int = 512
    depth: int = 512
    vocab: int = 4096
    candidates: int = 1  # tokens that each state has above its tail; more of them push the tails apart, too
    own_tail: float = 0.1  # nats, the standard deviation of what is a row's own in its tail


SHARED_TAILS = Languages()
OWN_TAILS = Languages(candidates=12, own_tail=1.5)


class Batch(NamedTuple):
    hidden: Tensor  # [N, D]
    targets: Tensor  # [N]
    logprob_grad: Tensor  # [N]


class _Vocabulary(NamedTuple):
    weight: Tensor  # [V, D] embeddings
    own: Tensor  # [V, D] the part of each that it shares with no other
    frequency: Tensor  # [V, 2] log-frequencies in each language
    to_language: Tensor  # [2, D] states whose logits are these log-frequencies


def _vocabulary(sizes: Languages) -> _Vocabulary:
    g = torch.Generator().manual_seed(99)
    directions = torch.linalg.qr(torch.randn(sizes.depth, 3, generator=g)).Q * math.sqrt(sizes.depth)
    common, along = directions[:, 0], directions[:, 1:]
    ids = torch.arange(sizes.vocab)
    of_other = (ids % 2).unsqueeze(1) != torch.arange(2)
    frequency = -(ids // 2 + 1).float().log().unsqueeze(1) - APART * of_other  # Zipf's law
    log_vocab = math.log(sizes.vocab)
    shared = 0.5 * common + frequency @ along.T / (2 * log_vocab)
    own = torch.randn(sizes.vocab, sizes.depth, generator=g) * SIZE
    return _Vocabulary(own + shared * SIZE, own, frequency, along.T * (2 * log_vocab / (SIZE * sizes.depth)))


def make_batch(seed: int, sizes: Languages) -> tuple[Batch, Tensor]:
    """Sixty-four responses, each in one language, and the head that they are made for. Targets are sampled; three of
    ten responses have no advantage."""
    g = torch.Generator().manual_seed(seed)
    weight, own, frequency, to_language = _vocabulary(sizes)
    count, options = sizes.tokens, sizes.candidates
    response = torch.arange(count) * 64 // count
    language = torch.randint(0, 2, (64,), generator=g)[response]
    noise = torch.randn(count, sizes.depth, generator=g) * (sizes.own_tail / (SIZE * math.sqrt(sizes.depth)))
    common = to_language[language]

    # As in `covgrpo_kernels.testing.rl_head`: a fifth of the states are forks; the best candidate stands 4 to 14 nats
    # above the tail.
    is_fork = (torch.rand(count, generator=g) < 0.2).unsqueeze(1)
    candidates = torch.multinomial(frequency.exp().T[language], options, generator=g)
    steps = torch.empty(count, options).exponential_(generator=g)
    steps[:, 0] = 0
    sure = (4 + 10 * torch.rand(count, 1, generator=g)) * (steps > 0)
    gaps = torch.where(is_fork, 1.5 * steps, sure).cumsum(1)
    u = torch.rand(count, 1, generator=g)
    margin = torch.where(is_fork, 4 + 5 * u, 7 + 7 * u)
    for _ in range(4):  # the tail grows with the states, and embeddings are not quite orthogonal
        tail = frequency.logsumexp(0)[language].unsqueeze(1) + SIZE**2 * noise.square().sum(1, keepdim=True) / 2
        wanted = (tail + margin - gaps).where(gaps < margin, -math.inf)
        for j in range(options):
            ids = candidates[:, j]
            off = wanted[:, j] - ((common + noise) * weight[ids]).sum(1)
            push = off / own[ids].square().sum(1)
            noise += own[ids] * push.where(wanted[:, j].isfinite(), 0).unsqueeze(1)
    hidden = common + noise
    targets = torch.multinomial((hidden @ weight.T).softmax(1), 1, generator=g).squeeze(1)
    advantages = torch.randn(64, generator=g)
    advantages[torch.randperm(64, generator=g)[:19]] = 0
    spread = 1 + 0.2 * torch.randn(count, generator=g)  # of weights and ratios
    return Batch(hidden, targets, advantages[response] * spread / count), weight


class Head:
    """The head on its way. ``eager``: by PyTorch, with logits."""

    def __init__(self, weight: Tensor, held_out: Tensor, grad_tol: float, dtype: torch.dtype, eager: bool) -> None:
        self.weight = weight.clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.weight], weight_decay=0.0)
        self._held_out, self._dtype = held_out, dtype
        self._score: Callable[..., tuple[Tensor, Tensor | None]] = (
            reference.linear_logprob if eager else lambda *rows: linear_logprob(*rows, grad_tol=grad_tol)
        )

    def step(self, batch: Batch, order: Tensor | None) -> dict[str, float]:
        """A step on a batch, whose rows may come in another order."""
        hidden, targets, g = batch if order is None else Batch(*(value[order] for value in batch))
        logprob = self._score(hidden.to(self._dtype), self.weight.to(self._dtype), targets)[0]
        loss = (logprob * g).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return dict(loss=loss.item())

    @torch.no_grad()
    def log_policy(self) -> Tensor:  # [n, V] float64
        return (self._held_out @ self.weight.T).double().log_softmax(1)
