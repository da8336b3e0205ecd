"""Builds the wheel of this machine as cibuildwheel would, without the container that cibuildwheel runs in.

The commands are those that cibuildwheel itself reads from pyproject.toml: before the build, the build, the repair, the
audit and the test. What the container has beyond them is old system libraries, so the wheel made here runs on systems
that are as new as this one; auditwheel says which that is.

    python tests/wheels.py FOLDER       the wheel is then in FOLDER; `make wheel` installs what this needs
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cibuildwheel.options import CommandLineArguments, compute_options

ROOT = Path(__file__).parent.parent


def options_of_this_machine() -> Any:
    """What cibuildwheel would do for the one wheel that it builds on this machine."""
    system = "macos" if sys.platform == "darwin" else "linux"
    arguments = dataclasses.replace(CommandLineArguments.defaults(), package_dir=ROOT, platform=system)
    options = compute_options(platform=system, command_line_arguments=arguments, env={})
    [machine] = {architecture.value for architecture in options.globals.architectures}
    return options.build_options(f"cp310-{'macosx' if system == 'macos' else 'manylinux'}_{machine}")


class Steps:
    """Shell commands, printed before they run, in an environment of their own."""

    def __init__(self, name: str, folder: Path, variables: Any) -> None:
        self.folder = folder / name
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        # What is not there is looked for among the tools beside this script's own Python, as in the container.
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables = variables.as_dictionary(os.environ | dict(PATH=path, VIRTUAL_ENV=str(self.folder)))

    def run(self, command: str, cwd: Path = ROOT) -> None:
        print(f"+ {command}", flush=True)
        subprocess.run(["sh", "-c", command], cwd=cwd, env=self.variables, check=True)


def only(folder: Path) -> Path:
    [path] = folder.glob("*.whl")
    return path


def main(out: Path) -> None:
    options = options_of_this_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, built, repaired, empty = (folder / part for part in ("source", "built", "repaired", "empty"))
        for made in (repaired, empty):
            made.mkdir()
        # From a copy, as in the container: a build leaves files beside its sources.
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.so", "*.egg-info", "build", "runs", "site")
        shutil.copytree(ROOT, source, ignore=ignored)

        build = Steps("build", folder, options.environment)
        build.run(options.before_build, source)
        assert options.build_frontend.name == "build"
        build.run(
            f"pip install -q build && python -m build --wheel {' '.join(options.build_frontend.args)} -o {built} .",
            source,
        )
        build.run(options.repair_command.format(wheel=only(built), dest_dir=repaired))
        wheel = only(repaired)
        for audit in options.audit_command:
            Steps("audit", folder, options.environment).run(
                f"pip install -q {' '.join(options.audit_requires)} && {audit.format(abi3_wheel=wheel, wheel=wheel)}"
            )
        if sys.platform == "linux":
            build.run(f"auditwheel show {wheel}")

        test = Steps("test", folder, options.environment)
        test.variables = options.test_environment.as_dictionary(test.variables)
        test.run(f"pip install {wheel}", empty)
        test.run(options.test_command, empty)
        out.mkdir(parents=True, exist_ok=True)
        print(f"\n{shutil.copy(wheel, out)}: built and tested")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
