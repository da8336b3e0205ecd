"""What a run shows while it works: a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10  # about so many plain lines a run


class ProgressBar:
    def __init__(self, title: str, done: int, total: int, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self._title, self._total, self._quiet = title, total, quiet
        self._first, self._shown, self._started = done, done, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, state="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, state: str) -> None:
        self._bar.update(self._task, completed=done, state=state)
        every = max(self._total // LINES, 1)
        plain = not (self._quiet or self.console.is_terminal)
        if plain and (done // every > self._shown // every or done == self._total):
            self._shown = done
            pace = (time.monotonic() - self._started) / (done - self._first)
            left = f"{pace * (self._total - done):.0f} s left"
            print(f"{self._title} {done}/{self._total}  {state}  {left}", flush=True)
