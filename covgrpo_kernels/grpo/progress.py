"""What a run shows while it works: one line that changes, or where there is no terminal a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta

PATIENCE = 300  # seconds without a line where there is no terminal


class ProgressBar:
    """Without a terminal there is a line for the first step and for each tenth of all, and after `PATIENCE`."""

    def __init__(self, title: str, done: int, total: int, *, unit: str = "step", quiet: bool = False) -> None:
        self._title, self._total, self._unit, self._quiet = title, total, unit, quiet
        self._first, self._shown = done, done
        self._started = self._shown_at = time.monotonic()

    def update(self, done: int, state: str, *, last: bool = False) -> None:
        """`last`: nothing comes after this, although not all was done."""
        now, last = time.monotonic(), last or done == self._total
        due = self._shown == self._first or 10 * done // self._total > 10 * self._shown // self._total
        due = due or last or now - self._shown_at >= PATIENCE
        terminal = sys.stdout.isatty()
        if self._quiet or not (terminal or due):
            return
        pace = (now - self._started) / (done - self._first)
        rate = f"  {pace:.1f} s/{self._unit}" if pace >= 1 else f"  {1 / max(pace, 1e-3):.1f} {self._unit}s/s"
        left = "" if last else f"  {timedelta(seconds=round(pace * (self._total - done)))} left"
        line = f"{self._title} {done}/{self._total}  {state}"
        if terminal:  # what is cut is the state, not the rates
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[: max(width - len(rate + left), 0)] + rate + left:<{width}}"[: width + 1]
        else:
            line += rate + left
        print(line, end="" if terminal and not last else "\n", flush=True)
        self._shown, self._shown_at = done, now
