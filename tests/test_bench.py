"""The benchmark: it runs, writes whole files, and gives a wrong contender no timing."""

import json
import subprocess
import sys

import pytest
import torch

from bench import live_rows, measure, units
from covgrpo_kernels import reference
from covgrpo_kernels.testing import rms, run_logprob
from covgrpo_kernels.tiles.interface import State


def arguments(*words):
    parser = live_rows.argparse.ArgumentParser()
    live_rows.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16", "--grad-tol", "auto")], ids=["float32", "bfloat16"])
def test_runs_and_reports(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live_rows, "SIZE", live_rows.SMOKE)
    monkeypatch.setattr(live_rows, "peak_mib", lambda name, dtype, size: 1.0)
    out = tmp_path / "new" / "report.json"
    live_rows.run(arguments("--repeats", "2", "--out", str(out), *options))
    report = json.loads(out.read_text())
    assert live_rows.markdown(report) == capsys.readouterr().out.strip("\n")
    assert [len(c["backward"]) for c in report["results"]] == [2] * 4
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


def test_command_line():
    subprocess.run([sys.executable, "-m", "bench", "live-rows", "--smoke"], check=True)


@pytest.mark.parametrize("part", ["logprob", "dhidden", "dweight"])
def test_a_wrong_contender_gets_no_timing(part, monkeypatch, capsys):
    """One per mille off in one of its results."""
    if part == "logprob":
        results = State.results
        monkeypatch.setattr(
            State, "results", lambda self: results(self)._replace(logprob=results(self).logprob * 1.001)
        )
    else:
        results = measure.Contender.results

        def off(contender):
            right = results(contender)
            return right if contender.name == "eager" else right | {part: right[part] * 1.001}

        monkeypatch.setattr(measure.Contender, "results", off)
    with pytest.raises(AssertionError, match=part):
        live_rows.run(arguments("--smoke"))
    assert "|" not in capsys.readouterr().out


def test_the_oracle_is_the_reference():
    """A block of rows at a time, with a last block that is not full, is the whole batch in float64."""
    head = live_rows.policy_head(0, **live_rows.SMOKE)
    contender = measure.Contender("ours", measure.eager_logprob, head, torch.float32)
    whole = run_logprob(reference.linear_logprob, **head, dtype=torch.float64)
    for name, value in measure.exact(contender, rows=7).items():
        assert rms(value - whole[name]) <= 64 * torch.finfo(torch.float64).eps * rms(whole[name]), name


@pytest.mark.parametrize("part", ["logprob", "dhidden", "dweight"])
def test_units_refuse_wrong_numbers_of_ours(part, monkeypatch, capsys):
    """One per mille off in ours, on a backend that is found without a GPU; eager and the peers are as they are."""
    monkeypatch.setattr(units, "_trl", None)
    monkeypatch.setattr(units, "_liger", None)
    parser = units.argparse.ArgumentParser()
    units.add_arguments(parser)
    toy = parser.parse_args(["--toy", "--device", "cpu", "--repeats", "1"])
    units.run(toy)
    table = capsys.readouterr().out
    assert "| ours |" in table
    assert "not measured: TRL" in table
    results = measure.Contender.results

    def off(contender):
        right = results(contender)
        return right | {part: right[part] * 1.001} if contender.name == "ours" else right

    monkeypatch.setattr(measure.Contender, "results", off)
    with pytest.raises(AssertionError, match=part):
        units.run(toy)
    assert "|" not in capsys.readouterr().out
