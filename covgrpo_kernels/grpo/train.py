"""GRPO with the covariance-weighted loss, from start to end. The algorithm is `grpo_step`; `train` is the run around
it.

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from .. import CovGRPOConfig, covgrpo_loss, linear_logprob
from . import parallel
from .checkpoint import RunFolder, TrainingError
from .config import ALGORITHMS, TrainConfig, usable_dtype
from .logs import MetricsLog, check_tracker, read_metrics
from .plots import save_report
from .policy import Policy, load_policy, new_policy
from .progress import ProgressBar
from .rollout import Batch, Rollout, encode_solutions, group_advantages, reward, reward_metrics, sample
from .tasks import Problem, Task, countdown_task, file_task

# A run may be resumed with other values of these; every other option changes its numbers.
FREE_OPTIONS = ("out", "steps", "checkpoint_every", "parallel", "log_to")
SOLUTIONS = 64  # of a supervised step

# --- the algorithm -----------------------------------------------------------------------------------------


def grpo_step(
    policy: Policy,
    reference: Policy | None,
    optimizer: Optimizer,
    problems: list[Problem],
    config: TrainConfig,
    generator: torch.Generator,
    loss_config: CovGRPOConfig | None = None,  # instead of the one that the options give
    before_update: Callable[[Rollout], None] | None = None,  # may change what the update is made of
) -> dict[str, Any]:
    """Samples responses to the problems, and takes several optimiser steps on them. Returns the metrics."""
    # 1. Sample a group of responses to each problem; the rows of a group follow each other.
    prompts = [problem.prompt for problem in problems]
    batch = sample(policy, prompts, config.group_size, config.max_new_tokens, config.temperature, generator)
    # 2. Reward them, and 3. compare each with its group.
    rewards = reward(policy, batch, problems)
    advantages = group_advantages(rewards, config.group_size)
    # 4. Log-probs before the first update. They are computed as in the loss, not taken from the sampler: the importance
    #    ratio then starts at 1.
    old_logprobs = logprobs(policy, batch, config)
    ref_logprobs = None if reference is None else logprobs(reference, batch, config)
    data = Rollout(batch, advantages, old_logprobs, ref_logprobs)
    if before_update is not None:
        before_update(data)
    losses, norms = [], []
    # 5. Optimiser steps, each on its share of the groups. The covariance weights compare a token with the others of its
    #    group, so a group is never cut by microbatches. (The processes may cut it: the loss adds up over them.)
    for minibatch in split_groups(len(problems), config, generator):
        mask = data.batch.mask[torch.cat(minibatch)]
        # The loss divides by this number, not by the microbatch's own: then the gradients add up exactly.
        normalizer = len(mask) if config.loss_type in ("grpo", "dr_grpo") else mask.sum()
        optimizer.zero_grad(set_to_none=True)
        for rows in minibatch:
            part = data.rows(rows[parallel.share(len(rows))])
            loss_of = partial(
                covgrpo_loss, targets=part.batch.responses, mask=part.batch.mask, advantages=part.advantages,
                group_size=config.group_size, old_logprobs=part.old_logprobs, ref_logprobs=part.ref_logprobs,
                config=loss_config or config.loss, normalizer=normalizer, temperature=config.temperature,
                grad_tol="auto" if config.grad_tol is None else config.grad_tol, generator=generator,
                process_group=parallel.group(),
            )  # fmt: skip
            result = part.batch.apply_head(policy, loss_of)
            # The losses of the ranks add up, but their gradients are averaged.
            (result.loss * parallel.size()).backward()
            losses.append(result.metrics | {"loss": result.loss.detach(), "tokens": part.batch.mask.sum()})
        norms.append(parallel.clipped_gradients(policy.model, config.max_grad_norm))
        optimizer.step()
    metrics = reward_metrics(policy, batch, rewards, config.group_size) | parallel.pooled(losses, config.inner_steps)
    return metrics | {"optim/grad_norm": torch.stack(norms).mean().item()}


@torch.no_grad()
def logprobs(policy: Policy, batch: Batch, config: TrainConfig) -> Tensor:  # [B, T]
    scored = []
    for rows in torch.arange(len(batch.mask)).split(config.groups_per_microbatch * config.group_size):
        part = batch.rows(rows[parallel.share(len(rows))])
        targets = part.responses.where(part.mask, -100)
        result = part.apply_head(policy, partial(linear_logprob, targets=targets, temperature=config.temperature))
        scored.append(parallel.gather(result.logprob, len(rows)))
    return torch.cat(scored)


def split_groups(groups: int, config: TrainConfig, generator: torch.Generator) -> list[list[Tensor]]:
    """The rows of each optimiser step, in microbatches of whole groups. The same on all ranks, so it has to be drawn
    before the loss, which may draw for the tokens of a rank."""
    order = torch.randperm(groups, generator=generator, device=generator.device).cpu()
    rows = order.unsqueeze(1) * config.group_size + torch.arange(config.group_size)
    shares = rows.tensor_split(config.inner_steps)
    return [[part.flatten() for part in s.split(config.microbatch_prompts or len(s))] for s in shares]


# --- the run -----------------------------------------------------------------------------------------------


def train(config: TrainConfig, start: Path | None = None) -> None:
    """Trains, or goes on from the last checkpoint, until OUT holds metrics.jsonl, model/ and report.png.

    Args:
        start: folder of a policy, in place of the new model's warm start.

    Raises:
        ValueError, OSError, TrainingError: the run cannot begin, and nothing was written; or it cannot go on.
    """
    parallel.join()
    task, policy, folder = start_run(config, "train", start)
    reference = copy.deepcopy(policy) if config.beta else None
    if reference is not None:
        reference.model.requires_grad_(False)
        parallel.distribute(reference.model, config.parallel)
    policy, optimizer, done = last_checkpoint(folder, policy, config)
    held_out = task.held_out_problems(config.eval_problems)
    with MetricsLog(folder, config.log_to) as log:
        parallel.on_rank_0(log.open, done)
        if not done:
            parallel.on_rank_0(log.add, 0, {"eval/accuracy": evaluate(policy, held_out, config)})
        progress = ProgressBar(ALGORITHMS[config.weighting], done, config.steps, quiet=parallel.rank() > 0)
        for step in range(done + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, step / max(config.warmup_steps, 1))
            problems = task.training_problems(step, config.prompts_per_step)
            started, generator = time.perf_counter(), generator_of(policy, config.seed, step)
            try:
                metrics = grpo_step(policy, reference, optimizer, problems, config, generator)
            except TrainingError as error:
                raise TrainingError(f"step {step}: {error}; the last checkpoint is untouched") from error
            metrics |= {"optim/lr": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - started}
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                metrics["eval/accuracy"] = evaluate(policy, held_out, config)
            # In this order: a checkpoint never knows of a step that metrics.jsonl does not.
            parallel.on_rank_0(log.add, step, metrics)
            if step % config.checkpoint_every == 0 or step == config.steps:
                save_policy(folder, "model", policy, optimizer, step)
            what = "nothing to learn" if metrics["reward/equal_groups"] == 1 else f"entropy {metrics['entropy']:.3f}"
            progress.update(step, f"reward {metrics['reward/mean']:.3f}  {what}")
    if done >= config.steps and parallel.rank() == 0:
        print(f"{config.out} holds a finished run of {done} steps; with more --steps it goes on.")
    parallel.on_rank_0(conclude, folder, config, len(held_out))


def generator_of(policy: Policy, seed: int, step: int) -> torch.Generator:
    """All the randomness of a step comes from its number: a checkpoint needs no generator's state."""
    return torch.Generator(policy.device).manual_seed(random.Random(f"{seed}/step/{step}").getrandbits(63))


@torch.no_grad()
def evaluate(policy: Policy, problems: list[Problem], config: TrainConfig) -> float:
    """Share of the problems that the most likely response solves."""
    right, size = 0.0, config.prompts_per_step * config.group_size
    for part in (problems[i : i + size] for i in range(0, len(problems), size)):
        batch = sample(policy, [p.prompt for p in part], 1, config.max_new_tokens, temperature=0)
        right += reward(policy, batch, part).sum().item()
    return right / len(problems)


def evaluated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that were evaluated: the start, and the last one unless a run was finished with fewer steps than it was
    begun with."""
    return [row for row in rows if "eval/accuracy" in row]


def conclude(folder: RunFolder, config: TrainConfig, problems: int) -> None:
    """Draws report.png, and says what came of the run and where it is."""
    rows = read_metrics(folder.path / "metrics.jsonl")
    save_report(folder, {ALGORITHMS[config.weighting]: rows})
    steps, first, last = rows[1:], rows[0], evaluated(rows)[-1]
    print(
        f"Of {problems} held-out problems {first['eval/accuracy']:.1%} solved at the start, "
        f"{last['eval/accuracy']:.1%} after {last['step']} steps."
    )
    print(f"{folder.path}: model/ with its tokenizer, metrics.jsonl, report.png with the curves.", flush=True)
    if all(row["reward/equal_groups"] == 1 for row in steps):
        right, cut = (mean(row[name] for row in steps) for name in ("reward/mean", "response/truncated"))
        print(
            "Nothing was learnt: all responses to a problem were always equally good.\n"
            f"{right:.0%} of them were right; {cut:.0%} were cut off at --max-new-tokens, and so wrong."
        )


# --- the start ---------------------------------------------------------------------------------------------


def start_run(config: TrainConfig, command: str, start: Path | None = None) -> tuple[Task, Policy, RunFolder]:
    """Checks all that can be checked, makes OUT the run's folder, and returns the problems, the policy before GRPO and
    the folder. The policy is also the reference of the KL term, and the same after every resume."""
    task, policy = parallel.together(problems_and_policy, config)
    folder = RunFolder(Path(config.out), command, with_digests(config, policy), FREE_OPTIONS)
    parallel.on_rank_0(folder.claim)
    if start is None and config.warm_start_steps:
        start = folder.path / "warm_start"
        if folder.step_of("warm_start") is None:
            parallel.distribute(policy.model, config.parallel)
            warm_start(policy, task, config)
            save_policy(folder, "warm_start", policy)
    return task, policy if start is None else reloaded(policy, start), folder


def problems_and_policy(config: TrainConfig) -> tuple[Task, Policy]:
    _ = config.loss  # which raises where weighting and loss type do not go together
    rows = min(len(part) for step in split_groups(config.prompts_per_step, config, torch.Generator()) for part in step)
    rows = min(rows, SOLUTIONS) if config.warm_start_steps else rows
    if parallel.size() > rows:
        raise ValueError(
            f"microbatch_prompts times group_size, of a supervised step at most {SOLUTIONS}, must be at least the "
            f"{parallel.size()} processes, got {rows}"
        )
    out, model = Path(config.out).resolve(), config.model
    # Also of a model's name on the hub, which a folder would shadow.
    if model is not None and Path(model).resolve() in (out, *out.parents):
        raise ValueError(f"out must not be in the folder of the model, {model}, got {config.out}")
    check_tracker(config.log_to)
    device, task = parallel.device_of_rank(config.device), make_task(config)
    dtype = usable_dtype(config.dtype, device)
    if model is None:
        policy = new_policy(config.hidden_size, config.layers, config.seed, device)
        policy.dtype = dtype
    else:
        policy = load_policy(model, device, dtype, config.chat_template)
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for prompt, place in task.prompts.items():
        [ids] = policy.encode([prompt])
        if not 0 < len(ids) <= positions - config.max_new_tokens:
            raise ValueError(
                f"{place}: a prompt must have tokens, and fit into the {positions} positions of the model with "
                f"max_new_tokens, got {len(ids)} + {config.max_new_tokens} tokens with {prompt[:40]!r}"
            )
    return task, policy


def make_task(config: TrainConfig) -> Task:
    if config.data is not None:
        return file_task(config.data, config.seed)
    return countdown_task(config.difficulty, config.seed, instruct=config.model is not None)


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


def warm_start(policy: Policy, task: Task, config: TrainConfig) -> None:
    """Supervised steps on worked solutions, until enough responses are right: a group in which none is teaches
    nothing. The loss is `linear_logprob` again."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.warm_start_lr, weight_decay=0.0)
    watched = [task.training_problem("warm start reward", i) for i in range(256)]
    progress = ProgressBar("warm start", 0, config.warm_start_steps, quiet=parallel.rank() > 0)
    for step in range(1, config.warm_start_steps + 1):
        problems = [task.training_problem("warm start", SOLUTIONS * step + i) for i in range(SOLUTIONS)]
        batch = encode_solutions(policy, [p.prompt for p in problems], [p.solution for p in problems])
        part = batch.rows(parallel.share(SOLUTIONS))
        targets = part.responses.where(part.mask, -100)
        loss = -part.apply_head(policy, partial(total_logprob, targets=targets)) / batch.mask.sum()
        optimizer.zero_grad(set_to_none=True)
        (loss * parallel.size()).backward()
        parallel.clipped_gradients(policy.model, config.max_grad_norm)
        optimizer.step()
        if step % 10 == 0 or step == config.warm_start_steps:
            generator = torch.Generator(policy.device).manual_seed(config.seed)
            prompts = [p.prompt for p in watched]
            sampled = sample(policy, prompts, 1, config.max_new_tokens, config.temperature, generator)
            share = reward(policy, sampled, watched).mean().item()
            enough = share >= config.warm_start_reward
            state = f"loss {parallel.reduce(loss.detach()).item():.3f}  reward {share:.3f}"
            progress.update(step, state, last=enough)
            if enough:
                break


def total_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, **how: Any) -> Tensor:  # []
    """Summed within the model's forward: FSDP warns where that returns a view, as the log-probs are."""
    return linear_logprob(hidden, weight, targets, **how).logprob.sum()


# --- kill and resume ---------------------------------------------------------------------------------------


def reloaded(policy: Policy, path: Path) -> Policy:
    """The policy with the weights of a folder."""
    loaded = parallel.together(load_policy, str(path), policy.device, policy.dtype)
    loaded.chat = policy.chat
    return loaded


def save_policy(
    folder: RunFolder, name: str, policy: Policy, optimizer: Optimizer | None = None, step: int = 0
) -> None:
    """A folder for transformers, with the optimiser's state if there is one. The same whatever the number of processes
    and however they share the model."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0; empty on the others
    weights = get_model_state_dict(policy.model, options=options)
    moments = get_optimizer_state_dict(policy.model, optimizer, options=options) if optimizer is not None else None

    def save(path: Path) -> None:
        policy.save(path, weights)
        if moments is not None:
            torch.save(moments, path / "optimizer.pt")

    parallel.on_rank_0(folder.save_folder, name, save, step)


def last_checkpoint(folder: RunFolder, policy: Policy, config: TrainConfig) -> tuple[Policy, Optimizer, int]:
    """The policy, its optimiser and the number of steps that they have made; of a new run, `policy` and 0."""
    done = parallel.together(folder.step_of, "model") or 0
    if done:
        policy = reloaded(policy, folder.path / "model")
    parallel.distribute(policy.model, config.parallel)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0)
    if done:
        state = parallel.together(optimizer_state, folder.path / "model" / "optimizer.pt")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=parallel.group() is not None)
        set_optimizer_state_dict(policy.model, optimizer, state, options=options)
    return policy, optimizer, done


def optimizer_state(path: Path) -> dict[str, Any]:
    """Every process maps the file; rank 0 reads it and sends the rest."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds
        raise TrainingError(
            f"{path} cannot be read ({type(error).__name__}): move {path.parent} away, and the run begins again"
        ) from error
