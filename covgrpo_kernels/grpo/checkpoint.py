"""The folder of a run.

Whatever is in it is whole, whenever the run was killed. And nothing that the run did not write is ever overwritten or
deleted: each of its files holds the run's id in its first bytes, each of its folders a list of what is in it, and
all are compared before the first write.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

RUN_FILE = "covgrpo_run.json"
OUTPUTS = ("warm_start", "model", "metrics.jsonl", "report.png")
_TEMPORARY = ".covgrpo-tmp"
_OLD = ".old" + _TEMPORARY


class TrainingError(Exception):
    """The run cannot begin or go on; the message says why and what can be done."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The file holds the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY)
    with open(temporary, "wb") as file:
        write(file)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def save_folder_atomically(path: Path, save: Callable[[Path], Any]) -> None:
    """The folder exists only when it is whole."""
    recover_folder(path)
    temporary = path.with_name(path.name + _TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    for file in (*temporary.rglob("*"), temporary):
        _sync(file)
    if path.exists():  # moved away whole: a kill while it is deleted would leave a part of it
        os.replace(path, path.with_name(path.name + _OLD))
    os.replace(temporary, path)
    _sync(path.parent)
    recover_folder(path)


def recover_folder(path: Path) -> None:
    """Puts the old folder back where a kill left no new one; else deletes it."""
    old = path.with_name(path.name + _OLD)
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class RunFolder:
    """The folder OUT of a run of a command of `covgrpo`, with the options as JSON takes them (those that name files
    with digests of these). Those that are `free` may change when the run is resumed."""

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
        names = sorted(file.name for file in self.path.iterdir()) if self.path.exists() else []
        if names := [name for name in names if not name.endswith(_TEMPORARY)]:
            self._check(names)
        for name in OUTPUTS:
            recover_folder(self.path / name)
        content = json.dumps({"run": self.id, **self.settings}, indent=2).encode()
        write_atomically(self.path / RUN_FILE, lambda file: file.write(content))

    def _check(self, names: list[str]) -> None:
        another, there = "give another --out", _read_json(self.path / RUN_FILE)
        if RUN_FILE not in names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise TrainingError(f"{self.path} holds files that are not of a covgrpo run ({some}): {another}")
        if "command" not in there:
            raise TrainingError(f"{self.path / RUN_FILE} is damaged or not of a run: {another}")
        for name, value in self.fixed.items():
            if there.get(name) != value:
                option = f"--{name.replace('_', '-')} {there.get(name)}, not {value}"
                raise TrainingError(
                    f"{self.path} holds a run with {option}: give the same value to resume it, or another --out"
                )
        for path in (self.path / name for name in OUTPUTS):
            if path.is_dir():
                ours = _read_json(path / RUN_FILE) == self._listed(path, self.step_of(path.name))
            else:
                ours = not os.path.lexists(path) or (path.is_file() and self.id.encode() in path.read_bytes()[:4096])
            if not ours:
                raise TrainingError(
                    f"{path} is not as this run wrote it, but damaged or of another: put that back, or move "
                    f"{path.name} away, and what it held is done again"
                )

    def save_folder(self, name: str, save: Callable[[Path], Any], step: int = 0) -> None:
        """With a list of the files that `save` writes, and the step of the run that they are of."""

        def save_with_list(folder: Path) -> None:
            save(folder)
            (folder / RUN_FILE).write_text(json.dumps(self._listed(folder, step), indent=2))

        save_folder_atomically(self.path / name, save_with_list)

    def _listed(self, folder: Path, step: int | None) -> dict[str, Any]:
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != RUN_FILE}
        return {"run": self.id, "step": step, "sizes": sizes}

    def step_of(self, name: str) -> int | None:
        """That of a folder; None without one."""
        return _read_json(self.path / name / RUN_FILE).get("step")


def _read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no object in it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
