"""What a run shows while it works: one line that changes, or ten lines a run where there is no terminal."""

from __future__ import annotations

import sys
import time
from datetime import timedelta


class ProgressBar:
    def __init__(self, title: str, done: int, total: int, *, quiet: bool = False) -> None:
        self._title, self._total, self._quiet = title, total, quiet
        self._first, self._shown, self._started = done, done, time.monotonic()
        self._terminal = sys.stdout.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._shown > self._first:
            print(flush=True)

    def update(self, done: int, state: str) -> None:
        tenth = 10 * done // self._total > 10 * self._shown // self._total
        if self._quiet or not (self._terminal or tenth or done == self._total):
            return
        pace = (time.monotonic() - self._started) / (done - self._first)
        left = timedelta(seconds=round(pace * (self._total - done)))
        line = f"{self._title} {done}/{self._total}  {state}  {pace:.1f} s/step  {left} left"
        print(f"\r{line[:79]:<79}" if self._terminal else line, end="" if self._terminal else "\n", flush=True)
        self._shown = done
