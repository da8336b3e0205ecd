"""Examples run and do what they say; they and the GRPO loop use what any user can."""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import covgrpo_kernels

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LOOP = [*sorted((ROOT / "covgrpo_kernels" / "grpo").glob("*.py")), ROOT / "covgrpo_kernels" / "cli.py"]


@pytest.mark.slow
def test_grpo_learns() -> None:
    """As it is run by a user: the reward that it prints rises from chance to nearly 1."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "grpo.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rewards = [float(reward) for reward in re.findall(r"reward (\S+)", result.stdout)]
    assert len(rewards) > 5
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.9


@pytest.mark.parametrize("weighting", ["none", "clip_cov", "kl_cov"])
def test_grpo_with_other_weights(weighting: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rewards = runpy.run_path(str(ROOT / "examples" / "grpo.py"))["train"](steps=25, weighting=weighting)
    torch.set_num_threads(threads)
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_begins_with_what_it_shows(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    introduction = ast.get_docstring(ast.parse(text)) or ""
    assert "What it shows:" in introduction
    assert "What to expect:" in introduction


def _imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a file imports from the package, by absolute names."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "covgrpo_kernels")
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module.split(".")[0] == "covgrpo_kernels":
                yield from ((module, alias.name) for alias in node.names)


def _is_public(module: str, name: str) -> bool:
    """Names of the package itself, and those of an integration that are no modules of it."""
    if module == "covgrpo_kernels":
        return name in ("", "__version__", *covgrpo_kernels.__all__)
    if re.fullmatch(r"covgrpo_kernels\.integrations\.\w+", module):
        return name != "" and not name.startswith("_") and module == getattr(
            getattr(importlib.import_module(module), name), "__module__", None
        )  # fmt: skip
    return False


@pytest.mark.parametrize("path", [*EXAMPLES, *LOOP], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_only(path: Path) -> None:
    if path in LOOP:
        pytest.importorskip("transformers")
    own = [("covgrpo_kernels.doctor", name) for name in ("main", "how_to_install")] if path.name == "cli.py" else []
    for module, name in _imported(path):
        of_the_loop = path in LOOP and (f"{module}.{name}." + ".").startswith("covgrpo_kernels.grpo.")
        assert of_the_loop or (module, name) in own or _is_public(module, name), f"{path.name}: {module} {name}"


def test_the_loop_imports_the_loss() -> None:
    """Or the test above would see nothing."""
    seen = {name for path in [*EXAMPLES, *LOOP] for _, name in _imported(path)}
    assert seen >= {"covgrpo_loss", "linear_logprob", "CovGRPOConfig", "patch_model"}


@pytest.mark.parametrize("path", [*EXAMPLES, *LOOP], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"
