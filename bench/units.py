"""What a step costs in bare matrix products of its head: ours by backend, eager PyTorch, and the peers installed."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from covgrpo_kernels import linear_logprob, tiles
from covgrpo_kernels.backward_plan import resolve_grad_tol
from covgrpo_kernels.testing import Results, check_draw, policy_head, rms

from .measure import Contender, eager_logprob, environment, exact, rounding, timed, write_json

# Llama-3-8B's head on a GPU, Qwen2.5-0.5B's on a CPU.
SIZES = {
    "cuda": dict(tokens=8192, depth=4096, vocab=131072),
    "cpu": dict(tokens=1024, depth=896, vocab=151936),
    "toy": dict(tokens=48, depth=32, vocab=2100),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--grad-tol", default="0.0", help="of ours: a number or auto")
    parser.add_argument("--zero-advantage", type=float, default=0.0, help="share of tokens without a coefficient")
    parser.add_argument("--toy", action="store_true", help="a size that tests the script")
    for name in SIZES["toy"]:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--profile", action="store_true", help="print where one step of ours spends the device's time")
    parser.add_argument("--out", type=Path, help="JSON, written anew after every round")
    parser.set_defaults(run=run)


class _OnEagerTiles(Contender):
    """Forward and backward: they are two operators, and each looks which backend is meant."""

    def step(self) -> None:
        with mock.patch.dict(os.environ, {tiles.VARIABLE: "eager"}):
            super().step()


class _SingleKernel(Contender):
    """The forward that writes no logits tile; it has no backward."""

    def step(self) -> None:
        from covgrpo_kernels.tiles.triton.forward import forward

        def function() -> Tensor:
            hidden, weight = self.hidden.detach(), self.weight.detach()
            settings: dict[str, Any] = dict(scale=1.0, softcap=None, entropy=False)
            return forward(hidden, weight, None, self.head["targets"], None, **settings).results().logprob

        seconds, self.logprob = timed(function, self.hidden.device)
        self.forward.append(seconds)

    def results(self) -> Results:
        return dict(logprob=self.logprob)


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 2048, None, 1.0, ())


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, *rest = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 1.0, -100, 1, True)
    return -nll, *rest


def _pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
    return (-torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options),)


class Bare:
    """The products alone, on operands of the size and dtype; the logits and their gradient exist."""

    def __init__(self, head: dict[str, Any], dtype: torch.dtype) -> None:
        self.hidden, self.weight = head["hidden"].to(dtype), head["weight"].to(dtype)
        self.logits = self.hidden @ self.weight.t()
        self.forward: list[float] = []
        self.backward: list[float] = []

    def step(self) -> None:
        device = self.hidden.device
        self.forward.append(timed(lambda: torch.mm(self.hidden, self.weight.t(), out=self.logits), device)[0])
        products = lambda: (self.logits @ self.weight, self.logits.t() @ self.hidden)  # noqa: E731
        self.backward.append(timed(products, device)[0])


def _peak_mib(contender: Contender) -> float | None:
    """Of a step, beyond inputs and gradients."""
    device = contender.hidden.device
    if device.type != "cuda":
        return None
    contender.hidden.grad = contender.weight.grad = None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.step()
    gradients = sum(x.grad.nbytes for x in (contender.hidden, contender.weight) if x.grad is not None)
    return (torch.cuda.max_memory_allocated(device) - before - gradients) / 2**20


def _errors(results: Results, truth: Results) -> dict[str, float]:
    off = (results["logprob"].double() - truth["logprob"]).abs().max().item()
    relative = {n: rms(results[n].double() - truth[n]) / rms(truth[n]) for n in results.keys() - {"logprob"}}
    return dict(logprob_max=off, **relative)


def _check(contender: Contender, baseline: Contender, truth: Results, grad_tol: float | str) -> None:
    """Raises AssertionError where ours is wrong: then there is no timing."""
    results, dtype = contender.results(), contender.hidden.dtype
    exact_ = {name: truth[name] for name in results}
    check_draw(results, baseline.results(), exact_, rounding(truth, dtype, resolve_grad_tol(grad_tol, dtype)))


def _started(contender: Contender) -> str | None:
    """After a first step, which compiles and allocates; returns why it does not run."""
    try:
        contender.step()
    except Exception as error:  # whatever keeps a peer from running is its line in the report
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def run(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    size = dict(SIZES["toy" if arguments.toy else device.type])
    size |= {name: value for name in size if (value := getattr(arguments, name))}
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    grad_tol = arguments.grad_tol if arguments.grad_tol == "auto" else float(arguments.grad_tol)

    function = functools.partial(linear_logprob, grad_tol=grad_tol)
    head = policy_head(0, **size, zero_advantage=arguments.zero_advantage)
    head = {n: v.to(device, dtype) if n in ("hidden", "weight") else v.to(device) for n, v in head.items()}

    baseline = Contender("eager", eager_logprob, head, dtype)
    ours = [Contender("ours", function, head, dtype), _OnEagerTiles("ours, eager tiles", function, head, dtype)]
    ours += [_SingleKernel("ours, forward in a single kernel", function, head, dtype)]
    peers = {"TRL": _trl, "Liger": _liger, "PyTorch": _pytorch}
    candidates = [*ours, *(Contender(name, peer, head, dtype) for name, peer in peers.items())]
    contenders: list[Contender] = []
    report: dict[str, Any] = dict(
        environment=environment(device),
        size=size,
        dtype=str(dtype).removeprefix("torch."),
        grad_tol=grad_tol,
        zero_advantage=arguments.zero_advantage,
        contenders={},
        missing={},
    )
    baseline.step()
    truth = exact(baseline)
    for contender in [baseline, *candidates]:
        reason = _started(contender)
        if reason:
            report["missing"][contender.name] = reason
            continue
        if contender in ours:
            _check(contender, baseline, truth, grad_tol)
        measured = dict(errors=_errors(contender.results(), truth), peak_mib=_peak_mib(contender))
        report["contenders"][contender.name] = measured
        contender.forward.clear()
        contender.backward.clear()
        contenders.append(contender)
    del truth
    bare = Bare(head, dtype)
    for _ in range(arguments.repeats):
        for contender in contenders:
            contender.step()
            report["contenders"][contender.name] |= dict(forward=contender.forward, backward=contender.backward)
        bare.step()
        report["bare"] = dict(forward=bare.forward, backward=bare.backward)
        if arguments.out:
            write_json(arguments.out, report)
    print(markdown(report))
    if arguments.profile:
        _profile(ours[0])


def _profile(contender: Contender) -> None:
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds) as result:
        contender.step()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def markdown(report: dict[str, Any]) -> str:
    size, where = report["size"], report["environment"]
    forward, backward = (statistics.median(report["bare"][part]) for part in ("forward", "backward"))
    unit = 2 * size["tokens"] * size["depth"] * size["vocab"]
    lines = [
        f"N={size['tokens']}, D={size['depth']}, V={size['vocab']}, {report['dtype']}, "
        f"{where.get('gpu') or 'CPU, backend ' + where['backend']}, torch {where['torch']}, "
        f"grad_tol={report['grad_tol']}, {report['zero_advantage']:.0%} of the tokens without advantage; "
        f"one bare product of the head takes {forward * 1e3:.2f} ms "
        f"({unit / forward / 1e12:.2f} TFLOP/s), the two of the backward {backward * 1e3:.2f} ms.",
        "",
        "| | forward / 1 product | step / 4 products | peak MiB | max log-prob error | dhidden | dweight |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, c in report["contenders"].items():
        f, errors = statistics.median(c["forward"]), c["errors"]
        peak = "" if c["peak_mib"] is None else f"{c['peak_mib']:.0f}"
        step = f"{(f + statistics.median(c['backward'])) / (2 * forward + backward):.2f}" if c["backward"] else ""
        cells = [f"{errors[key]:.1e}" if key in errors else "" for key in ("logprob_max", "dhidden", "dweight")]
        lines.append(f"| {name} | {f / forward:.2f} | {step} | {peak} | {' | '.join(cells)} |")
    lines += [f"\nnot measured: {name}: {why}" for name, why in report["missing"].items()]
    return "\n".join(lines)
