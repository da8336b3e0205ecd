"""Measurement, statistics, files; and what the command does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from covgrpo_kernels.grpo.checkpoint import write_atomically

from ..study.summary import six_digits
from .figures import save_figure
from .law import measure, plan
from .report import findings, updated
from .statistics import statistics


def run(out: Path, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Measures, and writes OUT/entropy_law.json and OUT/entropy_law.png; some minutes on one core, `quick` (a smaller
    policy, few batches, to see that all works) some seconds. Returns what is in the JSON."""
    results = six_digits(measure(plan(seed, quick)))
    results["statistics"] = six_digits(statistics(results["stages"]))
    text = json.dumps(results, allow_nan=False)
    save_figure(results, out)
    # Last: where it is, all is done.
    write_atomically(out / "entropy_law.json", lambda file: file.write(text.encode()))
    return json.loads(text)


def is_finished(out: Path, seed: int = 0, quick: bool = False) -> bool:
    """Whether OUT/entropy_law.json is there, and of these settings."""
    path = out / "entropy_law.json"
    settings = json.loads(json.dumps(six_digits(dataclasses.asdict(plan(seed, quick)))))
    return path.exists() and json.loads(path.read_text()).get("settings") == settings


def command(*, out: Path, seed: int, quick: bool, report_only: bool, document: Path | None) -> None:
    """Measures, or with `report_only` reads OUT/entropy_law.json; prints what was found, and writes it into a
    document."""
    torch.set_num_threads(1)  # products this small lose with more
    if report_only:
        results = json.loads((out / "entropy_law.json").read_text())
        save_figure(results, out)
    else:
        results = run(out, seed, quick)
    print(findings(results))
    if document:
        document.write_text(updated(document.read_text(), findings(results)))
