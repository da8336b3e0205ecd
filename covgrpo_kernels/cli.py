"""The `covgrpo` command: train, demo, recipe, study, doctor. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from .grpo.config import TrainConfig, option_type
from .study.arms import ALL_ARMS, SEEDS, TASKS

NEEDED = ("transformers", "rich", "matplotlib")  # by train, demo and study: the extra "grpo"
INTERRUPTED = 130

DEMO = TrainConfig(out="runs/demo")


def main(arguments: Sequence[str] | None = None) -> int:
    # Torchrun gives the same options to all of its processes: one of them complains.
    with contextlib.nullcontext() if _first() else contextlib.redirect_stderr(io.StringIO()):
        options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    if command == "doctor":
        from . import doctor

        return doctor.main()
    if command == "recipe":
        return _recipe(**options)
    if command == "demo" and _processes() > 1:
        return _fail("covgrpo demo runs in one process; torchrun is for covgrpo train")
    if command == "study" and _processes() > 1:
        return _fail("covgrpo study has processes of its own: --workers")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"covgrpo {command} needs {', '.join(missing)}: pip install 'covgrpo-kernels[grpo]'")
    if command == "study":
        return _study(**options)
    try:
        config = dataclasses.replace(DEMO if command == "demo" else TrainConfig(), **options)
    except (TypeError, ValueError) as error:
        return _fail(str(error))
    return _run(command, config)


def _run(command: str, config: TrainConfig) -> int:
    from transformers.utils import logging

    from .grpo import parallel
    from .grpo.demo import demo
    from .grpo.train import TrainingError, train

    logging.disable_progress_bar()
    status = 0
    try:
        (demo if command == "demo" else train)(config)
    except KeyboardInterrupt:
        _say(f"\ninterrupted; the same command goes on from the last checkpoint in {config.out}")
        status = INTERRUPTED
    except (TrainingError, ValueError, OSError) as error:
        status = _fail(str(error))
    return parallel.leave(status)


def _recipe(file: str, overrides: list[str], dry_run: bool) -> int:
    missing = [name for name in ("trl", "math_verify") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"covgrpo recipe needs {', '.join(missing)}: pip install 'covgrpo-kernels[recipe]'")
    from .grpo import parallel
    from .recipe.run import run

    status = 0
    try:
        result = run(file, overrides=overrides, dry_run=dry_run)
        if _first():
            print(result)
    except KeyboardInterrupt:
        _say("\ninterrupted; the same command goes on from the last checkpoint")
        status = INTERRUPTED
    except (OSError, TypeError, ValueError) as error:
        status = _fail(str(error))
    return parallel.leave(status)


def _study(**options: Any) -> int:
    from .grpo.train import TrainingError
    from .study.study import study

    try:
        study(**options)
    except KeyboardInterrupt:
        _say(f"\ninterrupted; the same command goes on with the runs that are not finished in {options['out']}")
        return INTERRUPTED
    except (TrainingError, ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="covgrpo", description="Covariance-weighted GRPO (arXiv 2605.11538).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a policy on problems with verifiable answers",
        description="Trains a policy by GRPO on problems whose answers a program checks. The same command "
        "goes on with an interrupted run. Under torchrun (torchrun --nproc-per-node N -m covgrpo_kernels train ...) "
        "its processes share the work, with the numbers of a single one but for rounding; the next command may have "
        "another number of them.",
    )
    for field in dataclasses.fields(TrainConfig):
        _add_option(train, field, field.default)

    demo = commands.add_parser(
        "demo",
        help="GRPO and CW-GRPO side by side on a small problem, in minutes on a CPU",
        description="One supervised warm start, then GRPO and CW-GRPO from it; ends with a table and "
        "OUT/report.png. An interrupted demo goes on where it was; a finished one is shown again.",
    )
    for field in dataclasses.fields(TrainConfig):
        if field.name in ("out", "steps", "seed", "device"):
            _add_option(demo, field, getattr(DEMO, field.name))

    recipe = commands.add_parser(
        "recipe",
        help="a whole run from a YAML file: TRL's trainer, benchmarks before and after, report",
        description="Trains by TRL's GRPOTrainer with covariance weights and judges the model before and after, as a "
        "file of recipes/ says. The same command goes on with an interrupted run. Under accelerate launch or torchrun "
        "its processes share the work.",
    )
    recipe.add_argument("file", metavar="FILE", help="the recipe")
    recipe.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="replaces a value of the file; may be given several times",
    )  # fmt: skip
    recipe.add_argument(
        "--dry-run", action="store_true",
        help="every stage on the CPU, with a tiny random model and made-up problems, into OUTPUT_DIR-dry-run",
    )  # fmt: skip

    study = commands.add_parser(
        "study",
        help="does CW-GRPO do what its paper says? All methods, controls and readings of the paper, in hours on a CPU",
        description="Trains small policies by every method with several seeds and writes study.md, what was found, and "
        "its figures. An interrupted study goes on where it was; finished runs are not run again.",
    )
    study.add_argument("--out", metavar="FOLDER", default="runs/study", help="of the runs (default: runs/study)")
    study.add_argument("--results", metavar="FOLDER", help="of the report (default: that of the runs)")
    study.add_argument("--tasks", metavar="TASK", nargs="+", help=f"default: all, {', '.join(TASKS)}")
    study.add_argument(
        "--arms", metavar="ARM", nargs="+",
        help=f"default: all, {', '.join(ALL_ARMS)}; what they are compared with runs too",
    )  # fmt: skip
    study.add_argument("--seeds", metavar="INT", type=int, help=f"so many (default: {SEEDS})")
    study.add_argument("--steps", metavar="INT", type=int, help="of a run (default: as the study was planned)")
    study.add_argument("--workers", metavar="INT", type=int, default=2, help="runs at a time (default: 2)")
    study.add_argument("--miniature", action="store_true", help="a minute or two, to see that all works")
    study.add_argument("--report-only", action="store_true", help="from the study.json that is there")

    commands.add_parser("doctor", help="versions, devices, backends and a numeric self-test")
    return parser


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, default: object) -> None:
    help = field.metadata["help"]
    if default is not None:
        help += f" (default: {default})"
    parser.add_argument(
        f"--{field.name.replace('_', '-')}",
        type=option_type(field.name),
        choices=field.metadata["choices"],
        default=argparse.SUPPRESS,
        metavar=None if field.metadata["choices"] else option_type(field.name).__name__.upper(),
        help=help.replace("%", "%%"),
    )


def _fail(message: str) -> int:
    _say(f"covgrpo: error: {message}")
    return 2


def _say(message: str) -> None:
    """What goes wrong goes wrong in every process, in the same words."""
    if _first():
        print(message, file=sys.stderr, flush=True)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _first() -> bool:
    return _processes() == 1 or os.environ.get("RANK", "0") == "0"
