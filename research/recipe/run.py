"""A recipe from start to end: training, benchmarks before and after it, report. What is finished is not done again."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from covgrpo_kernels.grpo.checkpoint import write_atomically

from .config import Recipe, load_recipe
from .data import load_problems
from .evaluate import evaluate
from .rehearsal import rehearsed, write_inputs
from .report import write_report
from .train import MODEL, train

SETTINGS = "recipe.json"


def run(path: str | Path, *, overrides: Sequence[str] = (), dry_run: bool = False) -> Path:
    """
    Args:
        path: a YAML file with the sections of `Recipe`.
        overrides: "section.key=value" for each that the file should have said otherwise.
        dry_run: on the CPU, without any network, in seconds: a tiny random model, three made-up problems each for
            training and every benchmark, two steps. The folder gets "-dry-run" at the end of its name.

    Returns:
        The report; everything is in its folder, ``trainer.output_dir``, where the same call goes on with an interrupted
        run. Under accelerate or torchrun each process calls this, and they share the work, but vLLM evaluates in a
        single process: with it, several only train, the folder of the trained model is returned, and the same call in
        one process does the rest.

    Raises:
        OSError: a file, model or data set cannot be read.
        TypeError, ValueError: something is wrong in the recipe, by key, or the folder is that of another.
    """
    recipe = load_recipe(path, overrides)
    out = Path(recipe.trainer["output_dir"] + ("-dry-run" if dry_run else ""))
    if dry_run:
        recipe = rehearsed(recipe, out / "inputs")
    arguments = recipe.arguments(out)  # before PartialState, which learns the device from it
    _begin(recipe, out)
    if dry_run and PartialState().is_main_process:
        write_inputs(recipe)
    PartialState().wait_for_everyone()

    # What the end of a run needs is tried before its hours begin.
    if recipe.evaluation.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("evaluation.engine: vllm is not installed")
    with PartialState().main_process_first():
        for benchmark in recipe.evaluation.benchmarks.values():
            load_problems(benchmark)

    if not (out / MODEL).exists():
        train(recipe, arguments, out)
    if recipe.evaluation.engine == "vllm" and PartialState().num_processes > 1:
        return out / MODEL
    evaluate(recipe.model.name, recipe.model.revision, recipe.evaluation, out / "evaluation" / "before")
    evaluate(str(out / MODEL), None, recipe.evaluation, out / "evaluation" / "after")
    if PartialState().is_main_process:
        write_report(recipe, out, dry_run=dry_run)
    return out / "report.md"


def _begin(recipe: Recipe, out: Path) -> None:
    settings = json.loads(json.dumps(dataclasses.asdict(recipe)))
    file = out / SETTINGS
    if file.exists():
        before = json.loads(file.read_text())
        changed = [section for section in settings if settings[section] != before.get(section)]
        if changed:
            raise ValueError(f"{out} holds a run with another {', '.join(changed)}; give another trainer.output_dir")
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        text = json.dumps(settings, indent=1)
        write_atomically(file, lambda f: f.write(text.encode()))
