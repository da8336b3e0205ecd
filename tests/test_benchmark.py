"""`covgrpo bench` and the benchmark of `covgrpo doctor`: what is measured, what is left out, what is said of it."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from covgrpo_kernels import benchmark, cli, doctor
from covgrpo_kernels.benchmark import EAGER, OURS, Comparison, Measured, Outputs
from covgrpo_kernels.grpo.config import usable_dtype

CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(not benchmark.can_measure_memory(CPU), reason="peak memory is read from Linux's /proc")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a process."""
    monkeypatch.setattr(benchmark, "can_measure_memory", lambda device: False)


def compare(tokens: int = 96, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    return benchmark.compare(tokens, 32, 3000, dtype, CPU, total=0.0)


@needs_proc
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of 80 columns, with every figure."""
    monkeypatch.setattr(benchmark, "TOTAL", 0.0)
    assert cli.main(["bench", "300", "16", "5000", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("300 tokens, hidden size 16, vocabulary 5000, float32\n")
    assert max(map(len, shown.splitlines()[2:])) <= 80
    header, ours, eager = (re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()[3:6])
    assert header == ["forward", "backward", "together", "memory", "log-prob error", "gradient error"]
    for row, name in ((ours, "ours"), (eager, "eager")):
        assert row[0] == name
        assert [re.sub(r"[\d.]+(e-\d\d)?( m?s)?", "0", cell) for cell in row[1:]] == ["0", "0", "0", "0 MiB", "0", "0"]
    assert re.search(r"^Ours takes [\d.e-]+ of eager PyTorch's time and [\d.e-]+ of its memory\.$", shown, re.M)
    assert "Medians of " in shown


@pytest.mark.usefixtures("no_memory")
def test_errors_are_those_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted in a contender is what is found; and ours are better than eager's in bfloat16."""
    found = compare().measured
    ours, eager = found["ours"], found["eager"]
    assert ours.logprob_error is not None
    assert eager.logprob_error is not None
    assert 0 < ours.logprob_error < 0.1 * eager.logprob_error
    assert ours.dhidden_error is not None
    assert eager.dhidden_error is not None
    assert 0 < ours.dhidden_error < 3 * eager.dhidden_error < 0.1
    forward = benchmark.Ours.forward

    def off(self: benchmark.Ours, *arguments: torch.Tensor) -> Outputs:
        out = forward(self, *arguments)
        return Outputs(out.logprob * 1.5 + 3)

    monkeypatch.setattr(benchmark.Ours, "forward", off)
    planted = compare(dtype=torch.float32).measured["ours"]
    assert planted.dhidden_error == pytest.approx(0.5, rel=1e-3)
    assert planted.logprob_error > 1


@pytest.mark.usefixtures("no_memory")
def test_a_part_of_the_size_where_all_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """First of the vocabulary, then of the tokens, so that a turn of both takes as long as it may."""
    a_logit = 1e-6
    monkeypatch.setattr(benchmark, "product_seconds", lambda problem, dtype: a_logit * 256 * 4096)
    monkeypatch.setattr(benchmark, "LEAST_VOCAB", 1000)
    made = compare(1000, torch.float32)
    assert (made.tokens, made.vocab, made.remarks) == (1000, 3000, [])
    a_logit = 2e-6
    made = compare(1000, torch.float32)
    assert (made.tokens, made.vocab) == (1000, int(benchmark.TURN / (3 * a_logit * 1000)))
    [remark] = made.remarks
    assert "takes eager PyTorch some 12 s here: measured are 1000 tokens and 1666 entries" in remark
    a_logit = 1e-5
    made = compare(1000, torch.float32)
    assert (made.tokens, made.vocab) == (int(benchmark.TURN / (3 * a_logit * 1000)), 1000)
    assert "With few tokens" in made.remarks[1]
    a_logit = 1.0
    made = compare(1000, torch.float32)
    assert (made.tokens, made.vocab) == (benchmark.LEAST_TOKENS, 1000)


@pytest.mark.usefixtures("no_memory")
def test_eager_is_left_out_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 12 * 96 * 3000
    inputs = (3000 + 4 * 96) * 32 * (8 + 2 * 2)
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: needed + 2 * inputs - 1)
    monkeypatch.setattr(benchmark, "CHECKED", 4)
    made = compare()
    assert list(made.measured) == ["ours"]
    assert re.fullmatch(
        r"Eager PyTorch would need 0.0 GiB for 96 tokens, and 0.0 GiB are free: it is left out\.", made.remarks[0]
    )
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: needed + 2 * inputs)
    assert list(compare().measured) == ["ours", "eager"]
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 1 << 30)
    assert cli.main(["bench", "8", "4096", "1000000"]) == 2
    assert re.search(
        r"error: inputs and gradients need \d+\.\d GiB, of which 1\.0 GiB are free", capsys.readouterr().err
    )


@needs_proc
def test_eager_needs_what_is_predicted() -> None:
    """Where the logits are what is large. Pages of zeros that are never written cost nothing on a CPU."""
    problem = benchmark.policy_problem(512, 8, 32768, torch.float32, CPU)
    predicted = benchmark.eager_bytes(512, 32768) / 2**20
    assert 0.6 * predicted < benchmark.peak_mib(EAGER, problem) < 1.05 * predicted
    assert benchmark.peak_mib(OURS, problem) < 0.3 * predicted


@pytest.mark.usefixtures("no_memory")
def test_slow_products_are_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: 5e-3, torch.float32: 1e-3}
    monkeypatch.setattr(benchmark, "product_seconds", lambda problem, dtype: seconds[dtype])
    [remark] = compare().remarks
    assert remark.startswith("This processor is 5.0 times as fast in float32")


@pytest.mark.parametrize(("there", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_is_one_that_the_processor_has(
    there: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True} if there else {})
    assert usable_dtype("auto", CPU) == dtype
    assert usable_dtype("float16", CPU) == torch.float16


def test_the_tokens_are_repeated_and_have_coefficients() -> None:
    problem = benchmark.policy_problem(300, 16, 500, torch.bfloat16, CPU)
    assert problem.size == dict(tokens=300, depth=16, vocab=500)
    assert torch.equal(problem.hidden[:128], problem.hidden[128:256])
    assert len(problem.hidden[:128].unique(dim=0)) == 128
    assert 0.3 < (problem.logprob_grad != 0).float().mean() < 0.8
    assert problem.hidden.dtype == problem.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 2)])
@pytest.mark.usefixtures("no_memory")
def test_any_size(size: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *map(str, size)]) == 0
    assert re.search(r"^eager ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("arguments", ["", "1 2", "0 1 1", "x 1 1", "-- -1 1 1", "1 1 1 --dtype int8"])
def test_wrong_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *arguments.split()])
    assert "covgrpo bench: error: " in capsys.readouterr().err


# --- covgrpo doctor ----------------------------------------------------------------------------------------


def test_doctor_says_how_much_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, here played by the CPU; without one it names the command."""
    [(name, command)] = doctor.beside_eager([])
    assert (name, "covgrpo bench N D V" in command) == ("at your size", True)
    measured = {"ours": Measured(1e-3, 2e-3, 10.0, 1e-6, 1e-3), "eager": Measured(2e-3, 4e-3, 1000.0, 1e-3, 1e-2)}
    given = []

    def compare(*arguments: object) -> Comparison:
        given.append(arguments)
        return Comparison(2048, 128256, 9, measured, ["It was hot."])

    monkeypatch.setattr(benchmark, "compare", compare)
    rows = dict(doctor.beside_eager([CPU]))
    assert given == [(*doctor.SIZE, usable_dtype("auto", CPU), CPU, 2.0)]
    assert rows["ours"] == (
        "forward 1 ms, backward 2 ms, together 3 ms, memory 10 MiB, log-prob error 1.0e-06, gradient error 1.0e-03"
    )
    assert "together 6 ms, memory 1000 MiB" in rows["eager"]
    assert rows["in short"] == "Ours takes 0.5 of eager PyTorch's time and 0.01 of its memory. It was hot."


def test_a_benchmark_that_fails_is_no_end_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("another process has it all")

    monkeypatch.setattr(benchmark, "compare", fail)
    assert dict(doctor.beside_eager([CPU]))["failed"] == "OutOfMemoryError: another process has it all"


def test_it_is_a_function_of_what_it_is_given() -> None:
    """The problem is the same one each time."""
    a, b = (benchmark.policy_problem(8, 4, 30, torch.float32, CPU) for _ in range(2))
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
