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
from dataclasses import dataclass
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
    temporary = path.with_name(path.name + _TEMPORARY)
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


@dataclass(frozen=True)
class RunFolder:
    path: Path
    id: str  # the same for all commands that may continue the run

    @classmethod
    def claim(cls, path: Path, command: str, options: dict[str, Any], free: Collection[str]) -> RunFolder:
        """Makes the folder the run's: a new or empty one, or one that holds this run already.

        Args:
            command: which of `covgrpo` it is.
            options: its options, and digests of the files it reads, as JSON takes them.
            free: options that may change when a run is resumed.

        Raises:
            TrainingError: the folder holds something else. Nothing was written then.
        """
        if path.exists() and not path.is_dir():
            raise TrainingError(f"{path} is a file: --out must be a folder")
        settings = {"command": command, **options}
        fixed = json.dumps({name: value for name, value in settings.items() if name not in free}, sort_keys=True)
        run = cls(path, hashlib.sha256(fixed.encode()).hexdigest()[:16])
        there = [file.name for file in path.iterdir() if not file.name.endswith(_TEMPORARY)] if path.exists() else []
        if there:
            run._compare_settings(there, settings, free)
            for name in OUTPUTS:
                if os.path.lexists(path / name):
                    run._check_output(path / name)
        content = json.dumps({"run": run.id, **settings}, indent=2).encode()
        write_atomically(path / RUN_FILE, lambda file: file.write(content))
        return run

    def _compare_settings(self, there: list[str], settings: dict[str, Any], free: Collection[str]) -> None:
        if RUN_FILE not in there:
            raise TrainingError(
                f"{self.path} holds files that are not of a covgrpo run ({', '.join(sorted(there)[:3])}"
                f"{', ...' if len(there) > 3 else ''}): give another --out"
            )
        try:
            old = json.loads((self.path / RUN_FILE).read_text())
            command = old["command"]
        except (OSError, ValueError, TypeError, KeyError):
            raise TrainingError(f"{self.path / RUN_FILE} is damaged or not of a run: give another --out") from None
        if command != settings["command"]:
            raise TrainingError(f"{self.path} holds a run of covgrpo {command}: give another --out")
        for name, value in settings.items():
            if name in free or old.get(name) == value:
                continue
            if name.endswith("_digest"):
                what = f"--{name.removesuffix('_digest')} {settings[name.removesuffix('_digest')]}"
                raise TrainingError(
                    f"{what} has changed since the run in {self.path} began: put it back to resume the run, "
                    "or give another --out"
                )
            raise TrainingError(
                f"{self.path} holds a run with --{name.replace('_', '-')} {old.get(name)}, not {value}: "
                "give the same value to resume it, or another --out"
            )

    def _check_output(self, path: Path) -> None:
        marked = path / RUN_FILE if path.is_dir() else path
        if path.name == "checkpoint.pt":
            _check_whole(path)
        if not marked.is_file() or self.id.encode() not in _first_bytes(marked):
            raise TrainingError(
                f"{path} was not written by the run in {self.path} and would be overwritten: move it, "
                "or give another --out"
            )
        if path.is_dir():
            listed = json.loads(marked.read_text())["files"]
            if added := sorted({file.name for file in path.iterdir()} - {*listed, RUN_FILE}):
                raise TrainingError(f"{path / added[0]} was not written by the run and would be deleted: move it")

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


class MetricsFile:
    """JSON lines, one per step, each on the disk before the next step begins."""

    def __init__(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Begins with the rows, which replace what was there."""
        lines = [_line(row) for row in rows]
        write_atomically(path, lambda file: file.writelines(lines))
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
    """All whole lines: a kill may have torn the last one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
