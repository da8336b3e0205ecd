"""Saves the hidden states, targets and coefficients that a real model's head sees on sampled responses, for
`python -m bench --inputs FILE`; the model may be the one that `covgrpo train` made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covgrpo_kernels import covariance_weights
from covgrpo_kernels.config import IGNORE_INDEX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="Hugging Face causal LM, a folder or a name; or OUT/model of a run"
    )
    parser.add_argument("--out", type=Path, required=True, help="file that is written")
    parser.add_argument("--data", help='problems, JSON lines {"prompt": ..., "answer": ...}; default: generated ones')
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8, help="responses for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from covgrpo_kernels.grpo.policy import load_policy

    try:
        policy = load_policy(arguments.model, torch.device(arguments.device))
        recording = record(policy, arguments.data, arguments.prompts, arguments.group_size, arguments.max_new_tokens)
    except ValueError as error:
        sys.exit(str(error))
    save(recording, arguments.out)
    n, d, v = len(recording["hidden"]), recording["hidden"].shape[1], len(recording["weight"])
    live = (recording["logprob_grad"] != 0).double().mean().item()
    print(f"{arguments.out}: N={n}, D={d}, V={v}, {live:.0%} of the tokens have a coefficient")


@torch.no_grad()
def record(policy: Any, data: str | None, prompts: int, group_size: int, max_new_tokens: int) -> dict[str, Any]:
    """One rollout at temperature 1, and the coefficients of CW-GRPO's first step on it: ratios are one. Raises
    ValueError for a head with a bias, which the peers don't have."""
    from covgrpo_kernels.grpo.config import TrainConfig
    from covgrpo_kernels.grpo.rollout import group_advantages, reward, sample
    from covgrpo_kernels.grpo.train import logprobs, make_task

    if getattr(policy.model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("the head has a bias: it can't be replayed beside peers that know none")
    config = TrainConfig(
        data=data, prompts_per_step=prompts, group_size=group_size, temperature=1.0, max_new_tokens=max_new_tokens,
        inner_steps=1, microbatch_prompts=1,
    )  # fmt: skip
    generator = torch.Generator(policy.device).manual_seed(0)
    problems = make_task(config).training_problems(1, prompts)
    asked = [problem.prompt for problem in problems]
    batch = sample(policy, asked, group_size, max_new_tokens, config.temperature, generator)
    advantages = group_advantages(reward(policy, batch, problems), group_size)
    if not advantages.any():
        raise ValueError(
            "all responses to a prompt got equal rewards, so that no token has a coefficient: other --data?"
        )

    def take(hidden: Tensor, weight: Tensor, *, bias: None, logit_scale: float, softcap: float | None) -> Any:
        return hidden.to(policy.dtype) * logit_scale, weight.to(policy.dtype), softcap

    parts = [batch.rows(rows).apply_head(policy, take) for rows in torch.arange(len(batch.mask)).split(group_size)]
    _, weight, softcap = parts[0]
    weights = covariance_weights(logprobs(policy, batch, config), advantages, batch.mask, group_size=group_size)
    gradient = -weights * advantages.unsqueeze(1) / batch.mask.sum()
    return dict(
        hidden=torch.cat([hidden for hidden, _, _ in parts]).flatten(0, 1),
        weight=weight,
        targets=batch.responses.where(batch.mask, IGNORE_INDEX).flatten(),
        logprob_grad=gradient.flatten(),
        softcap=softcap,
    )


def save(recording: dict[str, Any], path: Path) -> None:
    """All of it or nothing."""
    from covgrpo_kernels.grpo.checkpoint import write_atomically

    # Copies: a view would bring all of its storage.
    whole = {n: x.detach().cpu().clone() if isinstance(x, Tensor) else x for n, x in recording.items()}
    write_atomically(path, lambda file: torch.save(whole, file))


def load(path: Path, *_: Any, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A recording, in the form of the generators of `covgrpo_kernels.testing`, whose sizes it ignores."""
    return torch.load(path, weights_only=True, map_location=device)
