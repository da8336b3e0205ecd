"""What a training step of a real model costs in TRL's trainer and in ours: `python -m research trainers`.

Peak memory is the largest resident set of a fresh process, the model, its gradients and AdamW's state included. A step
is all but the sampling: TRL is handed completions, which are the model's own (recorded by `recordings.py`). A short
step comes first, so that AdamW's state is there in those that are measured.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from covgrpo_kernels.benchmark import resident_kib

from . import RESULTS
from .models import model_folder
from .recordings import recorded

MODEL = "smollm2"
COMPLETIONS = 2  # of one prompt, in a step
SHORT = 16  # tokens of a completion in the first step
SPACING = 256  # of the lengths among which the longest is sought
# Name -> keywords of CovGRPOTrainer, None for TRL's own.
TRAINERS: dict[str, dict[str, Any] | None] = {
    "TRL's GRPOTrainer": None,
    "CovGRPOTrainer": {},
    'CovGRPOTrainer(weighting="none", grad_tol=0.0)': dict(weighting="none", grad_tol=0.0),
}
SOUGHT = list(TRAINERS)[:2]  # whose longest completions are sought: the third has the memory of the second


def run(tokens: Sequence[int], dtypes: Sequence[str], steps: int, within: float | None, out: Path | None) -> None:
    from bench.measure import environment, write_json

    recorded(MODEL, 1.0)
    file = (out or RESULTS) / "trainers.json"
    found: dict[str, Any] = dict(environment=environment(), completions=COMPLETIONS, within_gib=within, runs=[])

    def peak(name: str, dtype: str, steps: int, length: int) -> float:
        """MiB; as a run of `found`, which is made if it is not there."""
        for x in found["runs"]:
            if (x["trainer"], x["dtype"], x["tokens"]) == (name, dtype, length):
                return float(x["peak_mib"])
        mib, seconds = in_a_process(name, length, dtype, steps)
        found["runs"].append(dict(trainer=name, tokens=length, dtype=dtype, peak_mib=mib, seconds=seconds))
        print(f"{name}, {length} tokens, {dtype}: {mib:.0f} MiB, {seconds} s", flush=True)
        write_json(file, found)
        return mib

    for length, dtype, name in itertools.product(tokens, dtypes, TRAINERS):
        peak(name, dtype, steps, length)
    if within is not None:
        for dtype, name in itertools.product(dtypes, SOUGHT):
            longest(functools.partial(peak, name, dtype, 1), within * 1024, positions())
    print(report(found))


def longest(peak: Callable[[int], float], limit: float, most: int) -> int:
    """The longest completion whose peak is within ``limit``, of the multiples of SPACING up to ``most``; 0: none.
    Peaks grow in about a straight line, so that two of them say where to look; but they scatter with what the C library
    keeps of freed memory, so that a length between those that were measured may be an exception."""
    known = {n: peak(n) for n in (4 * SPACING, 8 * SPACING)}
    while True:
        low = max((n for n in known if known[n] <= limit), default=0)
        high = min((n for n in known if known[n] > limit), default=most // SPACING * SPACING + SPACING)
        if high - low <= SPACING:
            return low
        (a, at_a), (b, at_b) = sorted(known.items())[-2:]
        crossing = (a + (limit - at_a) * (b - a) / max(at_b - at_a, 1.0)) // SPACING * SPACING
        guess = int(min(max(crossing, low + SPACING), high - SPACING))
        known[guess] = peak(guess)


def positions() -> int:
    """The longest completion that the model's positions leave room for, beside a prompt of SHORT tokens."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model_folder(MODEL)).max_position_embeddings) - SHORT


def report(found: dict[str, Any]) -> str:
    lines = ["| tokens of a completion | dtype | trainer | peak MiB | step |", "|---|---|---|---|---|"]
    for x in found["runs"]:
        seconds = statistics.median(x["seconds"][1:])
        lines.append(f"| {x['tokens']} | {x['dtype']} | {x['trainer']} | {x['peak_mib']:.0f} | {seconds:.1f} s |")
    return "\n".join(lines)


def in_a_process(name: str, length: int, dtype: str, steps: int) -> tuple[float, list[float]]:
    """Peak MiB, and the seconds of each step: a short one, and ``steps`` with completions of ``length`` tokens."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(theirs, name, length, dtype, steps))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} with {length} tokens in {dtype} failed") from None
    finally:
        process.join()
    return result


def _train(pipe: Any, name: str, length: int, dtype: str, steps: int) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from covgrpo_kernels.integrations.trl import CovGRPOTrainer

    folder = model_folder(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    stream = _recorded_tokens()
    lengths = itertools.chain([SHORT], itertools.repeat(length))

    def completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
        now = next(lengths)
        taken = [list(itertools.islice(stream, now)) for _ in prompts]
        return dict(prompt_ids=[tokenizer(p).input_ids for p in prompts], completion_ids=taken, logprobs=None)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begun, self.seconds = 0.0, list[float]()

        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    with tempfile.TemporaryDirectory() as out:
        options = TRAINERS[name]
        trainer_class: Any = GRPOTrainer if options is None else CovGRPOTrainer
        trainer = trainer_class(
            model=str(folder), processing_class=tokenizer, reward_funcs=_reward, rollout_func=completions,
            train_dataset=Dataset.from_dict({"prompt": ["What is 17 + 25?"] * (steps + 2)}),
            args=GRPOConfig(
                out, per_device_train_batch_size=COMPLETIONS, num_generations=COMPLETIONS, max_steps=steps + 1,
                max_completion_length=length, bf16=dtype == "bfloat16", model_init_kwargs=dict(dtype="float32"),
                use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-6,
            ),
            **(options or {}),
        )  # fmt: skip
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    # Not `resource.getrusage`, whose peak a process has from the one that started it.
    pipe.send((resident_kib("VmHWM:") / 1024, clock.seconds))
    pipe.close()


def _reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def _recorded_tokens() -> Iterator[int]:
    """An endless stream of the tokens that the model sampled."""
    import torch

    targets = torch.load(recorded(MODEL, 1.0), weights_only=True, mmap=True)["targets"]
    return itertools.cycle(targets[targets >= 0].tolist())
