"""The whole of GRPO with covariance-weighted tokens (CW-GRPO, arXiv 2605.11538) in one file.

What it shows: the five steps of the algorithm around `covgrpo_loss`, which goes from the last hidden states and the
weight of the head straight to the loss, without the logits of the training batch. The only logits here are those of
the sampler: one position at a time.

What to expect: a transformer with random weights learns to repeat a prompt of three digits. The reward, the share of
digits repeated right, is 0.1 by chance and ends above 0.9. This takes some 8 seconds on one CPU core.

    python examples/grpo.py
    python examples/grpo.py --weighting none    # the same without the covariance weights: GRPO
"""

import argparse

import torch
from torch import Tensor, nn

from covgrpo_kernels import CovGRPOConfig, covgrpo_loss, linear_logprob

VOCAB, DIGITS = 10, 3  # a token is a digit; prompt and response have three each
PROMPTS, GROUP = 16, 16  # prompts of a batch, responses to each prompt


class TinyLM(nn.Module):
    """A causal language model: `backbone` gives the hidden states, and `lm_head` would make logits of them."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(2 * DIGITS, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def backbone(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.blocks(self.token(tokens) + self.position(torch.arange(length)), mask=mask, is_causal=True)


@torch.no_grad()
def sample(model: TinyLM, prompts: Tensor) -> Tensor:  # [B, P] -> [B, P + T]
    tokens = prompts
    for _ in range(DIGITS):
        logits = model.lm_head(model.backbone(tokens)[:, -1])  # [B, V], of the last position only
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def score(tokens: Tensor) -> Tensor:  # [B, P + T] -> [B]
    """The reward of a response: the share of its digits that are those of the prompt."""
    return (tokens[:, :DIGITS] == tokens[:, DIGITS:]).float().mean(1)


def group_advantages(rewards: Tensor) -> Tensor:  # [B] -> [B]
    """How much better a response is than the others to its prompt, in standard deviations of its group."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def train(steps: int = 60, inner_steps: int = 2, weighting: str = "covariance", seed: int = 0) -> list[float]:
    """Returns the mean reward of every step."""
    torch.manual_seed(seed)
    model, config = TinyLM(), CovGRPOConfig(weighting=weighting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    history = []
    for step in range(1, steps + 1):
        # 1. Sample a group of responses to each prompt; rows of a group follow each other.
        prompts = torch.randint(VOCAB, (PROMPTS, DIGITS)).repeat_interleave(GROUP, 0)  # [B, P]
        tokens = sample(model, prompts)  # [B, P + T]

        # 2. Score them, and 3. compare each with its group.
        rewards = score(tokens)
        advantages = group_advantages(rewards)

        # 4. Log-probs before the first update. The state at a position predicts the token at the next one, so the
        #    states that predict the response begin one position before it.
        predict, responses = slice(DIGITS - 1, -1), tokens[:, DIGITS:]
        with torch.no_grad():
            old = linear_logprob(model.backbone(tokens)[:, predict], model.lm_head.weight, responses).logprob  # [B, T]

        # 5. Several optimiser steps on the batch. Only the first has importance ratios of 1.
        for _ in range(inner_steps):
            out = covgrpo_loss(
                model.backbone(tokens)[:, predict],  # [B, T, D]
                model.lm_head.weight,  # [V, D]
                targets=responses,
                advantages=advantages,
                group_size=GROUP,
                old_logprobs=old,
                config=config,
            )
            optimizer.zero_grad()
            out.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        history.append(rewards.mean().item())
        if step == 1 or step % 10 == 0:
            entropy, largest = out.metrics["entropy"].item(), out.metrics["weight/max"].item()
            print(f"step {step:3d}  reward {history[-1]:.2f}  entropy {entropy:.2f}  largest weight {largest:.2f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GRPO on a tiny language model, with covgrpo_kernels")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--weighting", default="covariance", help="as CovGRPOConfig takes it")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
