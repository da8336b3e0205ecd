"""Problems and answers from wherever they are; files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from covgrpo_kernels.grpo.checkpoint import write_atomically

from .config import Problems, TrainingData
from .rewards import as_solution


def load_problems(source: Problems) -> Dataset:
    """Columns ``problem`` and ``solution``, both text.

    Raises:
        ValueError: a column that is not there.
    """
    if Path(source.name).is_dir() and (Path(source.name) / "state.json").exists():
        data = load_from_disk(source.name)
    elif source.name.endswith(".jsonl"):
        data = Dataset.from_list(read_lines(Path(source.name)))
    else:
        data = load_dataset(source.name, source.config, split=source.split)
    for column in (source.problem, source.answer):
        if column not in data.column_names:
            raise ValueError(f"{source.name} has no column {column!r}; it has {', '.join(data.column_names)}")
    return data.map(
        lambda row: {"problem": row[source.problem], "solution": as_solution(row[source.answer])},
        remove_columns=data.column_names,
    )


def training_prompts(source: TrainingData) -> Dataset:
    """Columns ``prompt``, a conversation, and ``solution``."""
    system = [] if source.system_prompt is None else [{"role": "system", "content": source.system_prompt}]
    return load_problems(source).map(
        lambda row: {"prompt": [*system, {"role": "user", "content": row["problem"]}]}, remove_columns="problem"
    )


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Whole or not at all."""
    write_atomically(path, lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
