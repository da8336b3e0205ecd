"""Two checkouts of this repository side by side: the same measurement in processes that alternate, so that a machine
that slows down slows both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def named(against: Path | None) -> dict[str, Path]:
    """This one as "now" and the other one, if any, as "before". Ends the program where that is no checkout."""
    if against is None:
        return {"now": ROOT}
    if not (against / "covgrpo_kernels" / "__init__.py").is_file():
        sys.exit(f"--against must be a checkout of this repository, got {against}")
    return {"now": ROOT, "before": against.resolve()}


def in_turns(
    checkouts: dict[str, Path], turns: int, words: dict[str, list[str]], **variables: str
) -> dict[str, list[Any]]:
    """What `checkout_step.py` prints in each, given its ``words``, once a turn; who comes first changes. ``variables``
    are the environment's. Ends the program, with the errors that it printed, where a process fails."""
    found: dict[str, list[Any]] = {name: [] for name in checkouts}
    for turn in range(turns):
        for name in list(checkouts)[:: -1 if turn % 2 else 1]:
            folder = checkouts[name]
            environment = os.environ | variables | dict(PYTHONPATH=str(folder))
            command = [sys.executable, str(Path(__file__).with_name("checkout_step.py")), *words[name]]
            made = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
            if made.returncode:
                sys.exit(f"measuring {folder} failed:\n{made.stderr}")
            found[name].append(json.loads(made.stdout.splitlines()[-1]))
    return found


def commit(folder: Path) -> str:
    """Its hash, and "-dirty" where files were changed that git knows, but for results."""

    def git(*words: str) -> str:
        made = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return made.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)*/results/*")
    return git("describe", "--always") + ("-dirty" if changed else "")
