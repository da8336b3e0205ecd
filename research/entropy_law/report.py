"""What was found, in words: the part of docs/method.md that nobody types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .law import LOGITS, OPTIMIZERS, STATES, UPDATES
from .statistics import chosen, interval, mean, middle, ratio, reported, stage_of

BEGIN, END = "<!-- figures: python -m research entropy-law -->", "<!-- end of figures -->"


def findings(results: dict[str, Any]) -> str:
    """Markdown: every number is one of entropy_law.json, and so is the reason for every verdict."""
    settings, logits = results["settings"], results["stages"][0]["logits"]
    laws = logits["laws"]
    slopes = ", ".join(f"{law['slope']:.2f} ({name})" for name, law in laws.items())
    worst = max(law["error"][0] / law["change"][0] for law in laws.values())
    text = [
        f"**Logits changed directly.** The error of `-Cov_p(log p, dz)` grows with the step to the power of {slopes}; "
        f"the law demands 2. At a step of {logits['step'][0]:g} it is at most {worst:.2%} of the change.",
        f"**Real updates.** Of each policy {settings['batches']} batches give one update each. In brackets are 95% "
        "bootstrap intervals over these batches, of each number by itself; they say nothing of other policies. *Own* "
        "states are those of the batch that gave the update; *fresh* ones are of held-out problems.",
        _in_short(results),
        f"Seed {settings['seeds'][0]} in full; all of them are in `research/results/entropy_law.json`:",
    ]
    for stage in reported(results):
        text += _stage(results, stage)
    return "\n\n".join(text)


def _stage(results: dict[str, Any], stage: dict[str, Any]) -> Iterator[str]:
    at = stage_of(stage)
    reward, before = (float(np.mean(stage[key])) for key in ("reward", "entropy"))
    yield f"#### After {stage['grpo_steps']} steps of GRPO: reward {reward:.2f}, entropy {before:.3f} nats"
    yield "\n".join(f"- {sentence}" for sentence in _verdicts(results, at))
    columns = [(optimizer, states) for optimizer in OPTIMIZERS for states in STATES]
    heads = [f"{o} {middle(results, o):g}, {s}" for o, s in columns]

    def rows(kind: str, key: str, cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        table: dict[str, list[str]] = {}
        for optimizer, states in columns:
            for row in chosen(results, kind, **at, optimizer=optimizer, states=states):
                table.setdefault(row[key], []).append(cell(row))
        return [[UPDATES.get(name, name), *cells] for name, cells in table.items()]

    yield "Correlation of the change of entropy with what each law predicts, and how often the sign is right:"
    yield _table(
        ["law", *heads],
        rows("laws", "law", lambda row: f"{between(row['correlation'])}; {row['agreement'][0]:.0%}"),
    )
    yield "Change of entropy, in thousandths of a nat, by the tokens that the update is made of:"
    yield _table(["tokens", *heads], rows("updates", "update", lambda row: _thousandths(row["change"])))


def _in_short(results: dict[str, Any]) -> str:
    """In how many cases a whole interval is on the side of the premise."""
    count = {}
    for states in STATES:
        laws, updates, weights = (list(chosen(results, kind, states=states)) for kind in results["statistics"])
        for law in ("covariance", LOGITS):
            count[law, states] = sum(row["correlation"][1] > 0 for row in laws if row["law"] == law)
        count["top", states] = sum(row["change"][2] < 0 for row in updates if row["update"] == "top")
        count["bottom", states] = sum(row["change"][1] > 0 for row in updates if row["update"] == "bottom")
        count["CW-GRPO", states] = sum(row["difference"][1] > 0 for row in weights)
    settings = results["settings"]
    among = {"seeds": settings["seeds"], "times in training": settings["grpo_steps"], "optimisers": OPTIMIZERS}
    cases = math.prod(map(len, among.values()))

    def both(name: str) -> str:
        return f"{count[name, 'own']} of {cases} for own states and in {count[name, 'fresh']} for fresh ones"

    return (
        f"**In short.** There are {cases} cases ({', '.join(f'{name}: {len(of)}' for name, of in among.items())}). "
        f"From batch to batch the covariance predicts the change of entropy in {both('covariance')}; the gradient of "
        f"each state's logits does in {both(LOGITS)}. An update on the fifth of the tokens with the highest "
        f"covariance lowers entropy in {both('top')}; one on the lowest fifth raises it in {both('bottom')}. After one "
        f"with CW-GRPO's weights entropy is higher than after GRPO's in {both('CW-GRPO')}."
    )


def _verdicts(results: dict[str, Any], at: dict[str, Any]) -> Iterator[str]:
    adam = {**at, "optimizer": "AdamW"}
    [stage] = [stage for stage in results["stages"] if at.items() <= stage.items()]
    predicted = stage["predicted"]
    covariance = interval(mean, predicted["covariance"])
    share = interval(ratio, predicted["covariance"], predicted["covariance between states"])
    moved = {
        (row["optimizer"], row["states"]): _moved(row["change"])
        for row in chosen(results, "updates", **at, update="all")
    }
    yield (
        f"The covariances predict a change of entropy of {_thousandths(covariance)} thousandths of a nat for a step of "
        f"1, on average (a share of {between(share)} of it from between states): entropy "
        f"{_verdict(covariance, 'should fall', 'should rise', 'should neither fall nor rise for certain')}. Measured, "
        f"the entropy of own states {moved['SGD', 'own']} with SGD and {moved['AdamW', 'own']} with AdamW, that of "
        f"fresh states {moved['SGD', 'fresh']} with SGD and {moved['AdamW', 'fresh']} with AdamW."
    )
    for states in STATES:
        laws = {row["law"]: row["correlation"] for row in chosen(results, "laws", **adam, states=states)}
        paper, logits = laws["covariance"], laws[LOGITS]
        yield (
            f"From batch to batch, the covariance {_predicts(paper)} how the entropy of {states} states changes with "
            f"AdamW: r = {between(paper)}, {paper[0] ** 2:.0%} of the variance. The gradient of each state's logits "
            f"{_predicts(logits)} it: r = {between(logits)}, {logits[0] ** 2:.0%}."
        )
    own = {row["update"]: row["change"] for row in chosen(results, "updates", **adam, states="own")}
    expected = own["top"][2] < 0 < own["bottom"][1]
    yield (
        f"After an update on the fifth of the tokens with the highest covariance entropy {_moved(own['top'])}, on the "
        f"lowest fifth it {_moved(own['bottom'])}, on those between it {_moved(own['middle'])}: "
        f"{'the signs are those' if expected else 'these are not, beyond doubt, the signs'} of the premise."
    )
    [sgd] = chosen(results, "laws", **at, optimizer="SGD", states="own", law="covariance")
    yield (
        f"With SGD a unit of the covariance is {between(sgd['slope'])} units of the change of own states' entropy for "
        "a unit of the step: states share parameters, so that nothing fixes this factor."
    )
    weights = {s: next(chosen(results, "weights", **adam, states=s)) for s in STATES}
    [plain] = chosen(results, "weights", **at, optimizer="SGD", states="own")
    own, fresh = (weights[s]["difference"] for s in STATES)
    yield (
        f"After an update with CW-GRPO's weights the entropy of own states {_compared(own)} ({_thousandths(own)} "
        f"thousandths of a nat, AdamW), that of fresh ones {_compared(fresh)} ({_thousandths(fresh)}). The norm of the "
        f"gradient is {between(plain['gradient ratio'])} of GRPO's. Of the standard deviation of the change of own "
        f"states over batches {between(plain['spread ratio'])} is left with SGD, and "
        f"{between(weights['own']['spread ratio'])} with AdamW, whose first step has the same length for any gradient."
    )


def between(found: list[float]) -> str:
    value, low, high = found
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _thousandths(found: list[float]) -> str:
    return between([1000 * value for value in found])


def _verdict(found: list[float], below: str, above: str, neither: str) -> str:
    """By where the whole interval lies."""
    return below if found[2] < 0 else above if found[1] > 0 else neither


def _moved(found: list[float]) -> str:
    return _verdict(found, "falls", "rises", "neither falls nor rises for certain")


def _predicts(found: list[float]) -> str:
    return _verdict(found, "predicts the opposite of", "predicts", "does not predict")


def _compared(found: list[float]) -> str:
    return _verdict(found, "is lower than after GRPO's", "is higher than after GRPO's", "does not certainly differ")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def updated(text: str, figures: str) -> str:
    """The document with the findings in place of those it has."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"
