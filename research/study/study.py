"""Which runs there are, then the runs, then the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from covgrpo_kernels.grpo.checkpoint import write_atomically

from ..entropy_law import run as entropy_law
from .arms import (
    ABLATIONS,
    ALL_ARMS,
    EVALUATION,
    MINIATURE_ARMS,
    MINIATURE_EVALUATION,
    MINIATURE_SEEDS,
    MINIATURE_TASKS,
    SEEDS,
    TASKS,
)
from .figures import save_curves, save_figures
from .report import save_report
from .run import RunSpec, perform_all
from .summary import read_summaries, write_summaries


def study(
    out: str,
    *,
    results: str | None = None,
    tasks: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    workers: int = 2,
    miniature: bool = False,
    report_only: bool = False,
) -> None:
    """Runs what is not finished in OUT, then writes study.json, the report with its figures, and the entropy law's.

    Args:
        out: folder of the runs and of the entropy law; what is finished there is not run again.
        results: folder of the report; None: `out`.
        tasks: of `TASKS`; None: all.
        arms: of `ALL_ARMS`, and what they are compared with; None: all. Ablations run on the first of the tasks.
        seeds: so many, from 0 on; None: as `arms.py` says.
        steps: of a run; None: as `arms.py` says.
        workers: runs at a time, each on one thread.
        miniature: a minute or two, to see that all works.
        report_only: from the study.json that is there, running nothing.

    Raises:
        ValueError: a wrong argument, by name.
        TrainingError: OUT holds runs with other settings, or a run cannot go on.
        OSError: among others where `report_only` finds no study.json.
    """
    seeds = seeds if seeds is not None else MINIATURE_SEEDS if miniature else SEEDS
    for name, value, low in (("seeds", seeds, 2), ("steps", steps, 1), ("workers", workers, 1)):
        if value is not None and value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
    # Products this small gain nothing from a second thread, and lose much where cores are shared.
    torch.set_num_threads(1)
    folder = Path(out if results is None else results)
    if not report_only:
        specs = all_runs(Path(out), tasks, arms, seeds, steps, miniature)
        perform_all(specs, workers)
        write_summaries(specs, folder / "study.json")
        if not entropy_law.is_finished(Path(out), quick=miniature):
            entropy_law.run(Path(out), quick=miniature)
        if results is not None:
            for name in ("entropy_law.png", "entropy_law.json"):
                _copy(Path(out) / name, folder / name)
    write_report(folder)


def write_report(folder: Path) -> None:
    """The report and its figures, from the study.json in the folder, and from real_run.json where there is one."""
    summaries, real = read_summaries(folder / "study.json"), None
    save_figures(summaries, folder)
    if (folder / "real_run.json").exists():
        real = read_summaries(folder / "real_run.json")
        save_curves(real, folder / "real_run_curves.png")
    save_report(summaries, folder / "study.md", real)
    print(f"{folder / 'study.md'}: what was found")


def _copy(source: Path, target: Path) -> None:
    write_atomically(target, lambda file: file.write(source.read_bytes()))


def all_runs(
    out: Path,
    tasks: Sequence[str] | None,
    arms: Sequence[str] | None,
    seeds: int,
    steps: int | None,
    miniature: bool,
) -> list[RunSpec]:
    """A seed after the other: what is interrupted has whole seeds of all arms. Raises ValueError for unknown names."""
    configs, evaluation = (MINIATURE_TASKS, MINIATURE_EVALUATION) if miniature else (TASKS, EVALUATION)
    tasks = _known("tasks", tasks, configs)
    arms = _known("arms", arms, MINIATURE_ARMS if miniature and arms is None else ALL_ARMS)
    compared = {"grpo", *(["cw_grpo"] if any(arm in ABLATIONS for arm in arms) else [])}
    compared |= {like for arm in arms if (like := ALL_ARMS[arm].lr_like) is not None}
    arms = [arm for arm in ALL_ARMS if arm in arms or arm in compared]
    if steps is not None:
        configs = {task: dataclasses.replace(config, steps=steps) for task, config in configs.items()}
    return [
        RunSpec(out, task, arm, seed, configs[task], evaluation)
        for seed in range(seeds)
        for task in tasks
        for arm in arms
        if task == tasks[0] or arm not in ABLATIONS
    ]


def _known(name: str, chosen: Sequence[str] | None, there: Iterable[str]) -> list[str]:
    """In the order that they are in; all of them for None."""
    if chosen is None:
        return list(there)
    for one in chosen:
        if one not in there:
            raise ValueError(f"{name} must be of {', '.join(there)}, got {one!r}")
    return [one for one in there if one in chosen]
