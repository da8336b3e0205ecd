"""The folder of a run.

Whatever is in it is whole, whenever the run was killed. And nothing that the run did not write is ever overwritten or
deleted: each of its files holds the run's id in its first bytes, and all are checked before the first write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

RUN_FILE = "covgrpo_run.json"
OUTPUTS = ("metrics.jsonl", "checkpoint.pt", "report.png", "warm_start", "model")
_TEMPORARY = ".covgrpo-tmp"


class TrainingError(Exception):
    """The run cannot begin or go on; the message says why and what can be done."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The file holds the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY)
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def save_folder_atomically(path: Path, save: Callable[[Path], Any]) -> None:
    """The folder exists only when it is whole."""
    temporary, old = path.with_name(path.name + _TEMPORARY), path.with_name(path.name + ".old" + _TEMPORARY)
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    for file in temporary.rglob("*"):
        _sync(file)
    _sync(temporary)
    if path.exists():  # moved away whole: a kill while it is deleted would leave a part of it
        os.replace(path, old)
    os.replace(temporary, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """The folder OUT of one run.

    Args:
        path: OUT.
        command: which command of `covgrpo` it is.
        options: its options as JSON takes them; those that name files with digests of these.
        free: options that may change when a run is resumed.
    """

    def __init__(self, path: Path, command: str, options: dict[str, Any], free: Collection[str]) -> None:
        self.path, self.settings = path, {"command": command, **options}
        self.fixed = {name: value for name, value in self.settings.items() if name not in free}
        # The same for all commands that may continue the run.
        self.id = hashlib.sha256(json.dumps(self.fixed, sort_keys=True).encode()).hexdigest()[:16]

    def claim(self) -> None:
        """Makes the folder the run's, if it is new or empty or holds this run already. Raises TrainingError, before
        anything is written, where it holds something else."""
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path} is a file: --out must be a folder")
        there = [file.name for file in self.path.iterdir()] if self.path.exists() else []
        if there := sorted(name for name in there if not name.endswith(_TEMPORARY)):
            if RUN_FILE not in there:
                names = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
                raise TrainingError(
                    f"{self.path} holds files that are not of a covgrpo run ({names}): give another --out"
                )
            self._compare_settings()
            for name in OUTPUTS:
                if os.path.lexists(self.path / name):
                    self._check_output(self.path / name)
        content = json.dumps({"run": self.id, **self.settings}, indent=2).encode()
        write_atomically(self.path / RUN_FILE, lambda file: file.write(content))

    def _compare_settings(self) -> None:
        try:
            there = json.loads((self.path / RUN_FILE).read_text())
            command = there["command"]
        except (OSError, ValueError, TypeError, KeyError):
            raise TrainingError(f"{self.path / RUN_FILE} is damaged or not of a run: give another --out") from None
        if command != self.settings["command"]:
            raise TrainingError(f"{self.path} holds a run of covgrpo {command}: give another --out")
        for name, value in self.fixed.items():
            if there.get(name) != value:
                raise TrainingError(
                    f"{self.path} holds a run with --{name.replace('_', '-')} {there.get(name)}, not {value}: "
                    "give the same value to resume it, or another --out"
                )

    def _check_output(self, path: Path) -> None:
        marked = path / RUN_FILE if path.is_dir() else path
        if path.name == "checkpoint.pt":
            _check_whole(path)
        if not marked.is_file() or self.id.encode() not in _first_bytes(marked):
            raise TrainingError(f"{path} was not written by the run in {self.path}: move it, or give another --out")
        if path.name == "model":  # the folder that is replaced as a whole
            listed = json.loads(marked.read_text())["files"]
            if added := sorted({file.name for file in path.iterdir()} - {*listed, RUN_FILE}):
                raise TrainingError(f"{path / added[0]} was not written by the run, which replaces {path}: move it")

    def save_folder(self, name: str, save: Callable[[Path], Any]) -> None:
        def save_with_list(folder: Path) -> None:
            save(folder)
            listed = {"run": self.id, "files": sorted(file.name for file in folder.iterdir())}
            (folder / RUN_FILE).write_text(json.dumps(listed, indent=2))

        save_folder_atomically(self.path / name, save_with_list)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _check_whole(checkpoint: Path) -> None:
    try:
        with zipfile.ZipFile(checkpoint) as file:
            damaged = file.testzip()  # reads all of it, and compares check sums
    except (OSError, zipfile.BadZipFile):
        damaged = checkpoint.name
    if damaged is not None:
        raise TrainingError(
            f"{checkpoint} is empty, cut off or damaged: put back a whole one, or delete it and the run begins again"
        )


def write_metrics(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """metrics.jsonl anew: a JSON line for each step."""
    lines = [_line(row) for row in rows]
    write_atomically(path, lambda file: file.writelines(lines))


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Another line, which is on the disk when this returns. A kill may tear it."""
    with open(path, "ab") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def _line(row: dict[str, Any]) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
