"""Every contender on the same problem, in turns: numbers first, and no timing where they are wrong."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from covgrpo_kernels.benchmark import Contender, Problem, can_measure_memory, exact, peak_mib, slow_products, step, warm
from covgrpo_kernels.testing import Results, check_draw, rms

from .contenders import EAGER, certificates
from .measure import Bare, errors, rounding

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
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Raises AssertionError, naming the quantity, where ours is wrong: then there is no report at all. A peer that is
    wrong, and what does not run, is listed with the reason and has no timing. ``keep`` is given the report after each
    turn, with what there is by then."""
    torch._dynamo.reset()  # or it stops compiling after a few shapes
    say("exact results in float64")
    truth = exact(problem)
    sizes = {name: rms(x) for name, x in truth.items()}
    eager = {name: x["rms"] for name, x in errors(step(EAGER, problem).results, truth).items()}
    limits = _peer_limits(problem, sizes, eager)
    report: dict[str, Any] = dict(
        size=problem.size,
        mean_entropy=truth["entropy"].sum().item() / max((problem.targets >= 0).sum().item(), 1),
        coefficients=(problem.logprob_grad != 0).double().mean().item(),  # share of the rows that have one
        slow_products=slow_products(problem), contenders={}, wrong={}, missing={},
    )  # fmt: skip
    running: list[Contender] = []
    for contender in contenders:
        say(f"warming up {contender.name}")
        reason = contender.why_not(problem)
        try:
            if reason is None:
                warm(contender, problem)
        except Exception as error:  # whatever keeps a peer from running is its line in the report
            reason = _reason(contender, error)
        if reason is None:
            running.append(contender)
        else:
            report["missing"][contender.name] = reason

    bare = Bare(problem)
    report["bare"] = dict(forward=bare.forward, backward=bare.backward)
    for turn in range(repeats):
        bare.step()
        # So that nobody always follows the same neighbour.
        first = turn % max(len(running), 1)
        for contender in [*running[first:], *running[:first]]:
            say(f"{contender.name}, {turn + 1} of {repeats}")
            try:
                with certificates() as certified:
                    results, forward, backward = step(contender, problem)
                if turn == 0 and "logprob" not in results:
                    results |= step(contender, dataclasses.replace(problem, backward=False)).results
            except Exception as error:
                running.remove(contender)
                report["contenders"].pop(contender.name, None)
                report["missing"][contender.name] = _reason(contender, error)
                continue
            if turn > 0:  # comparing it takes long
                results.pop("dweight", None)
            made = errors(results, truth)
            if contender.ours:
                _check_ours(contender, problem, made, eager, sizes)
                _check_idle(contender, problem, results)
            elif why := _out_of_class(made, limits, sizes, eager):
                running.remove(contender)
                report["contenders"].pop(contender.name, None)
                report["wrong"][contender.name] = why
                continue
            if turn == 0:
                report["contenders"][contender.name] = dict(
                    pure_forward=contender.pure_forward or not problem.backward, forward=[], backward=[],
                    errors={name: _in_proportion(name, x, sizes, eager) for name, x in made.items()},
                    certificate=certified[0] if certified else None,
                )  # fmt: skip
            report["contenders"][contender.name]["forward"].append(forward)
            report["contenders"][contender.name]["backward"].append(backward)
            del results
        keep(report)
    del truth, bare

    if can_measure_memory(problem.hidden.device):
        for contender in filter(memory, running):
            say(f"memory of {contender.name}")
            report["contenders"][contender.name]["peak_mib"] = peak_mib(contender, problem)
    return report


def _reason(contender: Contender, error: Exception) -> str:
    if contender.ours:
        raise error
    if isinstance(error, ImportError):
        return f"is not installed: {error}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _in_proportion(name: str, error: dict[str, float], sizes: dict[str, float], eager: dict[str, float]) -> Any:
    """With the RMS as a share of the quantity's own and as a multiple of eager's, where these are not zero."""
    relative = error["rms"] / sizes[name] if sizes[name] else None
    return error | dict(relative=relative, of_eager=error["rms"] / eager[name] if eager.get(name) else None)


def _check_ours(
    contender: Contender, problem: Problem, made: dict[str, Any], eager: dict[str, float], sizes: dict[str, float]
) -> None:
    """By the rule of the tests, which here is given errors and exact zeros. Raises AssertionError."""
    dtype = problem.hidden.dtype
    off = {name: torch.tensor(x["rms"], dtype=torch.float64) for name, x in made.items()}
    eager_off = {name: torch.tensor(eager[name], dtype=torch.float64) for name in made}
    zeros = {name: torch.zeros(()) for name in made}
    try:
        check_draw(off, eager_off, zeros, rounding(sizes, dtype, contender.tolerance(dtype)))
    except AssertionError as error:
        raise AssertionError(f"{contender.name} is wrong, and nothing is reported: {error}") from None


def _check_idle(contender: Contender, problem: Problem, results: Results) -> None:
    idle = problem.logprob_grad == 0
    if problem.entropy_grad is not None:
        idle &= problem.entropy_grad == 0
    if "dhidden" in results and results["dhidden"][idle].any():
        raise AssertionError(f"{contender.name} is wrong: rows without a coefficient have a gradient in dhidden")


def _peer_limits(problem: Problem, sizes: dict[str, float], eager: dict[str, float]) -> dict[str, float]:
    """RMS errors beyond which a peer does not compute what was asked for: a multiple of eager's, or what comes of a
    logit and a log-sum that are rounded to float32 one by one, and of results in the dtype of the inputs."""
    eps = torch.finfo(torch.float32).eps
    weight = problem.weight.float().t()
    logit = max((block.float() @ weight).abs().max().item() for block in problem.hidden.split(128))
    bound = rounding(sizes, problem.hidden.dtype)
    limits = {}
    for name, size in sizes.items():
        separate = 8 * eps * logit * (size if name.startswith("d") else 1.0)
        result = torch.finfo(problem.hidden.dtype).eps * size
        limits[name] = max(PEER_CLASS * eager.get(name, 0.0), bound[name] + separate + result)
    return limits


def _out_of_class(
    made: dict[str, Any], limits: dict[str, float], sizes: dict[str, float], eager: dict[str, float]
) -> dict[str, Any] | None:
    """Errors and why they are too large. Not-a-number is out of every class."""
    for name, error in made.items():
        if not error["rms"] <= limits[name]:
            x = _in_proportion(name, error, sizes, eager)
            share = "" if x["relative"] is None else f", {x['relative']:.1e} of its size"
            times = "" if x["of_eager"] is None else f", {x['of_eager']:.0f} times eager's"
            return dict(why=f"{name} is off by {error['rms']:.1e}{share}{times}", errors=made)
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
    certificate: dict[str, Any] | None


def lines(point: dict[str, Any]) -> list[Line]:
    """From the fastest to the slowest."""
    limit = bare_step(point)
    result = []
    for name, x in point["contenders"].items():
        steps = [f + (b or 0.0) for f, b in zip(x["forward"], x["backward"], strict=True)]
        forward = statistics.median(x["forward"]) if x["pure_forward"] else None
        median = statistics.median(steps)
        shown = (forward, median, min(steps), max(steps), limit / median, x.get("peak_mib"))
        result.append(Line(name, *shown, errors=x["errors"], certificate=x["certificate"]))
    return sorted(result, key=lambda line: line.step)


def bare_step(point: dict[str, Any]) -> float:
    """Seconds of the products of an exact step that keeps no logits: one forward; once more, and those of the
    gradients, backward."""
    forward, backward = (point["bare"][part] for part in ("forward", "backward"))
    return statistics.median(forward) + (statistics.median(forward) + statistics.median(backward) if backward else 0.0)


def noise(point: dict[str, Any]) -> list[str]:
    """What can't be told apart on this machine today."""
    found = []
    if ratio := point.get("slow_products"):
        found.append(
            f"PyTorch's products in this dtype take {ratio:.1f} times as long as its float32 ones, since the processor "
            'has no instructions for them: "of the limit", and the times of peers, tell of that first'
        )
    for part, seconds in point["bare"].items():
        spread = (max(seconds) - min(seconds)) / statistics.median(seconds) if seconds else 0.0
        if spread > STEADY:
            found.append(f"noisy machine: the bare products ({part}) vary by {spread:.0%}")
    tied = [f"{a.name} and {b.name}" for a, b in itertools.pairwise(lines(point)) if b.low <= a.high]
    if tied:
        found.append(f"cannot be ranked on this machine today, since their times overlap: {', '.join(tied)}")
    return found
