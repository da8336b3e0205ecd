"""What real policies are like, where the head's step is concerned: `python -m research recordings`.

Records what the heads of the models of `models.py` see at two temperatures (`bench/record.py`), and measures on a part
of each recording, beside the made-up inputs of `covgrpo_kernels.testing.rl_head` that are fitted to them: entropy,
entries above the floor, tails, how the backward treats the rows, and its errors beside eager PyTorch's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covgrpo_kernels import linear_logprob
from covgrpo_kernels.config import IGNORE_INDEX
from covgrpo_kernels.inputs import resolve_grad_tol
from covgrpo_kernels.plan import min_probability
from covgrpo_kernels.testing import POLICIES, rl_head, rms

from . import RESULTS
from .models import SOURCES, cache_folder, model_folder

TEMPERATURES = (0.6, 1.0)
MANY = (64, 128, 256)  # entries above the floor
BLOCK = 128  # rows that have their logits at a time
ROWS = 2048  # that are measured, of each recording
PROMPTS_USED, RESPONSES, NEW_TOKENS = 60, 4, 32  # of bench/prompts.jsonl, which are in random order: 7,680 tokens
PROBES = 512  # rows whose dL/dlogits is measured


def run(models: Sequence[str], temperatures: Sequence[float], rows: int, out: Path | None, report_only: bool) -> None:
    folder = out or RESULTS
    if not report_only:
        _measure_all(models or list(SOURCES), temperatures or TEMPERATURES, rows, folder)
    text = report(json.loads((folder / "recordings.json").read_text()))
    (folder / "recordings.md").write_text(text)
    print(text)


def _measure_all(models: Sequence[str], temperatures: Sequence[float], rows: int, folder: Path) -> None:
    from bench.measure import environment, write_json

    file = folder / "recordings.json"
    found: dict[str, Any] = dict(environment=environment(), rows=rows, inputs={})
    wanted = {f"{name} at {t}": recorded(name, t) for name in models for t in temperatures}
    for label, path in wanted.items():
        print(f"{label}: {path}", flush=True)
        found["inputs"][label] = statistics(torch.load(path, weights_only=True), rows)
        write_json(file, found)
    for policy in POLICIES:
        label = f"rl_head, {policy}"
        print(label, flush=True)
        found["inputs"][label] = statistics(rl_head(0, rows, 576, 49152, policy=policy), rows)
        write_json(file, found)


def recorded(name: str, temperature: float) -> Path:
    """The file of a recording in the cache, which is made if it is not there. Raises ModelNotFetchedError."""
    from bench.record import PROMPTS, read_problems, record, save
    from covgrpo_kernels.grpo.policy import load_policy

    path = cache_folder() / "recordings" / f"{name}_t{temperature}_{PROMPTS_USED}x{RESPONSES}x{NEW_TOKENS}.pt"
    if not path.exists():
        policy = load_policy(str(model_folder(name)), torch.device("cpu"))
        problems = read_problems(PROMPTS)[:PROMPTS_USED]
        made = record(policy, problems, group_size=RESPONSES, max_new_tokens=NEW_TOKENS, temperature=temperature)
        save(made, path)
    return path


def some_groups(recording: dict[str, Any], rows: int) -> dict[str, Any]:
    """Whole groups at equal distances, of ``rows`` rows or a few less; the coefficients are those of the mean over
    their tokens."""
    n, size = len(recording["targets"]), int((recording["group_ids"] == 0).sum())
    groups = torch.linspace(0, n // size - 1, min(n // size, max(rows // size, 1))).long()
    kept = (groups.unsqueeze(1) * size + torch.arange(size)).flatten()
    part = {name: x[kept] if torch.is_tensor(x) and len(x) == n else x for name, x in recording.items()}
    before, after = ((x["targets"] != IGNORE_INDEX).sum() for x in (recording, part))
    return part | dict(logprob_grad=part["logprob_grad"] * (before / after))


# ----------------------------------------------------------------------------------------------------- measurements


def statistics(
    head: dict[str, Any], rows: int = ROWS, dtype: torch.dtype = torch.bfloat16, probes: int = PROBES
) -> dict[str, Any]:
    """Of a recording, or of a generator of `covgrpo_kernels.testing`, in inputs of a dtype: the distributions of all
    rows; the gradients of some whole groups, ``rows`` rows at most; the error of dL/dlogits of ``probes`` of these."""
    from covgrpo_kernels.benchmark import Problem

    every, problem = (Problem.of(x, dtype, torch.device("cpu")) for x in (head, some_groups(head, rows)))
    result: dict[str, Any] = dict(size=problem.size, coefficients=_share(problem.logprob_grad != 0))
    floor = min_probability(resolve_grad_tol("auto", dtype))
    result |= distribution(every.hidden, every.weight, every.targets, floor)
    result |= gradient_errors(problem)
    result["dlogits"] = dlogits_error(problem, probes)
    return result


def _share(rows: Tensor) -> float:
    return rows.double().mean().item()


def distribution(hidden: Tensor, weight: Tensor, targets: Tensor, floor: float) -> dict[str, Any]:
    """Of the policy's distributions, over the rows that are not padding. A row's tail is what is below the floor."""
    kept: dict[str, list[Tensor]] = {}
    w = weight.float()
    for rows in (targets != IGNORE_INDEX).nonzero().squeeze(1).split(BLOCK):
        log_p = (hidden[rows].float() @ w.T).log_softmax(1)
        p = log_p.exp()
        in_tail = p < floor
        tail = p.where(in_tail, 0).double()
        mass = tail.sum(1)
        columns = dict(
            entropy=-(p * log_p).sum(1),
            sure=(log_p.gather(1, targets[rows].unsqueeze(1)) > math.log(0.99)).squeeze(1),
            entries=(~in_tail).sum(1),
            largest=p.amax(1),
            tail_mass=mass,
            # Between 0 and 1: a tail in which every entry is at the floor has 1.
            tail_fill=tail.square().sum(1) / (mass * floor),
            exponent=zipf_exponent(log_p),
        )
        for name, value in columns.items():
            kept.setdefault(name, []).append(value.double())
    x = {name: torch.cat(parts) for name, parts in kept.items()}

    def quantiles(values: Tensor) -> dict[str, float]:
        return {f"{q:.0%}": values.quantile(q).item() for q in (0.1, 0.5, 0.9)}

    return dict(
        rows=len(x["entropy"]),
        floor=floor,
        entropy=dict(mean=x["entropy"].mean().item(), **quantiles(x["entropy"])),
        target_above_99=x["sure"].mean().item(),
        entries=dict(mean=x["entries"].mean().item(), **quantiles(x["entries"])),
        entries_above={str(n): _share(x["entries"] > n) for n in MANY},
        tail_mass=dict(mean=x["tail_mass"].mean().item(), **quantiles(x["tail_mass"])),
        tail_fill=quantiles(x["tail_fill"][x["tail_mass"] > 0]),
        exponent=quantiles(x["exponent"]),
    )


def zipf_exponent(log_p: Tensor, low: int = 16, high: int = 1024) -> Tensor:  # [R, V] -> [R]
    """Minus the slope of log p over log rank, from rank ``low`` to ``high``, by least squares at ranks a factor of the
    square root of two apart."""
    steps = int(2 * math.log2(high / low)) + 1
    ranks = torch.tensor([low * 2 ** (i / 2) for i in range(steps)]).round().long().unique()
    ordered = log_p.topk(int(ranks[-1]), dim=1).values[:, ranks - 1]
    x = ranks.double().log()
    x = x - x.mean()
    return -(ordered.double() @ x) / x.square().sum()


def gradient_errors(problem: Any) -> dict[str, Any]:
    """How ours treats the rows, and the errors of its gradients against float64, beside those of its exact mode and of
    eager PyTorch in the same dtype: root mean squares over that of the exact gradient. And what AdamW's first step
    makes of the gradient of the head: g / (|g| + 1e-8), entry by entry."""
    from bench.contenders import EAGER, certificates
    from covgrpo_kernels.benchmark import Ours, exact, step

    truth = exact(problem)
    found: dict[str, Any] = {}
    for name, contender in (("ours", Ours()), ("ours (exact)", Ours("exact", grad_tol=0.0)), ("eager", EAGER)):
        with certificates() as certified:
            results = step(contender, problem).results
        errors = {n: rms(results[n].double() - truth[n]) / rms(truth[n]) for n in ("dhidden", "dweight")}
        found[name] = errors | dict(first_update=_first_update_error(results["dweight"], truth["dweight"]))
        if name == "ours":
            rows = certified[0]["rows"]
            rows["dropped"] = 1 - rows["dense"] - rows["sparse"]
            certificate = certified[0]["error_bound"]
        del results
    return dict(row_classes=rows, certificate=certificate, errors=found)


def _first_update_error(gradient: Tensor, truth: Tensor) -> float:
    """Relative, in the Frobenius norm, a slice of the vocabulary at a time."""
    off = size = 0.0
    for g, exact in zip(gradient.split(4096), truth.split(4096), strict=True):
        update, wanted = (x.double() / (x.double().abs() + 1e-8) for x in (g, exact))
        off += (update - wanted).square().sum().item()
        size += wanted.square().sum().item()
    return math.sqrt(off / size)


def dlogits_error(problem: Any, probes: int) -> dict[str, float]:
    """The error of dL/dlogits itself, in the Frobenius norm over that of the exact one, on the first rows that
    have a coefficient.

    The backward never builds dL/dlogits. But hidden states with further dimensions, in which each row has a small
    number of its own and the weight has zeros, have the same logits, and there the gradient of the weight is that
    number times dL/dlogits. In float32, so that nothing but what is left out counts, with the tolerance of the
    problem's dtype."""
    from bench.contenders import certificates

    chosen = problem.logprob_grad.nonzero().squeeze(1)[:probes]
    n = len(chosen)
    own = 2.0**-12  # small beside the states, by whose angles tails are mixed
    states, targets, g = problem.hidden[chosen], problem.targets[chosen], problem.logprob_grad[chosen]
    hidden = torch.cat([states.float(), own * torch.eye(n)], 1)
    weight = torch.cat([problem.weight.float(), torch.zeros(len(problem.weight), n)], 1).requires_grad_()
    tolerance = resolve_grad_tol("auto", problem.hidden.dtype)
    with certificates() as certified:
        out = linear_logprob(hidden, weight, targets, grad_tol=tolerance).logprob
        [gradient] = torch.autograd.grad((out * g).sum(), weight)
    ours = gradient[:, -n:].T / own  # [n, V]
    off = size = 0.0
    exact_weight = problem.weight.double()
    for rows in torch.arange(n).split(BLOCK):
        dz = -(states[rows].double() @ exact_weight.T).softmax(1)
        dz[torch.arange(len(rows)), targets[rows]] += 1
        dz *= g[rows].double().unsqueeze(1)
        off += (ours[rows].double() - dz).square().sum().item()
        size += dz.square().sum().item()
    return dict(rows=n, certificate=certified[0]["error_bound"], error=math.sqrt(off / size))


# ------------------------------------------------------------------------------------------------------------ report


def report(found: dict[str, Any]) -> str:
    """Markdown: a line for each quantity, a column for each of the inputs."""
    inputs = found["inputs"]
    lines = [["", *inputs]]
    for title, value in _LINES:
        lines.append([title, *(value(x) for x in inputs.values())])
    lines.insert(1, ["---"] * len(lines[0]))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    where = found["environment"]
    return (
        "# What the heads of real policies see\n\n"
        "Written by `python -m research recordings`; `research/recordings.py` says how each line is measured. "
        "The models are those of `research/models.py` (4-bit weights, computed in float32); they answered "
        f"{PROMPTS_USED} prompts on mathematics, code and prose, sampling at the temperature named. All in bfloat16. "
        "Distributions are of all tokens, "
        f"errors and row classes of {found['rows']}. "
        "Advantages are of real answers in mathematics and made up elsewhere. `rl_head` is the generator of the "
        "benchmark's inputs, at SmolLM2's size, for its three policies: the last two are fitted to SmolLM2's "
        "recordings.\n\n"
        f"{table}\n\n"
        f"Commit {where['commit']}, torch {where['torch']}, backend {where['backend']}.\n"
    )


def _quantiles(name: str, form: str) -> Any:
    def value(x: dict[str, Any]) -> str:
        return " / ".join(format(x[name][q], form) for q in ("10%", "50%", "90%"))

    return value


def _error(contender: str, name: str) -> Any:
    return lambda x: f"{x['errors'][contender][name]:.1e}"


_LINES: list[tuple[str, Any]] = [
    ("hidden size, vocabulary", lambda x: "{depth}, {vocab}".format(**x["size"])),
    ("tokens that are not padding", lambda x: str(x["rows"])),
    ("with a coefficient, of all", lambda x: f"{x['coefficients']:.0%}"),
    ("mean entropy, nats", lambda x: f"{x['entropy']['mean']:.2f}"),
    ("entropy, 10% / median / 90%", _quantiles("entropy", ".2f")),
    ("sampled token above 0.99", lambda x: f"{x['target_above_99']:.0%}"),
    ("entries above the floor, mean", lambda x: f"{x['entries']['mean']:.0f}"),
    ("the same, 10% / median / 90%", _quantiles("entries", ".0f")),
    *((f"rows with more than {n}", lambda x, n=n: f"{x['entries_above'][str(n)]:.0%}") for n in MANY),
    ("mass of the tail, mean", lambda x: f"{x['tail_mass']['mean']:.1e}"),
    ("the same, 10% / median / 90%", _quantiles("tail_mass", ".1e")),
    ("tail's sum of squares over mass times floor", _quantiles("tail_fill", ".2f")),
    ("Zipf exponent, ranks 16 to 1024", _quantiles("exponent", ".2f")),
    (
        "rows dense / sparse / dropped",
        lambda x: " / ".join(f"{x['row_classes'][name]:.0%}" for name in ("dense", "sparse", "dropped")),
    ),
    ("certificate: error of dL/dlogits at most", lambda x: f"{x['certificate']:.1e}"),
    ("on some rows with a coefficient: certificate", lambda x: f"{x['dlogits']['certificate']:.1e}"),
    ("on the same rows: error of dL/dlogits", lambda x: f"{x['dlogits']['error']:.1e}"),
    ("error of dH: ours", _error("ours", "dhidden")),
    ("ours (exact)", _error("ours (exact)", "dhidden")),
    ("eager", _error("eager", "dhidden")),
    ("error of dW: ours", _error("ours", "dweight")),
    ("ours (exact)", _error("ours (exact)", "dweight")),
    ("eager", _error("eager", "dweight")),
    ("AdamW's first update of the head: ours", _error("ours", "first_update")),
    ("ours (exact)", _error("ours (exact)", "first_update")),
    ("eager", _error("eager", "first_update")),
]
