"""`covgrpo train --config`: options from a YAML file, and the command line on top."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from covgrpo_kernels import cli
from covgrpo_kernels.config_file import read_config
from covgrpo_kernels.grpo.config import TrainConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_every_option_may_stand_in_a_file(path: Path) -> None:
    config = TrainConfig(model="mine", data="rows.jsonl", grad_tol=0.5, lr=3e-5)
    for dash in ("_", "-"):
        values = dataclasses.asdict(config)
        path.write_text("".join(f"{name.replace('_', dash)}: {value}\n" for name, value in values.items()))
        assert TrainConfig(**read_config(str(path))) == config


def test_values_as_the_command_line_has_them(path: Path) -> None:
    """YAML 1.1 would read some of them otherwise."""
    path.write_text(
        "# a run\n\nlr: 1e-4   # no dot\nwarmup_steps: 010\nbeta: 0\nweighting: none\nout: 'runs/x'\n"
        "data: null\nmodel: ~\ngrad_tol:\n"
    )
    assert read_config(str(path)) == dict(lr=1e-4, warmup_steps=10, beta=0.0, weighting="none", out="runs/x")
    path.write_bytes(b"\xef\xbb\xbfout: \xc3\xa9")
    assert read_config(str(path)) == {"out": "é"}
    for nothing in ("", "# nothing\n"):
        path.write_text(nothing)
        assert read_config(str(path)) == {}


def test_the_file_of_the_documents(path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.S)
    path.write_text(block)
    options = read_config(str(path))
    assert len(options) > 3
    TrainConfig(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1\nstepz: 3", "line 2: no such option: stepz; is steps meant?"),
        ("lr: 1\n\nconfig: other.yaml", "line 3: no such option: config"),
        ("? [a, b]\n: 1", "line 1: no such option: a sequence"),
        ("base: &b 1\n<<: *b", "line 1: no such option: base"),
        ("seed: 1\ngroup_size: 4\ngroup-size: 5", "line 3: group_size is there a second time, after line 2"),
        ("\nlr: fast", "line 2: lr must be of type float, got fast"),
        ("lr: true", "line 1: lr must be of type float, got true"),
        ("lr: .nan", "line 1: lr must be of type float, got .nan"),
        ("lr: nan", "line 1: lr must be finite, got nan"),
        ("lr: null", "line 1: lr must be of type float, got null"),
        ("steps: 80.0", "line 1: steps must be of type int, got 80.0"),
        ("steps: '80'", "line 1: steps must be of type int, got '80'"),
        ("steps:", "line 1: steps must be of type int, got nothing"),
        ("steps: [80]", "line 1: steps must be of type int, got a sequence"),
        ("steps: !mine 8", "line 1: steps must be of type int, got 8"),
        ("steps: 0", "line 1: steps must be >= 1, got 0"),
        ("out: 123", "line 1: out must be of type str, got 123; in quotes it is one"),
        ("device: yes", "line 1: device must be of type str, got yes; in quotes it is one"),
        ("out: {a: b}", "line 1: out must be of type str, got a mapping"),
        ("weighting: cov", "line 1: weighting must be one of covariance, none, "),
        ("lr: !!python/object/apply:os.system ['echo']", "line 1: lr must be of type float, got a sequence"),
        ("- lr: 1", "line 1: not options of the form name: value"),
        ("\n\nlr 1", "line 3: not options of the form name: value"),
        ("lr: 1\n\nsteps: [1\n", "line 4: not YAML: while parsing a flow sequence, expected"),
        ("lr: 1\n  steps: 2", "line 2: not YAML: mapping values are not allowed here"),
        ("lr: 1\n\tsteps: 2", "line 2: not YAML: "),
        ("lr: 1\n---\nlr: 2", "line 2: not YAML: expected a single document"),
        ("lr: *x", "line 1: not YAML: found undefined alias"),
        ("lr: 1\nout: \a", "line 2: not YAML: special characters are not allowed"),
        ("lr: 1\nout: \udcff", "line 2: not UTF-8"),
    ],
)
def test_what_is_refused(content: str, message: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line that names the file, the line and the option; nothing is written."""
    pytest.importorskip("transformers")
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert cli.main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"covgrpo: error: {path}, {message}")
    assert error.count("\n") == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_not_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert cli.main(["train", "--config", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_the_command_line_comes_on_top(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    seen: list[TrainConfig] = []
    monkeypatch.setattr(cli, "_run", lambda command, config: bool(seen.append(config)))
    path.write_text("lr: 1e-3\nsteps: 7\nmodel: mine\n")
    for arguments in (["--steps", "9"], ["--steps", "80"], []):
        assert cli.main(["train", *arguments, "--config", str(path)]) == 0
    # Also where it says the default. What neither says has the defaults of a run with a model.
    assert [(c.lr, c.steps, c.model, c.max_new_tokens) for c in seen] == [(1e-3, n, "mine", 512) for n in (9, 80, 7)]
