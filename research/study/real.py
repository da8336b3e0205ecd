"""The same on a real model: which runs there are, and the learning rate that each arm gets.

What is claimed of these runs is what is claimed of the small policies (`report.CLAIMS`). It was fixed, with the tasks,
the arms, the grid of learning rates and the rule that chooses from it, before the first of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean

import torch

from covgrpo_kernels.grpo.config import TrainConfig

from .. import RESULTS
from ..models import model_folder
from .arms import REAL_SEEDS, Evaluation
from .run import RunSpec, perform_all, read_run
from .study import write_report
from .summary import write_summaries

# Of pilots: at a learning rate of 1e-5 GRPO takes easier forms of both tasks from a fifth or two fifths of responses
# that are right to four fifths in twelve steps. A step takes 6 s of a core, and bfloat16 was no faster on this CPU.
_SIZES = TrainConfig(
    model="smollm2",
    prompts_per_step=8,
    group_size=8,
    max_new_tokens=8,
    temperature=0.7,
    dtype="float32",
    weighting="none",
    inner_steps=2,
    microbatch_prompts=4,
    warmup_steps=5,
    steps=100,
    checkpoint_every=25,
)
REAL_TASKS = {"sums": _SIZES, "largest": _SIZES}
REAL_ARMS = ("grpo", "cw_grpo", "author_code", "kl_cov")
REAL_EVALUATION = Evaluation(problems=64, samples=8, every=50)

# An arm's learning rate is that of the highest mean reward over the last ten steps of a short run on the first task,
# with a seed that no other run has.
LEARNING_RATES = (1e-6, 3e-6, 1e-5)
SWEEP_SEED = 1000
SWEEP_STEPS = 30
_SWEEP_EVALUATION = Evaluation(problems=8, samples=8, every=SWEEP_STEPS)


def real_run(out: str, *, results: Path | None = None, seeds: int = REAL_SEEDS, workers: int = 2) -> None:
    """Runs what is not finished in OUT, and writes real_run.json and the report in `results`, which has a study.json.
    None: research/results.

    Raises:
        ValueError: a wrong argument, by name.
        ModelNotFetchedError: the model is not there; the message says how to get it.
        TrainingError: OUT holds runs with other settings, or a run cannot go on.
    """
    model_folder(_SIZES.model or "")
    for name, value, low in (("seeds", seeds, 2), ("workers", workers, 1)):
        if value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
    torch.set_num_threads(1)
    swept = [spec for arm in REAL_ARMS for spec in sweep_runs(Path(out), arm)]
    perform_all(swept, workers)
    rates = {arm: learning_rate(Path(out), arm) for arm in REAL_ARMS}
    specs = [
        RunSpec(Path(out), task, arm, seed, dataclasses.replace(config, lr=rates[arm]), REAL_EVALUATION)
        for seed in range(seeds)
        for task, config in REAL_TASKS.items()
        for arm in REAL_ARMS
    ]
    perform_all(specs, workers)
    folder = RESULTS if results is None else results
    sweep = [{"arm": spec.arm, "lr": spec.config.lr, "reward": _late_reward(spec)} for spec in swept]
    write_summaries(specs, folder / "real_run.json", sweep)
    write_report(folder)


def sweep_runs(out: Path, arm: str) -> list[RunSpec]:
    task, config = next(iter(REAL_TASKS.items()))
    config = dataclasses.replace(config, steps=SWEEP_STEPS)
    return [
        RunSpec(out / f"sweep-{lr:g}", task, arm, SWEEP_SEED, dataclasses.replace(config, lr=lr), _SWEEP_EVALUATION)
        for lr in LEARNING_RATES
    ]


def learning_rate(out: Path, arm: str) -> float:
    return max(sweep_runs(out, arm), key=_late_reward).config.lr


def _late_reward(spec: RunSpec) -> float:
    return fmean(row["reward/mean"] for row in read_run(spec.path).steps[-10:])
