"""Sampling groups of responses, and the batch they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .policy import Policy


@dataclass
class Batch:
    """Prompts, padded on the left, and their responses, padded on the right: B = prompts * group size rows,
    the responses to one prompt next to each other."""

    tokens: Tensor  # [B, P + T]
    attention: Tensor  # [B, P + T], 0 on padding
    mask: Tensor  # [B, T], True on the tokens of a response, its end-of-sequence token included

    @property
    def responses(self) -> Tensor:  # [B, T]
        return self.tokens[:, -self.mask.shape[1] :]

    def hidden(self, policy: Policy) -> Tensor:  # [B, T, D]
        return policy.hidden(self.tokens, self.attention, last=self.mask.shape[1])

    def rows(self, rows: Tensor) -> Batch:
        return Batch(self.tokens[rows], self.attention[rows], self.mask[rows])


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[str],
    group_size: int,
    max_new_tokens: int,
    temperature: float,  # 0: the likeliest token
    generator: torch.Generator | None = None,
) -> Batch:
    tokens, attention = _encode_prompts(policy, prompts)
    out = policy.run_backbone(tokens, attention, use_cache=True)
    # The prompts went through the backbone once; now every response gets its own copy of the cache.
    cache, states = out.past_key_values, out.last_hidden_state[:, -1].repeat_interleave(group_size, 0)
    cache.batch_repeat_interleave(group_size)
    tokens, attention = (t.repeat_interleave(group_size, 0) for t in (tokens, attention))
    running = torch.ones(len(tokens), dtype=torch.bool, device=policy.device)
    mask: list[Tensor] = []
    while True:
        logits = policy.logits(states)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
        token = token.where(running, policy.pad_id)
        mask.append(running)
        tokens = torch.cat([tokens, token.unsqueeze(1)], 1)
        attention = torch.cat([attention, running.unsqueeze(1).to(attention.dtype)], 1)
        running = running & ~torch.isin(token, policy.eos_ids)
        if len(mask) == max_new_tokens or not running.any():
            return Batch(tokens, attention, torch.stack(mask, 1))
        out = policy.run_backbone(tokens[:, -1:], attention, past_key_values=cache, use_cache=True)
        states = out.last_hidden_state[:, -1]


def encode_solutions(policy: Policy, prompts: list[str], solutions: list[str]) -> Batch:
    """The batch that sampling would have given, had it answered with the solutions."""
    tokens, attention = _encode_prompts(policy, prompts)
    eos = int(policy.eos_ids[0])
    responses = [[*policy.tokenizer(s, add_special_tokens=False).input_ids, eos] for s in solutions]
    length = max(map(len, responses))
    padded = torch.tensor([r + [policy.pad_id] * (length - len(r)) for r in responses], device=policy.device)
    lengths = torch.tensor([len(r) for r in responses], device=policy.device)
    mask = torch.arange(length, device=policy.device) < lengths.unsqueeze(1)
    attention = torch.cat([attention, mask.to(attention.dtype)], 1)
    return Batch(torch.cat([tokens, padded], 1), attention, mask)


def _encode_prompts(policy: Policy, prompts: list[str]) -> tuple[Tensor, Tensor]:  # [B, P], [B, P]
    rows = [policy.tokenizer(prompt).input_ids for prompt in prompts]
    length = max(map(len, rows))
    tokens = [[policy.pad_id] * (length - len(row)) + row for row in rows]
    attention = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens, device=policy.device), torch.tensor(attention, device=policy.device)


def finished(policy: Policy, batch: Batch) -> Tensor:  # [B]
    """Whether a response ended by itself; the others were cut off."""
    return (torch.isin(batch.responses, policy.eos_ids) & batch.mask).any(1)


def texts(policy: Policy, batch: Batch) -> list[str]:
    keep = batch.mask & ~torch.isin(batch.responses, policy.eos_ids)
    return policy.tokenizer.batch_decode(
        [row[k].tolist() for row, k in zip(batch.responses, keep, strict=True)], skip_special_tokens=True
    )


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:  # [B] -> [B]
    """How much better than its group a response is, in standard deviations of the group."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + 1e-4)
    # Equal rewards teach nothing: exactly zero, whatever the mean rounds to.
    return advantages.where(groups.max(1, keepdim=True)[0] > groups.min(1, keepdim=True)[0], 0.0).view(-1)
