"""One run of the study; and all of them, several at a time. A run's file is whole or is not there."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from covgrpo_kernels.grpo.checkpoint import TrainingError, save_folder_atomically, write_atomically
from covgrpo_kernels.grpo.config import TrainConfig
from covgrpo_kernels.grpo.policy import Policy, load_policy, new_policy
from covgrpo_kernels.grpo.progress import ProgressBar
from covgrpo_kernels.grpo.rollout import Rollout, reward, sample
from covgrpo_kernels.grpo.tasks import Problem
from covgrpo_kernels.grpo.train import grpo_step, warm_start

from ..covariances import group_statistics, statistics_metrics, weight_metrics
from ..few_shot import few_shot_policy
from ..rollouts import make_task
from .arms import ALL_ARMS, Arm, Evaluation
from .statistics import pass_at_k, tail_means

CPU = torch.device("cpu")
# What is kept of a step, under the names of `covgrpo train`.
KEPT = (
    *("reward/mean", "reward/equal_groups", "response/length", "response/truncated", "response/tokens"),
    *("entropy", "kl", "clip/low", "clip/high", "loss", "optim/grad_norm"),
    *("weight/mean", "weight/min", "weight/max", "weight/ess", "covariance/std", "advantages/kept"),
)


@dataclass(frozen=True)
class RunSpec:
    """One run. It starts from OUT/task/warm_start, or from the options' `model`; its results are
    OUT/task/arm-seed.jsonl."""

    out: Path
    task: str
    arm: str
    seed: int
    config: TrainConfig  # of the task, with the seed of the start
    evaluation: Evaluation

    @property
    def start(self) -> Path:
        return self.out / self.task

    @property
    def path(self) -> Path:
        return self.start / f"{self.arm}-{self.seed}.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path.with_suffix(".pt")

    @property
    def after(self) -> RunSpec | None:
        """The run whose results this one needs."""
        like = ALL_ARMS[self.arm].lr_like
        return None if like is None else dataclasses.replace(self, arm=like)

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on, but for the code."""
        options = dataclasses.asdict(dataclasses.replace(self.config, out=""))
        del options["log_to"]  # which no run of the study heeds
        return {
            "task": self.task,
            "arm": self.arm,
            "seed": self.seed,
            "loss": repr(ALL_ARMS[self.arm].loss),
            "evaluation": dataclasses.asdict(self.evaluation),
            "options": options,
        }

    def is_finished(self) -> bool:
        """Raises TrainingError where the results are of other settings."""
        if not self.path.exists():
            return False
        there, wanted = read_run(self.path).settings, self.settings()
        other = [name for name in wanted if there.get(name) != wanted[name]]
        if other:
            raise TrainingError(f"{self.path} is a run with other {', '.join(other)}: give another --out, or delete it")
        return True


@dataclass(frozen=True)
class Results:
    """The file of a finished run: its settings, a line for each step from 0 on, and what is of the run as a whole."""

    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    whole: dict[str, Any]


def read_run(path: Path) -> Results:
    settings, *steps, whole = map(json.loads, path.read_text().splitlines())
    return Results(settings, steps, whole)


# --- one run -----------------------------------------------------------------------------------------------


def perform(spec: RunSpec) -> None:
    """Trains from the task's start and writes the results, all at once. A run that is cut off is done again; one of a
    real model goes on from its last checkpoint."""
    started = time.process_time()
    arm, config = ALL_ARMS[spec.arm], dataclasses.replace(spec.config, seed=spec.seed)
    lr = config.lr
    if spec.after is not None:
        lr *= mean(row["advantages/kept"] for row in read_run(spec.after.path).steps[1:])
    policy = load_policy(str(spec.start / "warm_start"), CPU) if config.model is None else few_shot_policy(config.model)
    reference = copy.deepcopy(policy) if arm.loss.beta else None
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, weight_decay=0.0)
    task = make_task(spec.task, config)
    held_out = task.held_out_problems(spec.evaluation.problems)

    done = Progress.load(spec, policy, optimizer)
    if done is None:
        done = Progress([{"step": 0, **evaluate(policy, held_out, config, spec.evaluation.samples)}], [], 0.0)
    for step in range(len(done.steps), config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / max(config.warmup_steps, 1))
        watched = Watched(arm, config.group_size, _generator(spec.seed, "weights", step))
        problems = task.training_problems(step, config.prompts_per_step)
        generator = _generator(spec.seed, "step", step)
        metrics = grpo_step(policy, reference, optimizer, problems, config, generator, arm.loss, watched)
        metrics |= watched.metrics
        done.covariances.append(watched.covariance)
        if step % spec.evaluation.every == 0 or step == config.steps:
            metrics |= evaluate(policy, held_out, config, spec.evaluation.samples)
        done.steps.append({"step": step, **{name: metrics[name] for name in metrics if name in KEPT or "eval" in name}})
        if config.model is not None and step % config.checkpoint_every == 0 and step < config.steps:
            done.seconds, started = done.seconds + time.process_time() - started, time.process_time()
            done.save(spec, policy, optimizer)
    seconds = done.seconds + time.process_time() - started
    whole = {"lr": lr, "seconds": seconds, "covariance": tail_means(torch.cat(done.covariances))}
    lines = [json.dumps(row) + "\n" for row in (spec.settings(), *done.steps, whole)]
    write_atomically(spec.path, lambda file: file.write("".join(lines).encode()))
    spec.checkpoint.unlink(missing_ok=True)


@dataclass
class Progress:
    """What a run has so far."""

    steps: list[dict[str, Any]]
    covariances: list[Tensor]  # of each step
    seconds: float  # of a core

    def save(self, spec: RunSpec, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "settings": spec.settings(), "progress": vars(self), "model": policy.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        write_atomically(spec.checkpoint, lambda file: torch.save(state, file))

    @classmethod
    def load(cls, spec: RunSpec, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress | None:
        """None where there is no checkpoint. Raises TrainingError for one of other settings."""
        if not spec.checkpoint.exists():
            return None
        state = torch.load(spec.checkpoint, weights_only=True, mmap=True)
        if state["settings"] != spec.settings():
            raise TrainingError(f"{spec.checkpoint} is of a run with other settings: give another --out, or delete it")
        policy.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return cls(**state["progress"])


class Watched:
    """Called with the rollout of a step before its updates: the covariances are kept, and where the arm has weights of
    its own, the advantages are weighted."""

    def __init__(self, arm: Arm, group_size: int, generator: torch.Generator) -> None:
        self._arm, self._group_size, self._generator = arm, group_size, generator

    def __call__(self, data: Rollout) -> None:
        found = group_statistics(data.old_logprobs, data, self._group_size)
        self.covariance = found.covariance[data.batch.mask.flatten()]
        statistics, self.metrics = statistics_metrics(found, data), {}
        if self._arm.weights is not None:
            # From a generator of its own: the rest is drawn as in the other arms.
            weights = self._arm.weights(
                data.old_logprobs, data.advantages, data.batch.mask, self._group_size, self._generator
            )
            data.advantages = data.advantages.unsqueeze(1) * weights
            self.metrics = weight_metrics(weights, found, data)  # the loss does not know of them
        self.metrics |= statistics


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


@torch.no_grad()
def evaluate(policy: Policy, problems: Sequence[Problem], config: TrainConfig, samples: int) -> dict[str, float]:
    prompts = [problem.prompt for problem in problems]
    generator = _generator("evaluation")
    batch = sample(policy, prompts, samples, config.max_new_tokens, config.temperature, generator)
    right = reward(policy, batch, list(problems))
    counts = right.view(-1, samples).sum(1).long()  # [problems]
    return {f"eval/pass@{k}": pass_at_k(counts, samples, k).mean().item() for k in (1, 8)}


# --- all of them -------------------------------------------------------------------------------------------


def perform_all(specs: Sequence[RunSpec], workers: int) -> None:
    """Those that are not finished, ``workers`` at a time, in the order given but for what waits for another."""
    left = [spec for spec in specs if not spec.is_finished()]
    for start in {spec.start: spec for spec in left}.values():
        make_start(start)
    running: dict[Future[None], RunSpec] = {}
    done = len(specs) - len(left)
    context = multiprocessing.get_context("spawn")  # a fork would share locks of the threads of torch
    others = multiprocessing.active_children()
    progress = ProgressBar("runs", done, len(specs), unit="run")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            while left or running:
                ready = [spec for spec in left if spec.after is None or spec.after.path.exists()]
                for spec in ready[: workers - len(running)]:
                    left.remove(spec)
                    running[pool.submit(perform, spec)] = spec
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    spec = running.pop(future)
                    future.result()
                    done += 1
                    progress.update(done, f"{spec.task} {spec.arm} {spec.seed}")
        except BaseException as error:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise TrainingError(
                    "a worker was killed, perhaps for its memory; the same command goes on with the runs that are not "
                    "finished, with --workers 1 in less memory"
                ) from error
            raise


def make_start(spec: RunSpec) -> None:
    """The policy that all runs of a task start from, in OUT/task/warm_start, if it is not a real model. Raises
    TrainingError where there is one of other options."""
    config, file, folder = spec.config, spec.start / "options.json", spec.start / "warm_start"
    if config.model is not None:
        return
    options = {name: value for name, value in spec.settings()["options"].items() if name != "steps"}  # of GRPO
    if folder.exists():
        if json.loads(file.read_text()) != options:
            raise TrainingError(f"{spec.start} holds runs with other options: give another --out")
        return
    write_atomically(file, lambda opened: opened.write(json.dumps(options).encode()))
    policy = new_policy(config.hidden_size, config.layers, config.seed, CPU)
    warm_start(policy, make_task(spec.task, config), config)
    save_folder_atomically(folder, policy.save)


def _start_worker() -> None:
    """One thread; and its end when the study ends, however that is killed. The study alone hears of an interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
