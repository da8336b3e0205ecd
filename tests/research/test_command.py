"""`python -m research`: what it imports, what it says, and that the documents have its commands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "matplotlib", "rich", "trl", "math_verify", "yaml"):
    pytest.importorskip(package)

from research.__main__ import _parser, main  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_help_is_light() -> None:
    code = (
        "import sys; from research.__main__ import main\n"
        "try: main(['study', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'transformers', 'trl', 'matplotlib', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_documents_have_every_command_and_no_other() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "Makefile"))
    commands = next(action.choices for action in _parser()._actions if action.dest == "command")
    assert set(re.findall(r"-m research ([a-z-]+)", text)) == set(commands)


@pytest.mark.parametrize(
    ("command", "package"),
    [("study", "transformers"), ("recipe r.yaml", "trl"), ("entropy-law", "matplotlib"), ("training", "rich")],
)
def test_missing_extra(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert f"needs {package}: pip install -e '.[research]'" in error


def test_torchrun_is_for_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["study", "--seeds", "1"]) == 2
    assert "study starts its own processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["study", "--seeds", "1"]) == 2
    assert capsys.readouterr().err == ""


def test_wrong_values_are_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["study", "--seeds", "1"], "seeds must be >= 2, got 1"),
        (["study", "--out", str(tmp_path), "--report-only"], "study.json"),
        (["entropy-law", "--out", str(tmp_path), "--report-only"], "entropy_law.json"),
        (["training", "--seeds", "1"], "seeds must be >= 2, got 1"),
        (["recipe", str(tmp_path / "none.yaml")], "none.yaml"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
