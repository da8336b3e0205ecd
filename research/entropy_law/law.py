"""The premise of covariance weights, measured: how one update changes a policy's entropy, and what predicts that.

For a softmax with logits z, probabilities p and entropy H, a small change of the logits changes the entropy by

    dH = -Cov_p(log p, dz)        to first order, whatever dz is.

A natural policy gradient in the logits of each state by itself has dz = eta A, so that dH = -eta Cov_p(log p, A)
(arXiv 2505.22617); a plain gradient has dz = eta p (A - mean A). Neither is what training does: it samples one token a
state, its step is in parameters that all states share, and covariances are taken over the tokens of a group, which
mixes states. Here entropies are exact sums over a small vocabulary, before and after real optimiser steps, in float64
(but for the norms of the model, which transformers computes in float32), so that each of these differences can be seen
by itself. `python -m research entropy-law --help`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covgrpo_kernels import CovGRPOConfig, covgrpo_loss
from covgrpo_kernels.grpo.config import TrainConfig
from covgrpo_kernels.grpo.policy import Policy, new_policy
from covgrpo_kernels.grpo.rollout import Batch, Rollout, sample
from covgrpo_kernels.grpo.tasks import Task
from covgrpo_kernels.grpo.train import generator_of, grpo_step, warm_start

from ..covariances import group_statistics
from ..rollouts import make_task, rollout

LOGITS = "gradient of each state's logits"
STATES = ("own", "fresh")
SHARE = 0.2  # of the tokens, in the part of the highest and of the lowest covariance
LOGIT_STEPS = (0.001, 0.003, 0.01, 0.03, 0.1)
UPDATES = {  # the tokens that an update is made of
    "all": "all: GRPO",
    "top": f"highest {SHARE:.0%} of covariance",
    "middle": "between",
    "bottom": f"lowest {SHARE:.0%} of covariance",
    "CW-GRPO": "all, weighted: CW-GRPO",
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.0),  # a first step: the learning rate times the gradient's sign
}


@dataclass(frozen=True)
class Plan:
    policy: TrainConfig
    seeds: tuple[int, ...]  # of policies; the first is reported in full
    grpo_steps: tuple[int, ...]  # how long the policy was trained when its updates are measured
    batches: int  # updates at each of these times, all from the same policy
    steps: dict[str, tuple[float, ...]]  # step sizes of each optimiser; the parts are compared at the middle one
    task: str = "countdown"


def plan(seed: int, quick: bool) -> Plan:
    policy = TrainConfig(hidden_size=64, layers=2, warm_start_lr=3e-3, prompts_per_step=16, weighting="none", lr=5e-4)
    if quick:
        # A guess: one answer in seven is right.
        policy = dataclasses.replace(
            policy, layers=1, prompts_per_step=6, max_new_tokens=4, warm_start_steps=25, warm_start_lr=5e-3
        )
        return Plan(policy, (seed,), (0, 2), 6, {"SGD": (0.01,), "AdamW": (1e-4,)}, task="arithmetic")
    return Plan(
        policy, (seed, seed + 1, seed + 2), (0, 40), 48, {"SGD": (0.001, 0.01, 0.1), "AdamW": (1e-5, 1e-4, 1e-3)}
    )


# --- the law -----------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:  # [N, V] -> [N]
    return torch.distributions.Categorical(logits=logits).entropy()


def first_order(logits: Tensor, change: Tensor) -> Tensor:  # [N, V], [N, V] -> [N]
    """-Cov_p(log p, dz): how the entropy changes with the logits."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    deviation = log_p - (p * log_p).sum(-1, keepdim=True)
    return -(p * deviation * change).sum(-1)


def sampled_gradient(logits: Tensor, advantages: Tensor, responses: Tensor) -> Tensor:  # [N, V], [N], [N] -> [N, V]
    """Of A times the log-prob of the sampled token, in the logits of its state."""
    return advantages[:, None] * (torch.nn.functional.one_hot(responses, logits.shape[1]) - logits.softmax(-1))


def logit_law(logits: Tensor, advantages: Tensor, responses: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Error of the law against the size of the step, which has to fall with its square. An advantage is known of the
    sampled tokens only: for the gradients over all actions they are drawn at random."""
    p = logits.softmax(-1)
    drawn = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    directions = {
        "natural gradient": drawn,
        "gradient": p * (drawn - (p * drawn).sum(-1, keepdim=True)),
        "gradient of a sampled token": sampled_gradient(logits, advantages, responses),
    }
    laws = {}
    for name, direction in directions.items():
        changes = [entropy(logits + eta * direction) - entropy(logits) for eta in LOGIT_STEPS]
        law = first_order(logits, direction)
        errors = [_rms(change - eta * law) for eta, change in zip(LOGIT_STEPS, changes, strict=True)]
        laws[name] = {
            "change": [_rms(change) for change in changes],
            "error": errors,
            "slope": float(np.polyfit(np.log(LOGIT_STEPS), np.log(errors), 1)[0]),
        }
    return {"step": list(LOGIT_STEPS), "laws": laws}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


# --- one batch ---------------------------------------------------------------------------------------------


def response_logits(policy: Policy, batch: Batch, temperature: float) -> Tensor:  # [N, V]
    """Of the policy that samples, at every token of a response. 258 tokens: here they may be built."""
    last = batch.mask.shape[1]
    logits = policy.forward(batch.tokens, batch.attention).logits
    return logits[:, -last - 1 : -1][batch.mask] / temperature


@dataclass
class Tokens:
    """The tokens of a batch, and what covariances are made of."""

    x: Tensor  # [N] log-prob
    H: Tensor  # [N] entropy of the state
    covariance: Tensor  # [N] of the group
    dA: Tensor  # [N] advantage less its group's mean
    A: Tensor  # [N]


def tokens_of(data: Rollout, logits: Tensor, group_size: int) -> Tokens:
    mask = data.batch.mask
    x = logits.log_softmax(-1).gather(1, data.batch.responses[mask][:, None]).squeeze(1)
    A = data.advantages.to(x.dtype)[:, None].expand(mask.shape)[mask]
    found = group_statistics(x.new_zeros(mask.shape).masked_scatter(mask, x), data, group_size)
    valid = mask.flatten()
    return Tokens(x, entropy(logits), found.covariance[valid], found.advantage_deviation[valid], A)


def predictions(tokens: Tokens, logits: Tensor, responses: Tensor) -> dict[str, float]:  # [N, V], [N]
    """What the entropy does for a step of 1, by laws that need no gradient. As x - mean x is (x + H) + (-H - mean x),
    the covariance is the sum of its parts within and between states; the law speaks of the first."""
    within = (tokens.x + tokens.H) * tokens.dA
    sampled = sampled_gradient(logits, tokens.A, responses)
    return {
        "covariance": -tokens.covariance.mean().item(),
        "covariance within states": -within.mean().item(),
        "covariance between states": -(tokens.covariance - within).mean().item(),
        LOGITS: first_order(logits, sampled).mean().item(),
    }


def parts(covariance: Tensor) -> dict[str, Tensor]:  # [N] -> [N] of zeros and ones
    """The tokens that an update is made of."""
    place = covariance.argsort(stable=True).argsort(stable=True)
    low, high = SHARE * len(place), (1 - SHARE) * len(place)
    chosen = {"all": place >= 0, "top": place >= high, "middle": (place >= low) & (place < high), "bottom": place < low}
    return {name: part.to(covariance.dtype) for name, part in chosen.items()}


def gradients(
    policy: Policy, data: Rollout, config: TrainConfig, weighting: str, part: Tensor | None = None  # [N]
) -> list[Tensor]:  # fmt: skip
    """Of the loss, of the tokens of a part."""
    loss_of = partial(
        covgrpo_loss,
        targets=data.batch.responses,
        advantages=data.advantages,
        mask=data.batch.mask,
        group_size=config.group_size,
        rollout_weights=None if part is None else part.new_zeros(data.batch.mask.shape).masked_scatter(
            data.batch.mask, part
        ),
        temperature=config.temperature,
        # Divided by the number of tokens, as the covariance is.
        config=CovGRPOConfig(weighting=weighting, loss_type="bnpo"),  # type: ignore[arg-type]
        metrics=False,
        grad_tol=0.0,
    )  # fmt: skip
    loss = data.batch.apply_head(policy, loss_of).loss
    return list(torch.autograd.grad(loss, list(policy.model.parameters())))


def mean_entropy(policy: Policy, batch: Batch, temperature: float) -> Tensor:  # []
    return entropy(response_logits(policy, batch, temperature)).mean()


@dataclass
class States:
    """States whose entropy is measured before and after updates."""

    batch: Batch
    before: float
    gradient: list[Tensor]  # of their mean entropy, in every parameter

    @classmethod
    def of(cls, policy: Policy, batch: Batch, temperature: float) -> States:
        H = mean_entropy(policy, batch, temperature)
        return cls(batch, H.item(), list(torch.autograd.grad(H, list(policy.model.parameters()))))


def measure_step(
    policy: Policy, gradient: list[Tensor], optimizer: str, step: float, states: dict[str, States], temperature: float
) -> dict[str, float]:
    """Change of the mean entropy with one step of a new optimiser, in each set of states, and to first order in the
    parameters. The policy is left as it was."""
    parameters = list(policy.model.parameters())
    before = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g.clone()
    OPTIMIZERS[optimizer](parameters, lr=step).step()
    moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    result = {}
    with torch.no_grad():
        for name, there in states.items():
            result[name] = mean_entropy(policy, there.batch, temperature).item() - there.before
            result[f"{name}, first order"] = sum(
                (g * m).sum().item() for g, m in zip(there.gradient, moved, strict=True)
            )
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
            p.grad = None
    return result


def measure_batch(policy: Policy, data: Rollout, fresh: States, plan: Plan) -> dict[str, Any]:
    config = plan.policy
    logits = response_logits(policy, data.batch, config.temperature).detach()
    tokens = tokens_of(data, logits, config.group_size)
    states = {"own": States.of(policy, data.batch, config.temperature), "fresh": fresh}
    updates = {name: gradients(policy, data, config, "none", part) for name, part in parts(tokens.covariance).items()}
    updates["CW-GRPO"] = gradients(policy, data, config, "covariance")
    rows = []
    for optimizer, steps in plan.steps.items():
        for name, gradient in updates.items():
            for step in steps if name == "all" else [steps[len(steps) // 2]]:
                row = measure_step(policy, gradient, optimizer, step, states, config.temperature)
                rows.append({"optimizer": optimizer, "step": step, "update": name, **row})
    return {
        "entropy": tokens.H.mean().item(),
        "predicted": predictions(tokens, logits, data.batch.responses[data.batch.mask]),
        "gradient norm": {name: _norm(gradient) for name, gradient in updates.items()},
        "changes": rows,
    }


def _norm(gradient: list[Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradient))


def measure(plan: Plan) -> dict[str, Any]:
    stages = [stage for seed in plan.seeds for stage in measure_policy(seed, plan)]
    return {"settings": dataclasses.asdict(plan), "stages": stages}


def measure_policy(seed: int, plan: Plan) -> Iterator[dict[str, Any]]:
    """A stage of its training after the other."""
    config = dataclasses.replace(plan.policy, seed=seed)
    task = make_task(plan.task, config)
    policy = new_policy(config.hidden_size, config.layers, config.seed, torch.device("cpu"))
    warm_start(policy, task, config)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)
    done = 0
    for grpo_steps in plan.grpo_steps:
        for step in range(done + 1, grpo_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, step / max(config.warmup_steps, 1))
            problems = task.training_problems(step, config.prompts_per_step)
            grpo_step(policy, None, optimizer, problems, config, generator_of(policy, config.seed, step))
        done = grpo_steps
        exact = copy.deepcopy(policy)
        exact.model.double()
        yield {"seed": seed, "grpo_steps": grpo_steps, **measure_stage(exact, task, config, grpo_steps, plan)}


def measure_stage(policy: Policy, task: Task, config: TrainConfig, grpo_steps: int, plan: Plan) -> dict[str, Any]:
    fresh = States.of(policy, held_out(policy, task, config), config.temperature)
    batches = []
    for i in range(plan.batches):
        key = f"{config.seed}/entropy law/{grpo_steps}/{i}"
        generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
        # Problems that no training step has seen.
        problems = task.training_problems(plan.grpo_steps[-1] + 1 + i, config.prompts_per_step)
        data, mean_reward = rollout(policy, problems, config, generator)
        if i == 0:
            logits = response_logits(policy, data.batch, config.temperature).detach()
            advantages = tokens_of(data, logits, config.group_size).A
            law = logit_law(logits, advantages, data.batch.responses[data.batch.mask], generator)
        batches.append({"reward": mean_reward, **measure_batch(policy, data, fresh, plan)})
        if (i + 1) % 10 == 0:
            print(f"seed {config.seed}, {grpo_steps} steps of GRPO: batch {i + 1} of {plan.batches}", flush=True)
    return {"logits": law, **collated(batches)}


def held_out(policy: Policy, task: Task, config: TrainConfig) -> Batch:
    """One response to each of as many problems as a batch has rows."""
    prompts = [task.held_out_problem(i).prompt for i in range(config.prompts_per_step * config.group_size)]
    generator = torch.Generator().manual_seed(config.seed)
    return sample(policy, prompts, 1, config.max_new_tokens, config.temperature, generator)


def collated(batches: list[Any]) -> Any:
    """One tree of lists in place of a list of trees; labels stay single."""
    first = batches[0]
    if isinstance(first, dict):
        return {
            key: value if key in ("optimizer", "step", "update") else collated([b[key] for b in batches])
            for key, value in first.items()
        }
    if isinstance(first, list):
        return [collated(list(rows)) for rows in zip(*batches, strict=True)]
    return batches
