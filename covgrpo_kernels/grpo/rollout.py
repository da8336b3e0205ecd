"""Groups of responses: sampling, rewards, advantages, and the batch they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import parallel
from .policy import Policy, cached
from .tasks import Problem


@dataclass
class Batch:
    """Prompts, padded on the left, and their responses, padded on the right. B = prompts * group size rows; the
    responses to one prompt are next to each other."""

    tokens: Tensor  # [B, P + T]
    attention: Tensor  # [B, P + T], 0 on padding
    mask: Tensor  # [B, T], True on the tokens of a response, its end-of-sequence token included

    @property
    def responses(self) -> Tensor:  # [B, T]
        return self.tokens[:, -self.mask.shape[1] :]

    def apply_head(self, policy: Policy, function: Callable[..., Any]) -> Any:
        """Runs the model and, where it would build logits, ``function(hidden [B, T, D], weight [V, D], bias=...,
        logit_scale=..., softcap=...)``, whose result is returned: a log-prob, a loss. ``hidden`` are the states that
        predict the responses."""
        length = self.mask.shape[1]

        def head(hidden: Tensor, weight: Tensor, **how: Any) -> Any:  # [B, P + T, D]
            return function(hidden[:, -length - 1 : -1], weight, **how)

        return policy.forward(self.tokens, self.attention, head=head)

    def rows(self, rows: Tensor) -> Batch:
        return Batch(self.tokens[rows], self.attention[rows], self.mask[rows])


@dataclass
class Rollout:
    """A batch of whole groups, and what is known of it before the first update."""

    batch: Batch  # [B, T] tokens
    advantages: Tensor  # [B]
    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor | None  # [B, T]

    def rows(self, rows: Tensor) -> Rollout:
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        return Rollout(self.batch.rows(rows), self.advantages[rows], self.old_logprobs[rows], ref)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[str],
    group_size: int,
    max_new_tokens: int,
    temperature: float,  # 0: the most likely token
    generator: torch.Generator | None = None,
) -> Batch:
    """Every rank samples its share of the rows, and returns all of them."""
    tokens, attention = _padded(policy, policy.encode(prompts))
    rows, prompt_length = len(prompts) * group_size, tokens.shape[1]
    mine = parallel.share(rows).to(policy.device)
    tokens, attention = tokens[mine // group_size], attention[mine // group_size]
    out = policy.forward(tokens, attention, use_cache=True, logits_to_keep=1)
    running = torch.ones(len(mine), dtype=torch.bool, device=policy.device)
    while True:
        logits = out.logits[:, -1].float()
        token = logits.argmax(-1)
        if temperature > 0:
            # A number for every row of all ranks: a row's tokens do not depend on which rank has it. The token is where
            # the cumulative distribution passes it; the clamp is for rounding, and for no distribution at all.
            uniform = torch.rand(rows, generator=generator, dtype=torch.float64, device=policy.device)[mine]
            cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
            place = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
            token = place.squeeze(1).clamp(max=logits.shape[1] - 1)
        token = token.where(running, policy.pad_id)
        tokens = torch.cat([tokens, token.unsqueeze(1)], 1)
        attention = torch.cat([attention, running.unsqueeze(1).to(attention.dtype)], 1)
        running = running & ~torch.isin(token, policy.eos_ids)
        going_on = parallel.reduce(running.sum()) > 0
        if tokens.shape[1] == prompt_length + max_new_tokens or not going_on:
            tokens, attention = parallel.gather(torch.stack([tokens, attention], 1), rows).unbind(1)
            return Batch(tokens, attention, attention[:, prompt_length:].bool())
        out = policy.forward(tokens[:, -1:], attention, use_cache=True, **cached(out))


def encode_solutions(policy: Policy, prompts: list[str], solutions: list[str]) -> Batch:
    """The batch that sampling would have given, had it answered with the solutions."""
    eos = policy.eos_ids[:1].tolist()
    responses = [ids + eos for ids in policy.tokenizer(solutions, add_special_tokens=False).input_ids]
    (tokens, attention), (answer, mask) = _padded(policy, policy.encode(prompts)), _padded(policy, responses, "right")
    return Batch(torch.cat([tokens, answer], 1), torch.cat([attention, mask], 1), mask.bool())


def _padded(policy: Policy, ids: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:  # tokens, attention
    rows = [torch.tensor(row, device=policy.device) for row in ids]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return pad(rows, padding_value=policy.pad_id), pad([torch.ones_like(row) for row in rows])


def finished(policy: Policy, batch: Batch) -> Tensor:  # [B]
    """Whether a response ended by itself; the others were cut off."""
    return (torch.isin(batch.responses, policy.eos_ids) & batch.mask).any(1)


def reward(policy: Policy, batch: Batch, problems: list[Problem]) -> Tensor:  # [B]
    """1 for a correct response, 0 for a wrong one or one that was cut off. As many rows for each problem."""
    keep = batch.mask & ~torch.isin(batch.responses, policy.eos_ids)
    rows = [row[k].tolist() for row, k in zip(batch.responses, keep, strict=True)]
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
    group_size = len(texts) // len(problems)
    right = [problems[i // group_size].is_correct(text) for i, text in enumerate(texts)]
    return (torch.tensor(right, device=policy.device) & finished(policy, batch)).float()


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:  # [B] -> [B]
    """How much better than its group a response is, in standard deviations of the group."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + 1e-4)
    # Equal rewards teach nothing: exactly zero, whatever the mean rounds to.
    return advantages.where(groups.max(1, keepdim=True)[0] > groups.min(1, keepdim=True)[0], 0.0).view(-1)


def reward_metrics(policy: Policy, batch: Batch, rewards: Tensor, group_size: int) -> dict[str, Any]:
    groups, lengths = rewards.view(-1, group_size), batch.mask.sum(1).float()
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "reward/equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        "response/length": lengths.mean().item(),
        "response/truncated": 1 - finished(policy, batch).float().mean().item(),
        "response/tokens": int(lengths.sum()),
    }
