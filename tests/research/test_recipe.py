"""Recipes: every stage in a dry run with TRL's own trainer, the schema, the rewards, the arithmetic of benchmarks."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("trl", "math_verify", "datasets"):
    pytest.importorskip(name)

from datasets import Dataset  # noqa: E402
from processes import processes  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl.rewards import accuracy_reward  # noqa: E402

from covgrpo_kernels import CovarianceWeighting  # noqa: E402
from research.__main__ import main  # noqa: E402
from research.recipe import evaluate, rehearsal  # noqa: E402
from research.recipe.config import Benchmark, Evaluation, Problems, TrainingData, load_recipe  # noqa: E402
from research.recipe.data import load_problems, training_prompts  # noqa: E402
from research.recipe.rewards import as_solution, format_reward  # noqa: E402
from research.recipe.run import run  # noqa: E402
from research.recipe.train import _last_checkpoint  # noqa: E402

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "research" / "recipes").glob("*.yaml"))
SMALL = ROOT / "research" / "recipes" / "open_rs_1.5b.yaml"


# --- the dry run -------------------------------------------------------------------------------------------


def check_run(out: Path, recipe: Path) -> None:
    """What a whole run leaves behind."""
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:  # the made-up problems train something
        assert 0 < line["rewards/accuracy_reward/mean"] < 1
        assert 0 < line["rewards/format_reward/mean"] < 1
        assert line["frac_reward_zero_std"] < 1
        assert line["grad_norm"] > 0
        assert line["weight/min"] < 0.9 < 1.1 < line["weight/max"]
    assert steps[1]["learning_rate"] == pytest.approx(1e-7)  # the second of ten steps of warm-up to 1e-6
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (out / "inputs" / "model", out / "model")
    )
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("_proj.weight"))

    benchmarks = load_recipe(recipe).evaluation.benchmarks
    report = (out / "report.md").read_text()
    for when in ("before", "after"):
        assert {file.stem for file in (out / "evaluation" / when).iterdir()} == set(benchmarks)
    for name, benchmark in benchmarks.items():
        rows = [json.loads(line) for line in (out / "evaluation" / "after" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["problem"] for row in rows] == [0, 1, 2]
        assert [row["solution"] for row in rows] == ["$3$", "$5$", "$7$"]
        assert {len(row["responses"]) for row in rows} == {min(benchmark.samples, 2)}
        [row] = re.findall(rf"^\| {name} \|.*", report, re.M)
        assert row.endswith(" | ".join(f"{value:.1f}" for value in benchmark.paper.values()) + " |")


def test_dry_run_by_command_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["recipe", str(SMALL), "--dry-run", "--set", f"trainer.output_dir={tmp_path / 'run'}"]
    assert main(command) == 0
    out = tmp_path / "run-dry-run"
    assert str(out / "report.md") in capfd.readouterr().out
    check_run(out, SMALL)

    # A benchmark and the report are lost: these alone are made again, as they were.
    kept = {file: file.stat().st_mtime_ns for file in [*out.glob("evaluation/*/*"), *out.glob("model/*")]}
    lost = [out / "evaluation" / "before" / "amc23.jsonl", out / "report.md"]
    texts = [file.read_bytes() for file in lost]
    for file in lost:
        kept.pop(file, None)
        file.unlink()
    assert main(command) == 0
    assert [file.read_bytes() for file in lost] == texts
    assert {file: file.stat().st_mtime_ns for file in kept} == kept

    # Training was cut off while it wrote its second checkpoint: it goes on from the first to the same model.
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    first = (out / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    weights = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    assert main(command) == 0
    assert (out / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == first
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert [json.loads(line)["step"] for line in (out / "training.jsonl").read_text().splitlines()] == [1, 2, 2]

    # What is evaluated as trained is the model in the folder: here, one that is surer.
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    model.lm_head.weight.data *= 1000
    model.save_pretrained(out / "model")
    lost = [out / "evaluation" / when / "minerva.jsonl" for when in ("before", "after")]
    texts = [file.read_bytes() for file in lost]
    for file in lost:
        file.unlink()
    assert main(command) == 0
    assert [file.read_bytes() == text for file, text in zip(lost, texts, strict=True)] == [True, False]

    assert main([*command, "--set", "trainer.seed=1"]) == 2
    assert "holds a run with another trainer" in capfd.readouterr().err


def run_dry(recipe: str, out: str) -> str:
    return str(run(recipe, overrides=[f"trainer.output_dir={out}"], dry_run=True))


def test_dry_run_in_two_processes(tmp_path: Path) -> None:
    recipe = ROOT / "research" / "recipes" / "open_rs_7b.yaml"
    out = tmp_path / "run-dry-run"
    assert processes(2).run(run_dry, str(recipe), str(tmp_path / "run")) == [str(out / "report.md")] * 2
    check_run(out, recipe)


def test_last_checkpoint_is_whole(tmp_path: Path) -> None:
    assert _last_checkpoint(tmp_path) is None
    for step, files in {9: ["trainer_state.json"], 10: ["trainer_state.json"], 11: ["model.safetensors"]}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in files:
            (tmp_path / f"checkpoint-{step}" / file).touch()
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# --- the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_the_papers(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["trainer.bf16=false", "trainer.use_cpu=true"])
    arguments = recipe.arguments(tmp_path)
    assert (arguments.num_generations, arguments.temperature, arguments.max_completion_length) == (12, 0.7, 4096)
    assert (arguments.max_steps, arguments.learning_rate, arguments.warmup_steps) == (100, 1e-6, 10)
    assert arguments.lr_scheduler_type == "cosine_with_min_lr"
    assert arguments.generation_batch_size == 48
    assert arguments.reward_weights == [1.0, 1.0]
    assert arguments.model_init_kwargs["dtype"] == "float32"
    assert list(recipe.evaluation.benchmarks) == ["aime24", "math500", "amc23", "minerva", "olympiadbench"]
    document = (ROOT / "docs" / "recipe.md").read_text()
    size = path.stem.rsplit("_", 1)[1].upper()
    for row in ("before", "GRPO", "Clip-Cov", "CW-GRPO"):
        figures = [benchmark.paper[row] for benchmark in recipe.evaluation.benchmarks.values()]
        cells = [f"{value:.1f}" for value in (*figures, sum(figures) / 5)]
        assert f"| {size} {row} | {' | '.join(cells)} |" in document


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stepz=3", "trainer: unknown key 'max_stepz'"),
        ("trainer.learning_rate=1e-6", "trainer.learning_rate must be float, got '1e-6'; YAML takes 1e-6 for text"),
        ("trainer.max_steps=2.5", "trainer.max_steps must be int, got 2.5"),
        ("trainer.max_steps=true", "trainer.max_steps must be int, got True"),
        ("trainer.bf16=1", "trainer.bf16 must be"),
        ("trainer.reward_weights=[1.0]", "trainer.reward_weights follows from the section rewards"),
        ("trainer.output_dir=", "trainer.output_dir is missing"),
        ("model.nam=x", "model: unknown key 'nam'"),
        ("model=x", "model must be a mapping"),
        ("rewards.acuracy=1.0", "rewards must be some of accuracy, format, got acuracy"),
        ("rewards={}", "rewards must be some of accuracy, format, got none"),
        ("weighting.scope=batch", "weighting: unknown key 'scope'"),
        ("weighting.weighting={scop: batch}", "weighting.weighting: .*scop"),
        ("weighting.weighting={scope: all}", "weighting.scope"),
        ("data.problem=3", "data.problem must be str, got 3"),
        ("evaluation.prompt=Solve it", r"evaluation.prompt must contain \{problem\}"),
        ("evaluation.engine=sglang", "evaluation.engine must be transformers or vllm"),
        ("evaluation.temperature=0", "evaluation.temperature must be > 0"),
        ("evaluation.max_new_tokens=0", "evaluation.max_new_tokens must be >= 1"),
        ("evaluation.benchmarks.aime24.samples=0", "evaluation.benchmarks.aime24.samples must be >= 1"),
        ("evaluation.benchmarks.aime24.sample=2", "evaluation.benchmarks.aime24: unknown key 'sample'"),
        ("evaluation.benchmarks.new={problem: p}", "evaluation.benchmarks.new: name is missing"),
        ("evaluations.seed=1", "'evaluations.seed=1' is no SECTION.KEY=VALUE"),
        ("trainer.seed", "'trainer.seed' is no SECTION.KEY=VALUE"),
    ],
)
def test_wrong_key_is_named(override: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        load_recipe(SMALL, [override])


def test_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- model\n")
    with pytest.raises(TypeError, match="a recipe must be a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("model: {")
    with pytest.raises(ValueError, match=r"broken.yaml is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "short.yaml").write_text("model: {name: x}")
    with pytest.raises(ValueError, match="a recipe: data is missing"):
        load_recipe(tmp_path / "short.yaml")


def test_weighting_with_fields() -> None:
    recipe = load_recipe(SMALL, ["weighting.weighting={scope: batch, normalizer: numel}"])
    assert recipe.weighting.keywords()["weighting"] == CovarianceWeighting(scope="batch", normalizer="numel")


# --- problems ----------------------------------------------------------------------------------------------

ROWS = [{"question": "What is 1 + 1?", "key": 2, "level": "Easy"}, {"question": "1/2?", "key": 0.5, "level": "Hard"}]


def test_problems_of_a_folder_and_a_file(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("folder", "rows.jsonl"):
        source = Problems(name=str(tmp_path / name), problem="question", answer="key")
        problems = load_problems(source)
        assert problems.column_names == ["problem", "solution"]
        assert problems["problem"][:] == [row["question"] for row in ROWS]
        assert [s[0] + s[-1] for s in problems["solution"]] == ["$$"] * 2
        assert [float(s.strip("$")) for s in problems["solution"]] == [2, 0.5]
    source = TrainingData(name=str(tmp_path / "folder"), problem="question", answer="key", system_prompt="Think.")
    prompts = training_prompts(source)
    assert sorted(prompts.column_names) == ["prompt", "solution"]
    assert prompts[0]["prompt"] == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    assert len(training_prompts(dataclasses.replace(source, system_prompt=None))[0]["prompt"]) == 1


def test_wrong_problems(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="has no column 'answer'; it has question, key, level"):
        load_problems(Problems(name=str(tmp_path / "rows"), problem="question"))


def test_too_few_problems_for_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL would end such a training at once, as if it were done."""
    overrides = [f"trainer.output_dir={tmp_path / 'run'}", "trainer.gradient_accumulation_steps=25"]
    with pytest.raises(ValueError, match="has 24 problems; one generation takes 25"):
        run(SMALL, overrides=overrides, dry_run=True)


# --- rewards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nTwo.\n</think>\nThe answer is 2.", 1.0),
        ("Two.\n</think>\nThe answer is 2.", 1.0),  # the prompt ends in <think>
        ("\n<think></think>2", 1.0),
        ("Two. The answer is 2.", 0.0),
        ("<think>Two.", 0.0),
        ("<think>Two.</think>", 0.0),
        ("<think>Two.</think> \n", 0.0),
        ("So <think>Two.</think> 2", 0.0),
        ("<think>Two.</think> 2 </think> 2", 0.0),
        ("<think>Two.</think> <think> 2", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text: str, reward: float) -> None:
    assert format_reward([[{"role": "assistant", "content": text}]], prompts=[], solution=["$2$"]) == [reward]


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        (204, r"Therefore, the final answer is: $\boxed{204}$. I hope it is correct", 1.0),
        (204, r"$\boxed{205}$", 0.0),
        ("27.0", r"\boxed{27}", 1.0),
        (r"\frac{1}{2}", r"<think> $\frac13$? </think> It is \boxed{0.5}.", 1.0),
        (r"$\frac{1}{2}$", r"\boxed{\dfrac{1}{2}}", 1.0),
        (r"Since $x=2$ and $y=3$, we find \boxed{5}. That was wrong: \boxed{\frac{12}{2}}. Done, $z=1$.",
         r"\boxed{6}", 1.0),
        (r"Since $x=2$, we find \boxed{\frac{1}{2}}.", r"\boxed{2}", 0.0),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}", 1.0),
        ("5", "5", 0.0),  # only what is in a box or after words such as "the answer is" counts
    ],
)  # fmt: skip
def test_accuracy_reward_of_answers(answer: Any, response: str, reward: float) -> None:
    assert accuracy_reward([[{"content": response}]], [as_solution(answer)]) == [reward]


# --- benchmarks --------------------------------------------------------------------------------------------


def test_score(tmp_path: Path) -> None:
    rows = [
        {"correct": [1.0, 0.0, 1.0, 1.0], "tokens": [1, 2, 3, 4], "truncated": [False, False, False, True]},
        {"correct": [0.0] * 4, "tokens": [10] * 4, "truncated": [True] * 4},
        {"correct": [None] * 4, "tokens": [0] * 4, "truncated": [False] * 4},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = evaluate.score(tmp_path / "a.jsonl")
    assert score == evaluate.Score(
        problems=3, unreadable=1, correct=[0.75, 0.0, 0.0], pass_at_1=25.0, tokens=50 / 12, truncated=5 / 12
    )
    assert evaluate.standard_error(score.correct) == pytest.approx(torch.tensor(score.correct).std().item() / 3**0.5)


def test_responses_end_where_the_model_ends_them(tmp_path: Path) -> None:
    """Lengths, truncation and text of sampled responses, against what the tokens say."""
    rehearsal._save_model(tmp_path)
    settings = Evaluation(
        prompt="{problem}", temperature=1.0, max_new_tokens=5, dtype="float32", batch_size=3, benchmarks={}
    )
    torch.manual_seed(0)
    engine = evaluate._transformers(str(tmp_path), None, settings)
    responses = engine([[{"role": "user", "content": "so " * n}] for n in range(40)])
    assert len(responses) == 40
    assert {response.truncated for response in responses} == {True, False}
    assert any(response.tokens == 5 and not response.truncated for response in responses)
    for response in responses:
        words = len(response.text.split())  # all tokens but <unk>, <pad> and the end
        assert words <= response.tokens - (not response.truncated)
        assert response.tokens == 5 if response.truncated else 1 <= response.tokens <= 5


def test_benchmark_scores_are_those_of_its_responses(tmp_path: Path) -> None:
    rehearsal._save_model(tmp_path / "model")
    Dataset.from_list([{"problem": f"{a - 1} + 1", "answer": a} for a in (3, 5, 7)] * 4).save_to_disk(tmp_path / "data")
    settings = Evaluation(
        prompt="Solve {problem} so", temperature=1.0, max_new_tokens=8, dtype="float32",
        benchmarks={"sums": Benchmark(name=str(tmp_path / "data"), samples=8)},
    )  # fmt: skip
    evaluate.evaluate(str(tmp_path / "model"), None, settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    for row in rows:
        for text, correct in zip(row["responses"], row["correct"], strict=True):
            boxes = set(re.findall(r"\\boxed\{(\d)\}", text))
            if len(boxes) < 2:  # else it depends on what is between them
                assert correct == float(f"${''.join(boxes)}$" == row["solution"]), text
    assert 0 < evaluate.score(tmp_path / "sums.jsonl").pass_at_1 < 100
