"""The minimal loop in several processes: the run of a single one, whatever shares the model and wherever it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers")

from processes import processes  # noqa: E402
from test_grpo import guesses  # noqa: E402

from covgrpo_kernels import cli, covgrpo_loss  # noqa: E402
from covgrpo_kernels.grpo import parallel  # noqa: E402
from covgrpo_kernels.grpo import train as training  # noqa: E402
from covgrpo_kernels.grpo.config import LOSS_TYPES, TrainConfig  # noqa: E402
from covgrpo_kernels.grpo.policy import Policy, load_policy, new_policy  # noqa: E402
from covgrpo_kernels.grpo.rollout import sample  # noqa: E402
from covgrpo_kernels.grpo.train import train  # noqa: E402
from covgrpo_kernels.testing import random_batch  # noqa: E402

CPU = torch.device("cpu")
# 15 rows in microbatches of 5: no number of processes divides them, and every cut goes through a group.
ODD = TrainConfig(
    prompts_per_step=3,
    group_size=5,
    max_new_tokens=6,
    inner_steps=1,
    microbatch_prompts=1,
    temperature=1.0,
    max_grad_norm=0.5,
    grad_tol=0.0,
)
# Means of what each rank has of them, not of the tokens of all.
OF_A_RANK = ("weight/ess", "covariance/std", *(f"covariance/q{q}" for q in ("01", "20", "50", "80", "99")))


def double_policy(how: str, seed: int = 0) -> Policy:
    policy = new_policy(64, 2, seed=seed, device=CPU)
    policy.model.double()
    parallel.distribute(policy.model, how)
    return policy


# --- one step ----------------------------------------------------------------------------------------------


def samples(how: str) -> list[torch.Tensor]:
    """Of more rows than ranks, and of fewer; drawn and the likeliest. Ranks end at different lengths."""
    policy = double_policy(how)
    policy.eos_ids = torch.arange(90)
    generator = torch.Generator().manual_seed(1)
    batches = [
        sample(policy, ["1 +1 =", "a longer prompt", "x"], 5, 30, 1.0, generator),
        sample(policy, ["abc", "1 +1 =", "x"], 1, 30, 0.0),
    ]
    assert 1 < batches[0].mask.shape[1] < 30
    assert all(torch.equal(batch.mask.long(), batch.attention[:, -batch.mask.shape[1] :]) for batch in batches)
    return [batch.tokens for batch in batches] + [generator.get_state()]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_responses_are_those_of_one_process(size: int, how: str) -> None:
    want = samples(how)
    for got in processes(size).run(samples, how):
        assert all(map(torch.equal, got, want))


def step(how: str, config: TrainConfig) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The clipped gradient of a step and its metrics. About every second response counts as right."""
    policy = double_policy(how)
    reference = None
    if config.beta:
        reference = double_policy(how, seed=1)
    seen: list[torch.Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            seen.extend(g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads)

    optimizer = Recorder(policy.model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "reward", lambda policy, batch, problems: (batch.responses.sum(1) % 2).float())
        problems = training.make_task(config).training_problems(1, config.prompts_per_step)
        generator = training.generator_of(policy, config.seed, 1)
        metrics = training.grpo_step(policy, reference, optimizer, problems, config, generator)
    assert 0.2 < metrics["reward/mean"] < 0.8
    return seen, metrics


def same_step(size: int, how: str, config: TrainConfig) -> None:
    want, reported = step(how, config)
    assert reported["optim/grad_norm"] > config.max_grad_norm
    for got, metrics in processes(size).run(step, how, config):
        for a, b in zip(got, want, strict=True):
            bound = 1024 * torch.finfo(torch.float64).eps * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=bound)
        for name in reported.keys() - {*OF_A_RANK}:
            # Metrics are averaged in float32, of numbers up to about 1.
            assert metrics[name] == pytest.approx(reported[name], rel=8e-7, abs=8e-7), name


@pytest.mark.parametrize(
    ("size", "how", "changes"),
    [
        (2, "ddp", {"loss_type": "dapo", "beta": 0.1}),
        (2, "fsdp", {"inner_steps": 3}),
        (4, "fsdp", {"loss_type": "grpo", "beta": 0.1, "entropy_coef": 0.01}),
    ],
)
def test_a_step_equals_that_of_one_process(size: int, how: str, changes: dict[str, object]) -> None:
    same_step(size, how, dataclasses.replace(ODD, **changes))


def test_counts_are_added_up_and_means_are_not() -> None:
    """Over the microbatches of a step, as over ranks."""
    parts = [
        {"ratio/non_finite": 1.0, "entropy": 2.0, "tokens": 1},
        {"ratio/non_finite": 2.0, "entropy": 1.0, "tokens": 9},
    ]
    of_each = [{name: torch.tensor(value) for name, value in part.items()} for part in parts]
    assert parallel.pooled(of_each, 1) == {"ratio/non_finite": 3.0, "entropy": 1.5}
    assert set(parallel.COUNTS) <= set(covgrpo_loss(**random_batch(0)).metrics)


@pytest.mark.deep
@pytest.mark.parametrize("weighting", ["covariance", "none"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_step_equals_that_of_one_process(size: int, how: str, loss_type: str, weighting: str) -> None:
    same_step(size, how, dataclasses.replace(ODD, loss_type=loss_type, weighting=weighting, beta=0.1))


def groups_after_other_draws() -> list[torch.Tensor]:
    """Clip-Cov draws for the tokens of a rank, of which each has another number."""
    config = dataclasses.replace(ODD, weighting="clip_cov", inner_steps=3)
    seen: list[torch.Tensor] = []
    split = training.split_groups

    def record(*arguments: object) -> list:
        steps = split(*arguments)
        seen.append(torch.cat([torch.cat(step) for step in steps]))
        return steps

    policy = double_policy("ddp")
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "split_groups", record)
        problems = training.make_task(config).training_problems(1, config.prompts_per_step)
        for step in (1, 2, 3):
            training.grpo_step(policy, None, optimizer, problems, config, training.generator_of(policy, 0, step))
    return seen


def test_minibatches_are_those_of_one_process() -> None:
    want = groups_after_other_draws()
    assert len(want) == 3
    for got in processes(2).run(groups_after_other_draws):
        assert all(map(torch.equal, got, want))


# --- errors ------------------------------------------------------------------------------------------------


def failing(rank: int) -> list[str]:
    messages = []

    def fail() -> int:
        if parallel.rank() == rank:
            raise ValueError(f"rank {rank} cannot")
        return parallel.rank()

    for call in (lambda: parallel.together(fail), lambda: parallel.on_rank_0(fail)):
        try:
            messages.append(str(call()))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert processes(2).run(failing, 0) == [["rank 0 cannot", "rank 0 cannot"]] * 2
    assert processes(2).run(failing, 1) == [["rank 1 cannot", "None"]] * 2


def too_few_rows(out: str) -> str:
    try:
        train(dataclasses.replace(ODD, out=out, group_size=2))
    except ValueError as error:
        return str(error)
    return "none"


def test_more_processes_than_rows(tmp_path: Path) -> None:
    for message in processes(4).run(too_few_rows, str(tmp_path / "out")):
        assert "microbatch_prompts times group_size" in message
        assert message.endswith("must be at least the 4 processes, got 2")
    assert not (tmp_path / "out").exists()  # before any work


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--lr", "0"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_complains(
    arguments: list[str], rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit, match="2"):
        sys.exit(cli.main(["train", *arguments]))
    assert ("error" in capsys.readouterr().err) == (rank == 0)


def test_demo_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["demo"]) == 2
    assert "one process" in capsys.readouterr().err


# --- runs --------------------------------------------------------------------------------------------------

RUN = TrainConfig(
    hidden_size=64,
    layers=1,
    warm_start_steps=25,
    warm_start_reward=1.0,
    warm_start_lr=5e-3,
    data=guesses(),
    steps=4,
    prompts_per_step=4,
    group_size=7,
    max_new_tokens=4,
    inner_steps=2,
    checkpoint_every=1,
    eval_every=2,
    eval_problems=9,
    warmup_steps=2,
    lr=1e-3,
    temperature=1.0,
    grad_tol=0.0,
)
ROUNDED = (1, 2)


def arguments_of(config: TrainConfig) -> list[str]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return [x for n, v in values.items() if v is not None for x in (f"--{n.replace('_', '-')}", str(v))]


def torchrun(size: int, config: TrainConfig) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "covgrpo_kernels", "train", *arguments_of(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(size: int, config: TrainConfig) -> str:
    """What all processes print."""
    process = torchrun(size, config)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return output + error


def metrics(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN in this process, and beside it runs from parameters that are rounded otherwise."""
    out = tmp_path_factory.mktemp("single")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(dataclasses.replace(RUN, out=str(out / "run")))
    patch = pytest.MonkeyPatch()
    patch.setattr(training, "save_report", lambda run, runs: None)  # half of the time of so small a run
    for seed in ROUNDED:
        generator = torch.Generator().manual_seed(seed)
        start = load_policy(str(out / "run" / "warm_start"), CPU)
        with torch.no_grad():
            for p in start.model.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape, generator=generator))
        start.save(out / f"start {seed}")
        train(dataclasses.replace(RUN, out=str(out / str(seed)), model=str(out / f"start {seed}"), warm_start_steps=0))
    patch.undo()
    torch.set_num_threads(threads)
    return out


def copy_warm_start(run: Path, out: Path) -> None:
    """A run of the same options that was interrupted after its warm start."""
    shutil.copytree(run / "warm_start", out / "warm_start")
    shutil.copy(run / "covgrpo_run.json", out)


def same_run(out: Path, single: Path) -> None:
    want, *others = (metrics(single / name) for name in ("run", *map(str, ROUNDED)))
    got = metrics(out)
    assert [row.keys() for row in got] == [row.keys() for row in want]
    assert 0 < want[-1]["reward/mean"] < 1
    for i, row in enumerate(got):
        for name in row.keys() - {*OF_A_RANK, "run"}:
            if name.startswith(("reward/", "response/", "eval/")):
                assert row[name] == want[i][name], (i, name)
            else:
                rounding = max(abs(other[i][name] - want[i][name]) for other in others)
                floor = 64 * torch.finfo(torch.float32).eps * max(abs(want[i][name]), 1e-2)
                assert abs(row[name] - want[i][name]) <= 8 * rounding + floor, (i, name)


def test_a_run_goes_on_with_other_processes(single: Path, tmp_path: Path) -> None:
    """Two steps of two processes that shard the model, then two of four that have all of it, and of one."""
    out = tmp_path / "run"
    copy_warm_start(single / "run", out)
    output = run(2, dataclasses.replace(RUN, out=str(out), steps=2, eval_every=2, parallel="fsdp"))
    assert output.count("CW-GRPO 2/2") == 1  # one of them speaks
    assert {path.name for path in out.rglob("*")} == {path.name for path in (single / "run").rglob("*")}
    moments = torch.load(out / "model" / "optimizer.pt", weights_only=True)["state"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert {n: m["exp_avg"].shape for n, m in moments.items()} == {n: p.shape for n, p in model.named_parameters()}

    shutil.copytree(out, tmp_path / "alone")
    processes(4).run(train, dataclasses.replace(RUN, out=str(out)))
    same_run(out, single)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(dataclasses.replace(RUN, out=str(tmp_path / "alone")))
    torch.set_num_threads(threads)
    same_run(tmp_path / "alone", single)


def test_a_warm_start_of_two(tmp_path: Path) -> None:
    out, config = tmp_path / "run", dataclasses.replace(RUN, steps=1, warm_start_steps=1)
    train(dataclasses.replace(config, out=str(tmp_path / "alone")))
    processes(2).run(train, dataclasses.replace(config, out=str(out), parallel="fsdp"))
    want, got = (load_policy(str(folder / "warm_start"), CPU) for folder in (tmp_path / "alone", out))
    for a, b in zip(got.model.parameters(), want.model.parameters(), strict=True):
        # A step of AdamW is the learning rate times the gradient's direction, whatever its size.
        assert (a - b).abs().mean() < 1e-3 * config.warm_start_lr


def command(config: TrainConfig) -> tuple[int, str]:
    """The exit status and what is said on stderr of `covgrpo train` in a process of several, which it would end."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as error:
        patch.setattr(parallel, "leave", lambda status: status)
        return cli.main(["train", *arguments_of(config)]), error.getvalue()


def test_another_run_is_refused_once(single: Path) -> None:
    """What rank 0 alone knows ends all, and one of them says why."""
    (status, error), other = processes(2).run(command, dataclasses.replace(RUN, out=str(single / "run"), lr=0.5))
    assert status == 2
    assert error.startswith("covgrpo: error:")
    assert error.count("\n") == error.count("--lr 0.001, not 0.5") == 1
    assert other == (2, "")


@pytest.mark.deep
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_kill_and_resume(single: Path, tmp_path: Path, how: str) -> None:
    """kill -9 of all processes, wherever they are, twice."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    config = dataclasses.replace(RUN, steps=30, checkpoint_every=3, parallel=how)
    for folder in (whole, out):
        copy_warm_start(single / "run", folder)
    run(2, dataclasses.replace(config, out=str(whole)))
    rng, reached, lines = random.Random(0), 0, out / "metrics.jsonl"
    for _ in range(2):
        process = torchrun(2, dataclasses.replace(config, out=str(out)))
        while process.poll() is None and (not lines.exists() or lines.read_bytes().count(b"\n") < reached + 6):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        # The workers first: torchrun has made each the leader of a group of its own.
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [*map(int, workers), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        reached = lines.read_bytes().count(b"\n")
        assert 6 <= reached < 31
    run(2, dataclasses.replace(config, out=str(out)))
    assert metrics(out) == metrics(whole)
