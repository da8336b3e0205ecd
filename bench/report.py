"""Rewrites the figures of README.md and bench/README.md, and the plots, from the JSON under bench/results/."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import host
from .cases import all_cases
from .compare import Line, bare_step, lines, noise

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RECORDINGS = ROOT / "research" / "results" / "recordings.json"
BEGIN, END = "<!-- figures: python -m bench report -->", "<!-- end of figures -->"
NOTHING = "Nothing has been measured yet: `python -m bench`."

HEADER = [
    "", "forward", "step", "spread", "over ours", "of the limit", "peak MiB", "log-prob max", "dH", "dW", "x eager's",
]  # fmt: skip

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    for path in plot(read(RESULTS), RESULTS):
        print(path)
    for document, figures in documents(RESULTS).items():
        document.write_text(updated(document.read_text(), figures))
        print(document)


def read(folder: Path) -> list[Report]:
    """Those of the comparison, in the order of the cases; bfloat16 first."""
    order = [case.name for case in all_cases("cpu")]
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    known = [report for report in reports if report.get("case")]
    return sorted(
        known, key=lambda r: (r["device"], (order.index(r["case"]) if r["case"] in order else 99), r["dtype"])
    )


def documents(folder: Path) -> dict[Path, str]:
    """The figures of each, from a folder of results."""
    reports, of_host = read(folder), folder / host.RESULT.name
    parts = [everything(reports)]
    if of_host.exists():
        parts.append(_host(json.loads(of_host.read_text())))
    return {ROOT / "README.md": summary(reports), ROOT / "bench" / "README.md": "\n\n".join(parts)}


def _host(report: Report) -> str:
    command = "python -m bench host" + (" --against FOLDER" if "before" in report else "")
    return f"### host\n\n`{command}`. {host.describe(report)}.\n\n{table(host.HEADER, host.rows(report))}"


def updated(text: str, figures: str) -> str:
    """The document with its figures in place of those it has."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


# ----------------------------------------------------------------------------------------------------------- tables


def cells(point: Report) -> list[list[str]]:
    """A row for each contender, the fastest first, and the bare products."""
    ranked = lines(point)
    ours = next((line.step for line in ranked if line.name == "ours"), None)
    rows = []
    for line in ranked:
        logprob = line.errors["logprob"]
        gradients = [line.errors.get(name) for name in ("dhidden", "dweight")]
        of_eager = [x["of_eager"] for x in [logprob, *gradients] if x and x["of_eager"] is not None]
        rows.append(
            [
                line.name,
                "" if line.forward is None else seconds(line.forward),
                seconds(line.step),
                f"{seconds(line.low)} to {seconds(line.high)}",
                "" if ours is None else f"{line.step / ours:.2f}",
                f"{line.limit:.0%}",
                "" if line.peak_mib is None else f"{line.peak_mib:.0f}",
                f"{logprob['max']:.1e}",
                *("" if x is None or x["relative"] is None else f"{x['relative']:.1e}" for x in gradients),
                f"{max(of_eager):.2g}" if of_eager else "",
            ]
        )
    bare = bare_step(point)
    rows.append(["bare products", seconds(statistics.median(point["bare"]["forward"])), seconds(bare)] + [""] * 8)
    return rows


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def where(*reports: Report) -> str:
    """The first one's machine and versions, and the commits of all."""
    x, commits = reports[0]["environment"], dict.fromkeys(report["environment"]["commit"] for report in reports)
    machine = x.get("gpu") or f"{x['cpu']}, {x['threads']} threads"
    peers = ", ".join(f"{name} {version}" for name, version in x["peers"].items() if version)
    return f"{machine}, backend {x['backend']}, torch {x['torch']}, {peers}; commit {', '.join(commits)}"


def _size(point: Report) -> str:
    return "N={tokens}, D={depth}, V={vocab}".format(**point["size"])


def _headlines(reports: list[Report]) -> list[Report]:
    """Of a GPU where one was measured."""
    found = [r for r in reports if r["case"] == "headline"]
    return [r for r in found if r["device"] == "cuda"] or found


def summary(reports: list[Report]) -> str:
    """One plot and one table, for the main README."""
    headlines = _headlines(reports)
    if not headlines:
        return NOTHING
    point = headlines[0]["points"][0]
    by_dtype = [{line.name: line for line in lines(r["points"][0])} for r in headlines]
    names = list(dict.fromkeys(name for lines_ in by_dtype for name in lines_))
    header = [""] + [f"{r['dtype']}: {what}" for r in headlines for what in ("step", "MiB", "error of dW")]
    rows = []
    for name in names:
        row = [name]
        for lines_ in by_dtype:
            row += _short(lines_.get(name))
        rows.append(row)
    turns = len(next(iter(point["contenders"].values()))["forward"])
    return "\n".join(
        [
            f"![Error of the gradients against the time of a step](bench/results/{headlines[0]['device']}_pareto.png)",
            "",
            *_claim(headlines[0]["dtype"], by_dtype[0]),
            f"Forward and backward on RL-like inputs, {_size(point)}, {1 - point['coefficients']:.0%} of the tokens "
            f"without a gradient (padding, clipped, or of zero advantage), median of {turns} turns; memory beyond "
            "inputs and gradients; errors against float64, as shares of dW. *eager*: logits, then log-softmax; "
            f"*PyTorch*: its `linear_cross_entropy`. ({where(*headlines)})",
            "",
            table(header, rows),
            *policies(headlines),
        ]
    )


def policies(reports: list[Report]) -> list[str]:
    """How the step depends on the policy, where more than one was measured."""
    points = [(report["dtype"], point) for report in reports for point in report["points"] if len(report["points"]) > 1]
    if not points:
        return []
    header = [
        "", "mean entropy", "rows dense / sparse / dropped", "ours", "ours (exact)", "eager", "fastest peer",
        "error of dW, x eager's",
    ]  # fmt: skip
    rows = [row for dtype, point in points for row in (_policy(dtype, point), _recording(dtype, point)) if row]
    return [
        "",
        "The same for policies that are more or less sure; the times of the others are in multiples of ours. Two "
        "policies are fitted to recordings of a real model, SmolLM2, at temperatures of 0.6 and 1.0. What was recorded "
        "stands below them (fewer of its tokens have a gradient); `research/results/recordings.md` has more of it. "
        "[Performance](docs/performance.md#the-backward) says what dense, sparse and dropped rows are:",
        "",
        table(header, rows),
    ]


def _recording(dtype: str, point: Report) -> list[str]:
    """What the policy of a point is fitted to, where it is, in the recordings' dtype."""
    temperature = point["label"].removeprefix("RL-like, recorded-").removesuffix(" policy")
    inputs = json.loads(RECORDINGS.read_text())["inputs"] if dtype == "bfloat16" else {}
    if (recorded := inputs.get(f"smollm2 at {temperature}")) is None:
        return []
    return [
        f"*SmolLM2 at {temperature}*",
        f"{recorded['entropy']['mean']:.2f}",
        _row_classes(*(recorded["row_classes"][name] for name in ("dense", "sparse"))),
        *[""] * 5,
    ]


def _row_classes(dense: float, sparse: float) -> str:
    return " / ".join(f"{share:.0%}" for share in (dense, sparse, 1 - dense - sparse))


def _policy(dtype: str, point: Report) -> list[str]:
    by_name = {line.name: line for line in lines(point)}
    if (ours := by_name.get("ours")) is None or ours.certificate is None:
        return []

    def over_ours(line: Line | None) -> str:
        return "" if line is None else f"{line.step / ours.step:.2f}"

    # From the fastest on; compiled eager is eager.
    peers = [line for name, line in by_name.items() if not name.startswith(("ours", "eager"))]
    rows_of = ours.certificate["rows"]
    error = ours.errors["dweight"]["of_eager"]
    return [
        f"{dtype}, {point['label'].removeprefix('RL-like, ')}",
        f"{point['mean_entropy']:.2f}",
        _row_classes(rows_of["dense"], rows_of["sparse"]),
        seconds(ours.step),
        over_ours(by_name.get("ours (exact)")),
        over_ours(by_name.get("eager")),
        f"{over_ours(peers[0])} ({peers[0].name})" if peers else "",
        "" if error is None else f"{error:.2g}",
    ]


def _claim(dtype: str, of: dict[str, Line]) -> list[str]:
    """The table in one sentence, where ours and eager were measured."""
    if any(name not in of or of[name].peak_mib is None for name in ("ours", "eager")):
        return []
    ours, eager = (f"{step} and {peak} MiB" for step, peak, _ in (_short(of["ours"]), _short(of["eager"])))
    return [f"**In {dtype} a step takes {ours}; eager PyTorch takes {eager}.**", ""]


def _short(line: Line | None) -> list[str]:
    if line is None:
        return ["", "", ""]
    peak = "" if line.peak_mib is None else f"{line.peak_mib:.0f}"
    return [seconds(line.step), peak, f"{line.errors['dweight']['relative']:.1e}"]


def everything(reports: list[Report]) -> str:
    """All results, for bench/README.md."""
    if not reports:
        return NOTHING
    parts = []
    for device in dict.fromkeys(r["device"] for r in reports):
        here = [r for r in reports if r["device"] == device]
        for name, (what, drawn) in PLOTS.items():
            if drawn(here):
                parts.append(f"![{what}](results/{device}_{name}.png)")
        for report in here:
            parts.append(f"### {report['case']}, {report['dtype']}, {device}: {report['what']}")
            parts.append(f"`{command(report)}` on {where(report)}.")
            parts += [_point(point) for point in report["points"]]
    return "\n\n".join(parts)


def command(report: Report) -> str:
    """What measures it again."""
    chosen = {"replay": "--inputs FILE", "custom": "--size N,D,V"}.get(report["case"], f"--cases {report['case']}")
    return f"python -m bench {chosen} --dtype {report['dtype']} --device {report['device']}"


def _point(point: Report) -> str:
    # Some cases grow one of the sizes, and have it as their label.
    label = "" if point["label"].isdecimal() else f"{point['label']}, "
    text = (
        f"{label}{_size(point)}: {point['coefficients']:.0%} of the tokens have a gradient, mean entropy "
        f"{point['mean_entropy']:.2f}.\n\n{table(HEADER, cells(point))}"
    )
    remarks = [certificate(line) for line in lines(point) if line.certificate and line.certificate["error_bound"]]
    remarks += [f"Wrong numbers, no timing: {name}: {x['why']}" for name, x in point["wrong"].items()]
    remarks += [f"Not measured: {name}: {why}" for name, why in point["missing"].items()]
    remarks += [f"{warning[0].upper()}{warning[1:]}" for warning in noise(point)]
    return "\n\n".join([text, *(["\n".join(f"- {x}." for x in remarks)] if remarks else [])])


def certificate(line: Line) -> str:
    """What `grad_tol` promised beside what came out."""
    assert line.certificate is not None
    made = {name: line.errors[name]["relative"] for name in ("dhidden", "dweight") if name in line.errors}
    true = ", ".join(f"{name} {relative:.1e}" for name, relative in made.items())
    rows = ", ".join(f"{share:.0%} of the rows {name}" for name, share in line.certificate["rows"].items())
    return (
        f"{line.name}: certified to be off by at most {line.certificate['error_bound']:.1e} of dL/dlogits, "
        f"{rows}; true errors, rounding included: {true}"
    )


# ------------------------------------------------------------------------------------------------------------ plots


def plot(reports: list[Report], folder: Path) -> Iterator[Path]:
    for device in dict.fromkeys(r["device"] for r in reports):
        here = [r for r in reports if r["device"] == device]
        for name, (title, drawn) in PLOTS.items():
            if not (chosen := drawn(here)):
                continue
            figure = DRAW[name](chosen)
            figure.suptitle(title)
            path = folder / f"{device}_{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            yield path


def _with(case: str) -> Any:
    return lambda reports: [r for r in reports if r["case"].startswith(case)]


# Name -> title, and the reports it shows.
PLOTS = {
    "pareto": ("Error of the gradients against the time of a step", _with("headline")),
    "limit": ("Share of the physical limit: bare products of an exact step over the time of a step", _with("headline")),
    "growth": ("Time and memory of a step as one size grows", _with("growth")),
}


def _style(name: str) -> dict[str, Any]:
    """Ours in one colour, the others in one each, the same in all plots."""
    from .contenders import CONTENDERS

    if name.startswith("ours"):
        return dict(color="black", marker={"ours": "*", "ours (exact)": "D"}.get(name, "p"))
    names = [c.name for c in CONTENDERS if not c.ours]
    return dict(color=f"C{names.index(name) if name in names else len(names)}", marker="o")


def _figure(rows: int, columns: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * columns, 3.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_pareto(reports: list[Report]) -> Any:
    figure, [axes] = _figure(1, len(reports))
    for axis, report in zip(axes, reports, strict=True):
        for line in lines(report["points"][0]):
            error = max(line.errors[name]["relative"] for name in ("dhidden", "dweight"))
            axis.errorbar(
                line.step, error, xerr=[[line.step - line.low], [line.high - line.step]], markersize=8, linestyle="",
                label=line.name, **_style(line.name),
            )  # fmt: skip
        axis.set(yscale="log", xlabel="seconds a step", title=report["dtype"])
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("RMS error of dH or dW, relative")
    _legend(figure, axes)
    return figure


def _draw_limit(reports: list[Report]) -> Any:
    figure, [axes] = _figure(1, len(reports))
    for axis, report in zip(axes, reports, strict=True):
        ranked = lines(report["points"][0])[::-1]
        colors = [_style(line.name)["color"] for line in ranked]
        bars = axis.barh([line.name for line in ranked], [100 * line.limit for line in ranked], color=colors)
        axis.bar_label(bars, fmt="%.0f%%", fontsize=7)
        axis.axvline(100, color="grey", linestyle=":")
        axis.set(xlabel="%", title=report["dtype"])
        axis.tick_params(labelsize=8)
    return figure


def _draw_growth(reports: list[Report]) -> Any:
    figure, axes = _figure(2, len(reports))
    for (time, memory), report in zip(axes.T, reports, strict=True):
        size = {"growth-tokens": "tokens", "growth-vocab": "vocab", "growth-depth": "depth"}[report["case"]]
        curves: dict[str, list[tuple[int, Line]]] = {}
        for point in report["points"]:
            for line in lines(point):
                curves.setdefault(line.name, []).append((point["size"][size], line))
        for name, curve in curves.items():
            style = dict(label=name, markersize=4, linewidth=1, **_style(name))
            time.plot([x for x, _ in curve], [line.step for _, line in curve], **style)
            peaks = [(x, line.peak_mib) for x, line in curve if line.peak_mib is not None]
            memory.plot([x for x, _ in peaks], [peak for _, peak in peaks], **style)
        time.set(xscale="log", yscale="log", title=f"{report['case']}, {report['dtype']}", ylabel="seconds a step")
        memory.set(xscale="log", xlabel=size, ylabel="peak MiB beyond inputs and gradients")
        memory.set_yscale("symlog", linthresh=10)
        memory.set_ylim(bottom=0)
        sizes = [point["size"][size] for point in report["points"]]
        for axis in (time, memory):
            axis.set_xticks(sizes, [str(x) for x in sizes])
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """One for all of them, since a contender may be missing in one."""
    found = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=8)


DRAW = {"pareto": _draw_pareto, "limit": _draw_limit, "growth": _draw_growth}
