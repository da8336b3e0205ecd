"""Batches and error measures, shared by the tests and the benchmark.

The rule for numbers: errors are taken against the float64 reference and compared with those that eager PyTorch
makes in the same dtype on the same inputs. Pooled over many rows ours are at most 1.1 times eager's RMS (16-bit
log-probs: a tenth); in a single draw at most the larger of 3 times eager's and a bound in machine epsilons that
follows from the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import reference
from .config import IGNORE_INDEX, CovGRPOConfig
from .inputs import flatten_tokens
from .kernels.interface import LOG_ZERO
from .objective import policy_objective

# What a function of the head returns here: name -> tensor, gradients as "d" + input.
Results = dict[str, Tensor]


def leaf(x: Tensor, dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_(requires_grad)


def run_logprob(
    function: Callable[..., Any],
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None = None,  # [V]
    *,
    dtype: torch.dtype,
    logprob_grad: Tensor,  # [N] coefficients of the gradient
    entropy_grad: Tensor | None = None,  # [N]
    **options: Any,
) -> Results:
    """Log-probs, entropies and gradients of `linear_logprob` or of the reference, from inputs cast to dtype."""
    h, w = leaf(hidden, dtype), leaf(weight, dtype)
    b = None if bias is None else leaf(bias, dtype)
    logprob, entropy = function(h, w, targets, bias=b, **options)[:2]
    total = (logprob * logprob_grad.to(logprob.dtype)).sum()
    if entropy_grad is not None:
        total = total + (entropy * entropy_grad.to(entropy.dtype)).sum()
    inputs = {"hidden": h, "weight": w} | ({} if b is None else {"bias": b})
    grads = torch.autograd.grad(total, list(inputs.values()))
    results = {"logprob": logprob.detach()} | {f"d{n}": g for n, g in zip(inputs, grads, strict=True)}
    return results if entropy is None else results | {"entropy": entropy.detach()}


def run_loss(
    function: Callable[..., Any],
    batch: dict[str, Any],
    config: CovGRPOConfig,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Results:
    """Loss, per-token outputs and gradients of `covgrpo_loss` or of the reference, from a batch cast to dtype."""
    inputs = {n: leaf(batch[n], dtype) for n in ("hidden", "weight", "bias") if batch.get(n) is not None}
    out = function(**(batch | inputs), config=config, **options)
    grads = torch.autograd.grad(out.loss, list(inputs.values()))
    results = {"loss": out.loss.detach(), "logprob": out.logprobs, "weights": out.weights}
    return results | {f"d{n}": g for n, g in zip(inputs, grads, strict=True)}


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item() if error.numel() else 0.0


@dataclass
class ErrorBook:
    """Errors of ours and of eager against float64, pooled over draws by quantity."""

    ours: dict[str, list[Tensor]] = field(default_factory=dict)
    eager: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, ours: Results, eager: Results, oracle: Results) -> None:
        for name, exact in oracle.items():
            self.ours.setdefault(name, []).append((ours[name].double() - exact).flatten())
            self.eager.setdefault(name, []).append((eager[name].double() - exact).flatten())

    def ratios(self) -> dict[str, float]:
        """RMS of ours over RMS of eager's; where eager is exact, 0 if ours is and inf if not."""
        result = {}
        for name, errors in self.ours.items():
            ours, eager = rms(torch.cat(errors)), rms(torch.cat(self.eager[name]))
            result[name] = ours / eager if eager else (0.0 if ours == 0 else math.inf)
        return result

    def check(self, dtype: torch.dtype) -> None:
        """The pooled rule. Raises AssertionError with all ratios."""
        ratios = self.ratios()
        for name, ratio in ratios.items():
            tenth = name == "logprob" and dtype in (torch.bfloat16, torch.float16)
            assert ratio <= (0.1 if tenth else 1.1), f"{name} in {dtype}: {ratio:.3f} of eager's RMS; all: {ratios}"


def bounds(
    hidden: Tensor,  # [N, D] float64, as are all
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    logprob_grad: Tensor,  # [N]
    entropy_grad: Tensor | None = None,
    **options: Any,
) -> dict[str, float]:
    """Bounds on the RMS error in a single draw, from rounding alone: logits off by the rounding of a sum of D
    products, exponentials off by as much, every result rounded to its dtype. Rounding errors of a sum add up like
    its square root."""
    eps, out_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype).eps
    slope = abs(options.get("logit_scale", 1.0)) / torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64)
    raw = hidden @ weight.T

    def dlogits(g: Tensor, e: Tensor | None) -> Results:  # the raw products are the states of an identity head
        eye = torch.eye(len(weight), dtype=torch.float64)
        options_ = dict(dtype=torch.float64, logprob_grad=g, entropy_grad=e, **options)
        return run_logprob(reference.linear_logprob, raw, eye, targets, bias, **options_)

    exact = dlogits(logprob_grad, entropy_grad)
    dz, entropy = exact["dhidden"], exact["entropy"]
    size = raw.abs() if bias is None else raw.abs() + bias.abs()
    products = (hidden.square() @ weight.square().T).sqrt()
    off = (math.sqrt(hidden.shape[1]) + 8) * products + 4 * size
    logit = 3 * eps * (off.amax(1) * slope + 4) if len(weight) else eps * products.sum(1)  # [N]

    dz_size = dz.abs()
    if entropy_grad is not None:
        # p (log p + H) may cancel where neither factor does.
        p = dlogits(torch.ones_like(logprob_grad), None)["dhidden"].abs() / slope.reshape(-1, 1)
        p = p.scatter(1, targets.clamp(min=0).unsqueeze(1), exact["logprob"].exp().unsqueeze(1)) if len(weight) else p
        dz_size = dz_size + (entropy_grad.abs() * slope * (2 + entropy)).unsqueeze(1) * p
    dz_size = dz_size.where((targets != options.get("ignore_index", IGNORE_INDEX)).unsqueeze(1), 0)
    dz_off = dz_size * (2 * logit + eps * (math.sqrt(len(weight)) + math.sqrt(len(hidden)))).unsqueeze(1)

    def total(left: Tensor, left_off: Tensor, right: Tensor) -> float:
        rounded = (left @ right).abs() + (left.square() @ right.square()).sqrt()
        return rms(left_off @ right.abs() + out_eps * rounded)

    ones = torch.ones(len(hidden), 1, dtype=torch.float64)
    return {
        "logprob": rms(2 * logit),
        "entropy": rms(2 * logit * (1 + entropy)),
        "dhidden": total(dz, dz_off, weight),
        "dweight": total(dz.T, dz_off.T, hidden),
        "dbias": total(dz.T, dz_off.T, ones),
    }


def check_draw(ours: Results, eager: Results, oracle: Results, bound: dict[str, float]) -> None:
    """The single-draw rule. Raises AssertionError."""
    for name, exact in oracle.items():
        error, eager_error = rms(ours[name].double() - exact), rms(eager[name].double() - exact)
        limit = max(3 * eager_error, bound[name])
        assert error <= limit, f"{name}: RMS error {error:.3e}, eager {eager_error:.3e}, bound {bound[name]:.3e}"


def random_head(
    seed: int, tokens: int, depth: int, vocab: int, *, std: float = 1.0, bias: bool = False
) -> dict[str, Any]:
    """Gaussian hidden states and weights, float64, logits of standard deviation ``std``; targets at random, some
    ignored; coefficients of both gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    targets = torch.randint(0, max(vocab, 1), (tokens,), generator=g)
    ignored = torch.rand(tokens, generator=g) < (0.15 if vocab else 2.0)
    return dict(
        hidden=normal(tokens, depth),
        weight=normal(vocab, depth) * (std / math.sqrt(max(depth, 1))),
        targets=targets.masked_fill(ignored, IGNORE_INDEX),
        bias=normal(vocab) if bias else None,
        logprob_grad=normal(tokens),
        entropy_grad=normal(tokens),
    )


def policy_head(seed: int, tokens: int, depth: int, vocab: int, *, zero_advantage: float = 0.0) -> dict[str, Any]:
    """Tokens like a reasoning policy's: 80% are nearly certain and the rest forks; the embeddings
    share a common component; the share ``zero_advantage`` of the tokens has no coefficient. float32."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, depth, generator=g) + 0.5 * torch.randn(depth, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    own = weight[targets]
    # The target's logit stands this many nats over the typical one; log(vocab) + 1 is a fork, twice it is certain.
    is_sure = torch.rand(tokens, generator=g) < 0.8
    margin = math.log(vocab) * torch.where(is_sure, 2.0, 1.0) + torch.randn(tokens, generator=g).abs()
    hidden = own * (margin / own.square().sum(1)).unsqueeze(1) + 0.5 * torch.randn(tokens, depth, generator=g) / (
        math.sqrt(depth)
    )
    advantages = torch.randn(tokens, generator=g)
    advantages[: round(zero_advantage * tokens)] = 0
    return dict(hidden=hidden, weight=weight, targets=targets, logprob_grad=advantages / tokens)


@dataclass(frozen=True)
class RecordedPolicy:
    """The distributions of a real policy's tokens, as a few numbers that are fitted to a recording of them: quantiles
    of the entropy, of the number of entries above a floor, and of the mass below it (`python -m research recordings`).

    Logits are a Zipf prior over the vocabulary, times ``exponent``, and Gaussian noise of the context. Its standard
    deviation in nats is a token's own, uniform in ``noise``: it decides how far the most probable entries stand out,
    and so makes sure tokens and forks alike. The norms of the embeddings vary by ``norm_spread`` of their size. The
    best entry is raised by as many nats as an exponential distribution of mean ``lead`` gives.
    """

    exponent: float
    noise: tuple[float, float]
    lead: float
    norm_spread: float = 0.2


# The policies of `rl_head`; None: the one that `mean_entropy` describes. The others are those of SmolLM2-135M-Instruct
# when it samples at a temperature of 0.6 or 1.
POLICIES: dict[str, RecordedPolicy | None] = {
    "sure": None,
    "recorded-0.6": RecordedPolicy(exponent=1.67, noise=(4.0, 10.0), lead=1.0),
    "recorded-1.0": RecordedPolicy(exponent=1.0, noise=(2.25, 5.7), lead=0.7),
}


def rl_head(
    seed: int,
    tokens: int,
    depth: int,
    vocab: int,
    *,
    policy: str = "sure",
    mean_entropy: float = 0.2,
    zero_advantage: float = 0.3,
    padding: float = 0.1,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """A step of GRPO, as the policy's head sees it. All float32 but the integers.

    The policy is one of `POLICIES`. "recorded-0.6" and "recorded-1.0" are as unsure as a real model of 135 million
    parameters at that temperature, some 0.7 and 2 nats: `RecordedPolicy` says how they are made. "sure" is a reasoning
    policy after some training: four of five tokens are nearly certain and the rest forks (arXiv 2506.01939), more of
    them where ``mean_entropy`` (nats, 0.05 to 1.5) asks for more than forks have. A fork has a dozen candidates. Behind
    them stands the tail of every row: a Zipf prior over the vocabulary, which hidden states and embeddings have in
    common, times log-normal noise of the context.

    Targets are sampled from the policy. Sixteen groups of four responses with binary rewards; in the share
    ``zero_advantage`` of the groups all rewards are equal. The share ``padding`` of the tokens is padding: target -100,
    hidden states like any. Old log-probs are of a slightly older policy, so that some tokens are clipped.

    Everything is made on ``device``: other numbers on a GPU than on a CPU, from the same distribution.

    Returns hidden [N, D], weight [V, D], targets, advantages, old_logprobs, group_ids, sequence_ids [N], and the
    coefficients logprob_grad and entropy_grad [N] of CW-GRPO's loss with an entropy bonus of 1e-3.
    """
    g = torch.Generator(device).manual_seed(seed)
    recorded = POLICIES[policy]
    if recorded is None:
        hidden, weight = _policy_states(g, tokens, depth, vocab, mean_entropy)
    else:
        hidden, weight = _recorded_states(g, tokens, depth, vocab, recorded)
    targets, logprobs, entropies = _sample(g, hidden, weight)
    return dict(hidden=hidden, weight=weight, **_grpo_step(g, targets, logprobs, entropies, zero_advantage, padding))


def _policy_states(
    g: torch.Generator, tokens: int, depth: int, vocab: int, mean_entropy: float
) -> tuple[Tensor, Tensor]:  # [N, D], [V, D]
    """Hidden states and embeddings of `rl_head`, on the generator's device."""
    device = g.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tokens, generator=g, device=device)

    # Embeddings: one part of their own, one in common, one along which the prior lies; the size is that of real heads.
    size, log_vocab = 0.02, math.log(max(vocab, 2))
    common, along = torch.randn(2, depth, generator=g, device=device)
    prior = -torch.arange(1, vocab + 1, dtype=torch.float32, device=device).log()
    shared = 0.5 * common + (prior / (2 * log_vocab)).unsqueeze(1) * along
    weight = torch.randn(vocab, depth, generator=g, device=device).add_(shared).mul_(size)
    noise = torch.randn(tokens, depth, generator=g, device=device) * (1.5 / (size * math.sqrt(depth)))
    to_prior = along * (2 * log_vocab / (size * along.square().sum()))

    # Candidates from the prior, each once, gaps between their logits, and how far the best is above the tail.
    is_fork = torch.rand(tokens, generator=g, device=device) < max(0.2, mean_entropy / 1.6)
    frequency = prior.exp().cumsum(0)
    draws = torch.rand(tokens, 12, generator=g, device=device) * frequency[-1]
    candidates = torch.searchsorted(frequency, draws).clamp(max=vocab - 1)
    again = (candidates.unsqueeze(2) == candidates.unsqueeze(1)).tril(-1).any(2)
    steps = torch.empty(tokens, 12, device=device).exponential_(generator=g)
    steps[:, 0] = 0
    sure_gap = uniform(4, 14).unsqueeze(1) * (steps > 0)
    margin = torch.where(is_fork, uniform(4, 9), uniform(7, 14)).unsqueeze(1)

    def below(scale: float) -> Tensor:
        return torch.where(is_fork.unsqueeze(1), scale * steps, sure_gap).cumsum(1).masked_fill(again, math.inf)

    def entropy_of(scale: float) -> float:
        log_p = torch.cat([-below(scale), -margin], 1).log_softmax(1)
        h = -(log_p.exp() * log_p.clamp(min=LOG_ZERO)).sum(1) + log_p[:, -1].exp() * 0.7 * log_vocab
        return h.mean().item()

    low, high = 0.0, 20.0  # entropy falls with the scale
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_of(middle) > mean_entropy else (low, middle)
    gaps = below(low)
    own = weight[candidates] - size * shared[candidates]  # [N, 12, D]
    for _ in range(4):  # the tail grows with the states, and embeddings are not quite orthogonal
        tail = prior.logsumexp(0) + size**2 * noise.square().sum(1, keepdim=True) / 2
        wanted = (tail + margin - gaps).where(gaps < margin, -math.inf)
        for j in range(12):
            off = wanted[:, j] - ((noise + to_prior) * weight[candidates[:, j]]).sum(1)
            push = off / own[:, j].square().sum(1)
            noise += own[:, j] * push.where(wanted[:, j].isfinite(), 0).unsqueeze(1)
    return noise + to_prior, weight


def _recorded_states(
    g: torch.Generator, tokens: int, depth: int, vocab: int, policy: RecordedPolicy
) -> tuple[Tensor, Tensor]:  # [N, D], [V, D]
    """The same of a recorded policy."""
    device = g.device
    size, log_vocab = 0.02, math.log(max(vocab, 2))  # as above
    common, along = torch.randn(2, depth, generator=g, device=device)
    prior = -torch.arange(1, vocab + 1, dtype=torch.float32, device=device).log()
    norms = (1 + policy.norm_spread * torch.randn(vocab, 1, generator=g, device=device)).clamp(min=0.2)
    shared = 0.5 * common + (prior / (2 * log_vocab)).unsqueeze(1) * along
    weight = torch.randn(vocab, depth, generator=g, device=device).mul_(norms).add_(shared).mul_(size)
    low, high = policy.noise
    noise = (low + (high - low) * torch.rand(tokens, 1, generator=g, device=device)) / (size * math.sqrt(depth))
    to_prior = along * (policy.exponent * 2 * log_vocab / (size * along.square().sum()))
    hidden = torch.randn(tokens, depth, generator=g, device=device) * noise + to_prior
    lead = torch.empty(tokens, device=device).exponential_(1 / policy.lead, generator=g)
    for block in torch.arange(tokens, device=device).split(128):
        best = (hidden[block] @ weight.T).argmax(1)
        own = weight[best] - size * shared[best]
        hidden[block] += own * (lead[block] / own.square().sum(1)).unsqueeze(1)
    return hidden, weight


def _sample(
    g: torch.Generator, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # [N] targets, log-probs, entropies
    tokens, device = len(hidden), hidden.device
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    logprobs, entropies = torch.zeros(2, tokens, device=device)
    for block in torch.arange(tokens, device=device).split(128):
        log_p = (hidden[block] @ weight.T).log_softmax(1)
        p = log_p.exp()
        targets[block] = torch.multinomial(p, 1, generator=g).squeeze(1)
        logprobs[block] = log_p.gather(1, targets[block].unsqueeze(1)).squeeze(1)
        entropies[block] = -(p * log_p).sum(1)
    return targets, logprobs, entropies


def _grpo_step(
    g: torch.Generator,
    targets: Tensor,  # [N], as the next two
    logprobs: Tensor,
    entropies: Tensor,
    zero_advantage: float,
    padding: float,
) -> dict[str, Tensor]:
    """Groups, masked targets, advantages, old log-probs, and the coefficients of the loss."""
    tokens, device = len(targets), targets.device
    sequence = torch.arange(tokens, device=device) * 64 // max(tokens, 1)
    group = sequence // 4
    place = torch.arange(tokens, device=device) - torch.searchsorted(sequence, sequence)
    length = torch.bincount(sequence, minlength=64)[sequence]
    valid = place < length * (1 - padding * 2 * torch.rand(64, generator=g, device=device)[sequence])
    right = torch.randint(1, 4, (16,), generator=g, device=device)
    orders = (torch.randperm(4, generator=g, device=device) for _ in right)
    rewards = torch.stack([order < n for order, n in zip(orders, right, strict=True)]).float()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    advantages[torch.randperm(16, generator=g, device=device)[: round(16 * zero_advantage)]] = 0
    advantages = advantages.flatten()[sequence]
    targets = targets.where(valid, IGNORE_INDEX)
    old = logprobs - 0.15 * entropies.sqrt() * torch.randn(tokens, generator=g, device=device)
    flat = flatten_tokens(
        targets, advantages, valid, dtype=torch.float32, group_ids=group, group_size=None, sequence_ids=sequence
    )
    objective = policy_objective(
        logprobs.where(valid, 0), entropies.where(valid, 0), flat, old=old.where(valid, 0), ref=None, rollout=None,
        config=CovGRPOConfig(entropy_coef=1e-3), normalizer=None, generator=None, metrics=False,
    )  # fmt: skip
    assert objective.entropy_grad is not None
    return dict(
        targets=targets, advantages=advantages, old_logprobs=old, group_ids=group, sequence_ids=sequence,
        logprob_grad=objective.logprob_grad, entropy_grad=objective.entropy_grad,
    )  # fmt: skip


def random_batch(
    seed: int,
    *,
    groups: int = 2,
    group_size: int = 3,
    length: int = 5,
    depth: int = 4,
    vocab: int = 11,
    keep: float = 0.75,
    dtype: torch.dtype = torch.float64,
    packed: bool = False,
    shuffled: bool = False,
    bias: bool = False,
) -> dict[str, Any]:
    """Arguments of `covgrpo_loss`: a policy a little off the one that sampled; ``packed`` gives [N] tokens,
    without the masked ones; ``shuffled`` puts responses in random order and names their groups by ids."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = groups * group_size
    hidden, weight = normal(rows, length, depth), normal(vocab, depth)
    targets = torch.randint(0, vocab, (rows, length), generator=g)
    b = normal(vocab) if bias else None
    x, _ = reference.linear_logprob(hidden, weight, targets, bias=b)
    batch: dict[str, Any] = dict(
        targets=targets,
        hidden=hidden,
        mask=torch.rand(rows, length, generator=g) < keep,
        advantages=normal(rows),
        old_logprobs=x + 0.3 * normal(rows, length),
        ref_logprobs=x + 0.3 * normal(rows, length),
        rollout_weights=torch.rand(rows, length, generator=g, dtype=torch.float64) + 0.5,
    )
    if shuffled or packed:
        order = torch.randperm(rows, generator=g) if shuffled else torch.arange(rows)
        batch = {n: v[order] for n, v in batch.items()}
        batch["group_ids"] = order // group_size * 7 - 3
    else:
        batch["group_size"] = group_size
    if packed:
        batch["sequence_ids"] = torch.arange(rows) * 5 + 2
        mask = batch.pop("mask")
        spread = {n: v if v.ndim > 1 else v.unsqueeze(1).expand(rows, length) for n, v in batch.items()}
        batch = {n: v[mask] for n, v in spread.items()}
    floats = {n: v.to(dtype) for n, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return batch | floats | dict(weight=weight.to(dtype)) | ({} if b is None else dict(bias=b.to(dtype)))
