"""GRPO with the covariance-weighted loss, from start to end. Read `train`, then `rollout`, then `update`.

What differs from a textbook loop is the loss: `covgrpo_loss` takes hidden states and the head's matrix, so
the logits [tokens, vocabulary] are never built, neither here nor for the old and the reference log-probs.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import covgrpo_loss, linear_logprob
from .checkpoint import MetricsFile, save_folder_atomically, write_atomically
from .config import TrainConfig
from .plots import save_report
from .policy import Policy, load_policy, new_policy
from .progress import ProgressBar
from .rollout import Batch, encode_solutions, finished, group_advantages, sample, texts
from .tasks import Problem, Task, file_task, generated_task

# A run may be resumed with other values of these; every other option changes its numbers.
FREE_OPTIONS = ("out", "steps", "checkpoint_every")


class TrainingError(Exception):
    """The run cannot go on; the message says why and what can be done."""


def train(config: TrainConfig) -> None:
    """Trains, or goes on from the last checkpoint, until OUT holds metrics.jsonl, model/ and report.png."""
    out = Path(config.out)
    task, device = make_task(config), torch_device(config)
    claim_folder(out, config)
    policy = starting_policy(config, task, out, device)
    reference = copy.deepcopy(policy) if config.beta else None
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)

    done = load_checkpoint(out, policy, optimizer)
    metrics_file = MetricsFile(out / "metrics.jsonl", last_step=-1 if done is None else done)
    if done is None:
        metrics_file.append({"step": 0, "eval/accuracy": evaluate(policy, task, config)})
        done = 0
    with ProgressBar(config.weighting, done, config.steps) as progress:
        for step in range(done + 1, config.steps + 1):
            metrics = train_step(step, policy, reference, optimizer, task, config)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                metrics["eval/accuracy"] = evaluate(policy, task, config)
            # In this order: a checkpoint never knows of a step that metrics.jsonl does not.
            metrics_file.append({"step": step, **metrics})
            if step % config.checkpoint_every == 0 or step == config.steps:
                save_checkpoint(out, step, policy, optimizer)
            progress.update(
                step,
                f"reward {metrics['reward/mean']:.3f}  entropy {metrics['entropy']:.3f}"
                f"  live rows {metrics['rows/live_fraction']:.0%}",
            )
    metrics_file.close()
    save_folder_atomically(out / "model", policy.save)
    save_report({config.weighting: out / "metrics.jsonl"}, out / "report.png")


# --- one step ----------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """A batch of whole groups, and what is known of it before the first update."""

    batch: Batch  # [B, T] tokens
    advantages: Tensor  # [B]
    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor | None  # [B, T]

    def groups(self, groups: Tensor, group_size: int) -> Rollout:
        rows = (groups.unsqueeze(1) * group_size + torch.arange(group_size, device=groups.device)).flatten()
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        return Rollout(self.batch.rows(rows), self.advantages[rows], self.old_logprobs[rows], ref)


def train_step(
    step: int,
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    task: Task,
    config: TrainConfig,
) -> dict[str, Any]:
    # All the randomness of a step comes from its number: a checkpoint needs no generator's state.
    generator = torch.Generator(policy.device).manual_seed(random.Random(f"{config.seed}/step/{step}").getrandbits(63))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, step / max(config.warmup_steps, 1))
    start = time.perf_counter()
    data, metrics = rollout(step, policy, reference, task, config, generator)
    middle = time.perf_counter()
    metrics |= update(step, data, policy, optimizer, config, generator)
    metrics["optim/lr"] = optimizer.param_groups[0]["lr"]
    metrics["seconds/rollout"] = middle - start
    metrics["seconds/update"] = time.perf_counter() - middle
    return metrics


def rollout(
    step: int,
    policy: Policy,
    reference: Policy | None,
    task: Task,
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[Rollout, dict[str, Any]]:
    first = (step - 1) * config.prompts_per_step
    problems = [task.training_problem("train", first + i) for i in range(config.prompts_per_step)]
    batch = sample(
        policy,
        [problem.prompt for problem in problems],
        config.group_size,
        config.max_new_tokens,
        config.temperature,
        generator,
    )
    rewards = reward(policy, batch, [problem for problem in problems for _ in range(config.group_size)])
    groups = rewards.view(-1, config.group_size)
    data = Rollout(
        batch,
        group_advantages(rewards, config.group_size),
        # Scored by the same operation as in the loss, not taken from the sampler: the ratio then starts at 1.
        logprobs(policy, batch, config),
        None if reference is None else logprobs(reference, batch, config),
    )
    lengths = batch.mask.sum(1).float()
    return data, {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "reward/equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        "response/length": lengths.mean().item(),
        "response/truncated": 1 - finished(policy, batch).float().mean().item(),
        "response/tokens": int(lengths.sum()),
    }


def reward(policy: Policy, batch: Batch, problems: list[Problem]) -> Tensor:  # [B]
    """1 for a correct response, 0 for a wrong one or one that was cut off."""
    right = [p.is_correct(text) for p, text in zip(problems, texts(policy, batch), strict=True)]
    return (torch.tensor(right, device=policy.device) & finished(policy, batch)).float()


@torch.no_grad()
def logprobs(policy: Policy, batch: Batch, config: TrainConfig) -> Tensor:  # [B, T]
    scored = []
    rows = torch.arange(len(batch.mask), device=policy.device)
    for part in map(batch.rows, rows.split(config.groups_per_microbatch * config.group_size)):
        targets = part.responses.where(part.mask, -100)
        result = linear_logprob(part.hidden(policy), targets=targets, temperature=config.temperature, **policy.head)
        scored.append(result.logprob)
    return torch.cat(scored)


def update(
    step: int,
    data: Rollout,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Several optimiser steps on one rollout batch, each on a minibatch of whole groups: the covariance
    weights compare a token with the others of its group, so a group is never split."""
    parameters = list(policy.model.parameters())
    collected: dict[str, list[Tensor]] = defaultdict(list)
    order = torch.empty(0, dtype=torch.long, device=policy.device)
    for inner in range(config.inner_steps):
        if len(order) == 0:  # every group was seen: shuffle again
            order = torch.randperm(config.prompts_per_step, generator=generator, device=policy.device)
        chosen, order = order[: config.groups_per_minibatch], order[config.groups_per_minibatch :]
        minibatch = data.groups(chosen, config.group_size)
        # The loss divides by this number, not by the microbatch's own: then the gradients add up exactly.
        normalizer = len(minibatch.advantages) if per_sequence(config) else minibatch.batch.mask.sum()
        loss = torch.zeros((), device=policy.device)
        optimizer.zero_grad(set_to_none=True)
        for groups in torch.arange(len(chosen), device=policy.device).split(config.groups_per_microbatch):
            part = minibatch.groups(groups, config.group_size)
            result = covgrpo_loss(
                part.batch.hidden(policy),
                targets=part.batch.responses,
                advantages=part.advantages,
                mask=part.batch.mask,
                group_size=config.group_size,
                old_logprobs=part.old_logprobs,
                ref_logprobs=part.ref_logprobs,
                temperature=config.temperature,
                config=config.loss,
                normalizer=normalizer,
                generator=generator,
                grad_tol=config.gradient_tolerance,
                **policy.head,
            )
            result.loss.backward()
            loss += result.loss.detach()
            for name, value in result.metrics.items():
                collected[name].append(value)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(
                f"step {step}, inner step {inner + 1}: the loss is {loss.item()}, the norm of its gradient "
                f"{norm.item()}; the last checkpoint is untouched. A lower --lr may help."
            )
        optimizer.step()
        collected["loss"].append(loss)
        collected["optim/grad_norm"].append(norm)
    microbatches = config.groups_per_minibatch // config.groups_per_microbatch
    return {name: pooled(name, torch.stack(values), microbatches) for name, values in collected.items()}


def per_sequence(config: TrainConfig) -> bool:
    return config.loss_type in ("grpo", "dr_grpo")


def pooled(name: str, values: Tensor, microbatches: int) -> float:
    """One number of those of all microbatches and inner steps."""
    if name.startswith("loss/"):  # the loss of an inner step is the sum over its microbatches
        return values.mean().item() * microbatches
    if name.endswith("/max"):
        return values.max().item()
    if name.endswith("/min"):
        return values.min().item()
    return values.float().mean().item()


@torch.no_grad()
def evaluate(policy: Policy, task: Task, config: TrainConfig) -> float:
    """Share of held-out problems that the likeliest response solves."""
    problems = [task.held_out_problem(i) for i in range(config.eval_problems)]
    right = 0.0
    size = config.groups_per_microbatch * config.group_size
    for part in (problems[i : i + size] for i in range(0, len(problems), size)):
        batch = sample(policy, [p.prompt for p in part], 1, config.max_new_tokens, temperature=0)
        right += reward(policy, batch, part).sum().item()
    return right / len(problems)


# --- the start ---------------------------------------------------------------------------------------------


def make_task(config: TrainConfig) -> Task:
    if config.data is not None:
        return file_task(config.data, config.seed)
    return generated_task(config.task, config.difficulty, config.seed)


def torch_device(config: TrainConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device} cannot be used: {error}") from error


def starting_policy(config: TrainConfig, task: Task, out: Path, device: torch.device) -> Policy:
    """The policy before GRPO, which is also the reference of the KL term: the same after every resume."""
    if not config.supervised_steps and config.model is not None:
        return load_policy(config.model, device)
    folder = out / "warm_start"
    if not folder.exists():
        if config.model is None:
            policy = new_policy(config.hidden_size, config.layers, config.seed, device)
        else:
            policy = load_policy(config.model, device)
        warm_start(policy, task, config)
        save_folder_atomically(folder, policy.save)
    return load_policy(str(folder), device)


def warm_start(policy: Policy, task: Task, config: TrainConfig) -> None:
    """Supervised steps on worked solutions, until enough responses are right: a group in which none is teaches
    nothing. The loss is `linear_logprob` again."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.supervised_lr, weight_decay=0.0)
    with ProgressBar("warm start", 0, config.supervised_steps) as progress:
        for step in range(1, config.supervised_steps + 1):
            problems = [task.training_problem("warm start", 64 * step + i) for i in range(64)]
            batch = encode_solutions(policy, [p.prompt for p in problems], [p.solution for p in problems])
            targets = batch.responses.where(batch.mask, -100)
            loss = -linear_logprob(batch.hidden(policy), targets=targets, **policy.head).logprob.sum()
            loss = loss / batch.mask.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
            optimizer.step()
            if step % 10 == 0 or step == config.supervised_steps:
                share = sampled_reward(policy, task, config)
                progress.update(step, f"loss {loss.item():.3f}  reward {share:.3f}")
                if share >= config.warm_start_reward:
                    break


def sampled_reward(policy: Policy, task: Task, config: TrainConfig) -> float:
    problems = [task.training_problem("warm start reward", i) for i in range(256)]
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    batch = sample(policy, [p.prompt for p in problems], 1, config.max_new_tokens, config.temperature, generator)
    return reward(policy, batch, problems).mean().item()


# --- kill and resume ---------------------------------------------------------------------------------------


def claim_folder(out: Path, config: TrainConfig) -> None:
    """Writes the options to OUT/config.json, or compares them with those of the run that is there."""
    path, options = out / "config.json", dataclasses.asdict(config)
    if path.exists() and ((out / "warm_start").exists() or (out / "metrics.jsonl").exists()):
        there = json.loads(path.read_text())
        for name, value in options.items():
            if name not in FREE_OPTIONS and there.get(name) != value:
                raise TrainingError(
                    f"{out} holds a run with --{name.replace('_', '-')} {there.get(name)}, not {value}: "
                    "give the same value to resume it, or another --out"
                )
    write_atomically(path, lambda file: file.write(json.dumps(options, indent=2).encode()))


def save_checkpoint(out: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    state = {"step": step, "model": policy.model.state_dict(), "optimizer": optimizer.state_dict()}
    write_atomically(out / "checkpoint.pt", lambda file: torch.save(state, file))


def load_checkpoint(out: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int | None:
    """The last step in the checkpoint; None without one."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return None
    state = torch.load(path, map_location=policy.device, weights_only=True)
    policy.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
