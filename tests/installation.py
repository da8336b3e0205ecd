"""Installs a wheel as people do, in environments of their own, and tries there what it is for.

On each Python that is here, with one torch each, the oldest with the oldest: `covgrpo doctor` and tests of the public
functions. Then with each extra alone: imports of what the extra is for. What cannot be had is left out, and the last
lines say why: an interpreter that is not on the PATH, a torch that the index does not have.

    python tests/installation.py dist/NAME.whl       what `make test-installation` runs
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX = "https://download.pytorch.org/whl/cpu"
# Every Python and every torch at least once.
COMBINATIONS = [("3.10", "2.11.0"), ("3.11", "2.13.0"), ("3.12", "2.12.1"), ("3.13", "2.14.1"), ("3.14", "2.15.0")]
# Loss, gradients and weights against the reference, with C++ and with plain PyTorch, beside what was installed.
TESTS = ["conftest.py", "interpreter.py", "test_loss.py", "test_weights.py"]
NEEDED_BY_TESTS = ["numpy", "pytest", "hypothesis"]
EVERY_MODULE = (
    "import importlib, pkgutil, sys; package = importlib.import_module(sys.argv[1]); "
    "[importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, sys.argv[1] + '.')"
    " if not m.name.endswith('__main__')]"
)
# What an extra is for is imported: of the wheel, and of the folders of the checkout that are not in it.
EXTRAS = {
    "grpo": ["-c", EVERY_MODULE, "covgrpo_kernels.grpo"],
    "trl": ["-c", "from covgrpo_kernels.integrations.trl import CovGRPOTrainer"],
    "research": ["-c", EVERY_MODULE, "research"],
    "bench": ["-c", EVERY_MODULE, "bench"],
    "docs": ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "{folder}/site"],
    "dev": ["-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", "tests"],
}

IN_THE_CHECKOUT = ("docs", "dev")
BESIDE_THE_WHEEL = ("research", "bench")


class CannotBeHad(Exception):
    """Why a combination is left out."""


def run(command: list[str], folder: Path, **variables: str) -> None:
    """Its output is shown where it fails, and then it is a failure."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run(command, cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-5000:]}")


def python_of(version: str) -> str:
    path = sys.executable if version == f"3.{sys.version_info.minor}" else shutil.which(f"python{version}")
    if path is None:
        raise CannotBeHad(f"no python{version} on the PATH")
    return path


class Environment:
    """A virtual environment; one that is there already, with this torch, is used as it is."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.python = folder, str(folder / "bin" / "python")
        if not (folder / "pyvenv.cfg").exists():
            subprocess.run([python_of(version), "-m", "venv", "--without-pip", folder], check=True)

    def pip(self, *arguments: str) -> None:
        run([sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments], ROOT)

    def install_torch(self, torch: str, index: str) -> None:
        code = f"import importlib.metadata as m; assert m.version('torch').split('+')[0] == {torch!r}"
        if subprocess.run([self.python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0:
            return
        try:
            if index:  # torch alone: all else comes from pip's own index
                self.pip("install", "--retries", "0", "--index-url", index, "--no-deps", f"torch=={torch}")
            self.pip("install", f"torch=={torch}")
        except RuntimeError as error:
            raise CannotBeHad(f"torch {torch}: {str(error).strip().splitlines()[-1]}") from None

    def install_wheel(self, wheel: str) -> None:
        self.pip("uninstall", "--yes", "covgrpo-kernels")
        self.pip("install", wheel)


def check_combination(wheel: Path, folder: Path, python: str, torch: str, index: str) -> None:
    environment = Environment(folder, python)
    environment.install_torch(torch, index)
    environment.pip("install", *NEEDED_BY_TESTS)
    environment.install_wheel(str(wheel))
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    for name in ["pyproject.toml", *(f"tests/{name}" for name in TESTS)]:
        shutil.copy(ROOT / name, tests)
    run([str(folder / "bin" / "covgrpo"), "doctor"], tests, COVGRPO_BACKEND="cpp")
    # With 1 the tests of the C++ backend are red where it is missing.
    chosen = "not triton and not gpu and not portable"
    run([environment.python, "-m", "pytest", "-q", "-k", chosen, "."], tests, COVGRPO_BUILD_CPP="1")


def check_extra(wheel: Path, folder: Path, extra: str, index: str) -> None:
    version = f"3.{sys.version_info.minor}"
    environment = Environment(folder, version)
    environment.install_torch(dict(COMBINATIONS)[version], index)
    environment.install_wheel(f"{wheel}[{extra}]")
    beside = folder / "beside"
    beside.mkdir(exist_ok=True)
    for name in BESIDE_THE_WHEEL:
        shutil.copytree(ROOT / name, beside / name, dirs_exist_ok=True)
    command = [part.format(folder=folder) for part in EXTRAS[extra]]
    run([environment.python, *command], ROOT if extra in IN_THE_CHECKOUT else beside)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--index", default=INDEX, help="of torch; empty: pip's own, with CUDA (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "installation", help="of the environments")
    parser.add_argument("--only", nargs="+", help="versions of Python, and extras")
    parser.add_argument("--keep", action="store_true", help="the environments, of 1 GB (with CUDA 5 GB) each")
    arguments = parser.parse_args()
    wheel, folder, index = arguments.wheel.resolve(), arguments.folder.resolve(), arguments.index
    cases = {f"Python {python}, torch {torch}": (python, torch) for python, torch in COMBINATIONS}
    cases |= {f"extra {extra}": (extra,) for extra in EXTRAS}
    results: dict[str, str] = {}
    for name, case in cases.items():
        if arguments.only and case[0] not in arguments.only:
            continue
        place = folder / "-".join(case)
        try:
            (check_combination if len(case) == 2 else check_extra)(wheel, place, *case, index)
            results[name] = "passed"
        except CannotBeHad as why:
            results[name] = f"not run: {why}"
        except RuntimeError as error:
            results[name] = f"FAILED: {error}"
        print(f"{name}: {results[name]}", flush=True)
        if not arguments.keep:
            shutil.rmtree(place, ignore_errors=True)
    print("\n" + "\n".join(f"{name:<28} {result.splitlines()[0]}" for name, result in results.items()))
    count = [sum(result.startswith(word) for result in results.values()) for word in ("passed", "FAILED", "not run")]
    print("{} passed, {} failed, {} skipped".format(*count))
    return 0 if count[0] and not count[1] else 1


if __name__ == "__main__":
    sys.exit(main())
