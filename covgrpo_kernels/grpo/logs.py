"""Where the metrics of each step go: a line of OUT/metrics.jsonl, and on request TensorBoard or Weights & Biases."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from .checkpoint import RunFolder, TrainingError, write_atomically


class MetricsLog:
    """The metrics of a run, step by step, written by one process. `open` comes first; leaving the context closes it.

    metrics.jsonl grows by a line a step, null for what is not finite. Whenever the run is killed, and wherever it goes
    on, the file holds each step once, and whole lines but for a last one that a kill cut off and `open` removes.
    """

    def __init__(self, folder: RunFolder, tracker: str) -> None:
        self._folder, self._path, self._name = folder, folder.path / "metrics.jsonl", tracker
        self._tracker: TensorBoard | WandB | None = None

    def open(self, done: int) -> None:
        """Goes on after so many steps of the checkpoint; lines of later steps, which are done again, go. Raises
        TrainingError where lines are missing or of something else, or the tracker does not start."""
        if done:
            written = self._path.read_bytes() if self._path.exists() else b""
            lines = written.splitlines()[: done + 1]
            if len(_parsed(self._path, lines)) <= done:
                raise TrainingError(
                    f"{self._path} does not hold all of the {done} steps of the checkpoint: put it back"
                )
            kept = b"".join(line + b"\n" for line in lines)
            if kept != written:
                write_atomically(self._path, lambda file: file.write(kept))
        try:
            self._tracker = TRACKERS[self._name](self._folder, done) if self._name in TRACKERS else None
        except Exception as error:  # of many kinds, from the library
            raise TrainingError(f"--log-to {self._name}: {type(error).__name__}: {error}") from error

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """A step, one after the other. Step 0, the run before it learns, begins the file anew."""
        finite = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in metrics.items()}
        row = {"step": step, **finite} if step else {"run": self._folder.id, "step": step, **finite}
        line = json.dumps(row).encode() + b"\n"
        if step:
            self._append(line)
        else:
            write_atomically(self._path, lambda file: file.write(line))
        if self._tracker is not None:
            self._tracker.add(step, metrics)

    def _append(self, line: bytes) -> None:
        """The whole line; or nothing of it, where the disk is full or the user interrupts."""
        with open(self._path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tracker is not None:
            self._tracker.close(failed=kind is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The row of every step. Raises TrainingError, naming the line, where one is none."""
    return _parsed(path, path.read_bytes().splitlines())


def _parsed(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    rows = []
    for step, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, not UTF-8
            row = None
        if not isinstance(row, dict) or row.get("step") != step:
            raise TrainingError(
                f"{path}, line {step + 1}: not the metrics of step {step}: put the file back as the run wrote it"
            )
        rows.append(row)
    return rows


# --- trackers ----------------------------------------------------------------------------------------------


class TensorBoard:
    """In OUT/tensorboard. Of a run that goes on, it forgets the steps that are done again."""

    def __init__(self, folder: RunFolder, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1 if done else 0)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """One run there for a run here, however often it is resumed; what it has of a step stays, and has the same numbers
    as when the step is done again."""

    def __init__(self, folder: RunFolder, done: int) -> None:
        import wandb

        known = folder.path / "wandb_id.txt"
        if not known.exists():
            write_atomically(known, lambda file: file.write(secrets.token_hex(4).encode()))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "covgrpo"), name=folder.path.name, id=known.read_text().strip(),
            resume="allow", config=folder.settings, dir=str(folder.path),
        )  # fmt: skip

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(metrics, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_tracker(name: str) -> None:
    """Raises ValueError where its library is not installed. (A folder of its name, such as the one that wandb makes,
    could be imported: it has no origin.)"""
    if name in TRACKERS and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise ValueError(f"log_to {name} needs the package {name}, which is not installed: pip install {name}")
