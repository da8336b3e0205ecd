"""The benchmark: it sees what is slow and what is wrong, and writes whole files."""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import test_token_terms
import torch
from torch.overrides import TorchFunctionMode

from bench import (
    against,
    cases,
    checkout_step,
    checkouts,
    compare,
    contenders,
    host,
    measure,
    record,
    report,
    run,
    warm,
)
from bench.contenders import EAGER
from covgrpo_kernels import benchmark, reference, testing
from covgrpo_kernels.benchmark import Eager, Ours, Problem
from covgrpo_kernels.testing import policy_head, rms, run_logprob

CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(not benchmark.can_measure_memory(CPU), reason="peak memory is read from Linux's /proc")


def toy(dtype=torch.float32, **options):
    return Problem.of(policy_head(0, 64, 32, 1100, zero_advantage=0.3), dtype, CPU, **options)


def arguments(*words):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(words)


def measured(*field, problem=None, repeats=1):
    return compare.compare(problem or toy(), field, repeats, memory=lambda contender: False)


# --------------------------------------------------------------------------------------------------- what is slow


class Clock:
    """Seconds pass when a contender says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


class Paced(Eager):
    """Takes the given seconds, one after the other: the first is that of the warm-up."""

    def __init__(self, name, clock, seconds):
        self.name, self.clock, self.seconds = name, clock, iter(seconds)

    def forward(self, hidden, weight, problem):
        self.clock.now += next(self.seconds)
        return super().forward(hidden, weight, problem)


NOISE = [1.0, 0.97, 1.04, 1.0, 1.02, 0.98]  # what a machine adds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, "clock", clock)
    return clock


def test_a_fifth_slower_is_seen(clock):
    """Although it always comes first, and although noise of a few per cent is added."""
    slow = Paced("slow", clock, [1.2 * x for x in NOISE])
    fast = Paced("fast", clock, NOISE[::-1])
    point = measured(slow, fast, repeats=5)
    first, second = compare.lines(point)
    assert (first.name, second.name) == ("fast", "slow")
    assert second.step / first.step == pytest.approx(1.2, rel=0.03)
    assert not [warning for warning in compare.noise(point) if "ranked" in warning]
    [_, shown, _] = report.cells(point)
    assert shown[0] == "slow"


def test_what_noise_hides_is_not_ranked(clock):
    point = measured(Paced("a", clock, [1.02 * x for x in NOISE]), Paced("b", clock, NOISE[::-1]), repeats=5)
    [warning] = [warning for warning in compare.noise(point) if "ranked" in warning]
    assert warning.endswith((": a and b", ": b and a"))


def test_a_noisy_machine_is_said_to_be_one(clock, monkeypatch):
    seconds = iter([1.0, 1.3] * 10)
    mm = torch.mm

    def slow(*operands, **options):
        clock.now += next(seconds)
        return mm(*operands, **options)

    monkeypatch.setattr(torch, "mm", slow)
    assert any("noisy" in warning for warning in compare.noise(measured(EAGER, repeats=3)))


def test_everybody_takes_turns(monkeypatch):
    """And nobody always follows the same neighbour."""
    order = []
    step = compare.step
    monkeypatch.setattr(compare, "step", lambda c, p: order.append(c.name) or step(c, p))
    field = [Ours(), EAGER, contenders.LigerScaledCE()]
    pytest.importorskip("liger_kernel")
    measured(*field, repeats=3)
    turns = [order[i : i + 3] for i in range(1, len(order), 3)]  # the first is the baseline
    assert [sorted(turn) for turn in turns] == [sorted(c.name for c in field)] * 3
    assert len({tuple(turn) for turn in turns}) == 3


# -------------------------------------------------------------------------------------------------- what is wrong


def planted(kind, part):
    """One per mille off in one of its results; of ours or of a peer."""

    class Wrong(kind):
        name = "planted"

        def __init__(self):
            super().__init__()
            self.name = "planted"

        def forward(self, hidden, weight, problem):
            def off(x, name):
                if part == name and x.requires_grad:
                    x = x.clone()  # the hook is on this contender's path alone
                    x.register_hook(lambda grad: grad * 1.001)
                return x

            out = super().forward(off(hidden, "dhidden"), off(weight, "dweight"), problem)
            return out._replace(logprob=out.logprob + 1e-3 * out.logprob.detach()) if part == "logprob" else out

    return Wrong()


@pytest.mark.parametrize("part", ["logprob", "dhidden", "dweight"])
def test_a_fault_of_ours_is_refused(part):
    with pytest.raises(AssertionError, match=part):
        measured(EAGER, planted(Ours, part))


@pytest.mark.parametrize("part", ["logprob", "dhidden", "dweight"])
def test_a_fault_of_a_peer_is_flagged(part):
    point = measured(Ours(), planted(Eager, part))
    assert point["wrong"]["planted"]["why"].startswith(part)
    assert [line.name for line in compare.lines(point)] == ["ours"]


def test_a_refused_run_prints_no_timing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "CONTENDERS", [planted(Ours, "dweight"), EAGER])
    with pytest.raises(AssertionError, match="dweight"):
        run.run(arguments("--smoke", "--cases", "headline", "--dtype", "float32", "--out", str(tmp_path)))
    assert "headline" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class Tires(Eager):
    """Right at first: a step to warm up, one that is looked at closely, and then no more."""

    name = "tires"

    def __init__(self):
        self.steps = 0

    def forward(self, hidden, weight, problem):
        self.steps += 1
        return super().forward(hidden, weight if self.steps < 3 else 1.01 * weight, problem)


def test_a_refused_run_leaves_no_file(monkeypatch, tmp_path):
    """Although what the turns before had measured was kept."""

    class TiresOfOurs(Tires):
        ours = True

    monkeypatch.setattr(run, "CONTENDERS", [TiresOfOurs()])
    kept = []
    write = run.write_json
    monkeypatch.setattr(run, "write_json", lambda path, value: kept.append(path.name) or write(path, value))
    size = ("--size", "64,32,1100", "--device", "cpu", "--dtype", "float32", "--repeats", "3")
    with pytest.raises(AssertionError, match="tires is wrong"):
        run.run(arguments(*size, "--out", str(tmp_path)))
    assert kept == ["cpu_custom_float32.unfinished"]
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_cut_off_leaves_what_it_measured(monkeypatch, tmp_path):
    class CutOff(Tires):
        def forward(self, hidden, weight, problem):
            if self.steps == 3:
                raise KeyboardInterrupt
            return super().forward(hidden, weight, problem)

    monkeypatch.setattr(run, "CONTENDERS", [Ours(), CutOff()])
    size = ("--size", "64,32,1100", "--device", "cpu", "--dtype", "float32", "--repeats", "4")
    with pytest.raises(KeyboardInterrupt):
        run.run(arguments(*size, "--out", str(tmp_path)))
    [file] = tmp_path.iterdir()
    assert file.name == "cpu_custom_float32.unfinished"
    [point] = json.loads(file.read_text())["points"]
    assert len(point["contenders"]["ours"]["forward"]) == 2
    assert compare.lines(point)[0].name in ("ours", "tires")


def test_later_turns_are_checked_too():
    """Their times count as much."""
    point = measured(Ours(), Tires(), repeats=2)
    assert "tires" in point["wrong"]
    assert "tires" not in point["contenders"]


def test_ours_that_fails_is_not_a_line_of_the_table(monkeypatch):
    monkeypatch.setattr(benchmark, "linear_logprob", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        measured(Ours(), EAGER)


def test_rows_without_a_coefficient_have_no_gradient(monkeypatch):
    """However small it is."""
    step = benchmark.step

    def off(contender, problem):
        made = step(contender, problem)
        if contender.ours:
            made.results["dhidden"][problem.logprob_grad == 0] += 1e-30
        return made

    monkeypatch.setattr(compare, "step", off)
    with pytest.raises(AssertionError, match="without a coefficient"):
        measured(Ours())


def test_the_peers_solve_the_same_problem():
    """All that are installed are in class, log-probs of those that only have a loss included."""
    field = [c for c in contenders.CONTENDERS if not c.compiles]
    for options in ({}, dict(frozen=True), dict(softcap=3.0), dict(backward=False)):
        point = measured(*field, problem=toy(**options))
        assert not point["wrong"]
        assert all("logprob" in line.errors for line in compare.lines(point))
        assert {"ours", "ours (exact)", "eager"} <= set(point["contenders"])
        assert set(point["contenders"]) | set(point["missing"]) == {c.name for c in field}
    assert all(line.certificate is None for line in compare.lines(point) if not line.name.startswith("ours"))


def test_the_certificate_stands_beside_the_error():
    by_name = {
        line.name: line for line in compare.lines(measured(*contenders.CONTENDERS[:2], problem=toy(torch.bfloat16)))
    }
    certificate = by_name["ours"].certificate
    assert 0 < certificate["error_bound"] <= torch.finfo(torch.bfloat16).eps / 8
    exact = by_name["ours (exact)"].certificate
    assert exact["error_bound"] == 0
    # What has no coefficient is left out by both, and more by the one that may.
    assert max(certificate["rows"].values()) < max(exact["rows"].values()) == pytest.approx(0.7, abs=0.01)


class Missing(Eager):
    name = "missing"

    def forward(self, hidden, weight, problem):
        import no_such_package  # noqa: F401


class TooLarge(Eager):
    name = "too large"

    def forward(self, hidden, weight, problem):
        if len(weight) > 1100:
            raise MemoryError("of 640 KiB")
        return super().forward(hidden, weight, problem)


def test_what_does_not_run_is_listed_with_the_reason(monkeypatch, capsys):
    problem = Problem.of(policy_head(0, 32, 32, 1200), torch.float32, CPU)
    point = measured(Ours(), Missing(), TooLarge(), contenders.VerlTriton(), problem=problem)
    assert list(point["contenders"]) == ["ours"]
    assert "is not installed" in point["missing"]["missing"]
    assert "640 KiB" in point["missing"]["too large"]
    assert point["missing"]["verl (Triton)"] == "needs a GPU"
    monkeypatch.setattr(run, "CONTENDERS", [Ours(), Missing()])
    run.run(arguments("--smoke", "--cases", "frozen"))
    assert "not measured: missing: is not installed" in capsys.readouterr().out


def test_verl_is_not_imported(monkeypatch):
    """Its package has dependencies of gigabytes. Without the distribution the reason says how to get it."""
    monkeypatch.delitem(sys.modules, "verl", raising=False)  # by another test of this process
    measured(contenders.Verl())
    assert "verl" not in sys.modules
    contenders.verl_module.cache_clear()
    error = contenders.importlib.metadata.PackageNotFoundError
    monkeypatch.setattr(contenders.importlib.metadata, "distribution", lambda name: (_ for _ in ()).throw(error))
    assert "pip install --no-deps verl" in measured(contenders.Verl())["missing"]["verl"]


def test_the_triton_kernels_of_verl_need_no_ray(monkeypatch):
    """They import their other file in the forward and in the backward, and that one asks the package for the device."""
    pytest.importorskip("triton")
    if not has_verl():
        pytest.skip("verl is not installed")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "verl", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda text: contextlib.nullcontext())
    contenders.verl_module.cache_clear()
    contender = contenders.VerlTriton()
    monkeypatch.setattr(contender, "why_not", lambda problem: None)
    called = []

    def forward(hidden, weight, labels, *rest):
        called.append("forward")
        logprob, entropy = benchmark.eager_logprob(hidden, weight, labels, entropy=True)
        return logprob, entropy, hidden, hidden, hidden

    def backward(dlogprobs, dentropy, hidden, weight, *rest):
        called.append("backward")
        return torch.zeros_like(hidden), torch.zeros_like(weight)

    with contender.around():
        module = contenders.verl_module("utils/kernel/kernels")
    monkeypatch.setattr(module, "efficient_entropy_forward", forward)
    monkeypatch.setattr(module, "efficient_entropy_backward", backward)
    benchmark.step(contender, toy())
    contenders.verl_module.cache_clear()
    assert called == ["forward", "backward"]


def has_verl():
    try:
        return contenders.importlib.metadata.distribution("verl") is not None
    except contenders.importlib.metadata.PackageNotFoundError:
        return False


class SaysWhere(TorchFunctionMode):
    """Refuses to make a tensor without being told on which device."""

    FACTORIES = (torch.arange, torch.empty, torch.rand, torch.randint, torch.randn, torch.randperm, torch.zeros)
    made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FACTORIES:
            assert "device" in kwargs, f"{function.__name__} is not told on which device"
            self.made += 1
        return function(*args, **kwargs)


def test_inputs_are_made_where_they_are_used(monkeypatch):
    """Point -> generator of the inputs -> generator of random numbers, whose device everything is made on."""
    given, create = [], torch.Generator
    monkeypatch.setattr(testing.torch, "Generator", lambda device: given.append(device) or create(device))
    [point] = next(case for case in cases.all_cases("cuda", smoke=True) if case.name == "small").points
    with SaysWhere() as mode:
        point.problem(torch.bfloat16, CPU)
    assert given == [CPU]
    assert mode.made > 15


@pytest.mark.parametrize("options", [{}, dict(softcap=3.0, entropy=True)], ids=["plain", "all"])
def test_the_oracle_is_the_reference(options):
    """A block of rows at a time, with a last block that is not full, is the whole batch in float64."""
    head = policy_head(0, 64, 32, 1100)
    head["entropy_grad"] = head["logprob_grad"].flip(0)
    head["targets"][5:9] = -100
    problem = Problem.of(head, torch.float32, CPU, **options)
    inputs = {n: getattr(problem, n) for n in ("hidden", "weight", "targets", "logprob_grad", "entropy_grad")}
    whole = run_logprob(reference.linear_logprob, **inputs, dtype=torch.float64, softcap=problem.softcap)
    for name, value in benchmark.exact(problem, rows=7).items():
        assert rms(value - whole[name]) <= 64 * torch.finfo(torch.float64).eps * rms(whole[name]), name


def test_slow_products_are_said_to_be_slow(monkeypatch):
    """As on a processor that has no instructions for bfloat16, where a step may take a fraction of "the limit"."""
    seconds = {torch.bfloat16: 0.5, torch.float32: 0.1}
    monkeypatch.setattr(benchmark, "product_seconds", lambda problem, dtype: seconds[dtype])
    assert benchmark.slow_products(toy()) is None
    point = measured(EAGER, problem=toy(torch.bfloat16))
    assert any("5.0 times as long as its float32 ones" in warning for warning in compare.noise(point))
    seconds[torch.float32] = 1.0
    point = measured(EAGER, problem=toy(torch.bfloat16))
    assert not any("float32" in warning for warning in compare.noise(point))


def test_products_are_timed_in_the_dtype(clock, monkeypatch):
    mm, cost = torch.mm, {torch.bfloat16: 3.0, torch.float32: 1.0}

    def slow(a, b, **options):
        clock.now += cost[a.dtype]
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", slow)
    assert benchmark.slow_products(toy(torch.bfloat16)) == pytest.approx(3, rel=0.01)


def test_it_says_how_long_it_takes(monkeypatch, tmp_path, capsys):
    """Before anything is measured. Twice the turns take about twice the time."""

    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(run, "_measure", refuse)
    monkeypatch.setattr(run, "timed", lambda function, device: (1e-2, None))
    expected = []
    for turns in ("10", "20"):
        with pytest.raises(AssertionError, match="measured"):
            run.run(arguments("--size", "1024,64,8192", "--dtype", "bfloat16", "--repeats", turns, "--device", "cpu"))
        [said] = re.findall(r"this takes some (\d+) (?:s|minutes)", capsys.readouterr().out)
        expected.append(int(said))
    assert 1.3 < expected[1] / expected[0] < 2


# --------------------------------------------------------------------------------------------------------- memory


class Hungry(Eager):
    name = "hungry"

    def forward(self, hidden, weight, problem):
        if len(hidden) < 64:  # not while warming up
            torch.ones(48 << 18)  # 48 MiB, gone when the step goes on
        return super().forward(hidden, weight, problem)


@needs_proc
def test_memory_that_is_gone_is_seen():
    problem = Problem.of(policy_head(0, 32, 32, 1100), torch.float32, CPU)
    assert benchmark.peak_mib(Hungry(), problem) - benchmark.peak_mib(EAGER, problem) == pytest.approx(48, abs=4)


class Dies(Eager):
    name = "dies"

    def forward(self, hidden, weight, problem):
        sys.exit(3)


@needs_proc
def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="dies failed with exit status 3"):
        benchmark.peak_mib(Dies(), toy())


# ------------------------------------------------------------------------------------------------ the host, compilers


@pytest.fixture(scope="module")
def of_host(tmp_path_factory):
    """The command at toy size with the chunked engine, against this checkout as it is."""
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("host") / "host.json"
    here = str(Path(__file__).parent.parent)
    words = ["--toy", "--turns", "1", "--repeats", "2", "--against", here, "--engine", "chunked", "--out", str(file)]
    parser = argparse.ArgumentParser()
    host.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        host.run(parser.parse_args(words))
    return output.getvalue(), json.loads(file.read_text())


def test_the_host_is_measured(of_host):
    output, made = of_host
    assert {"now", "before"} < set(made)
    assert set(made["now"]["steps"]) == {
        "linear_logprob", "linear_logprob, exact", "covgrpo_loss", "covgrpo_loss, metrics"
    }  # fmt: skip
    for step in made["now"]["steps"].values():
        for part in ("forward", "backward"):
            assert 0 < step[part]["seconds"] < 1
            assert step[part]["kernels"] > 0
            assert step[part]["operators"] > 0
    # Metrics are operators on what is there.
    loss, with_metrics = (made["now"]["steps"][name]["forward"] for name in ("covgrpo_loss", "covgrpo_loss, metrics"))
    assert with_metrics["operators"] > loss["operators"] + 5
    # The other engine is what a GPU would get.
    chunked, fused = (made[name]["steps"]["linear_logprob"] for name in ("now", "before"))
    assert fused["forward"]["waits"] == 0
    for part in ("forward", "backward"):
        launches = [engine[part]["operators"] + engine[part]["kernels"] for engine in (chunked, fused)]
        assert launches[0] > 3 * launches[1]
    assert "covgrpo_loss, metrics, before" in output
    assert len(host.rows(made)) == 8


def test_two_checkouts_take_turns(tmp_path, monkeypatch, capsys):
    """Steps are timed in each, and shown with their ratio in each turn."""
    here, file = str(Path(__file__).parent.parent), tmp_path / "against.json"
    words = ["--size", "48,16,1100", "--turns", "1", "--repeats", "2", "--dtype", "float32", "--device", "cpu"]
    parser = argparse.ArgumentParser()
    against.add_arguments(parser)
    in_turns = checkouts.in_turns

    def slower_in_a_second_turn(*arguments):  # which would be two processes more
        turns = in_turns(*arguments)
        for name, factor in (("now", 3), ("before", 2)):
            turns[name].append({step: [factor * x for x in seconds] for step, seconds in turns[name][0].items()})
        return turns

    monkeypatch.setattr(checkouts, "in_turns", slower_in_a_second_turn)
    against.run(parser.parse_args([here, *words, "--out", str(file)]))
    output, made = capsys.readouterr().out, json.loads(file.read_text())
    for name in ("now", "before"):
        for turn in made[name]["turns"]:
            assert {step: len(seconds) for step, seconds in turn.items()} == {
                "float32, default": 2, "float32, exact": 2
            }  # fmt: skip
    assert len(made["now"]["turns"]) == 2
    a, b = ([statistics.median(turn["float32, exact"]) for turn in made[n]["turns"]] for n in ("now", "before"))
    assert ", ".join(f"{x / y:.3f}" for x, y in zip(a, b, strict=True)) in output


def test_who_comes_first_changes(monkeypatch):
    order = []

    def run(command, cwd, **options):
        order.append(cwd.name)
        return subprocess.CompletedProcess(command, 0, stdout="of a library\n1\n", stderr="")

    monkeypatch.setattr(checkouts.subprocess, "run", run)
    words = {"now": ["time"], "before": ["time"]}
    assert checkouts.in_turns({"now": Path("a"), "before": Path("b")}, 3, words) == dict(now=[1] * 3, before=[1] * 3)
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="must be a checkout"):
        checkouts.named(tmp_path)
    (tmp_path / "covgrpo_kernels").mkdir()
    (tmp_path / "covgrpo_kernels" / "__init__.py").write_text("raise ImportError('too old')")
    with pytest.raises(SystemExit, match="too old"):
        checkouts.in_turns({"before": tmp_path}, 1, {"before": ["time", "inputs.pt", "1", "float32"]})


def test_launches_and_waits_are_counted():
    """Operators inside of others, views, allocations, and reads in every form."""
    x = torch.arange(6.0)

    def of(function):
        return checkout_step.count(function, checkout_step.Launches([]))

    assert of(lambda: x.exp().add_(1)) == dict(operators=2, kernels=0, waits=0)
    assert of(lambda: x.view(2, 3).t()[0].unsqueeze(0)) == dict(operators=0, kernels=0, waits=0)
    assert of(lambda: torch.empty(3).expand(2, 3)) == dict(operators=0, kernels=0, waits=0)
    assert of(lambda: torch.promote_types(torch.bfloat16, torch.float32)) == dict(operators=0, kernels=0, waits=0)
    assert of(lambda: torch.nn.functional.silu(x).sum())["operators"] == 2
    for read in (
        lambda: x[0].item(), lambda: bool(x[0] > 1), lambda: x.tolist(), lambda: x.bool().nonzero(), lambda: x.unique(),
        lambda: x[x > 2], lambda: torch.equal(x, x + 1), lambda: torch.unique_consecutive(x),
    ):  # fmt: skip
        assert of(read)["waits"] == 1, read


def test_launches_are_replaced_by_what_they_left():
    """A replayed step gives the same bits, and takes none of the time of the launch."""
    a, b = torch.randn(2, 64, 64)
    launches, out = checkout_step.Launches([a, b]), []
    with checkout_step.replaced(launches):
        for recording in (True, False):
            launches.start(recording)
            out.append((torch.mm(a, b), torch.addmm(a, a, b, beta=0.5)))
        a.zero_()  # not looked at any more
        launches.start(False)
        out.append((torch.mm(a, b), torch.addmm(a, a, b, beta=0.5)))
        launches.start(False)
        with pytest.raises(RuntimeError, match="was mm and is addmm now"):
            torch.addmm(a, a, b)
    assert all(torch.equal(x, y) for later in out[1:] for x, y in zip(out[0], later, strict=True))
    assert torch.equal(torch.mm(a, b), torch.zeros(64, 64))  # products are products again


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter runs")
def test_what_a_launch_left_in_a_tuple_of_tensors_is_replayed():
    kernels = pytest.importorskip("covgrpo_kernels.kernels.triton")
    inputs = test_token_terms.draw(40, torch.float32, optional=False)
    options = test_token_terms.TermOptions(**test_token_terms.PLAIN)
    launches, out = checkout_step.Launches([x for x in inputs if x is not None]), []
    with checkout_step.replaced(launches):
        for recording in (True, False):
            launches.start(recording)
            out.append(kernels.token_terms(inputs, options))
    assert out[0].logprob_grad.any()
    assert all(torch.equal(x, y) for x, y in zip(*out, strict=True))


def test_what_only_a_cpu_does_is_replaced():
    """Casts of 16-bit matrices to float32, which products need there, and no others."""
    matrix = torch.randn(8, 4).bfloat16()
    launches = checkout_step.Launches([matrix])
    with checkout_step.replaced(launches):
        launches.start(recording=True)
        first = matrix.t().to(torch.float32)
        others = [matrix[0].to(torch.float32), matrix.to(torch.float64), matrix.float().to(torch.bfloat16)]
        assert [name for name, _ in launches.recorded] == ["to"]
        launches.start(recording=False)
        assert torch.equal(matrix.t().to(torch.float32), first)
    assert torch.equal(first, matrix.t().float())
    assert [x.dtype for x in others] == [torch.float32, torch.float64, torch.bfloat16]


def test_after_an_error_products_are_products_again():
    """Although the error keeps alive what had replaced them."""
    launches = checkout_step.Launches([])
    with pytest.raises(KeyError) as error, checkout_step.replaced(launches):
        raise KeyError
    torch.mm(torch.eye(2), torch.eye(2))
    torch.eye(2).bfloat16().to(torch.float32)
    assert not launches.recorded, error


def test_only_the_host_is_timed(clock, monkeypatch):
    """What stands for the device's work takes 100 seconds here, and the host one before and two after it. Reading the
    time takes ten."""

    def slow_clock():
        clock.now += 10
        return clock()

    monkeypatch.setattr(checkout_step.time, "thread_time", slow_clock)
    get_bytes = checkout_step._bytes

    def slow(x):
        clock.now += 100
        return get_bytes(x)

    monkeypatch.setattr(checkout_step, "_bytes", slow)
    launches = checkout_step.Launches([])

    class Step:
        def forward(self):
            clock.now += 1
            launches("kernel", [torch.zeros(3)], lambda: None)
            clock.now += 2

        def backward(self):
            clock.now += 5

    made = checkout_step.measure(Step(), launches, 3)
    assert made["forward"]["seconds"] == pytest.approx(3, abs=1e-3)
    assert made["backward"]["seconds"] == pytest.approx(5, abs=1e-3)


def test_compilation_is_no_comparison(capsys):
    """A contender that can't run is a line, not an error; what compiles for every shape is left out."""
    parser = argparse.ArgumentParser()
    warm.add_arguments(parser)
    words = ["--toy", "--device", "cpu", "--workers", "1", "--cases", "frozen"]
    warm.run(parser.parse_args([*words, "--contenders", "ours,verl (Triton),eager (compiled)"]))
    said = sorted(capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"frozen, ours: [\d.]+ s", said[0])
    assert said[1:] == ["frozen, verl (Triton): needs a GPU"]


def test_what_is_compiled_is_what_a_case_needs(monkeypatch):
    """Its hidden size and its options; of tokens and vocabulary fewer will do."""
    problems = []
    monkeypatch.setattr(warm, "step", lambda contender, problem: problems.append(problem))
    [ours] = [i for i, c in enumerate(contenders.CONTENDERS) if c.name == "ours"]
    for name in ("shallow", "frozen"):
        warm.compile_one(ours, name, "cpu", toy=False)
    shallow, frozen = problems
    assert shallow.hidden.shape == (warm.TOKENS, cases.SHALLOW["cpu"][1])
    assert shallow.weight.shape[0] == warm.VOCAB
    assert (shallow.frozen, frozen.frozen) == (False, True)


def test_what_fails_to_compile_is_said(monkeypatch):
    def fails(contender, problem):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(warm, "step", fails)
    [ours] = [i for i, c in enumerate(contenders.CONTENDERS) if c.name == "ours"]
    assert warm.compile_one(ours, "small", "cpu", toy=True) == "RuntimeError: no compiler"


# -------------------------------------------------------------------------------------------- files and documents


def test_command_line():
    command = [sys.executable, "-m", "bench", "--smoke", "--cases", "forward,hard", "--contenders", "ours,eager"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(name in output for name in ("forward", "uniform logits", "extreme logits"))


def test_what_does_not_fit_is_left_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "free_bytes", lambda device: 1 << 20)
    run.run(arguments("--smoke", "--cases", "frozen", "--contenders", "ours", "--out", str(tmp_path)))
    assert "left out, since it needs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_refused():
    for words, known in (("--cases", "headline"), ("--contenders", "eager")):
        with pytest.raises(SystemExit, match=r"unknown .*nonsense"):
            run.run(arguments("--smoke", words, f"{known},nonsense"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder of results at toy sizes."""
    folder = tmp_path_factory.mktemp("results")
    cases = "headline,entropy,growth-tokens,growth-vocab"
    run.run(
        arguments("--smoke", "--cases", cases, "--contenders", "ours,ours (exact),eager,verl", "--out", str(folder))
    )
    return folder


def test_results_are_whole_files(results):
    names = {path.name for path in results.iterdir() if path.suffix != ".png"}
    assert {"cpu_headline_bfloat16.json", "cpu_headline_float32.json", "cpu_entropy_bfloat16.json"} <= names
    assert all(name.endswith(".json") for name in names)
    made = json.loads((results / "cpu_headline_float32.json").read_text())
    assert {"cpu", "threads", "torch", "commit", "peers"} <= set(made["environment"])
    [point] = made["points"]
    assert all(len(x[part]) == 1 for x in point["contenders"].values() for part in ("forward", "backward"))
    assert {"max", "rms", "relative", "of_eager"} == set(point["contenders"]["ours"]["errors"]["dweight"])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "report.json"
    measure.write_json(path, dict(a=1))
    with pytest.raises(TypeError):
        measure.write_json(path, dict(a=object()))
    assert json.loads(path.read_text()) == dict(a=1)
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_report_says_the_same_twice(results):
    reports = report.read(results)
    plots = {path.name for path in report.plot(reports, results)}
    assert plots == {"cpu_pareto.png", "cpu_limit.png", "cpu_growth.png"}
    text = f"# Before\n\n{report.BEGIN}\nold figures\n{report.END}\n\nAfter.\n"
    for figures in report.documents(results).values():
        once = report.updated(text, figures)
        assert report.updated(once, figures) == once
        assert once.startswith("# Before")
        assert once.endswith("After.\n")
        assert "old figures" not in once
        shown = set(Path(name).name for name in re.findall(r"\]\(([^)]+\.png)\)", once))
        assert shown
        assert shown <= plots


def test_figures_are_those_of_the_file(results):
    made = json.loads((results / "cpu_headline_bfloat16.json").read_text())
    [x] = [
        (a + b)
        for a, b in zip(*(made["points"][0]["contenders"]["ours"][p] for p in ("forward", "backward")), strict=True)
    ]
    for figures in report.documents(results).values():
        [row, *_] = [line for line in figures.splitlines() if line.startswith("| ours |")]
        assert report.seconds(x) in row


def test_the_table_of_policies_has_both_dtypes_and_the_recordings():
    """Of the committed results: what each policy is fitted to stands below it, as far as it was recorded."""
    headlines = [x for x in report.read(report.RESULTS) if (x["case"], x["device"]) == ("headline", "cpu")]
    table = report.policies(headlines)[-1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == [
        "bfloat16, sure policy", "bfloat16, recorded-0.6 policy", "*SmolLM2 at 0.6*", "bfloat16, recorded-1.0 policy",
        "*SmolLM2 at 1.0*", *(f"float32, {name} policy" for name in testing.POLICIES),
    ]  # fmt: skip
    recorded = json.loads(report.RECORDINGS.read_text())["inputs"]
    for row in rows:
        if row[0].startswith("*"):
            assert row[1] == f"{recorded[row[0].strip('*').lower()]['entropy']['mean']:.2f}"
        else:
            assert all(row)
    assert report.policies([x | dict(points=x["points"][:1]) for x in headlines]) == []


def test_without_results_the_documents_say_so(tmp_path):
    assert set(report.documents(tmp_path).values()) == {report.NOTHING}


# ------------------------------------------------------------------------------------------------------ recordings


PROBLEMS = [{"prompt": "1+1="}, {"prompt": "Why?"}, {"prompt": "2+2=", "answer": "4"}]


@pytest.fixture
def policy():
    pytest.importorskip("transformers")
    from covgrpo_kernels.grpo.policy import new_policy

    return new_policy(64, 1, 0, CPU)


def test_a_recording_is_replayed(policy, tmp_path, capsys):
    """Of a model that is saved and loaded as a user's would be; log-probs are those of its own logits."""
    policy.save(tmp_path / "model")
    file = tmp_path / "recorded.pt"
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(dict(prompt=f"{i}?")) + "\n" for i in range(9)))
    words = ["--data", str(data), "--prompts", "6"]
    words += ["--group-size", "4", "--max-new-tokens", "6", "--device", "cpu", "--temperature", "0.7"]
    parser = argparse.ArgumentParser()
    record.add_arguments(parser)
    record.run(parser.parse_args(["--model", str(tmp_path / "model"), "--out", str(file), *words]))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    head = record.load(file)
    assert head["hidden"].shape[0] == head["targets"].shape[0] == head["logprob_grad"].shape[0]
    valid = head["targets"] != -100
    assert not head["logprob_grad"][~valid].any()
    assert head["logprob_grad"][valid].any()
    out = tmp_path / "results"
    run.run(arguments("--inputs", str(file), "--contenders", "ours,eager", "--repeats", "1", "--out", str(out)))
    assert "replay" in capsys.readouterr().out
    [made] = [json.loads(path.read_text()) for path in out.iterdir()]
    [point] = made["points"]
    assert point["size"] == dict(tokens=len(valid), depth=64, vocab=len(head["weight"]))
    assert made["what"] == file.name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_recording_holds_what_the_model_saw(policy, monkeypatch, temperature):
    """The log-probs that follow from it are those of the model's own logits at the temperature, on what it sampled."""
    policy.eos_ids = torch.arange(60)  # responses of different lengths, and padding
    sampled = []
    sample = record._sample
    monkeypatch.setattr(record, "_sample", lambda *a: sampled.append(sample(*a)) or sampled[-1])
    recording = record.record(policy, PROBLEMS, group_size=4, max_new_tokens=5, temperature=temperature)
    [(tokens, attention, mask)] = sampled
    logits = policy.forward(tokens, attention).logits[:, -mask.shape[1] - 1 : -1] / temperature
    responses = tokens[:, -mask.shape[1] :]
    wanted = logits.log_softmax(-1).gather(2, responses.unsqueeze(2)).squeeze(2).where(mask, 0).flatten()
    problem = Problem.of(recording, torch.float32, CPU)
    x = benchmark.step(EAGER, dataclasses.replace(problem, backward=False)).results["logprob"].where(mask.flatten(), 0)
    for ours in (x, recording["old_logprobs"]):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    # The end of a sequence is a target, and nothing after it.
    ended = torch.isin(responses, policy.eos_ids)
    assert ended.where(mask, False).sum(1).equal(ended.any(1).long())
    ignored = problem.targets == -100
    assert ignored.any()
    assert not problem.logprob_grad[ignored].any()
    assert not recording["logprob_grad"][ignored].any()


def test_a_recording_without_coefficients_is_refused(policy):
    with pytest.raises(ValueError, match="equal rewards"):
        record.record(policy, [{"prompt": "2+2=", "answer": "no such word"}], group_size=4, max_new_tokens=5)


def test_rewards_of_recordings():
    """An answer counts as a word; made-up rewards differ in 3 of 5 groups of four."""
    texts = ["it is 42.", "142", "42", "4 2"]
    assert record._rewards(dict(prompt="", answer="42"), texts, random.Random(0)) == [1, 0, 1, 0]
    rng = random.Random(0)
    groups = [record._rewards(dict(prompt=""), [""] * 4, rng) for _ in range(500)]
    assert 0.5 < sum(len(set(group)) == 2 for group in groups) / len(groups) < 0.7


def test_prompts_are_read_or_refused(tmp_path):
    assert len(record.read_problems(record.PROMPTS)) == 100
    bad = tmp_path / "problems.jsonl"
    for line in ("[1]", '{"answer": "1"}', '{"prompt": 3}'):
        bad.write_text('{"prompt": "fine"}\n' + line)
        with pytest.raises(ValueError, match="line 2"):
            record.read_problems(bad)
