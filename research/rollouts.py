"""Problems, and responses with their rewards and advantages, apart from any update."""

from __future__ import annotations

import torch

from covgrpo_kernels.grpo.config import TrainConfig
from covgrpo_kernels.grpo.policy import Policy
from covgrpo_kernels.grpo.rollout import Rollout, group_advantages, reward, sample
from covgrpo_kernels.grpo.tasks import Problem, Task, countdown_task
from covgrpo_kernels.grpo.train import logprobs

from .arithmetic import arithmetic_task
from .few_shot import FEW_SHOT_TASKS


def make_task(name: str, config: TrainConfig) -> Task:
    if name in FEW_SHOT_TASKS:
        return FEW_SHOT_TASKS[name](config.seed)
    return {"countdown": countdown_task, "arithmetic": arithmetic_task}[name](config.difficulty, config.seed)


def rollout(
    policy: Policy, problems: list[Problem], config: TrainConfig, generator: torch.Generator
) -> tuple[Rollout, float]:
    """What a step of `covgrpo train` samples, and the mean reward."""
    prompts = [problem.prompt for problem in problems]
    batch = sample(policy, prompts, config.group_size, config.max_new_tokens, config.temperature, generator)
    rewards = reward(policy, batch, problems)
    advantages = group_advantages(rewards, config.group_size)
    return Rollout(batch, advantages, logprobs(policy, batch, config), None), rewards.mean().item()
