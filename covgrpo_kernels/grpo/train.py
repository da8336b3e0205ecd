"""GRPO with the covariance-weighted loss, from start to end. Read `train`, then `rollout`, then `update`.

What differs from a textbook loop is the loss: `covgrpo_loss` takes hidden states and the head's matrix, so the logits
[tokens, vocabulary] are never built, neither here nor for the old and the reference log-probs.

Under torchrun the same run is spread over its processes, by what ``parallel`` does. The responses, the groups, the
minibatches and the files are those of a single process, and the numbers are but for rounding (Clip-Cov and KL-Cov
choose among the tokens of each process). OUT is a folder that all processes see; rank 0 writes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from .. import CovGRPOConfig, covgrpo_loss, linear_logprob
from . import parallel
from .checkpoint import RunFolder, TrainingError, append_metrics, read_metrics, write_atomically, write_metrics
from .config import ALGORITHMS, TrainConfig
from .plots import save_report
from .policy import Policy, load_policy, new_policy
from .progress import ProgressBar
from .rollout import Batch, encode_solutions, finished, group_advantages, sample, texts
from .tasks import Problem, Task, file_task, generated_task

# A run may be resumed with other values of these; every other option changes its numbers.
FREE_OPTIONS = ("out", "steps", "checkpoint_every", "parallel")
SOLUTIONS = 64  # of a supervised step


def train(config: TrainConfig) -> None:
    """Trains, or goes on from the last checkpoint, until OUT holds metrics.jsonl, model/ and report.png."""
    parallel.join()
    task, policy, folder = start_run(config, "train")
    reference = reference_policy(policy, config) if config.beta else None
    parallel.distribute(policy, config.parallel)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)
    metrics_file, writes = folder.path / "metrics.jsonl", parallel.rank() == 0

    done = load_checkpoint(folder, policy, optimizer)
    if done is None:
        done, accuracy = 0, evaluate(policy, task, config)
        first = {"run": folder.id, "step": 0, "eval/accuracy": accuracy}
        parallel.on_rank_0(write_metrics, metrics_file, [first])
    else:
        parallel.on_rank_0(rewind_metrics, metrics_file, done)
        if writes and done >= config.steps:
            print(f"{config.out} holds a finished run of {done} steps; with more --steps it goes on.")
    with ProgressBar(ALGORITHMS[config.weighting], done, config.steps, quiet=not writes) as progress:
        for step in range(done + 1, config.steps + 1):
            metrics = train_step(step, policy, reference, optimizer, task, config)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                metrics["eval/accuracy"] = evaluate(policy, task, config)
            # In this order: a checkpoint never knows of a step that metrics.jsonl does not.
            if writes:
                append_metrics(metrics_file, {"step": step, **metrics})
            if step % config.checkpoint_every == 0 or step == config.steps:
                save_checkpoint(folder, step, policy, optimizer)
            what = "nothing to learn" if metrics["reward/equal_groups"] == 1 else f"entropy {metrics['entropy']:.3f}"
            progress.update(step, f"reward {metrics['reward/mean']:.3f}  {what}")
    save_model(folder, "model", policy)
    parallel.on_rank_0(conclude, folder, config)


def conclude(folder: RunFolder, config: TrainConfig) -> None:
    """Draws report.png, and says what came of the run and where it is."""
    path = folder.path / "metrics.jsonl"
    save_report(folder, {ALGORITHMS[config.weighting]: path})
    start, *steps = read_metrics(path)
    accuracies = [row["eval/accuracy"] for row in steps if "eval/accuracy" in row]
    print(
        f"Held-out accuracy: {start['eval/accuracy']:.1%} at the start, {accuracies[-1]:.1%} after {len(steps)} steps."
    )
    print(f"{folder.path}: model/ with its tokenizer, metrics.jsonl, report.png with the curves.", flush=True)
    if all(row["reward/equal_groups"] == 1 for row in steps):
        print("Nothing was learnt: all responses of a group had the same reward, in every group of every step.")


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
    step: int, policy: Policy, reference: Policy | None, optimizer: Optimizer, task: Task, config: TrainConfig
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
    step: int, policy: Policy, reference: Policy | None, task: Task, config: TrainConfig, generator: torch.Generator
) -> tuple[Rollout, dict[str, Any]]:
    first = (step - 1) * config.prompts_per_step
    problems = [task.training_problem("train", first + i) for i in range(config.prompts_per_step)]
    prompts, length = [problem.prompt for problem in problems], config.max_new_tokens
    batch = sample(policy, prompts, config.group_size, length, config.temperature, generator)
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
    optimizer: Optimizer,
    config: TrainConfig,
    generator: torch.Generator,
    loss_config: CovGRPOConfig | None = None,  # instead of the one that the options give
) -> dict[str, Any]:
    """Several optimiser steps on one rollout batch, each on a minibatch of whole groups: the covariance weights compare
    a token with the others of its group, so a group is never cut by microbatches. The processes may cut it."""
    # The loss may draw from the generator too, on each rank for tokens of its own: so this is drawn first, the same on
    # all.
    order = torch.randperm(config.prompts_per_step, generator=generator, device=generator.device).cpu()
    metrics: list[dict[str, Tensor]] = []
    tokens, losses, norms = [], [], []
    for inner, minibatch in enumerate(split_groups(order, config), 1):
        mask = data.batch.mask[rows_of(torch.cat(minibatch), config)]
        # The loss divides by this number, not by the microbatch's own: then the gradients add up exactly.
        normalizer = len(mask) if config.loss_type in ("grpo", "dr_grpo") else mask.sum()
        total = torch.zeros((), device=policy.device)
        optimizer.zero_grad(set_to_none=True)
        for groups in minibatch:
            rows = rows_of(groups, config)
            part = data.rows(rows[parallel.share(len(rows))])
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
            result = part.batch.apply_head(policy, loss_of)
            # The losses of the ranks add up, but their gradients are averaged.
            (result.loss * parallel.size()).backward()
            total = total + result.loss.detach()
            metrics.append(result.metrics)
            tokens.append(part.batch.mask.sum())
        losses.append(parallel.reduce(total))
        norms.append(parallel.average_gradients(policy, config.max_grad_norm))
        if not (torch.isfinite(losses[-1]) and torch.isfinite(norms[-1])):
            raise TrainingError(
                f"step {step}, inner step {inner}: the loss is {losses[-1].item()}, the norm of its gradient "
                f"{norms[-1].item()}; the last checkpoint is untouched. A lower --lr may help."
            )
        optimizer.step()
    found = {name: torch.stack([part[name] for part in metrics]) for name in metrics[0]}
    reported = {name: pooled(name, values, torch.stack(tokens), inner) for name, values in found.items()}
    return reported | {
        "loss": torch.stack(losses).mean().item(),
        "optim/grad_norm": torch.stack(norms).mean().item(),
    }


def split_groups(order: Tensor, config: TrainConfig) -> list[list[Tensor]]:
    """The groups of each inner step, in microbatches."""
    shares = order.tensor_split(config.inner_steps)
    return [list(share.split(config.microbatch_prompts or len(share))) for share in shares]


def rows_of(groups: Tensor, config: TrainConfig) -> Tensor:  # [n] -> [n * group size]
    return (groups.unsqueeze(1) * config.group_size + torch.arange(config.group_size)).flatten()


def pooled(name: str, values: Tensor, tokens: Tensor, inner_steps: int) -> float:  # [microbatches] both
    """One number of a metric of the loss: over the tokens of all ranks, and the mean over microbatches. Quantiles,
    deviations and effective sizes are no means over tokens: of them it is the mean over ranks."""
    values = values.float()
    if name.startswith("loss/"):  # the loss of an inner step is the sum over its microbatches
        return parallel.reduce(values.sum()).item() / inner_steps
    if name.endswith("/max"):
        return parallel.reduce(values.max(), ReduceOp.MAX).item()
    if name.endswith("/min"):
        return parallel.reduce(values.min(), ReduceOp.MIN).item()
    return parallel.reduce(values * (tokens / parallel.reduce(tokens))).mean().item()


@torch.no_grad()
def evaluate(policy: Policy, task: Task, config: TrainConfig) -> float:
    """Share of held-out problems that the most likely response solves."""
    problems = [task.held_out_problem(i) for i in range(config.eval_problems)]
    right, size = 0.0, config.rows_per_microbatch
    for part in (problems[i : i + size] for i in range(0, len(problems), size)):
        batch = sample(policy, [p.prompt for p in part], 1, config.max_new_tokens, temperature=0)
        right += reward(policy, batch, part).sum().item()
    return right / len(problems)


# --- the start ---------------------------------------------------------------------------------------------


def start_run(config: TrainConfig, command: str) -> tuple[Task, Policy, RunFolder]:
    """Checks all that can be checked, makes OUT the run's folder, and returns the problems, the policy before GRPO and
    the folder. The policy is also the reference of the KL term, and the same after every resume.

    Raises ValueError, OSError or TrainingError, before anything is written, where the run cannot begin."""
    check_shares(config)
    out, model = Path(config.out), config.model
    # Also of a model's name on the hub, which a folder would shadow.
    if model is not None and Path(model).resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out must not be in the folder of the model, {model}, got {out}")
    device = parallel.together(parallel.device_of_rank, config.device)
    task = parallel.together(make_task, config)
    if model is None:
        policy = new_policy(config.hidden_size, config.layers, config.seed, device)
    else:
        policy = parallel.together(load_policy, model, device)
    parallel.together(check_prompts, policy, task, config)
    folder = RunFolder(out, command, with_digests(config, policy), FREE_OPTIONS)
    parallel.on_rank_0(folder.claim)
    if config.supervised_steps:
        if not parallel.together((out / "warm_start").exists):
            parallel.distribute(policy, config.parallel)
            warm_start(policy, task, config)
            save_model(folder, "warm_start", policy)
        policy = parallel.together(load_policy, str(out / "warm_start"), device)
    return task, policy, folder


def check_shares(config: TrainConfig) -> None:
    """Raises ValueError where a process would have no row to train on."""
    parts = split_groups(torch.arange(config.prompts_per_step), config)
    rows = min(len(part) for minibatch in parts for part in minibatch) * config.group_size
    rows = min(rows, SOLUTIONS) if config.supervised_steps else rows
    if parallel.size() > rows:
        raise ValueError(
            f"microbatch_prompts times group_size, of a supervised step at most {SOLUTIONS}, must be at least the "
            f"{parallel.size()} processes, got {rows}"
        )


def check_prompts(policy: Policy, task: Task, config: TrainConfig) -> None:
    """Raises ValueError where a prompt of the user's file is nothing to the tokenizer, or too long for the model."""
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for prompt in task.prompts:
        length = len(policy.tokenizer(prompt).input_ids)
        if length == 0:
            raise ValueError(f"{config.data}: the tokenizer makes no tokens of the prompt {prompt[:40]!r}")
        if length + config.max_new_tokens > positions:
            raise ValueError(
                f"{config.data}: a prompt and max_new_tokens must fit into the {positions} positions of the model, got "
                f"{length} + {config.max_new_tokens} tokens with {prompt[:40]!r}"
            )


def with_digests(config: TrainConfig, policy: Policy) -> dict[str, Any]:
    """The options, with digests of what the user gave: on resuming it has to be the same still."""
    options = dataclasses.asdict(config)
    if config.data is not None:
        digest = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
        options["data"] += f" (sha256 {digest[:16]})"
    if config.model is not None:
        hashes = [torch.hash_tensor(p.detach().cpu()).view(torch.int64).item() for p in policy.model.parameters()]
        options["model"] += f" (weights {hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]})"
    return options


def make_task(config: TrainConfig) -> Task:
    if config.data is not None:
        return file_task(config.data, config.seed)
    return generated_task(config.task, config.difficulty, config.seed)


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
            parallel.average_gradients(policy, config.max_grad_norm)
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


def save_model(folder: RunFolder, name: str, policy: Policy) -> None:
    state = parallel.whole_state(policy)["model"]
    parallel.on_rank_0(folder.save_folder, name, lambda path: policy.save(path, state))


def save_checkpoint(folder: RunFolder, step: int, policy: Policy, optimizer: Optimizer) -> None:
    """The same whatever the number of processes and however they share the model."""
    checkpoint = {"run": folder.id, "step": step, **parallel.whole_state(policy, optimizer)}
    parallel.on_rank_0(write_atomically, folder.path / "checkpoint.pt", lambda file: torch.save(checkpoint, file))


def load_checkpoint(folder: RunFolder, policy: Policy, optimizer: Optimizer) -> int | None:
    """The last step in the checkpoint; None without one."""
    path = folder.path / "checkpoint.pt"
    if not parallel.together(path.exists):
        return None
    # Every process maps the file, which reads nothing but the step; rank 0 reads and sends the rest.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parallel.load_whole_state(policy, optimizer, checkpoint)
    return checkpoint["step"]


def rewind_metrics(path: Path, done: int) -> None:
    """Keeps the lines up to the last step of the checkpoint: later steps are done again."""
    rows = [row for row in read_metrics(path) if row["step"] <= done] if path.exists() else []
    if [row["step"] for row in rows] != list(range(done + 1)):
        raise TrainingError(f"{path} does not hold all of the {done} steps of the checkpoint: put it back")
    write_metrics(path, rows)
