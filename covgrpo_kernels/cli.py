"""The `covgrpo` command: train, demo, bench, doctor. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .grpo.config import TrainConfig, option_type

NEEDED = ("transformers", "matplotlib")  # by train and demo: the extra "grpo"
INTERRUPTED = 130

DEMO = TrainConfig(out="runs/demo")


def main(arguments: Sequence[str] | None = None) -> int:
    # Torchrun gives the same options to all of its processes: one of them complains.
    with contextlib.nullcontext() if _first() else contextlib.redirect_stderr(io.StringIO()):
        options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    if command == "doctor":
        from .doctor import main as doctor

        return doctor(**options)
    if command == "bench":
        return _bench(**options)
    if command == "demo" and _processes() > 1:
        return _fail("covgrpo demo runs in one process; torchrun is for covgrpo train")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        from .doctor import how_to_install

        return _fail(f"covgrpo {command} needs {', '.join(missing)}: {how_to_install('grpo')}")
    try:
        if "config" in options:
            from .config_file import read_config

            options = read_config(options.pop("config")) | options
        config = TrainConfig(**options) if command == "train" else dataclasses.replace(DEMO, **options)
    except (TypeError, ValueError, OSError) as error:
        return _fail(str(error))
    return _run(command, config)


def _run(command: str, config: TrainConfig) -> int:
    from transformers.utils import logging

    from .grpo import parallel
    from .grpo.demo import demo
    from .grpo.train import TrainingError, train

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of what a model lacks, `covgrpo train` makes errors of its own
    status = 0
    try:
        (demo if command == "demo" else train)(config)
    except KeyboardInterrupt:
        _say(f"\ninterrupted; the same command {_what_is_left(Path(config.out))}")
        status = INTERRUPTED
    except (TrainingError, ValueError, OSError) as error:
        status = _fail(str(error))
    return parallel.leave(status)


def _bench(**options: Any) -> int:
    from .benchmark import main as bench

    try:
        return bench(**options)
    except (ValueError, RuntimeError) as error:  # inputs that are too large, or a backend that cannot run
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _what_is_left(out: Path) -> str:
    """Of a run or a demo that was interrupted."""
    if [*out.glob("model"), *out.glob("*/model")]:
        return f"goes on from the last checkpoint in {out}"
    if (out / "warm_start").exists():
        return f"goes on after the warm start, which is in {out}"
    return "begins again: there is no checkpoint yet"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="covgrpo", description="Covariance-weighted GRPO (arXiv 2605.11538).")
    parser.add_argument("--version", action="version", version=f"covgrpo-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a policy on problems with verifiable answers",
        description="Trains a policy by GRPO on problems whose answers a program checks. The same command "
        "goes on with an interrupted run. Under torchrun (torchrun --nproc-per-node N -m covgrpo_kernels train ...) "
        "its processes share the work, with the numbers of a single one but for rounding; the next command may have "
        "another number of them.",
    )
    train.add_argument(
        "--config", default=argparse.SUPPRESS, metavar="FILE",
        help="options from a YAML file, one a line (group_size: 8); those of the command line come on top",
    )  # fmt: skip
    for field in dataclasses.fields(TrainConfig):
        _add_option(train, field, field.metadata["default"])

    demo = commands.add_parser(
        "demo",
        help="GRPO and CW-GRPO side by side on a small problem, in minutes on a CPU",
        description="One supervised warm start, then GRPO and CW-GRPO from it; ends with a table and "
        "OUT/report.png. An interrupted demo goes on where it was; a finished one is shown again.",
    )
    for field in dataclasses.fields(TrainConfig):
        if field.name in ("out", "steps", "seed", "device"):
            _add_option(demo, field, getattr(DEMO, field.name))

    bench = commands.add_parser(
        "bench",
        help="the loss beside eager PyTorch at your size, in less than a minute",
        description="Time, memory and errors of log-probs and their gradients, from hidden states [N, D] and a head "
        "[V, D], beside eager PyTorch's; on the GPU if there is one. In a clone, python -m bench has every peer.",
    )
    for name, metavar, help in (
        ("tokens", "N", "tokens of an optimiser step, or of a micro-batch"),
        ("depth", "D", "hidden size of the model"),
        ("vocab", "V", "size of its vocabulary"),
    ):
        bench.add_argument(name, type=_positive, metavar=metavar, help=help)
    bench.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="of hidden states and head (default: bfloat16 where the device has instructions for it, else float32)",
    )  # fmt: skip

    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, backends and a numeric self-test",
        description="Versions, devices, backends, and a self-test of the numbers on every device.",
    )
    doctor.add_argument(
        "--json", action="store_true", dest="as_json", help="one object of JSON, for a program or an issue"
    )
    return parser


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, default: object) -> None:
    help, with_model = field.metadata["help"], field.metadata["with_model"]
    if default is not None:
        help += f" (default: {default}" + (f"; with --model {with_model}" if with_model is not None else "") + ")"
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
