"""The study: its statistics, its arms, runs that resume, and a report that follows the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from covgrpo_kernels import CovarianceWeighting, CovGRPOConfig, covariance_weights, covgrpo_loss
from covgrpo_kernels.grpo.checkpoint import TrainingError
from covgrpo_kernels.grpo.rollout import Batch, Rollout
from covgrpo_kernels.grpo.tasks import Problem
from covgrpo_kernels.testing import random_batch
from research import RESULTS, arithmetic
from research.__main__ import main
from research.covariances import group_statistics, statistics_metrics
from research.entropy_law import run as entropy_law
from research.entropy_law.law import plan
from research.study import statistics as study_statistics
from research.study.arms import (
    ABLATIONS,
    ALL_ARMS,
    ARMS,
    MINIATURE_EVALUATION,
    MINIATURE_TASKS,
    SEEDS,
    TASKS,
    VARIANTS,
    Arm,
    batch_bandwidth,
    gaussian,
    permuted,
    recentred,
)
from research.study.report import CLAIMS, MEASURES, Study, document, in_short
from research.study.run import RunSpec, make_start, perform, perform_all, read_run
from research.study.statistics import TAILS, difference, pass_at_k, tail_means
from research.study.study import all_runs, study
from research.study.summary import Summaries, read_summaries, summary, write_summaries

F64 = torch.float64
ROOT = Path(__file__).parents[2]
NOISE = [-1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0]  # of eight seeds


# --- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 8])
def test_pass_at_k_is_the_share_of_all_choices(k: int) -> None:
    samples = 9
    right = torch.arange(samples + 1)
    choices = list(itertools.combinations(range(samples), k))
    expected = [Fraction(sum(min(choice) < r for choice in choices), len(choices)) for r in range(samples + 1)]
    torch.testing.assert_close(
        pass_at_k(right, samples, k), torch.tensor([float(e) for e in expected], dtype=F64), rtol=1e-14, atol=1e-14
    )


def test_pass_at_k_needs_as_many_samples() -> None:
    with pytest.raises(ValueError, match="k must be from 1 to the number of samples, 4, got 8"):
        pass_at_k(torch.tensor([1]), 4, 8)


def test_tails_of_a_known_distribution() -> None:
    n = 20_000
    values = torch.arange(n, dtype=F64)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    tails = tail_means(values)
    for name, share in TAILS.items():
        size = round(share * n)
        assert tails[f"bottom {name}"] == (size - 1) / 2
        assert tails[f"top {name}"] == n - 1 - (size - 1) / 2


def test_a_tail_is_never_empty() -> None:
    tails = tail_means(torch.tensor([3.0, 1.0, 2.0]))
    assert tails["top 0.01%"] == 3.0
    assert tails["bottom 0.01%"] == 1.0


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say(skewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight values, where a percentile interval holds it in 90% of cases; one that is too long would be as wrong.
    The intervals of a table hold all of their truths at once."""
    monkeypatch.setattr(study_statistics, "RESAMPLES", 2000)
    generator, studies, table = torch.Generator().manual_seed(0), 200, 5
    held = alone = together = 0
    for _ in range(studies):
        draws = torch.randn(table, 8, generator=generator, dtype=F64)
        draws = draws.exp() - math.exp(0.5) if skewed else draws
        found = [difference(values, table) for values in draws]
        held += sum(each.low <= 0 <= each.high for each in found)
        alone += all(each.low <= 0 <= each.high for each in found)
        together += all(each.low_all <= 0 <= each.high_all for each in found)
    spread = 3 * math.sqrt(0.05 * 0.95 / (studies * table))
    # The lognormal's tail is rarely in eight values: no interval made from them has all of its 95%.
    assert (0.87 if skewed else 0.95 - spread) <= held / (studies * table) <= (0.95 if skewed else 0.975)
    if not skewed:
        assert together / studies >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / studies)
    assert alone < together


def test_differences_move_and_scale_with_the_values() -> None:
    values = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=F64)
    a, b = difference(values, 3), difference(1000 + 50 * values, 3)
    ours, theirs = dataclasses.astuple(a), dataclasses.astuple(b)
    assert theirs == pytest.approx([1000 + 50 * x for x in ours], rel=1e-12)
    assert a.mean == values.mean().item()
    assert a.low_all < a.low < a.mean < a.high < a.high_all
    assert difference(values, 3) == a


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.3027), (4, 3.1824), (5, 2.7764)])
def test_intervals_of_a_few_seeds_are_students(n: int, t: float) -> None:
    values = torch.arange(n, dtype=F64)
    found, error = difference(values, 3), math.sqrt(n * (n + 1) / 12 / n)
    middle = (n - 1) / 2
    assert middle - found.low == pytest.approx(t * error, rel=1e-3)
    assert found.high - middle == pytest.approx(t * error, rel=1e-3)
    assert found.low_all < found.low
    assert found.high_all > found.high
    assert difference(values, 15).high_all - middle == pytest.approx(
        {2: 190.98, 3: 17.277, 4: 8.5752, 5: 6.2541}[n] * error, rel=2e-3
    )
    with pytest.raises(ValueError, match="two seeds at least, got 1"):
        difference(torch.tensor([1.0]), 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_and_survival(sign: int) -> None:
    noise = torch.tensor(NOISE)
    assert difference(sign * (10 + noise), 35).sign == sign
    assert difference(sign * (10 + noise), 35).survives
    weak = difference(sign * (0.75 + noise), 35)
    assert (weak.sign, weak.survives) == (sign, False)
    assert difference(noise, 35).sign == 0


# --- arms --------------------------------------------------------------------------------------------------


def tokens(seed: int, groups: int = 3, group_size: int = 4, length: int = 6) -> tuple[torch.Tensor, ...]:
    """Log-probs [B, T], advantages [B], mask [B, T]; under the mask stands what must not matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * group_size
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < lengths.unsqueeze(1)
    x = -torch.rand(rows, length, generator=generator, dtype=F64) * 4
    return x.where(mask, torch.nan), torch.randn(rows, generator=generator, dtype=F64), mask


def test_permuted_weights_are_those_of_the_group_elsewhere() -> None:
    x, advantages, mask = tokens(0)
    before = covariance_weights(x, advantages, mask, group_size=4)
    after = permuted(x, advantages, mask, 4, torch.Generator().manual_seed(0))
    assert (after[~mask] == 0).all()
    for rows in torch.arange(len(x)).split(4):
        valid = mask[rows]
        assert not torch.equal(before[rows][valid], after[rows][valid])
        assert torch.equal(before[rows][valid].sort().values, after[rows][valid].sort().values)
    again = permuted(x, advantages, mask, 4, torch.Generator().manual_seed(0))
    other = permuted(x, advantages, mask, 4, torch.Generator().manual_seed(1))
    assert torch.equal(after, again)
    assert not torch.equal(after, other)


def test_bandwidth_of_the_batch_with_means_of_the_group() -> None:
    """log W is -c^2 / (2 s2) and a constant: of the same c it has another slope, the ratio of the variances."""
    x, advantages, mask = tokens(1)
    advantages[8:] *= 5  # a group with another variance
    weights = batch_bandwidth(x, advantages, mask, 4, torch.Generator())
    found = group_statistics(x, _rollout(x, advantages, mask), 4)
    group_weights, c = found.weights.view_as(mask), found.covariance.view_as(mask)
    batch_variance = c[mask].var(correction=0)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(), mask.sum().double(), rtol=1e-13, atol=0)
    constants = []
    for i, rows in enumerate(torch.arange(len(x)).split(4)):
        valid = mask[rows]
        ratio = found.std[i].square() / batch_variance
        # log W_batch = ratio * log W_group + a constant of the group, so what is left has no spread.
        left = weights[rows][valid].log() - ratio * group_weights[rows][valid].log()
        torch.testing.assert_close(left, left.mean().expand_as(left), rtol=1e-10, atol=1e-10)
        constants.append(weights[rows][valid].log() + c[rows][valid].square() / (2 * batch_variance))
    constant = torch.cat(constants)
    torch.testing.assert_close(constant, constant.mean().expand_as(constant), rtol=1e-10, atol=1e-10)


def test_recentred_advantages_add_up_to_zero() -> None:
    """In each group; and they are CW-GRPO's but for a factor for each of a group's advantages."""
    x, advantages, mask = tokens(3)
    advantages[4:8] = 0  # equal rewards
    before = covariance_weights(x, advantages, mask, group_size=4) * advantages.unsqueeze(1)
    after = recentred(x, advantages, mask, 4, torch.Generator()) * advantages.unsqueeze(1)
    assert (after[~mask] == 0).all()
    assert (before.view(3, -1).sum(1).abs() > 1e-3).tolist() == [True, False, True]
    torch.testing.assert_close(after.view(3, -1).sum(1), torch.zeros(3, dtype=F64), rtol=0, atol=1e-14)
    for row in (0, 1, 2, 3, 8, 9, 10, 11):
        ratio = after[row][mask[row]] / before[row][mask[row]]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-12, atol=0)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_gaussians_of_one_sign_and_of_another_centre(side: int, centre: bool) -> None:
    x, advantages, mask = tokens(4)
    advantages[4:8] = 0.5  # a group without variance
    weights = gaussian(x, advantages, mask, 4, torch.Generator(), side=side, centre=centre)
    found = group_statistics(x, _rollout(x, advantages, mask), 4)
    c = found.covariance.view_as(mask)
    assert (weights[~mask] == 0).all()
    for i, rows in enumerate(torch.arange(len(x)).split(4)):
        inside = c[rows][mask[rows]]
        middle = inside.mean() if centre else 0.0
        kernel = [
            math.exp(-((each.item() - middle) ** 2) / (2 * found.std[i].item() ** 2))
            if found.std[i] > 0 and side * each >= 0
            else 1.0
            for each in inside
        ]
        expected = torch.tensor(kernel, dtype=F64) * len(kernel) / sum(kernel)
        torch.testing.assert_close(weights[rows][mask[rows]], expected, rtol=1e-9, atol=1e-12)
    if (side, centre) == (0, False):
        torch.testing.assert_close(weights, covariance_weights(x, advantages, mask, group_size=4), rtol=1e-6, atol=0)


def _rollout(x: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Rollout:
    batch = Batch(torch.zeros(len(x), 1 + mask.shape[1]), torch.ones(len(x), 1 + mask.shape[1]), mask)
    return Rollout(batch, advantages, x, None)


def test_the_authors_code_is_fed_a_group_at_a_time() -> None:
    """The arm takes a minibatch of groups; the numbers are those of `author_code()` on each of them."""
    data = random_batch(3, groups=3, group_size=4, length=5, keep=0.7)
    del data["group_size"], data["rollout_weights"]
    head, rows = data.pop("weight").requires_grad_(), len(data["advantages"])

    def gradient(config: CovGRPOConfig, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {name: value[part] for name, value in data.items()}
        loss = covgrpo_loss(weight=head, group_size=4, config=config, normalizer=rows, grad_tol=0.0, **arguments).loss
        return loss.detach(), torch.autograd.grad(loss, head)[0]

    config = CovGRPOConfig.author_code()
    parts = [gradient(config, slice(4 * i, 4 * i + 4)) for i in range(3)]
    whole = gradient(ALL_ARMS["author_code"].loss, slice(None))
    for part, together in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(part), together, rtol=1e-11, atol=1e-13)


def test_what_the_weights_keep_of_the_advantages() -> None:
    def kept(data: Rollout) -> float:
        found = group_statistics(data.old_logprobs, data, 4)
        return statistics_metrics(found, data)["advantages/kept"]

    x, advantages, mask = tokens(2)
    data = _rollout(x, advantages, mask)
    weights = covariance_weights(x, advantages, mask, group_size=4)
    sizes = advantages.abs().unsqueeze(1).expand_as(mask)[mask]
    expected = (weights[mask] * sizes).sum() / sizes.sum()
    assert kept(data) == pytest.approx(expected.item(), rel=1e-12)
    assert kept(_rollout(x, torch.zeros_like(advantages), mask)) == 1.0


def test_each_ablation_changes_one_reading() -> None:
    default = dataclasses.asdict(CovarianceWeighting())
    for name, arm in ABLATIONS.items():
        if arm.weights is None:
            assert dataclasses.replace(arm.loss, weighting="covariance") == CovGRPOConfig.paper()
            there = dataclasses.asdict(arm.loss.weighting)
            assert sum(there[option] != default[option] for option in default) == 1, name


def test_arithmetic_is_right() -> None:
    rng = random.Random(0)
    for difficulty in range(1, 9):
        for _ in range(50):
            problem = arithmetic.modular_arithmetic(rng, difficulty)
            start, *operations, _, modulus, _ = problem.prompt.split()
            value, steps = int(start), []
            for operation in operations:
                a, b = value, int(operation[1:])
                value = {"+": a + b, "-": a - b, "*": a * b}[operation[0]] % int(modulus)
                steps.append(str(value))
            assert len(steps) == difficulty
            assert problem.solution == " ".join(steps)
            for answer in range(int(modulus)):
                assert problem.is_correct(f"1 2 {answer}") == (answer == value)


def test_arithmetic_takes_the_last_number() -> None:
    problem = Problem("", "", lambda response: arithmetic._ends_with(response, answer=7))
    for response in ("7", "3 7", "1 2 7 ", "\t7\n"):
        assert problem.is_correct(response), response
    for response in ("07", "17", "-7", "7.", "7 3", "x7", "7a", "\u0667", "", " "):
        assert not problem.is_correct(response), response


# --- runs --------------------------------------------------------------------------------------------------


def spec(out: Path, arm: str = "grpo", seed: int = 0, task: str = "arithmetic", **changes: Any) -> RunSpec:
    config = dataclasses.replace(MINIATURE_TASKS[task], **changes)
    return RunSpec(out, task, arm, seed, config, MINIATURE_EVALUATION)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the start of the arithmetic runs."""
    out = tmp_path_factory.mktemp("study")
    make_start(spec(out))
    return out


def steps_of(run: RunSpec) -> list[dict[str, Any]]:
    if not run.path.exists():
        perform(run)
    return read_run(run.path).steps


@pytest.mark.parametrize("arm", ALL_ARMS)
def test_every_arm_runs_from_the_same_start_on_the_same_problems(arm: str, started: Path) -> None:
    """And with the same random numbers: until the first update, what an arm sees is what GRPO sees."""
    grpo = steps_of(spec(started))
    if ALL_ARMS[arm].lr_like is not None:
        steps_of(spec(started, ALL_ARMS[arm].lr_like))
    steps = steps_of(spec(started, arm))
    assert [row["step"] for row in steps] == list(range(7))
    assert [row["step"] for row in steps if "eval/pass@8" in row] == [0, 3, 6]
    assert steps[0] == grpo[0]
    same = ("reward/mean", "response/tokens", "reward/equal_groups", "advantages/kept", "covariance/std")
    assert {name: steps[1][name] for name in same} == {name: grpo[1][name] for name in same}
    assert all(math.isfinite(value) for row in steps for value in row.values())
    if arm != "grpo":  # it is not GRPO under another name
        assert [row["optim/grad_norm"] for row in steps[1:]] != [row["optim/grad_norm"] for row in grpo[1:]]


def test_seeds_differ_in_problems_but_not_in_those_held_out(started: Path) -> None:
    first, second = steps_of(spec(started)), steps_of(spec(started, seed=1))
    assert first[0] == second[0]
    assert [row["reward/mean"] for row in first[1:]] != [row["reward/mean"] for row in second[1:]]


def test_weights_given_as_advantages_are_those_of_the_loss(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one update a rollout, when both are of the same log-probs."""

    def by_hand(x: Any, advantages: Any, mask: Any, group_size: int, _: Any) -> torch.Tensor:
        return covariance_weights(x, advantages, mask, group_size=group_size)

    monkeypatch.setitem(ALL_ARMS, "by_hand", Arm("", CovGRPOConfig(weighting="none"), by_hand))
    make_start(spec(started / "once", inner_steps=1))
    runs = [steps_of(spec(started / "once", arm, inner_steps=1)) for arm in ("cw_grpo", "by_hand")]
    for ours, theirs in zip(*runs, strict=True):
        # Statistics of the weights are of what was drawn, or of all.
        same = [name for name in ours if not name.startswith("weight/")]
        assert [ours[name] for name in same] == pytest.approx([theirs[name] for name in same], rel=1e-4, abs=1e-6)
    assert runs[0][2]["weight/min"] < 0.9


def test_what_an_arm_draws_for_its_weights_changes_nothing_else(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which groups are in which of the updates is drawn after the weights."""

    def ones(x: Any, advantages: Any, mask: torch.Tensor, group_size: int, generator: Any) -> torch.Tensor:
        torch.rand(7, generator=generator)
        return mask.to(torch.float32)

    monkeypatch.setitem(ALL_ARMS, "ones", Arm("", CovGRPOConfig(weighting="none"), ones))
    for ours, theirs in zip(steps_of(spec(started, "ones")), steps_of(spec(started)), strict=True):
        assert ours == theirs


def test_smaller_steps_are_as_small_as_the_weights_make_the_advantages(started: Path) -> None:
    steps_of(spec(started, "cw_grpo"))
    steps_of(spec(started, "mean_weight"))
    kept = [row["advantages/kept"] for row in read_run(spec(started, "cw_grpo").path).steps[1:]]
    lr = read_run(spec(started, "mean_weight").path).whole["lr"]
    assert min(kept) < lr / TASKS["arithmetic"].lr < 1
    assert lr == pytest.approx(TASKS["arithmetic"].lr * sum(kept) / len(kept), rel=1e-12)


def test_results_of_other_settings_are_not_taken(started: Path) -> None:
    steps_of(spec(started))
    assert spec(started).is_finished()
    assert not spec(started, seed=99).is_finished()
    with pytest.raises(TrainingError, match=r"grpo-0\.jsonl is a run with other options: give another --out"):
        spec(started, steps=7).is_finished()


def test_a_start_of_other_settings_is_not_taken(started: Path) -> None:
    make_start(spec(started, steps=7))  # which the start does not depend on
    with pytest.raises(TrainingError, match=r"arithmetic holds runs with other options: give another --out"):
        make_start(spec(started, warm_start_steps=61))


def test_a_run_that_fails_ends_the_study(started: Path) -> None:
    """With its error; what is finished stays, and there is no part of what is not."""
    good, broken = spec(started, seed=2), spec(started / "broken", lr=1e30, warm_start_steps=30)
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(120,))
    bystander.start()
    with pytest.raises(TrainingError, match="the norm of the gradient"):
        perform_all([good, broken], workers=1)
    assert bystander.is_alive()
    bystander.terminate()
    assert good.path.exists()
    assert not broken.path.exists()


def test_a_worker_that_is_killed_ends_the_study(started: Path) -> None:
    """As for want of memory: with an error that says how to go on, and nothing half-written."""
    run = spec(started, seed=3, steps=100_000)
    others = set(multiprocessing.active_children())  # of other tests

    def kill() -> None:
        while not (workers := set(multiprocessing.active_children()) - others):
            time.sleep(0.05)
        workers.pop().kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(TrainingError, match="a worker was killed"):
        perform_all([run], workers=1)
    killer.join()
    assert not run.path.exists()


def test_a_seed_of_all_arms_comes_before_the_next() -> None:
    specs = all_runs(Path("out"), None, None, 8, None, miniature=False)
    assert len(specs) == 8 * (2 * len(ARMS) + 2 * len(VARIANTS) + len(ABLATIONS))
    assert [one.seed for one in specs] == sorted(one.seed for one in specs)
    assert {one.task for one in specs if one.arm in ABLATIONS} == {"countdown"}
    assert len({one.path for one in specs}) == len(specs)


def test_what_an_arm_is_compared_with_runs_too() -> None:
    def arms(*chosen: str) -> list[str]:
        return [one.arm for one in all_runs(Path("out"), ["arithmetic"], chosen, 1, None, miniature=True)]

    assert arms("clip_cov") == ["grpo", "clip_cov"]
    assert arms("mean_weight") == ["grpo", "cw_grpo", "mean_weight"]
    assert arms("scope_batch") == ["grpo", "cw_grpo", "scope_batch"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(seeds=1), "seeds must be >= 2, got 1"),
        (dict(steps=0), "steps must be >= 1, got 0"),
        (dict(workers=0), "workers must be >= 1, got 0"),
        (dict(tasks=["chess"]), "tasks must be of countdown, arithmetic, got 'chess'"),
        (dict(arms=["ppo"]), "arms must be of grpo, cw_grpo, .*, got 'ppo'"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        study(str(tmp_path / "out"), **wrong)
    assert not (tmp_path / "out").exists()


# --- the command -------------------------------------------------------------------------------------------

LAW = {
    "entropy_law.json": json.dumps({"settings": dataclasses.asdict(plan(0, quick=True))}).encode(),
    "entropy_law.png": b"PNG",
}
CHOSEN = ("grpo", "cw_grpo", "permuted", "mean_weight")
MINIATURE = ["--miniature", "--tasks", "arithmetic", "--arms", *CHOSEN]


def lines_but_for_seconds(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[-1]["seconds"]
    return rows


@pytest.mark.slow
def test_the_miniature_interrupted_killed_and_resumed(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt and a kill take the workers with them and leave whole files; the same command goes on, and all is as
    if never interrupted. Then the report, again from study.json alone."""
    out, results, errors = tmp_path / "out", tmp_path / "results", tmp_path / "errors"
    command = ["study", "--out", str(out), *MINIATURE]
    deadline, there = time.monotonic() + 240, {}
    for stop in (signal.SIGINT, signal.SIGKILL):
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "research", *command, "--workers", "1"],
                stdout=file,
                stderr=file,
                start_new_session=True,
                # Even where tests ignore it, as in the background of a shell.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        while len(list(out.glob("*/*.jsonl"))) == len(there):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # as a terminal does
            assert process.wait(60) == 130
            assert errors.read_text().splitlines()[-1].startswith("interrupted; the same command goes on")
        else:
            os.kill(process.pid, stop)  # it alone
            process.wait()
        gone = time.monotonic() + 30
        while _alive(process.pid):
            assert time.monotonic() < gone
            time.sleep(0.05)
        assert {path: path.stat().st_mtime_ns for path in there} == there
        there = {path: path.stat().st_mtime_ns for path in out.glob("*/*.jsonl")}
    assert len(there) < 8
    assert not (out / "study.json").exists()

    laws: list[bool] = []

    def law(folder: Path, seed: int = 0, quick: bool = False) -> None:  # test_entropy_law.py has the real one
        laws.append(quick)
        for name, content in LAW.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(entropy_law, "run", law)
    for _ in range(2):  # the second time there is nothing to be done but the report
        assert main([*command, "--results", str(results)]) == 0
    assert laws == [True]
    assert {path: path.stat().st_mtime_ns for path in there} == there
    files = sorted(out.glob("*/*.jsonl"))
    assert len(files) == 8
    for path in files:
        arm, seed = path.stem.split("-")
        whole = spec(started, arm, int(seed))
        steps_of(whole)
        assert lines_but_for_seconds(path) == lines_but_for_seconds(whole.path)

    assert {path.name for path in out.iterdir()} == {"arithmetic", *LAW}
    assert {path.name for path in results.iterdir()} == {
        *("study.json", "study.md", "study_curves.png", "study_differences.png", *LAW),
    }
    for name, content in LAW.items():
        assert (results / name).read_bytes() == content
    report = (results / "study.md").read_text()
    assert "## Is it the covariance?" in report
    (results / "study.md").unlink()
    assert main(["study", "--out", str(results), "--report-only"]) == 0
    assert (results / "study.md").read_text() == report


def _alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


# --- the report --------------------------------------------------------------------------------------------


def made_up(**effects: float) -> Summaries:
    """Sixteen runs: what CW-GRPO adds to measures of GRPO, which are 1 but for what seeds have in common."""
    generator = torch.Generator().manual_seed(0)
    names = [
        *MEASURES, *("entropy first", "entropy last", "reward first", "pass@1 before", "pass@8 before"),
        *(f"{end} {share}" for end in ("top", "bottom") for share in TAILS),
        *("gradient norm", "largest gradient norm", "advantages kept"),
        *("smallest weight", "largest weight", "effective share", "covariance spread"),
    ]  # fmt: skip
    runs = []
    for seed in range(8):
        common = 0.1 * torch.randn(len(names), generator=generator)
        for arm in ("grpo", "cw_grpo"):
            noise = NOISE[seed] / 100 if arm == "cw_grpo" else 0.0
            values = dict(zip(names, (1 + common + noise).tolist(), strict=True))
            if arm == "cw_grpo":
                for name, effect in effects.items():
                    values[name.replace("_", " ")] += effect
            curves = dict(step=[2.0, 7.0, 12.0], entropy=[0.5, 0.5 + 0.1 * seed, 0.25])
            runs.append(
                dict(task="countdown", arm=arm, seed=seed, steps=10, seconds=1.0, lr=1e-3, tokens=100, curves=curves)
                | values
            )
    options = dataclasses.asdict(TASKS["countdown"])
    del options["lr"]
    return Summaries({"countdown": dict(options=options, evaluation=dict(problems=4, samples=8))}, runs)


def sentence(text: str, start: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(start)]
    return line


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [
        (0.1, "holds"),
        (0.0065, "holds, less surely"),
        (0.0, "not seen"),
        (-0.0065, "the opposite is seen, less surely"),
        (-0.1, "the opposite is seen"),
    ],
)
def test_sentences_follow_the_numbers(effect: float, verdict: str) -> None:
    text = document(made_up(entropy=effect))
    assert f"- entropy over the last half of the steps is higher: {verdict} on countdown." in text.replace("  - ", "- ")
    line = sentence(text, "- Entropy over the last half of the steps is higher, countdown")
    assert f": *{verdict}*. " in line
    table = {1: "entropy is higher", 0: "no difference is seen", -1: "entropy is lower"}
    found = table[0 if effect == 0 else int(math.copysign(1, effect))]
    assert found in sentence(text, "- CW-GRPO: ")


@pytest.mark.parametrize(("effect", "verdict"), [(0.1, "holds"), (0.0, "no difference is seen")])
def test_at_least_as_high(effect: float, verdict: str) -> None:
    line = sentence(document(made_up(reward=effect)), "- Reward over the last tenth")
    assert f": *{verdict}*. " in line


def test_a_lower_variance_and_smaller_tails_are_what_is_wanted() -> None:
    summaries = made_up(entropy_variance=-0.1)
    for run in summaries.runs:
        if run["arm"] == "cw_grpo":
            run["top 1%"] -= 0.1
            run["bottom 1%"] += 0.1
    text = document(summaries)
    for start in ("- The variance of entropy", "- The largest 1% of", "- The smallest 1% of"):
        assert ": *holds*. " in sentence(text, start)


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        (dict(entropy=0.1), "entropy is kept, and no reward is lost"),
        (dict(entropy=0.0), "entropy is not higher for sure on countdown"),
        (dict(entropy=0.1, reward=-0.1), "reward is lower on countdown"),
        (dict(entropy=0.1, **{"pass@1": -0.1}), "pass@1 is lower on countdown"),
    ],
)
def test_what_a_variant_is_worth_follows_the_numbers(effects: dict[str, float], verdict: str) -> None:
    summaries = made_up(**effects)
    for run in summaries.runs:
        run["arm"] = {"grpo": "grpo", "cw_grpo": "recentred"}[run["arm"]]
    text = document(summaries)
    assert sentence(text, f"- {VARIANTS['recentred'].title}: {verdict}")
    assert "### Variants of the weights, countdown" in text


def test_the_runs_of_a_real_model_are_a_section_of_the_report() -> None:
    real = made_up(entropy=0.2)
    real.tasks["countdown"]["options"] |= dict(model="smollm2")
    for run in real.runs:
        run["lr"] = {"grpo": 3e-6, "cw_grpo": 1e-5}[run["arm"]]
    swept = {"grpo": {3e-6: 0.5, 1e-5: 0.25}, "cw_grpo": {3e-6: 0.125, 1e-5: 0.375}}
    real.sweep.extend(dict(arm=arm, lr=lr, reward=reward) for arm in swept for lr, reward in swept[arm].items())
    text = document(made_up(), real)
    before, section = text.split("## On a real model")
    assert before == document(made_up()).split("## How sure is this?")[0]
    assert "entropy over the last half of the steps is higher: holds on countdown" in section
    assert "difficulty" not in section.split("###")[0]
    assert "AdamW at 3e-06 or 1e-05, by arm;" in section
    assert (
        "|  | 3e-06 | 1e-05 |\n| --- | ---: | ---: |\n| GRPO | **0.5** | 0.25 |\n| CW-GRPO | 0.125 | **0.375** |"
        in section
    )
    assert "AdamW at 0.001;" in before


@pytest.mark.parametrize(("change", "verb"), [(-0.5, "falls"), (0.5, "rises"), (0.0, "neither falls nor rises")])
def test_whether_there_was_anything_to_stabilise(change: float, verb: str) -> None:
    summaries = made_up()
    for run in summaries.runs:
        noise = 0.01 * (run["seed"] - 3.5)
        run["entropy last"] = run["entropy first"] + change + noise
    assert f"GRPO's entropy {verb}" in document(summaries)


def test_where_entropy_is_highest_and_lowest() -> None:
    summaries = made_up()
    row = next(line for line in document(summaries).splitlines() if "0.85 at 7" in line)
    assert row.startswith("| GRPO | ")
    assert "| 0.25 at 12 |" in row


def test_every_claim_is_of_a_measure_that_runs_have(started: Path) -> None:
    steps_of(spec(started))
    line = summary(read_run(spec(started).path))
    measures = [claim.measure for claims in CLAIMS.values() for claim in claims] + list(MEASURES)
    assert set(measures) <= set(line)


def test_a_summary_says_what_the_run_did(started: Path) -> None:
    steps_of(spec(started))
    results = read_run(spec(started).path)
    line, steps = summary(results), results.steps[1:]
    entropies = [row["entropy"] for row in steps[3:]]
    centre = sum(entropies) / 3
    expected = {
        "entropy": centre,
        "entropy variance": sum((e - centre) ** 2 for e in entropies) / 3,
        "entropy first": steps[0]["entropy"],
        "reward": steps[-1]["reward/mean"],
        "pass@8": steps[-1]["eval/pass@8"],
        "pass@8 before": results.steps[0]["eval/pass@8"],
        "top 1%": results.whole["covariance"]["top 1%"],
        "largest gradient norm": max(row["optim/grad_norm"] for row in steps),
    }
    assert {name: line[name] for name in expected} == {name: float(f"{v:.6g}") for name, v in expected.items()}
    assert line["curves"]["entropy"] == [float(f"{row['entropy']:.6g}") for row in steps]


def test_the_committed_report_is_made_from_the_committed_numbers() -> None:
    """No sentence of it is written by hand; docs/method.md says the same of what holds, and
    has no number of two decimals or more that is not there."""
    summaries, real = (read_summaries(RESULTS / f"{name}.json") for name in ("study", "real_run"))
    report = (RESULTS / "study.md").read_text()
    assert report == document(summaries, real)
    section = (ROOT / "docs" / "method.md").read_text().split("## What the study showed")[1]
    assert "\n".join(in_short(Study(summaries))) in section
    numbers = re.findall(r"\d\.\d\d+", section)
    assert len(numbers) > 8
    assert set(numbers) <= set(re.findall(r"\d\.\d+", report))
    # As the command runs it, whole: not some of its arms, or fewer seeds or steps.
    specs = all_runs(Path(), None, None, SEEDS, None, False)
    there = [(run["task"], run["arm"], run["seed"]) for run in summaries.runs]
    assert there == [(spec.task, spec.arm, spec.seed) for spec in specs]
    for spec in specs:
        settings = spec.settings()
        lr = settings["options"].pop("lr")
        assert summaries.tasks[spec.task] == {name: settings[name] for name in ("options", "evaluation")}
        assert all(run["lr"] == lr for run in summaries.runs if run["arm"] == spec.arm) or spec.after is not None


def test_runs_that_a_call_has_not_stay_in_the_file(started: Path, tmp_path: Path) -> None:
    """If they are comparable with its own: of the same start, the same options, and an arm of one learning rate."""
    path = tmp_path / "study.json"
    first, second, third = spec(started), spec(started, "cw_grpo"), spec(started, "cw_grpo", seed=1)
    for run in (first, second, third):
        steps_of(run)
    assert [(line["arm"], line["seed"]) for line in write_summaries([second, third], path).runs] == [
        ("cw_grpo", 0), ("cw_grpo", 1),
    ]  # fmt: skip
    together = write_summaries([first], path)
    assert [(line["arm"], line["seed"]) for line in together.runs] == [("grpo", 0), ("cw_grpo", 0), ("cw_grpo", 1)]
    assert read_summaries(path) == together
    text = path.read_text()
    other_start, other_options, other_rate = json.loads(text), json.loads(text), json.loads(text)
    other_start["runs"][1]["pass@1 before"] = 0.123
    other_options["tasks"]["arithmetic"]["options"]["temperature"] = 0.5
    other_rate["runs"][0]["lr"] = 1.0
    for wrong in (other_start, other_options, other_rate):
        path.write_text(json.dumps(wrong))
        with pytest.raises(TrainingError, match="other options, another start or another learning rate of"):
            write_summaries([first], path)
