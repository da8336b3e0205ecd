"""Files that survive a kill at any moment: what is there is whole, and what is not there is done again."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The file holds the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def save_folder_atomically(path: Path, save: Callable[[Path], Any]) -> None:
    """The folder exists only when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    for file in temporary.rglob("*"):
        _sync(file)
    _sync(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class MetricsFile:
    """JSON lines, one per step, each on the disk before the next step begins."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Continues after `last_step`: later lines, and one that a kill tore, go and are written again."""
        kept = [row for row in read_metrics(path) if row["step"] <= last_step] if path.exists() else []
        write_atomically(path, lambda file: file.writelines(map(_line, kept)))
        self._file = open(path, "ab")  # noqa: SIM115  (open until `close`)

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
