"""The report: every sentence and every table of it is made from study.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from covgrpo_kernels.grpo.checkpoint import write_atomically

from ..models import SOURCES
from .arms import ABLATIONS, ALL_ARMS, ARMS, VARIANTS
from .statistics import TAILS, Difference, difference
from .summary import POINTS, Line, Summaries

MEASURES = {  # of a run: the name in study.json, and a heading
    "entropy": "entropy",
    "entropy variance": "variance of entropy",
    "reward": "reward",
    "pass@1": "pass@1",
    "pass@8": "pass@8",
}


class Study:
    """The runs by task, arm and seed; differences between arms are always of runs of the same seed."""

    def __init__(self, summaries: Summaries) -> None:
        self.options = summaries.tasks
        self.runs = {(run["task"], run["arm"], run["seed"]): run for run in summaries.runs}

    @property
    def tasks(self) -> list[str]:
        return list(self.options)

    def arms(self, task: str, among: Iterable[str] = ALL_ARMS) -> list[str]:
        return [arm for arm in among if self.seeds(task, arm)]

    def seeds(self, task: str, *arms: str) -> list[int]:
        """Those that all these arms have."""
        return sorted(set.intersection(*({seed for t, a, seed in self.runs if (t, a) == (task, arm)} for arm in arms)))

    def runs_of(self, task: str, arm: str) -> list[Line]:
        return [self.runs[task, arm, seed] for seed in self.seeds(task, arm)]

    def mean(self, task: str, arm: str, measure: str) -> float:
        return fmean(run[measure] for run in self.runs_of(task, arm))

    def difference(self, task: str, arm: str, baseline: str, measure: str, comparisons: int) -> Difference:
        pairs = [
            (self.runs[task, arm, seed][measure], self.runs[task, baseline, seed][measure])
            for seed in self.seeds(task, arm, baseline)
        ]
        return difference(torch.tensor([a - b for a, b in pairs], dtype=torch.float64), comparisons)

    def change(self, task: str, arm: str, before: str, after: str) -> Difference:
        changes = [run[after] - run[before] for run in self.runs_of(task, arm)]
        return difference(torch.tensor(changes, dtype=torch.float64), 1)


# --- what the paper says ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """That a measure of CW-GRPO is above (1) or below (-1) the baseline's; or, with ``at_least``, not below it."""

    measure: str
    wanted: int
    words: str
    at_least: bool = False

    def verdict(self, found: Difference) -> str:
        if found.sign == 0:
            return "no difference is seen" if self.at_least else "not seen"
        if found.sign == self.wanted:
            return "holds" if found.survives else "holds, less surely"
        return "the opposite is seen" if found.survives else "the opposite is seen, less surely"


CLAIMS = {
    "Entropy stays up": [Claim("entropy", 1, "entropy over the last half of the steps is higher")],
    "Entropy is stable": [Claim("entropy variance", -1, "the variance of entropy over the last half is lower")],
    "Extreme tokens are tamed": [
        Claim("top 0.01%", -1, "the largest 0.01% of covariances are smaller"),
        Claim("top 1%", -1, "the largest 1% of covariances are smaller"),
        Claim("bottom 1%", 1, "the smallest 1% of covariances are nearer to zero"),
        Claim("bottom 0.01%", 1, "the smallest 0.01% of covariances are nearer to zero"),
    ],
    "Nothing is lost": [
        Claim("reward", 1, "reward over the last tenth of the steps is at least as high", at_least=True),
        Claim("pass@1", 1, "held-out pass@1 is at least as high", at_least=True),
        Claim("pass@8", 1, "held-out pass@8 is at least as high", at_least=True),
    ],
}


def _claims(study: Study) -> int:
    """Comparisons that are made for all claims and tasks."""
    return sum(map(len, CLAIMS.values())) * len(_tasks_with(study, "cw_grpo", "grpo"))


def _found(study: Study, task: str, claim: Claim) -> Difference:
    return study.difference(task, "cw_grpo", "grpo", claim.measure, _claims(study))


def in_short(study: Study) -> list[str]:
    lines = []
    for heading, claims in CLAIMS.items():
        lines.append(f"- {heading}:")
        for claim in claims:
            verdicts = [
                f"{claim.verdict(_found(study, task, claim))} on {task}"
                for task in _tasks_with(study, "cw_grpo", "grpo")
            ]
            lines.append(f"  - {claim.words}: {'; '.join(verdicts)}.")
    return lines


def claim_lines(study: Study) -> list[str]:
    lines = []
    for heading, claims in CLAIMS.items():
        lines += ["", f"**{heading}.**", ""]
        for claim in claims:
            for task in _tasks_with(study, "cw_grpo", "grpo"):
                found = _found(study, task, claim)
                lines.append(
                    f"- {claim.words[0].upper()}{claim.words[1:]}, {task}: *{claim.verdict(found)}*. "
                    f"{_number(study.mean(task, 'cw_grpo', claim.measure))} against "
                    f"{_number(study.mean(task, 'grpo', claim.measure))}, a difference of {_interval(found)}."
                )
    return lines


def premise(study: Study) -> list[str]:
    """Whether there was anything to stabilise."""
    lines = []
    for task in study.tasks:
        found = study.change(task, "grpo", "entropy first", "entropy last")
        verb = {-1: "falls", 0: "neither falls nor rises for sure", 1: "rises"}[found.sign]
        lines.append(
            f"- {task}: GRPO's entropy {verb}, from {_number(study.mean(task, 'grpo', 'entropy first'))} nats a token "
            f"in the first tenth of the steps to {_number(study.mean(task, 'grpo', 'entropy last'))} in the last, by "
            f"{_alone(found)}; reward goes from {_number(study.mean(task, 'grpo', 'reward first'))} to "
            f"{_number(study.mean(task, 'grpo', 'reward'))}, held-out pass@1 from "
            f"{_number(study.mean(task, 'grpo', 'pass@1 before'))} to {_number(study.mean(task, 'grpo', 'pass@1'))}, "
            f"pass@8 from {_number(study.mean(task, 'grpo', 'pass@8 before'))} to "
            f"{_number(study.mean(task, 'grpo', 'pass@8'))}."
        )
    return lines


ARMS_OF_CONTROL = {
    "permuted": "the same weights in random order",
    "mean_weight": "GRPO and a learning rate as much smaller as the weights make the advantages",
}


def controls(study: Study) -> list[str]:
    """What of CW-GRPO's effect is due to which token gets which weight."""
    lines = []
    for control, what in ARMS_OF_CONTROL.items():
        for task in _tasks_with(study, "cw_grpo", control):
            for measure, heading in MEASURES.items():
                comparisons = len(ARMS_OF_CONTROL) * len(MEASURES) * len(study.tasks)
                found = study.difference(task, "cw_grpo", control, measure, comparisons)
                effect = {0: "is not told apart from that of", 1: "is higher than with", -1: "is lower than with"}
                sure = ", less surely" if found.sign and not found.survives else ""
                lines.append(f"- {task}: {heading} {effect[found.sign]} {what}{sure}: {_interval(found)}.")
    return lines


def verdicts_on_variants(study: Study) -> list[str]:
    """Which of the variants keep entropy and lose no reward, on every task."""
    lines = []
    for variant in ("cw_grpo", *VARIANTS):
        tasks = _tasks_with(study, variant, "grpo")
        if not tasks:
            continue
        failures = []
        for task in tasks:
            found = {
                measure: study.difference(task, variant, "grpo", measure, _variant_comparisons(study, task))
                for measure in ("entropy", "reward", "pass@1")
            }
            if not (found["entropy"].sign > 0 and found["entropy"].survives):
                failures.append(f"entropy is not higher for sure on {task}, {_interval(found['entropy'])}")
            for measure in ("reward", "pass@1"):
                if found[measure].sign < 0:
                    failures.append(f"{measure} is lower on {task}, {_interval(found[measure])}")
        title = ALL_ARMS[variant].title
        lines.append(f"- {title}: {'; '.join(failures) if failures else 'entropy is kept, and no reward is lost'}.")
    return lines


def _variant_comparisons(study: Study, task: str) -> int:
    return len(MEASURES) * (1 + len(study.arms(task, VARIANTS)))


# --- tables -----------------------------------------------------------------------------------------------


def differences(study: Study, task: str, arms: Sequence[str], baseline: str) -> list[str]:
    """Means of the baseline and what differs from it, as a table and in words."""
    others = [arm for arm in arms if arm != baseline]
    rows = [[ALL_ARMS[baseline].title, *(_number(study.mean(task, baseline, measure)) for measure in MEASURES)]]
    words = []
    for arm in others:
        found = {
            heading: study.difference(task, arm, baseline, measure, len(others) * len(MEASURES))
            for measure, heading in MEASURES.items()
        }
        rows.append([ALL_ARMS[arm].title, *map(_cell, found.values())])
        told = [
            f"{heading} is {'higher' if each.sign > 0 else 'lower'}{'' if each.survives else ' (less surely)'}"
            for heading, each in found.items()
            if each.sign
        ]
        words.append(f"- {ALL_ARMS[arm].title}: {', '.join(told) or 'no difference is seen'}.")
    how = f"The first row has means over seeds; the others have the difference to {ALL_ARMS[baseline].title}."
    return [how, "", *_table(["", *MEASURES.values()], rows), "", *words]


def covariance_table(study: Study, task: str) -> list[str]:
    ends = [f"top {share}" for share in TAILS] + [f"bottom {share}" for share in reversed(TAILS)][1:]
    rows = [
        [ALL_ARMS[arm].title, *(_number(study.mean(task, arm, name)) for name in (*ends, "covariance spread"))]
        for arm in study.arms(task, ARMS)
    ]
    return _table(["", *ends, "spread"], rows)


def entropy_table(study: Study, task: str) -> list[str]:
    rows = []
    for arm in study.arms(task, ARMS):
        curves = [run["curves"] for run in study.runs_of(task, arm)]
        means = [fmean(point) for point in zip(*(curve["entropy"] for curve in curves), strict=True)]
        # Curves are means over stretches of steps, of which "step" is the middle.
        places = [means.index(max(means)), means.index(min(means))]
        ends = [f"{_number(means[i])} at {curves[0]['step'][i]:.0f}" for i in places]
        first, last = (_number(study.mean(task, arm, f"entropy {end}")) for end in ("first", "last"))
        rows.append([ALL_ARMS[arm].title, first, *ends, last])
    return _table(["", "first tenth", "highest", "lowest", "last tenth"], rows)


def weight_table(study: Study, task: str) -> list[str]:
    columns = {
        "advantages kept": "advantages kept",
        "smallest weight": "smallest weight",
        "largest weight": "largest",
        "effective share": "effective share",
        "gradient norm": "gradient norm",
        "largest gradient norm": "largest",
        "lr": "learning rate",
    }
    rows = [
        [ALL_ARMS[arm].title, *(_number(study.mean(task, arm, name)) for name in columns)] for arm in study.arms(task)
    ]
    return _table(["", *columns.values()], rows)


def sweep_table(study: Study, sweep: Sequence[Line]) -> list[str]:
    rewards = {(line["arm"], line["lr"]): line["reward"] for line in sweep}
    rates, rows = sorted({line["lr"] for line in sweep}), []
    for arm in dict.fromkeys(line["arm"] for line in sweep):
        (chosen,) = {run["lr"] for task in study.tasks for run in study.runs_of(task, arm)}
        cells = {lr: _number(rewards[arm, lr]) for lr in rates}
        rows.append([ALL_ARMS[arm].title, *(f"**{cell}**" if lr == chosen else cell for lr, cell in cells.items())])
    return _table(["", *(f"{lr:g}" for lr in rates)], rows)


# --- the document -----------------------------------------------------------------------------------------

INTRODUCTION = """\
Made by `python -m research study` from `study.json`; nothing here is written by hand. The paper is arXiv 2605.11538.
What is not said to be of a real model is of a policy with some 0.1 million parameters on generated problems: it can
show what the weights do to a policy gradient, not what they do for a language model of billions."""

VERDICTS = """\
*Holds*, *the opposite is seen*: the 95% interval of the paired difference leaves out zero, with all {comparisons}
comparisons of these claims in mind; *less surely*: on its own only; *not seen*, *no difference is seen*: it does not,
and its ends, below, say how large a difference could have been missed."""

PROTOCOL = """\
All runs of a task start from one policy; runs of the same seed get the same problems; held-out problems and the random
numbers that answer them are the same in all. Reward is that of the last tenth of the steps, pass@1 and pass@8 are those
after the last step. Entropy is exact, over the whole vocabulary, of the states that were sampled; its mean and its
variance are over the last half of the steps."""

CONTROLS = """\
CW-GRPO against two controls. The mean of the weights is 1 by construction; but the weighted advantages are smaller than
the advantages, since tokens with large ones have large covariances. AdamW is blind to a constant factor of the loss, so
the second control has it in the learning rate. The permuted weights are computed once, before the updates of a step;
CW-GRPO's in each update."""

VARIANTS_OF_WEIGHTS = """\
What the Gaussian takes away is lopsided: large covariances are mostly those of unlikely tokens in bad responses, and
the weighted advantages add up to less than zero. Three changes to that, each against GRPO. The weighted advantages of a
group can have their mean taken off, under the weights, so that they add up to zero; the Gaussian can weigh the
covariances of one sign alone; and its centre can be the mean covariance in place of zero. These weights are computed
once, before the updates of a step; CW-GRPO's are computed in each update. A variant is worth having that keeps entropy
(higher than GRPO's with all comparisons in mind) and loses nothing (neither reward nor pass@1 is lower on its own)."""

COVARIANCES = """\
Means of the largest and of the smallest covariances, as in the paper's table: of so many per cent of all tokens of a
run, each before the update that saw it. The spread is the standard deviation over the tokens of a step, its mean over
steps. Covariances are products of deviations of log-prob and advantage: read them beside the entropies above."""

ENTROPIES = """\
Means over seeds, as in the picture above: of the first and the last tenth of the steps, and of the stretches of
{steps} steps where it is highest and lowest, with the step in their middle."""

REAL_MODEL = """\
{model}, all of its weights trained in {dtype} from its own start. It answers a question after a few
examples, in a line: the sum of two numbers of two digits, or the largest of five. Tasks, arms, claims and the rule for
learning rates were fixed before the first run."""

SWEEP = """\
Each arm has the learning rate with the highest reward at the end of a short run on the first task, with a seed that no
other run has. Where two arms have different ones, a difference between them may be the learning rate's. That reward by
learning rate, the chosen one in bold:"""

INTERVALS = """\
Intervals are of paired differences over seeds: bootstrap-t, and of fewer than six seeds Student's, as if the
differences were normal; of so few seeds a difference that is not told from zero may well be there. In a table a star
says that the interval leaves out zero, two that it does so with all comparisons of the table in mind (Bonferroni); in
the pictures of differences thick lines are the first, orange where they leave out zero, and thin lines the second, red
where they do. Advantages kept: sum |W A| / sum |A| for the weights that CW-GRPO gives or would give. Minibatches are so
small that Clip-Cov and KL-Cov choose one token of each, which is more than the share that their paper has."""


def real_model(summaries: Summaries) -> list[str]:
    """The section of the runs with a real model."""
    study = Study(summaries)
    options = study.options[study.tasks[0]]["options"]
    about = REAL_MODEL.format(model=SOURCES[options["model"]].title, dtype=options["dtype"])
    lines = ["", "## On a real model", "", about, "", *in_short(study)]
    lines += ["", *[_protocol(study, task) for task in study.tasks]]
    if summaries.sweep:
        lines += ["", SWEEP, "", *sweep_table(study, summaries.sweep)]
    lines += ["", *premise(study)]
    lines += ["", "![Reward, entropy and held-out accuracy on the real model](real_run_curves.png)"]
    lines += ["", "### CW-GRPO against GRPO, real model", *claim_lines(study)]
    for task in study.tasks:
        lines += ["", f"### All arms, {task}", "", *differences(study, task, study.arms(task), "grpo")]
        lines += ["", f"### Covariances, {task}", "", *covariance_table(study, task)]
        lines += ["", f"### Weights and gradients, {task}", "", *weight_table(study, task)]
    return lines


def document(summaries: Summaries, real: Summaries | None = None) -> str:
    """``real``: of the runs with a real model, where there are some."""
    study = Study(summaries)
    compared = _tasks_with(study, "cw_grpo", "grpo")
    lines = ["# Does it do what the paper says?", "", INTRODUCTION]
    if compared:
        lines += ["", "## In short", "", *in_short(study), "", VERDICTS.format(comparisons=_claims(study))]
    lines += ["", "## What was run", "", *[_protocol(study, task) for task in study.tasks], "", PROTOCOL]
    lines += ["", "## Was there anything to stabilise?", "", *premise(study)]
    lines += ["", "![Reward, entropy and held-out accuracy of every arm](study_curves.png)"]
    if compared:
        lines += ["", "## CW-GRPO against GRPO", *claim_lines(study)]
    if any(_tasks_with(study, "cw_grpo", control) for control in ARMS_OF_CONTROL):
        lines += ["", "## Is it the covariance?", "", CONTROLS, "", *controls(study)]
    several = [task for task in study.tasks if len(study.arms(task, ARMS)) > 1]
    for task in several:
        lines += ["", f"## All arms, {task}", "", *differences(study, task, study.arms(task, ARMS), "grpo")]
    if several:
        lines += ["", "![Differences to GRPO with their intervals](study_differences.png)"]
    varied = [task for task in study.tasks if study.arms(task, VARIANTS)]
    if varied:
        lines += ["", "## Can entropy be kept at no cost in reward?", "", VARIANTS_OF_WEIGHTS]
        lines += ["", *verdicts_on_variants(study)]
    for task in varied:
        arms = study.arms(task, ("grpo", "cw_grpo", *VARIANTS))
        lines += ["", f"### Variants of the weights, {task}", "", *differences(study, task, arms, "grpo")]
    for task in study.tasks:
        readings = study.arms(task, ABLATIONS)
        if readings:
            lines += ["", f"## Which readings of the paper matter? ({task})", ""]
            lines += differences(study, task, ["cw_grpo", *readings], "cw_grpo")
            lines += ["", "![Differences of the readings to CW-GRPO](study_ablations.png)"]
    for task in study.tasks:
        about = ENTROPIES.format(steps=-(-study.options[task]["options"]["steps"] // POINTS))
        lines += ["", f"## Entropy over the run, {task}", "", about, "", *entropy_table(study, task)]
    for task in study.tasks:
        lines += ["", f"## Covariances, {task}", "", COVARIANCES, "", *covariance_table(study, task)]
    for task in study.tasks:
        lines += ["", f"## Weights and gradients, {task}", "", *weight_table(study, task)]
    if real is not None:
        lines += real_model(real)
    lines += ["", "## How sure is this?", "", INTERVALS]
    return "\n".join(lines) + "\n"


def save_report(summaries: Summaries, path: Path, real: Summaries | None = None) -> None:
    text = document(summaries, real)
    write_atomically(path, lambda file: file.write(text.encode()))


def _protocol(study: Study, task: str) -> str:
    options, evaluation = (study.options[task][name] for name in ("options", "evaluation"))
    runs = [run for (t, _, _), run in study.runs.items() if t == task]
    rates = sorted({run["lr"] for run in runs if ALL_ARMS[run["arm"]].lr_like is None})
    lr = " or ".join(f"{rate:g}" for rate in rates) + (", by arm" if len(rates) > 1 else "")
    difficulty = "" if options["model"] else f", difficulty {options['difficulty']}"
    return (
        f"- {task}{difficulty}: {len(runs)} runs, {len(study.arms(task))} arms of "
        f"{min(len(study.seeds(task, arm)) for arm in study.arms(task))} seeds at least; {options['steps']} steps of "
        f"{options['prompts_per_step']} problems with {options['group_size']} responses each, "
        f"{options['inner_steps']} updates a step; temperature {options['temperature']:g}, AdamW at "
        f"{lr}; {evaluation['problems']} held-out problems with {evaluation['samples']} responses each. "
        f"A run has {_number(fmean(run['tokens'] for run in runs))} tokens and took "
        f"{fmean(run['seconds'] for run in runs):.0f} s on one core."
    )


def _tasks_with(study: Study, *arms: str) -> list[str]:
    return [task for task in study.tasks if len(study.seeds(task, *arms)) > 1]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:+.2g}"


def _alone(found: Difference) -> str:
    return f"{_signed(found.mean)} ({_signed(found.low)} to {_signed(found.high)})"


def _interval(found: Difference) -> str:
    return (
        f"{_signed(found.mean)} (95%: {_signed(found.low)} to {_signed(found.high)}; "
        f"with all comparisons: {_signed(found.low_all)} to {_signed(found.high_all)})"
    )


def _cell(found: Difference) -> str:
    stars = "" if not found.sign else " \\*\\*" if found.survives else " \\*"
    return f"{_alone(found)}{stars}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
