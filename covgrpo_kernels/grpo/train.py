"""GRPO with the covariance-weighted loss, from start to end. Read `train`, then `rollout`, then `update`.

What differs from a textbook loop is the loss: `covgrpo_loss` takes hidden states and the head's matrix, so
the logits [tokens, vocabulary] are never built, neither here nor for the old and the reference log-probs.

Under torchrun the same run is spread over its processes: ``parallel`` stands wherever that shows. The responses, the
groups, the minibatches and the files are those of a single process, and the numbers are but for rounding (Clip-Cov and
KL-Cov choose among the tokens of each process). OUT is a folder that all processes see; rank 0 writes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from .. import CovGRPOConfig, covgrpo_loss, linear_logprob
from . import parallel
from .checkpoint import MetricsFile, save_folder_atomically, write_atomically
from .config import TrainConfig
from .plots import save_report
from .policy import Policy, load_policy, new_policy
from .progress import ProgressBar
from .rollout import Batch, encode_solutions, finished, group_advantages, sample, texts
from .tasks import Problem, Task, file_task, generated_task

# A run may be resumed with other values of these; every other option changes its numbers.
FREE_OPTIONS = ("out", "steps", "checkpoint_every", "parallel")

SOLUTIONS = 64  # of a supervised step


class TrainingError(Exception):
    """The run cannot go on; the message says why and what can be done."""


def train(config: TrainConfig) -> None:
    """Trains, or goes on from the last checkpoint, until OUT holds metrics.jsonl, model/ and report.png."""
    parallel.join()
    out, writes = Path(config.out), parallel.rank() == 0
    check_shares(config)
    task, device = parallel.together(lambda: (make_task(config), torch_device(config)))
    parallel.on_rank_0(claim_folder, out, config)
    policy = starting_policy(config, task, out, device)
    reference = reference_policy(policy, config) if config.beta else None
    parallel.distribute(policy, config.parallel)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)

    done = load_checkpoint(out, policy, optimizer)
    metrics_file = MetricsFile(out / "metrics.jsonl", last_step=-1 if done is None else done) if writes else None
    if done is None:
        accuracy = evaluate(policy, task, config)
        if metrics_file:
            metrics_file.append({"step": 0, "eval/accuracy": accuracy})
        done = 0
    with ProgressBar(config.weighting, done, config.steps, quiet=not writes) as progress:
        for step in range(done + 1, config.steps + 1):
            metrics = train_step(step, policy, reference, optimizer, task, config)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                metrics["eval/accuracy"] = evaluate(policy, task, config)
            # In this order: a checkpoint never knows of a step that metrics.jsonl does not.
            if metrics_file:
                metrics_file.append({"step": step, **metrics})
            if step % config.checkpoint_every == 0 or step == config.steps:
                save_checkpoint(out, step, policy, optimizer)
            progress.update(
                step,
                f"reward {metrics['reward/mean']:.3f}  entropy {metrics['entropy']:.3f}"
                f"  live rows {metrics['rows/live_fraction']:.0%}",
            )
    if metrics_file:
        metrics_file.close()
    save_model(out / "model", policy)
    parallel.on_rank_0(save_report, {config.weighting: out / "metrics.jsonl"}, out / "report.png")


# --- one step ----------------------------------------------------------------------------------------------


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
    for rows in torch.arange(len(batch.mask)).split(config.rows_per_microbatch):
        part = batch.rows(rows[parallel.share(len(rows))])
        targets = part.responses.where(part.mask, -100)
        result = part.apply_head(policy, partial(linear_logprob, targets=targets, temperature=config.temperature))
        scored.append(parallel.gather(result.logprob, len(rows)))
    return torch.cat(scored)


def update(
    step: int,
    data: Rollout,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    generator: torch.Generator,
    loss_config: CovGRPOConfig | None = None,  # instead of the one that the options give
) -> dict[str, Any]:
    """Several optimiser steps on one rollout batch, each on a minibatch of whole groups: the covariance weights compare
    a token with the others of its group, so a group is never cut by microbatches. The processes may cut it."""
    collected: dict[str, list[Tensor]] = defaultdict(list)
    for inner, groups in enumerate(shuffled_groups(config, generator)):
        minibatch = data.rows((groups.unsqueeze(1) * config.group_size + torch.arange(config.group_size)).flatten())
        # The loss divides by this number, not by the microbatch's own: then the gradients add up exactly.
        normalizer = len(minibatch.advantages) if per_sequence(config) else minibatch.batch.mask.sum()
        losses = []
        optimizer.zero_grad(set_to_none=True)
        microbatches = torch.arange(len(minibatch.advantages)).split(config.rows_per_microbatch)
        for i, rows in enumerate(microbatches):
            part = minibatch.rows(rows[parallel.share(len(rows))])
            loss_of = partial(
                covgrpo_loss,
                targets=part.batch.responses,
                advantages=part.advantages,
                mask=part.batch.mask,
                group_size=config.group_size,
                old_logprobs=part.old_logprobs,
                ref_logprobs=part.ref_logprobs,
                temperature=config.temperature,
                config=loss_config or config.loss,
                normalizer=normalizer,
                generator=generator,
                grad_tol=config.gradient_tolerance,
                process_group=parallel.group(),
            )
            with parallel.accumulation(policy, last=i == len(microbatches) - 1):
                result = part.batch.apply_head(policy, loss_of)
                # The losses of the ranks add up, but their gradients are averaged.
                (result.loss * parallel.size()).backward()
            losses.append(result.loss.detach())
            for name, value in result.metrics.items():
                collected[name].append(over_ranks(name, value, part.batch.mask.sum()))
        loss = parallel.reduce(torch.stack(losses).sum())
        norm = parallel.clip_gradients(policy, config.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(
                f"step {step}, inner step {inner + 1}: the loss is {loss.item()}, the norm of its gradient "
                f"{norm.item()}; the last checkpoint is untouched. A lower --lr may help."
            )
        optimizer.step()
        collected["loss"].append(loss)
        collected["optim/grad_norm"].append(norm)
    return {name: pooled(name, torch.stack(values), len(microbatches)) for name, values in collected.items()}


def shuffled_groups(config: TrainConfig, generator: torch.Generator) -> Sequence[Tensor]:
    """The groups of each inner step; when all were seen, they are shuffled again. The loss may draw from the generator
    too, on each rank for tokens of its own: so this is drawn before it, the same on all."""
    groups = config.inner_steps * config.groups_per_minibatch
    rounds = math.ceil(groups / config.prompts_per_step)
    device = generator.device
    order = [torch.randperm(config.prompts_per_step, generator=generator, device=device) for _ in range(rounds)]
    return torch.cat(order)[:groups].cpu().split(config.groups_per_minibatch)


def per_sequence(config: TrainConfig) -> bool:
    return config.loss_type in ("grpo", "dr_grpo")


def over_ranks(name: str, value: Tensor, tokens: Tensor) -> Tensor:  # [] each
    """A metric of the loss over the tokens of all ranks. Quantiles, deviations and effective sizes are no means over
    tokens: of them it is the mean over ranks."""
    if parallel.group() is None:
        return value
    if name.startswith("loss/"):
        return parallel.reduce(value)
    if name.endswith("/max"):
        return parallel.reduce(value, ReduceOp.MAX)
    if name.endswith("/min"):
        return parallel.reduce(value, ReduceOp.MIN)
    return parallel.reduce(value * tokens) / parallel.reduce(tokens)


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
    size = config.rows_per_microbatch
    for part in (problems[i : i + size] for i in range(0, len(problems), size)):
        batch = sample(policy, [p.prompt for p in part], 1, config.max_new_tokens, temperature=0)
        right += reward(policy, batch, part).sum().item()
    return right / len(problems)


# --- the start ---------------------------------------------------------------------------------------------


def check_shares(config: TrainConfig) -> None:
    """Raises ValueError where a process would have no row to train on."""
    rows = min(config.rows_per_microbatch, SOLUTIONS) if config.supervised_steps else config.rows_per_microbatch
    if parallel.size() > rows:
        raise ValueError(
            f"microbatch_prompts times group_size, of a supervised step at most {SOLUTIONS}, must be at least the "
            f"{parallel.size()} processes, got {rows}"
        )


def make_task(config: TrainConfig) -> Task:
    if config.data is not None:
        return file_task(config.data, config.seed)
    return generated_task(config.task, config.difficulty, config.seed)


def torch_device(config: TrainConfig) -> torch.device:
    if config.device == "auto":
        return parallel.device_of_rank("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return parallel.device_of_rank(config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device} cannot be used: {error}") from error


def starting_policy(config: TrainConfig, task: Task, out: Path, device: torch.device) -> Policy:
    """The policy before GRPO, which is also the reference of the KL term: the same after every resume."""
    if not config.supervised_steps and config.model is not None:
        return parallel.together(load_policy, config.model, device)
    folder = out / "warm_start"
    if not parallel.together(folder.exists):
        if config.model is None:
            policy = new_policy(config.hidden_size, config.layers, config.seed, device)
        else:
            policy = parallel.together(load_policy, config.model, device)
        parallel.distribute(policy, config.parallel)
        warm_start(policy, task, config)
        save_model(folder, policy)
    return parallel.together(load_policy, str(folder), device)


def reference_policy(policy: Policy, config: TrainConfig) -> Policy:
    reference = copy.deepcopy(policy)
    reference.model.requires_grad_(False)
    parallel.distribute(reference, config.parallel)
    return reference


def warm_start(policy: Policy, task: Task, config: TrainConfig) -> None:
    """Supervised steps on worked solutions, until enough responses are right: a group in which none is teaches
    nothing. The loss is `linear_logprob` again."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.supervised_lr, weight_decay=0.0)
    with ProgressBar("warm start", 0, config.supervised_steps, quiet=parallel.rank() > 0) as progress:
        for step in range(1, config.supervised_steps + 1):
            problems = [task.training_problem("warm start", SOLUTIONS * step + i) for i in range(SOLUTIONS)]
            batch = encode_solutions(policy, [p.prompt for p in problems], [p.solution for p in problems])
            part = batch.rows(parallel.share(SOLUTIONS))
            targets = part.responses.where(part.mask, -100)
            loss = -part.apply_head(policy, partial(total_logprob, targets=targets)) / batch.mask.sum()
            optimizer.zero_grad(set_to_none=True)
            (loss * parallel.size()).backward()
            parallel.clip_gradients(policy, config.max_grad_norm)
            optimizer.step()
            if step % 10 == 0 or step == config.supervised_steps:
                share = sampled_reward(policy, task, config)
                progress.update(step, f"loss {parallel.reduce(loss.detach()).item():.3f}  reward {share:.3f}")
                if share >= config.warm_start_reward:
                    break


def total_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, **how: Any) -> Tensor:  # []
    """Summed within the model's forward: FSDP warns where that returns a view, as the log-probs are."""
    return linear_logprob(hidden, weight, targets, **how).logprob.sum()


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


def save_model(folder: Path, policy: Policy) -> None:
    state = parallel.whole_model(policy)
    parallel.on_rank_0(save_folder_atomically, folder, lambda path: policy.save(path, state))


def save_checkpoint(out: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """The same whatever the number of processes and however they share the model."""
    model, state = parallel.whole_model(policy), parallel.whole_optimizer(policy, optimizer)
    checkpoint = {"step": step, "model": model, "optimizer": state}
    parallel.on_rank_0(write_atomically, out / "checkpoint.pt", lambda file: torch.save(checkpoint, file))


def load_checkpoint(out: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int | None:
    """The last step in the checkpoint; None without one."""
    path = out / "checkpoint.pt"
    if not parallel.together(path.exists):
        return None
    # Every process maps the file, which reads nothing but the step; rank 0 reads and sends the rest.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parallel.load_whole(policy, optimizer, checkpoint["model"], checkpoint["optimizer"])
    return checkpoint["step"]
