"""The `covgrpo` command: what it imports, what it says, how it ends."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import covgrpo_kernels
from covgrpo_kernels import cli
from covgrpo_kernels.grpo.config import TrainConfig

SMALL = [
    *("--hidden-size", "64", "--layers", "1", "--max-new-tokens", "4"),
    *("--prompts-per-step", "2", "--group-size", "4", "--eval-problems", "4"),
    *("--warm-start-steps", "2", "--checkpoint-every", "2"),
]
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in cli.NEEDED), reason="needs the extra grpo"
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "covgrpo_kernels", *arguments]


def test_help_is_light() -> None:
    """No torch, which takes seconds, and no other library."""
    code = (
        "import sys; from covgrpo_kernels.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--lr FLOAT" in result.stdout
    assert "(default: 0.00015; with --model 1e-06)" in " ".join(result.stdout.split())


def test_the_package_imports_torch_and_no_more() -> None:
    """Every public name: its own modules and the standard library beside what `import torch` has imported, so no
    compiler, no transformers, no triton. It takes a tenth of a second."""
    code = (
        "import sys, torch\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "compilers = {name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules}\n"
        "from covgrpo_kernels import *\n"
        "more = {name.split('.')[0] for name in sys.modules} - before - sys.stdlib_module_names\n"
        "assert more == {'covgrpo_kernels'}, more\n"
        "assert compilers == {name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    code = "import sys, covgrpo_kernels; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_commands_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "demo", "doctor"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        sys.exit(cli.main(["--version"]))
    assert capsys.readouterr().out == f"covgrpo-kernels {covgrpo_kernels.__version__}\n"


def test_every_option_of_a_run_is_an_option_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "1"], "group_size must be >= 2, got 1"),
        (["--lr", "0"], "lr must be > 0"),
        (["--inner-steps", "33"], "inner_steps must be at most prompts_per_step (32)"),
        (["--grad-tol", "2"], "grad_tol must be"),
    ],
)
@needs_extra
def test_wrong_values(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--weighting", "cov"], ["--steps", "many"], ["--stepz", "3"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *arguments])
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "demo"])
def test_missing_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "matplotlib" else real(n))
    assert cli.main([name, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "needs matplotlib" in error
    assert "pip install '.[grpo]' in a checkout, or pip install 'PATH.whl[grpo]' with a wheel" in error
    assert not (tmp_path / "out").exists()


@needs_extra
def test_defaults_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a model are others, as the help says."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(cli, "_run", lambda command, config: bool(seen.append(config)))
    for arguments in ([], ["--model", "folder"], ["--model", "folder", "--lr", "0.1"]):
        assert cli.main(["train", *arguments]) == 0
    assert cli.main(["demo"]) == 0
    assert [(config.lr, config.max_new_tokens) for config in seen] == [
        (1.5e-4, 8),
        (1e-6, 512),
        (0.1, 512),
        (1.5e-4, 8),
    ]


@needs_extra
def test_train_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", "--out", str(out), *SMALL, "--steps", "2"]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("covgrpo_run.json", "warm_start", "metrics.jsonl", "model", "report.png")
    }
    assert cli.main(["train", "--out", str(out), *SMALL, "--steps", "3"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    shown = capsys.readouterr().out
    accuracies = f"{rows[0]['eval/accuracy']:.1%} solved at the start, {rows[-1]['eval/accuracy']:.1%} after 3 steps."
    assert f"Of 4 held-out problems {accuracies}" in shown
    assert f"{out}: model/ with its tokenizer, metrics.jsonl, report.png" in shown
    assert "finished" not in shown
    assert "CW-GRPO 3/3  reward 0.000  nothing to learn  " in shown  # of a policy that knows nothing
    assert "Nothing was learnt: all responses to a problem were always equally good.\n0% of them were right; " in shown
    assert max(map(len, shown.replace(str(out), "OUT").splitlines())) < 80
    assert max(len(line) for line in shown.splitlines() if " left" in line) < 80
    assert cli.main(["train", "--out", str(out), *SMALL, "--steps", "3"]) == 0
    assert f"{out} holds a finished run of 3 steps; with more --steps it goes on." in capsys.readouterr().out
    assert cli.main(["train", "--out", str(out), *SMALL, "--steps", "3", "--lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--lr" in error
    assert "another --out" in error


@needs_extra
def test_unusable_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    for arguments, message in (
        (["--data", str(tmp_path / "rows.jsonl")], "line 2: not JSON of the form"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--model", str(tmp_path / "empty")], "empty cannot be used"),
        (["--device", "abacus"], "device abacus"),
    ):
        assert cli.main(["train", *out, *SMALL, *arguments]) == 2
        assert message in capsys.readouterr().err
    # None of these made a run of the folder, whose options the next command would have to repeat.
    assert cli.main(["train", *out, *SMALL, "--steps", "1"]) == 0


@needs_extra
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both runs start from the same warm start and see the same problems; a finished demo is shown again."""
    out = tmp_path / "demo"
    options = vars(cli._parser().parse_args(["train", *SMALL]))
    options.pop("command")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # other tests want theirs
    monkeypatch.setattr(cli, "DEMO", dataclasses.replace(cli.DEMO, **options))
    arguments = ["demo", "--out", str(out), "--steps", "2"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "CW-GRPO" in shown
    assert "report.png" in shown
    assert (out / "report.png").stat().st_size > 10_000
    runs = [(out / name / "metrics.jsonl").read_text() for name in ("grpo", "cw-grpo")]
    first = [json.loads(run.splitlines()[1]) for run in runs]
    for name in ("reward/mean", "response/tokens", "entropy"):
        assert first[0][name] == first[1][name]
    assert json.loads((out / "grpo" / "covgrpo_run.json").read_text())["weighting"] == "none"
    assert cli.main(arguments) == 0
    assert "CW-GRPO" in capsys.readouterr().out
    assert [(out / name / "metrics.jsonl").read_text() for name in ("grpo", "cw-grpo")] == runs


@needs_extra
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt(tmp_path: Path) -> None:
    """As a user does it."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("train", "--out", str(out), *SMALL, "--steps", "5000"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # even where tests ignore it
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out / "model").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; the same command goes on from the last checkpoint in {out}" in error
    assert "Traceback" not in error


@needs_extra
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("encode_solutions", "begins again: there is no checkpoint yet"),  # in the warm start
        ("grpo_step", "goes on after the warm start, which is in"),
        ("conclude", "goes on from the last checkpoint in"),
    ],
)
def test_what_is_left(
    function: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command promises what is true."""
    from covgrpo_kernels.grpo import train

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, function, interrupted)
    assert cli.main(["train", "--out", str(tmp_path / "run"), *SMALL, "--steps", "1"]) == 130
    assert f"interrupted; the same command {message}" in capsys.readouterr().err


def test_doctor_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = pytest.importorskip("covgrpo_kernels.doctor")
    monkeypatch.setattr(doctor, "main", lambda as_json: 8 if as_json else 7)
    assert cli.main(["doctor"]) == 7
    assert cli.main(["doctor", "--json"]) == 8
