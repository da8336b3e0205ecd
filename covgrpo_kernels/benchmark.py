"""`covgrpo bench`: this package beside eager PyTorch at a size of the user's own, in less than a minute. A clone of the
repository has `python -m bench`, with every peer and every number, which measures by the same functions."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, linear_logprob, reference
from .config import IGNORE_INDEX
from .grpo.config import usable_dtype
from .inputs import resolve_grad_tol
from .testing import Results, policy_head, rl_head, rms

# --- what is measured: a problem, and who solves it ---------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What all contenders are given: the same tensors, and which gradients are wanted."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N], -100: ignored
    logprob_grad: Tensor  # [N] coefficients
    entropy_grad: Tensor | None = None  # [N]
    softcap: float | None = None
    frozen: bool = False  # the head: dW is not wanted
    backward: bool = True

    @classmethod
    def of(cls, head: dict[str, Any], dtype: torch.dtype, device: torch.device, **options: Any) -> Problem:
        """From a generator of `covgrpo_kernels.testing` or a recording. An ignored row has no coefficient."""
        valid = head["targets"] != IGNORE_INDEX
        x = {n: head[n].to(device, dtype) for n in ("hidden", "weight")}
        x |= {n: head[n].float().where(valid, 0).to(device) for n in ("logprob_grad", "entropy_grad") if n in head}
        if not options.pop("entropy", False):
            x.pop("entropy_grad", None)
        options = dict(softcap=head.get("softcap")) | options
        return cls(**x, targets=head["targets"].to(device), **options)

    @property
    def size(self) -> dict[str, int]:
        return dict(tokens=len(self.hidden), depth=self.hidden.shape[1], vocab=len(self.weight))

    @property
    def labels(self) -> Tensor:
        """Targets for those that have no ignored rows; their coefficient is zero."""
        return self.targets.clamp(min=0)

    def toy(self) -> Problem:
        """The same question at a size that takes no time."""
        head = policy_head(0, 64, 32, 1100)
        head["entropy_grad"] = head["logprob_grad"]
        options = dict(softcap=self.softcap, frozen=self.frozen, backward=self.backward)
        has_entropy = self.entropy_grad is not None
        return Problem.of(head, self.hidden.dtype, self.hidden.device, entropy=has_entropy, **options)


class Outputs(NamedTuple):
    logprob: Tensor | None  # [N]; None: only the loss comes out
    entropy: Tensor | None = None  # [N]
    loss: Tensor | None = None  # []; of a contender whose own loss has the problem's coefficients


class Contender:
    """Stateless, so that a fresh process can be given one."""

    name: str
    ours = False
    entropy = False  # has a gradient for entropies
    softcap = False
    compiles = False  # for each shape, and takes seconds to
    pure_forward = True  # its forward is not already half of its backward

    def why_not(self, problem: Problem) -> str | None:
        """Why it does not solve the problem where that is known beforehand. What is found out by trying is an
        exception of `forward`."""
        if problem.entropy_grad is not None and not self.entropy:
            return "has no gradient for entropies"
        if problem.softcap is not None and not self.softcap:
            return "has no softcap"
        return None

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        raise NotImplementedError

    def around(self) -> AbstractContextManager[Any]:
        """What a step runs in."""
        return nullcontext()

    def tolerance(self, dtype: torch.dtype) -> float:
        """What ours may leave out of dZ, as a share."""
        return 0.0


class Ours(Contender):
    ours = entropy = softcap = True

    def __init__(self, name: str = "ours", grad_tol: float | str = "auto", backend: str | None = None) -> None:
        self.name, self.grad_tol, self.backend = name, grad_tol, backend

    def why_not(self, problem: Problem) -> str | None:
        if self.backend == "eager" and kernels.describe(problem.hidden.device) == "eager":
            return "is the default backend here"
        return None

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        entropy, softcap = problem.entropy_grad is not None, problem.softcap
        options: dict[str, Any] = dict(entropy=entropy, softcap=softcap, grad_tol=self.grad_tol)
        return Outputs(*linear_logprob(hidden, weight, problem.targets, **options))

    def around(self) -> AbstractContextManager[Any]:
        # Forward and backward are two operators, and each looks which backend is meant.
        return mock.patch.dict(os.environ, {kernels.VARIABLE: self.backend} if self.backend else {})

    def tolerance(self, dtype: torch.dtype) -> float:
        return resolve_grad_tol(self.grad_tol, dtype)


def eager_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What trainers write: no more than what is asked for. (The reference always computes entropies.)"""
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    logprob = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logprob, -(log_p.exp() * log_p).sum(-1) if entropy else None


class Eager(Contender):
    name = "eager"
    entropy = softcap = True
    function = staticmethod(eager_logprob)

    def forward(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Outputs:
        entropy = problem.entropy_grad is not None
        return Outputs(*self.function(hidden, weight, problem.labels, problem.softcap, entropy))


# --- a step of one of them: its time, its numbers, its memory ------------------------------------------------


clock = time.perf_counter


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that the device took, or on a CPU that passed."""
    if device.type != "cuda":
        begin = clock()
        result = function()
        return clock() - begin, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000, result


class Step(NamedTuple):
    results: Results  # logprob, entropy [N]; dhidden [N, D], dweight [V, D]: those there are
    forward: float  # seconds
    backward: float | None


def step(contender: Contender, problem: Problem) -> Step:
    device, learn = problem.hidden.device, problem.backward
    hidden = problem.hidden.detach().requires_grad_(learn)
    weight = problem.weight.detach().requires_grad_(learn and not problem.frozen)
    backward = None
    with contender.around(), torch.set_grad_enabled(learn):
        forward, out = timed(lambda: contender.forward(hidden, weight, problem), device)
        if learn:
            pairs = [(out.logprob, problem.logprob_grad), (out.entropy, problem.entropy_grad)]
            if out.loss is not None:
                pairs = [(out.loss, torch.ones_like(out.loss))]
            outputs, grads = zip(*((x, g.to(x.dtype)) for x, g in pairs if g is not None), strict=True)
            backward, _ = timed(lambda: torch.autograd.backward(outputs, grads), device)
    valid = problem.targets != IGNORE_INDEX
    # Entropies that nobody asked for, as some make them in passing, are not looked at.
    found = dict(logprob=out.logprob, entropy=None if problem.entropy_grad is None else out.entropy)
    results = {name: x.detach().where(valid, 0) for name, x in found.items() if x is not None}
    for name, x in (("dhidden", hidden), ("dweight", weight)):
        if x.requires_grad:
            assert x.grad is not None, f"{contender.name} gave no {name}"
            results[name] = x.grad
    return Step(results, forward, backward)


def warm(contender: Contender, problem: Problem) -> None:
    """Threads, libraries and compilers, once."""
    step(contender, problem if contender.compiles else problem.toy())


def product_seconds(problem: Problem, dtype: torch.dtype) -> float:
    """Of the products of a step, forward and both gradients, on a cut-out of the problem's operands that takes no time:
    the smaller of two."""
    hidden, weight = (x[:rows].to(dtype) for x, rows in ((problem.hidden, 256), (problem.weight, 4096)))
    logits = hidden @ weight.t()

    def products() -> Any:
        return torch.mm(hidden, weight.t(), out=logits), logits @ weight, logits.t() @ hidden

    return min(timed(products, hidden.device)[0] for _ in range(2))


def slow_products(problem: Problem) -> float | None:
    """How many times as long as float32's the products take in the problem's dtype, on a processor that has no
    instructions for it. None where they are faster, as they should be."""
    dtype = problem.hidden.dtype
    if problem.hidden.device.type != "cpu" or dtype.itemsize >= 4:
        return None
    ratio = product_seconds(problem, dtype) / product_seconds(problem, torch.float32)
    return ratio if ratio > 1 else None


def exact(problem: Problem, rows: int = 256) -> Results:
    """The reference in float64 on the problem's inputs, a block of rows at a time."""
    hidden, weight = (x.detach().to(torch.float64, copy=True) for x in (problem.hidden, problem.weight))
    hidden.requires_grad_(problem.backward)
    weight.requires_grad_(problem.backward and not problem.frozen)
    logprobs, entropies = [], []
    for block in torch.arange(len(hidden), device=hidden.device).split(rows):
        x, e = reference.linear_logprob(hidden[block], weight, problem.targets[block], softcap=problem.softcap)
        if problem.backward:
            total = (x * problem.logprob_grad[block]).sum()
            if problem.entropy_grad is not None:
                total = total + (e * problem.entropy_grad[block]).sum()
            total.backward()
        logprobs.append(x.detach())
        entropies.append(e.detach())
    truth = dict(logprob=torch.cat(logprobs), entropy=torch.cat(entropies))
    return truth | {f"d{n}": x.grad for n, x in (("hidden", hidden), ("weight", weight)) if x.grad is not None}


def can_measure_memory(device: torch.device) -> bool:
    return device.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)


def peak_mib(contender: Contender, problem: Problem) -> float:
    """Peak memory of a step beyond inputs and gradients: of the device's allocator, or on a CPU of the resident set of
    a fresh process. Raises RuntimeError where that process fails."""
    device = problem.hidden.device
    if device.type == "cuda":
        warm(contender, problem)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = step(contender, problem).results
        return (torch.cuda.max_memory_allocated(device) - before - _gradient_bytes(results)) / 2**20
    context = multiprocessing.get_context("spawn")
    value = context.Value("d", -1.0)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save({f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}, file.name)
        process = context.Process(target=_peak_in_this_process, args=(contender, file.name, value))
        process.start()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring the memory of {contender.name} failed with exit status {process.exitcode}")
    return value.value


def free_bytes(device: torch.device) -> int | None:
    """None where it is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps and does not use is free
        return torch.cuda.mem_get_info(device)[0]
    about = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", about.read_text(), re.M) if about.exists() else None
    return int(found[1]) << 10 if found else None


def _gradient_bytes(results: Results) -> int:
    return sum(x.nbytes for name, x in results.items() if name.startswith("d"))


def resident_kib(field: str) -> int:
    """Of this process's memory, as Linux counts it: "VmRSS:" now, "VmHWM:" at the peak."""
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0])


def _peak_in_this_process(contender: Contender, path: str, value: Any) -> None:
    problem = Problem(**torch.load(path))
    warm(contender, problem)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident_kib("VmRSS:")
    results = step(contender, problem).results
    value.value = (resident_kib("VmHWM:") - before) / 1024 - _gradient_bytes(results) / 2**20


# --- the command -------------------------------------------------------------------------------------------

OURS, EAGER = Ours(), Eager()
TURN, TOTAL = 10.0, 15.0  # seconds that a turn of both, and all turns, may take
LEAST_VOCAB, LEAST_TOKENS = 32768, 64  # with less the logits fit into caches, and eager PyTorch looks better
SAMPLE, CHECKED = 128, 32  # different tokens of the problem, and those whose errors are measured


class Measured(NamedTuple):
    """A contender's medians, and errors against float64 (RMS): of log-probs in nats, of dhidden as a share of it."""

    forward: float  # seconds
    backward: float
    peak_mib: float | None
    logprob_error: float | None
    dhidden_error: float | None


class Comparison(NamedTuple):
    tokens: int  # those that were measured, as the vocabulary
    vocab: int
    turns: int
    measured: dict[str, Measured]  # by contender
    remarks: list[str]  # what is to know about it


def policy_problem(tokens: int, depth: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A step of GRPO of a policy as unsure as a real model at a temperature of 1. To make thousands of its tokens takes
    longer than to measure with them: there are `SAMPLE` different ones."""
    head = rl_head(0, min(tokens, SAMPLE), depth, vocab, policy="recorded-1.0", device=device)
    again = torch.arange(tokens, device=device) % SAMPLE
    return Problem.of({n: x if n == "weight" else x[again] for n, x in head.items()}, dtype, device)


def eager_bytes(tokens: int, vocab: int) -> int:
    """What eager PyTorch needs beyond inputs and gradients: log-probs, their gradient and that of the logits, [N, V] in
    float32 each."""
    return 3 * 4 * tokens * vocab


def compare(
    tokens: int, depth: int, vocab: int, dtype: torch.dtype, device: torch.device, total: float = TOTAL
) -> Comparison:
    """Ours and eager PyTorch in turns, for `total` seconds or a little more. Where a turn would take long, with a part
    of the vocabulary, with which time and memory grow alike, and if need be of the tokens. Raises ValueError where the
    inputs do not fit into memory."""
    remarks = []
    hidden, weight = (torch.ones(n, depth, dtype=dtype, device=device) for n in (256, 4096))
    probe = Problem(hidden, weight, targets=torch.zeros(256), logprob_grad=torch.zeros(256))
    # Of a logit, at the quickest: a machine is busy now and then. Ours takes about as long, eager twice.
    products = min(product_seconds(probe, dtype) for _ in range(5)) / (256 * 4096)
    part = min(vocab, max(int(TURN / (3 * products * tokens)), LEAST_VOCAB))
    measured = min(tokens, max(int(TURN / (3 * products * part)), LEAST_TOKENS))
    if (measured, part) != (tokens, vocab):
        whole = 2 * products * tokens * vocab
        remarks.append(
            f"A step of this size takes eager PyTorch some {whole:.0f} s here: measured are {measured} tokens and "
            f"{part} entries of the vocabulary. Time and memory grow with the vocabulary, while shares hardly change."
        )
    if measured < tokens:
        remarks.append("With few tokens the head's gradient, which is as large as ever, weighs more in both.")
    free, inputs = free_bytes(device), (part + 4 * measured) * depth * (8 + 2 * dtype.itemsize)
    if free is not None and inputs > free:
        raise ValueError(f"inputs and gradients need {_gib(inputs)}, of which {_gib(free)} are free")
    problem = policy_problem(measured, depth, part, dtype, device)
    if (ratio := slow_products(problem)) is not None:
        name = str(dtype).removeprefix("torch.")
        remarks.append(f"This processor is {ratio:.1f} times as fast in float32: no figure here is typical of {name}.")
    contenders: list[Contender] = [OURS, EAGER]
    free = free_bytes(device)
    # Of the process in which memory is measured on a CPU; on a GPU the gradients.
    copies = 2 * inputs if device.type == "cpu" else problem.weight.nbytes + problem.hidden.nbytes
    for size in dict.fromkeys([(measured, part), (tokens, vocab)]):
        if free is not None and (needed := eager_bytes(*size) + copies) > free:
            what = f"Eager PyTorch would need {_gib(needed)} for {size[0]} tokens, and {_gib(free)} are free"
            remarks.append(f"{what}: it is left out." if size == (measured, part) else f"{what}.")
            contenders = [OURS] if size == (measured, part) else contenders
    seconds, results = _turns(contenders, problem, total)
    errors = _errors(results, problem)
    peaks = {c.name: peak_mib(c, problem) for c in contenders if can_measure_memory(device)}
    found = {}
    for contender in contenders:
        forward, backward = map(statistics.median, zip(*seconds[contender.name], strict=True))
        off = errors.get(contender.name, (None, None))
        found[contender.name] = Measured(forward, backward, peaks.get(contender.name), *off)
    return Comparison(measured, part, len(seconds["ours"]), found, remarks)


def _turns(
    contenders: list[Contender], problem: Problem, total: float
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Results]]:
    """Seconds of forward and backward of each turn, and the results of the last, without dweight."""
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    results: dict[str, Results] = {}
    for contender in contenders:
        warm(contender, problem)
        if problem.hidden.device.type == "cuda":  # kernels are compiled for the head's size, and memory is kept
            step(contender, problem)
    begin, turn = clock(), 0
    while turn < 2 or (clock() - begin < total and turn < 50):
        for contender in contenders[:: (-1) ** turn]:
            results.pop(contender.name, None)
            made, forward, backward = step(contender, problem)
            seconds[contender.name].append((forward, backward or 0.0))
            results[contender.name] = {name: made[name] for name in ("logprob", "dhidden")}
            del made
        turn += 1
    return seconds, results


def _errors(results: dict[str, Results], problem: Problem) -> dict[str, tuple[float, float]]:
    """Of log-probs and dhidden, on the first tokens that have a coefficient. Empty where the head has no room in
    float64, or there is no gradient."""
    free = free_bytes(problem.hidden.device)
    if free is not None and 2 * 8 * problem.weight.numel() > free:
        return {}
    rows = problem.logprob_grad.nonzero().squeeze(1)[:CHECKED]
    part = {name: getattr(problem, name)[rows] for name in ("hidden", "targets", "logprob_grad")}
    truth = exact(dataclasses.replace(problem, **part, frozen=True))
    size = rms(truth["dhidden"])
    if size == 0:
        return {}

    def error(result: Results, name: str) -> float:
        return rms(result[name][rows].double() - truth[name])

    return {who: (error(x, "logprob"), error(x, "dhidden") / size) for who, x in results.items()}


def cells(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """A header, and a row for each contender."""
    yield ("", "forward", "backward", "together", "memory", "log-prob error", "gradient error")
    for name, x in comparison.measured.items():
        yield (
            name,
            *(_duration(s) for s in (x.forward, x.backward, x.forward + x.backward)),
            "unknown" if x.peak_mib is None else f"{max(x.peak_mib, 0):.0f} MiB",
            *("unknown" if e is None else f"{e:.1e}" for e in (x.logprob_error, x.dhidden_error)),
        )


def in_short(comparison: Comparison) -> list[str]:
    """Ours as shares of eager's, in a sentence; nothing without eager."""
    if EAGER.name not in comparison.measured:
        return []
    ours, eager = (comparison.measured[c.name] for c in (OURS, EAGER))
    time = (ours.forward + ours.backward) / (eager.forward + eager.backward)
    memory = f" and {ours.peak_mib / eager.peak_mib:.2g} of its memory" if ours.peak_mib and eager.peak_mib else ""
    return [f"Ours takes {time:.2g} of eager PyTorch's time{memory}."]


def main(tokens: int, depth: int, vocab: int, dtype: str = "auto") -> int:
    """Prints the comparison on the device at hand: a GPU, or else the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = usable_dtype(dtype, device)
    print(f"{tokens} tokens, hidden size {depth}, vocabulary {vocab}, {str(kind).removeprefix('torch.')}")
    print(f"{describe(device)}; kernels: {kernels.describe(device)}", flush=True)
    comparison = compare(tokens, depth, vocab, kind, device)
    table = list(cells(comparison))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for name, *row in table:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, row, widths[1:])]).rstrip())
    said = [
        *in_short(comparison),
        *comparison.remarks,
        f"Medians of {comparison.turns} turns. Memory: the peak beyond inputs and gradients. Errors (RMS, {CHECKED} "
        "tokens): against float64, of log-probs in nats and of the hidden states' gradient as a share of it.",
        "Inputs like those of a policy sampled at temperature 1; three of ten groups have no advantage, and "
        f"{SAMPLE} tokens are different, which the others repeat.",
    ]
    print("\n" + "\n".join(textwrap.fill(line, 79) for line in said))
    return 0


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.major}.{gpu.minor}"
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
