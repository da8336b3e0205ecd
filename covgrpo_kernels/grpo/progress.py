"""What a run shows while it works: one line that changes, or ten lines a run where there is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta


class ProgressBar:
    def __init__(self, title: str, done: int, total: int, *, quiet: bool = False) -> None:
        self._title, self._total, self._quiet = title, total, quiet
        self._first, self._shown, self._started = done, done, time.monotonic()

    def update(self, done: int, state: str, *, last: bool = False) -> None:
        """`last`: nothing comes after this, although not all was done."""
        last = last or done == self._total
        tenth = 10 * done // self._total > 10 * self._shown // self._total
        terminal = sys.stdout.isatty()
        if self._quiet or not (terminal or tenth or last):
            return
        pace = (time.monotonic() - self._started) / (done - self._first)
        left = timedelta(seconds=round(pace * (self._total - done)))
        line = f"{self._title} {done}/{self._total}  {state}  {pace:.1f} s/step" + f"  {left} left" * (not last)
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}" if terminal else line, end="" if terminal and not last else "\n", flush=True)
        self._shown = done
