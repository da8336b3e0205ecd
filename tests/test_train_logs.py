"""Where the metrics of `covgrpo train` go: metrics.jsonl, TensorBoard, Weights & Biases, and lines on the screen."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from covgrpo_kernels import cli
from covgrpo_kernels.grpo import progress as progress_lines
from covgrpo_kernels.grpo import train as training
from covgrpo_kernels.grpo.checkpoint import RunFolder, TrainingError
from covgrpo_kernels.grpo.config import TrainConfig
from covgrpo_kernels.grpo.logs import TRACKERS, MetricsLog, check_tracker, read_metrics
from covgrpo_kernels.grpo.progress import ProgressBar
from covgrpo_kernels.grpo.train import train

RUN = TrainConfig(
    hidden_size=64, layers=1, warm_start_steps=1, steps=5, prompts_per_step=2, group_size=4, max_new_tokens=3,
    checkpoint_every=2, eval_every=2, eval_problems=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "save_report", lambda run, runs: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, **changes: object) -> TrainConfig:
    return dataclasses.replace(RUN, out=str(out), **changes)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """But for the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


class Killed(BaseException):
    """Nothing in the program may catch this, as nothing can catch a kill."""


def train_until(step: int, config: TrainConfig) -> None:
    """The run is killed within this step."""
    real = training.generator_of

    def killed(policy: object, seed: int, number: int) -> torch.Generator:
        if number == step:
            raise Killed
        return real(policy, seed, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "generator_of", killed)
        with pytest.raises(Killed):
            train(config)


# --- metrics.jsonl -----------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(RunFolder(tmp_path, "train", {}, ()), "none")
    log.open(0)
    log.add(0, {"eval/accuracy": 0.5})
    return log


def test_lines_are_appended(log: MetricsLog, tmp_path: Path) -> None:
    """No line is written a second time: the file stays what it is, and grows."""
    path = tmp_path / "metrics.jsonl"
    file, before = path.stat().st_ino, path.read_bytes()
    for step in (1, 2):
        log.add(step, {"loss": step / 3})
        assert path.stat().st_ino == file
        assert path.read_bytes().startswith(before)
        before = path.read_bytes()
    assert before.endswith(b"}\n")
    assert [(row["step"], row.get("loss")) for row in read_metrics(path)] == [(0, None), (1, 1 / 3), (2, 2 / 3)]
    assert read_metrics(path)[0]["run"] == RunFolder(tmp_path, "train", {}, ()).id


def test_what_is_not_finite_is_null(log: MetricsLog, tmp_path: Path) -> None:
    log.add(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1, "e": 0.0})
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 1, "a": None, "b": None, "c": None, "d": 1, "e": 0.0}


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of a file")
def test_a_full_disk_leaves_no_half_of_a_line(log: MetricsLog, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "metrics.jsonl"
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))  # ten bytes of the line have room
        with pytest.raises(OSError, match="No space left"):
            log.add(1, {"loss": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    log.add(1, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_an_interrupt_leaves_no_half_of_a_step(
    log: MetricsLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.add(1, {"loss": 0.5})
    assert path.read_bytes() == before


@pytest.mark.parametrize("left", [b"", b'{"step": 4, "reward/me', b'{"step": 4}\n', b"\xff\n\n{"])
def test_a_resumed_run_has_every_step_once(tmp_path: Path, left: bytes) -> None:
    """Killed in the fourth step, two steps after the last checkpoint, while it was writing or not."""
    train(run(tmp_path / "whole"))
    train_until(4, run(tmp_path / "out"))
    path = tmp_path / "out" / "metrics.jsonl"
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    with open(path, "ab") as file:
        file.write(left)
    train(run(tmp_path / "out"))
    assert path.read_bytes().startswith(b"".join(kept))
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (2, b"{", "line 2: not the metrics of step 1"),
        (2, b'{"step": 2}', "line 2: not the metrics of step 1"),
        (3, b"[2]", "line 3: not the metrics of step 2"),
        (3, b"\xff", "line 3: not the metrics of step 2"),
        (3, None, "does not hold all of the 2 steps"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: int, content: bytes | None, message: str) -> None:
    out = tmp_path / "out"
    train(run(out, steps=2))
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[line - 1 :] = [] if content is None else [content, *lines[line:]]
    path.write_bytes(b"".join(each + b"\n" for each in lines))
    with pytest.raises(TrainingError, match=rf"out/metrics\.jsonl,? {message}"):
        train(run(out))


# --- trackers ----------------------------------------------------------------------------------------------


def test_every_choice_is_a_tracker() -> None:
    [choices] = [field.metadata["choices"] for field in dataclasses.fields(TrainConfig) if field.name == "log_to"]
    assert set(choices) == {"none", *TRACKERS}


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("wandb", None, is_package=True)])
def test_a_tracker_that_is_not_installed(
    found: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work, in one sentence. A folder named wandb, as runs leave it, is no installation."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "wandb" else real(name))
    assert cli.main(["train", "--out", str(tmp_path / "out"), "--log-to", "wandb"]) == 2
    message = "log_to wandb needs the package wandb, which is not installed: pip install wandb"
    assert capsys.readouterr().err == f"covgrpo: error: {message}\n"
    assert not (tmp_path / "out").exists()
    check_tracker("none")


def test_a_tracker_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("you have no account")

    monkeypatch.setitem(sys.modules, "wandb", stand_in := ModuleType("wandb"))
    stand_in.init = refuse  # type: ignore[attr-defined]
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
    with pytest.raises(TrainingError, match="--log-to wandb: RuntimeError: you have no account"):
        train(run(tmp_path / "out", log_to="wandb"))


def test_tensorboard(tmp_path: Path) -> None:
    """What TensorBoard shows of a run that was killed between two checkpoints and went on: each step once, and the
    numbers of metrics.jsonl."""
    pytest.importorskip("tensorboard", reason="needs tensorboard (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    train_until(4, run(out, log_to="tensorboard"))
    train(run(out, log_to="tensorboard"))
    shown = EventAccumulator(str(out / "tensorboard")).Reload()
    rows = rows_of(out)
    assert len(rows) == 6
    for name in ("loss", "reward/mean", "eval/accuracy", "optim/lr"):
        there = [(event.step, event.value) for event in shown.Scalars(name)]
        want = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in there] == [step for step, _ in want], name
        assert [value for _, value in there] == pytest.approx([value for _, value in want], rel=1e-6), name
    # Where a run is logged is no part of it: it goes on without.
    train(run(out, steps=6))
    assert len(rows_of(out)) == 7


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that remembers: one run there for a run here, all of whose steps it is given."""
    calls: list[tuple[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda metrics, step: calls.append(("log", (step, metrics))),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

    monkeypatch.setitem(sys.modules, "wandb", stand_in := ModuleType("wandb"))
    stand_in.init = init  # type: ignore[attr-defined]
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
    out = tmp_path / "out"
    train_until(4, run(out, log_to="wandb"))
    train(run(out, log_to="wandb"))
    (_, first), (_, second) = (call for call in calls if call[0] == "init")
    assert first == second
    assert (first["name"], first["project"], first["resume"]) == ("out", "covgrpo", "allow")
    assert first["config"]["lr"] == RUN.lr
    assert [code for name, code in calls if name == "finish"] == [1, 0]
    logged = [value for name, value in calls if name == "log"]
    assert [step for step, _ in logged] == [0, 1, 2, 3, 3, 4, 5]
    again = [{k: v for k, v in metrics.items() if k != "seconds"} for step, metrics in logged if step == 3]
    assert again[0] == again[1]  # which of the two it keeps does not matter
    for (_, metrics), row in zip(
        (logged[i] for i in (0, 1, 2, 4, 5, 6)), read_metrics(out / "metrics.jsonl"), strict=True
    ):
        assert metrics == {name: value for name, value in row.items() if name not in ("run", "step")}
    train(run(tmp_path / "another", steps=1, log_to="wandb"))
    assert [value for name, value in calls if name == "init"][-1]["id"] != first["id"]


def test_the_real_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: it takes what it is given, also of a run that goes on."""
    pytest.importorskip("wandb", reason="needs wandb (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    train(run(out, steps=1, log_to="wandb"))
    train(run(out, steps=2, log_to="wandb"))
    files = list(out.rglob("run-*.wandb"))
    assert len(files) == 2
    assert all(b"reward/mean" in file.read_bytes() for file in files)
    assert {file.stem.removeprefix("run-") for file in files} == {(out / "wandb_id.txt").read_text()}


# --- lines on the screen -----------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress_lines.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


STATE: typing.Final = "reward 0.123  entropy 1.234"


def test_a_terminal_of_80_columns(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that changes, of the same width every time; the rate and the remaining time are never cut."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = ProgressBar("CW-GRPO", 0, 100_000)
    for step in (1, 2, 100_000):
        clock.now += 30
        progress.update(step, STATE + 9 * "  and more")
    first, *shown = capsys.readouterr().out.split("\r")
    assert first == ""
    assert [len(line.rstrip("\n")) for line in shown] == [79] * 3
    assert shown[0].startswith("CW-GRPO 1/100000  reward 0.123  entropy")
    assert shown[0].endswith("  30.0 s/step  34 days, 17:19:30 left")
    assert shown[-1].endswith("  1111.1 steps/s\n") or shown[-1].endswith("  1000.0 steps/s\n")
    assert [line.endswith("\n") for line in shown] == [False, False, True]
    progress = ProgressBar("CW-GRPO", 0, 100)
    clock.now += 100
    progress.update(50, STATE)
    assert capsys.readouterr().out.split("\r")[1].rstrip() == f"CW-GRPO 50/100  {STATE}  2.0 s/step  0:01:40 left"
    progress.update(51, "enough", last=True)
    assert capsys.readouterr().out.endswith("\n")
    monkeypatch.setenv("COLUMNS", "20")
    progress.update(60, STATE)
    assert len(capsys.readouterr().out) == 20


@pytest.mark.parametrize(("seconds", "rate"), [(4.0, "4.0 s/step"), (1.0, "1.0 s/step"), (0.02, "50.0 steps/s")])
def test_rates_of_slow_and_quick_steps(
    seconds: float, rate: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the steps that this command has done, not of those before it was resumed."""
    progress = ProgressBar("GRPO", 500, 1000)
    for step in (501, 502):
        clock.now += seconds
        progress.update(step, "reward 0.1", last=step == 502)
    assert f"  {rate}\n" in capsys.readouterr().out


def test_lines_where_there_is_no_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the first step, of each tenth, and after five minutes without."""

    def shown(seconds: float) -> list[int]:
        progress, quiet = ProgressBar("GRPO", 0, 40), ProgressBar("GRPO", 0, 40, quiet=True)
        for step in range(1, 41):
            clock.now += seconds
            progress.update(step, "reward 0.1")
            quiet.update(step, "never shown")
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith("GRPO ") and line.endswith(" left") for line in lines[:-1])
        return [int(line.split()[1].removesuffix("/40")) for line in lines]

    assert shown(1) == [1, *range(4, 41, 4)]
    assert shown(301) == list(range(1, 41))
    assert shown(160) == list(range(1, 2)) + list(range(3, 4)) + list(range(4, 41, 2))
