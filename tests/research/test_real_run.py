"""The runs with a real model: with a small new one in its place, but for one test that asks for it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from covgrpo_kernels.grpo.checkpoint import TrainingError
from covgrpo_kernels.grpo.policy import new_policy
from research import RESULTS, few_shot
from research.models import ModelNotFetchedError
from research.prefix_tree import PrefixTreePolicy
from research.study import real, run
from research.study.arms import REAL_SEEDS, Evaluation
from research.study.run import RunSpec, perform
from research.study.summary import read_summaries, write_summaries


def small_policy(model: str) -> PrefixTreePolicy:
    assert model == "smollm2"
    policy = new_policy(64, 1, 0, torch.device("cpu"))
    return PrefixTreePolicy(policy.model, policy.tokenizer, policy.device)


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "few_shot_policy", small_policy)


def spec(out: Path, arm: str = "grpo", **changes: Any) -> RunSpec:
    config = dataclasses.replace(
        real.REAL_TASKS["sums"], lr=1e-3, steps=5, checkpoint_every=2, prompts_per_step=2, group_size=4,
        microbatch_prompts=1, max_new_tokens=4, **changes,
    )  # fmt: skip
    return RunSpec(out, "sums", arm, 0, config, Evaluation(problems=2, samples=8, every=3))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("arm", real.REAL_ARMS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    arm: str, small_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = spec(tmp_path / "whole", arm), spec(tmp_path / "cut", arm)
    perform(whole)
    step, taken = run.grpo_step, []

    def stops_at_the_fourth(*arguments: Any) -> Any:
        taken.append(0)
        if len(taken) == 4:
            raise Interrupted
        return step(*arguments)

    monkeypatch.setattr(run, "grpo_step", stops_at_the_fourth)
    with pytest.raises(Interrupted):
        perform(cut)
    assert [path.name for path in cut.start.iterdir()] == [cut.checkpoint.name]
    perform(cut)
    assert len(taken) == 4 + 3  # from the checkpoint after the second step on
    assert [path.name for path in cut.start.iterdir()] == [cut.path.name]
    ours, theirs = ([json.loads(line) for line in each.path.read_text().splitlines()] for each in (cut, whole))
    assert ours[-1].pop("seconds") > 0
    del theirs[-1]["seconds"]
    assert ours == theirs


def test_a_checkpoint_of_other_settings_is_not_taken(
    small_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    perform(spec(tmp_path))
    assert spec(tmp_path).checkpoint.exists()
    other = spec(tmp_path, temperature=1.0)
    other.path.rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match=r"grpo-0\.pt is of a run with other settings: give another --out"):
        perform(other)
    assert other.checkpoint.exists()
    assert not other.path.exists()


def test_the_learning_rate_of_the_highest_late_reward(tmp_path: Path) -> None:
    for rewards, sweep in zip(([0.1, 0.5], [0.9, 0.4], [0.2, 0.6]), real.sweep_runs(tmp_path, "cw_grpo"), strict=True):
        early, late = rewards
        steps = [{"reward/mean": early}] * 20 + [{"reward/mean": late}] * 10
        sweep.path.parent.mkdir(parents=True)
        sweep.path.write_text("\n".join(map(json.dumps, [sweep.settings(), *steps, {}])))
    assert real.learning_rate(tmp_path, "cw_grpo") == real.LEARNING_RATES[2]


def test_each_arm_has_its_own_learning_rate_in_the_results(small_model: None, tmp_path: Path) -> None:
    grpo = spec(tmp_path)
    cw_grpo = spec(tmp_path, "cw_grpo")
    cw_grpo = dataclasses.replace(cw_grpo, config=dataclasses.replace(cw_grpo.config, lr=3e-3))
    for each in (grpo, cw_grpo):
        perform(each)
    sweep = [dict(arm="grpo", lr=1e-3, reward=1 / 3)]
    found = write_summaries([grpo, cw_grpo], tmp_path / "real_run.json", sweep)
    assert [line["lr"] for line in found.runs] == [1e-3, 3e-3]
    assert found.sweep == [dict(arm="grpo", lr=1e-3, reward=0.333333)]
    assert read_summaries(tmp_path / "real_run.json") == found


def test_runs_of_the_sweep_have_their_own_seed(tmp_path: Path) -> None:
    sweep = [one for arm in real.REAL_ARMS for one in real.sweep_runs(tmp_path, arm)]
    assert {one.seed for one in sweep} == {real.SWEEP_SEED}
    assert real.SWEEP_SEED >= real.REAL_SEEDS
    assert len({one.path for one in sweep}) == len(real.REAL_ARMS) * len(real.LEARNING_RATES)


def test_wrong_arguments_and_a_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelNotFetchedError, match="python -m research fetch-models smollm2"):
        real.real_run(str(tmp_path / "out"))
    monkeypatch.setattr(real, "model_folder", lambda name: tmp_path)
    for wrong, message in ((dict(seeds=1), "seeds must be >= 2"), (dict(workers=0), "workers must be >= 1")):
        with pytest.raises(ValueError, match=message):
            real.real_run(str(tmp_path / "out"), **wrong)
    assert not (tmp_path / "out").exists()


def test_problems_and_their_answers() -> None:
    for task in few_shot.FEW_SHOT_TASKS.values():
        problem = task(0).training_problem("train", 0)
        *examples, question = problem.prompt.splitlines()
        assert len(examples) >= 3
        assert problem.is_correct(f" {problem.solution}")
        for wrong in (f"{problem.solution}.", f"{problem.solution} 1", f"1{problem.solution}", ""):
            assert not problem.is_correct(wrong), wrong
    rng = random.Random(0)
    for _ in range(50):
        a, b = few_shot._sum(rng).prompt.splitlines()[-1].removesuffix(" =").split(" + ")
        assert 10 <= int(a) <= 99
        assert 10 <= int(b) <= 99
    for examples, answer in ((few_shot.SUMS, sum), (few_shot.LARGEST, max)):
        for example in examples.splitlines():
            question, found = example.replace(" =", ":").split(": ")
            numbers = [int(part) for part in question.replace("Largest of ", "").replace(" +", ",").split(", ")]
            assert answer(numbers) == int(found)


def test_the_real_model_answers_often_enough() -> None:
    """At least one in five, as a run needs."""
    from covgrpo_kernels.grpo.rollout import reward, sample

    try:
        policy = few_shot.few_shot_policy("smollm2")
    except ModelNotFetchedError as error:
        pytest.skip(str(error))
    for name, task in few_shot.FEW_SHOT_TASKS.items():
        problems = task(0).held_out_problems(64)
        prompts = [problem.prompt for problem in problems]
        batch = sample(policy, prompts, 4, 8, real.REAL_TASKS[name].temperature, torch.Generator().manual_seed(0))
        assert reward(policy, batch, problems).mean() >= 0.2, name


def test_the_committed_runs_are_those_of_the_command() -> None:
    """All of them, with its settings, each at the learning rate that its rule chooses from the committed sweep."""
    found = read_summaries(RESULTS / "real_run.json")
    there = {(run["task"], run["arm"], run["seed"]) for run in found.runs}
    assert there == set(itertools.product(real.REAL_TASKS, real.REAL_ARMS, range(REAL_SEEDS)))
    assert len(found.runs) == len(there)
    for task, config in real.REAL_TASKS.items():
        settings = RunSpec(Path(), task, "grpo", 0, config, real.REAL_EVALUATION).settings()
        del settings["options"]["lr"]
        assert found.tasks[task] == {name: settings[name] for name in ("options", "evaluation")}
    for arm in real.REAL_ARMS:
        swept = [row for row in found.sweep if row["arm"] == arm]
        assert sorted(row["lr"] for row in swept) == sorted(real.LEARNING_RATES)
        best = max(swept, key=lambda row: row["reward"])["lr"]
        assert {run["lr"] for run in found.runs if run["arm"] == arm} == {best}
