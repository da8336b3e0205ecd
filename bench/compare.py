"""Every contender on the same problem, in turns: numbers first, and no timing where they are wrong."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from covgrpo_kernels.testing import Results, check_draw, rms

from .contenders import EAGER, Contender, certificates
from .measure import Bare, Problem, can_measure_memory, errors, exact, peak_mib, rounding, step, warm

# A peer's error may be this many times eager's; beyond that, and beyond what rounding explains, it is wrong.
PEER_CLASS = 4
# Spread of the bare product, as a share of its median, from which on a machine is noisy.
STEADY = 0.1


def compare(
    problem: Problem,
    contenders: Sequence[Contender],
    repeats: int,
    *,
    memory: Callable[[Contender], bool] = lambda contender: True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Raises AssertionError, naming the quantity, where ours is wrong: then there is no report at all. A peer that is
    wrong, and what does not run, is listed with the reason and has no timing."""
    torch._dynamo.reset()  # or it stops compiling after a few shapes
    say("exact results in float64")
    truth = exact(problem)
    baseline = step(EAGER, problem).results
    eager = {name: rms(x.double() - truth[name]) for name, x in baseline.items()}
    limits = _peer_limits(problem, truth, eager)
    valid = (problem.targets >= 0).sum().item()
    report: dict[str, Any] = dict(
        size=problem.size,
        mean_entropy=truth["entropy"].sum().item() / max(valid, 1),
        coefficients=(problem.logprob_grad != 0).double().mean().item(),  # share of the rows that have one
        contenders={}, wrong={}, missing={},
    )  # fmt: skip
    running: list[Contender] = []
    for contender in contenders:
        say(f"warming up {contender.name}")
        try:
            reason = contender.why_not(problem)
            if reason is None:
                warm(contender, problem)
                running.append(contender)
        except Exception as error:  # whatever keeps a peer from running is its line in the report
            reason = _reason(error)
        if reason is not None:
            report["missing"][contender.name] = reason
    bare = Bare(problem)
    for turn in range(repeats):
        bare.step()
        # So that nobody always follows the same neighbour.
        first = turn % max(len(running), 1)
        for contender in [*running[first:], *running[:first]]:
            say(f"{contender.name}, {turn + 1} of {repeats}")
            try:
                with certificates() as found:
                    results, forward, backward = step(contender, problem)
                if turn == 0 and "logprob" not in results:
                    results |= step(contender, dataclasses.replace(problem, backward=False)).results
            except Exception as error:
                running.remove(contender)
                report["contenders"].pop(contender.name, None)
                report["missing"][contender.name] = _reason(error)
                continue
            if turn == 0:
                made: dict[str, dict[str, Any]] = {
                    name: {**error, "of_eager": error["rms"] / eager[name] if eager.get(name) else None}
                    for name, error in errors(results, truth).items()
                }
                if contender.ours:
                    check_ours(contender, problem, results, baseline, truth)
                elif why := _out_of_class(made, limits):
                    running.remove(contender)
                    report["wrong"][contender.name] = dict(why=why, errors=made)
                    continue
                certificate = dict(certificate=found[0]) if found else {}
                pure = contender.pure_forward or not problem.backward
                report["contenders"][contender.name] = dict(
                    pure_forward=pure, forward=[], backward=[], errors=made, **certificate
                )
            report["contenders"][contender.name]["forward"].append(forward)
            report["contenders"][contender.name]["backward"].append(backward)
            del results
    report["bare"] = dict(forward=bare.forward, backward=bare.backward)
    del truth, baseline, bare
    if can_measure_memory(problem.hidden.device):
        for contender in filter(memory, running):
            say(f"memory of {contender.name}")
            report["contenders"][contender.name]["peak_mib"] = peak_mib(contender, problem)
    return report


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"is not installed: {error}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_ours(contender: Contender, problem: Problem, results: Results, baseline: Results, truth: Results) -> None:
    """By the rule of the tests. Raises AssertionError."""
    dtype = problem.hidden.dtype
    bound = rounding(truth, dtype, contender.tolerance(dtype))
    wanted = {name: truth[name] for name in results if name in baseline}
    try:
        check_draw(results, baseline, wanted, bound)
    except AssertionError as error:
        raise AssertionError(f"{contender.name} is wrong, and nothing is reported: {error}") from None
    idle = problem.logprob_grad == 0
    if problem.entropy_grad is not None:
        idle &= problem.entropy_grad == 0
    if "dhidden" in results and results["dhidden"][idle].any():
        raise AssertionError(f"{contender.name} is wrong: rows without a coefficient have a gradient in dhidden")


def _peer_limits(problem: Problem, truth: Results, eager: dict[str, float]) -> dict[str, float]:
    """RMS errors beyond which a peer does not compute what was asked for: a multiple of eager's, or what comes of a
    logit and a log-sum that are rounded to float32 one by one."""
    eps = torch.finfo(torch.float32).eps
    weight = problem.weight.float().t()
    logit = max((block.float() @ weight).abs().max().item() for block in problem.hidden.split(128))
    bound = rounding(truth, problem.hidden.dtype)
    limits = {}
    for name, exact_ in truth.items():
        size = rms(exact_) if name.startswith("d") else 1.0
        limits[name] = max(PEER_CLASS * eager.get(name, 0.0), bound[name] + 8 * eps * logit * size)
    if "entropy" not in eager:  # made in passing, to the dtype of the inputs
        limits["entropy"] = 8 * torch.finfo(problem.hidden.dtype).eps * max(logit, 1.0)
    return limits


def _out_of_class(made: dict[str, dict[str, Any]], limits: dict[str, float]) -> str | None:
    """Not-a-number is out of every class."""
    for name, error in made.items():
        if not error["rms"] <= limits[name]:
            times = "" if error["of_eager"] is None else f", {error['of_eager']:.0f} times eager's"
            return f"{name} is off by {error['relative']:.1e} of its size{times}"
    return None


# ------------------------------------------------------------------------------------------------- what it says


@dataclasses.dataclass(frozen=True)
class Line:
    """A contender's measurements in the numbers that are shown."""

    name: str
    forward: float | None  # seconds, medians; None where the forward is half of the backward
    step: float
    low: float  # of all repeats
    high: float
    limit: float  # bare products of an exact step over its time
    peak_mib: float | None
    errors: dict[str, dict[str, Any]]
    certificate: dict[str, float] | None


def lines(point: dict[str, Any]) -> list[Line]:
    """From the fastest to the slowest."""
    limit = bare_step(point)
    result = []
    for name, x in point["contenders"].items():
        steps = [f + (b or 0.0) for f, b in zip(x["forward"], x["backward"], strict=True)]
        forward = statistics.median(x["forward"]) if x["pure_forward"] else None
        median = statistics.median(steps)
        shown = (forward, median, min(steps), max(steps), limit / median, x.get("peak_mib"))
        result.append(Line(name, *shown, errors=x["errors"], certificate=x.get("certificate")))
    return sorted(result, key=lambda line: line.step)


def bare_step(point: dict[str, Any]) -> float:
    """Seconds of the products of an exact step that keeps no logits: one forward; once more, and those of the
    gradients, backward."""
    forward, backward = (point["bare"][part] for part in ("forward", "backward"))
    return statistics.median(forward) + (statistics.median(forward) + statistics.median(backward) if backward else 0.0)


def noise(point: dict[str, Any]) -> list[str]:
    """What can't be told apart on this machine today."""
    found = []
    for part, seconds in point["bare"].items():
        spread = (max(seconds) - min(seconds)) / statistics.median(seconds) if seconds else 0.0
        if spread > STEADY:
            found.append(f"noisy machine: the bare products ({part}) vary by {spread:.0%}")
    ranked = lines(point)
    for a, b in itertools.pairwise(ranked):
        if b.low <= a.high:
            found.append(f"{a.name} and {b.name} cannot be ranked on this machine today: their times overlap")
    return found
