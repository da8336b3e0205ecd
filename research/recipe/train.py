"""Training by `CovGRPOTrainer`, from the last whole checkpoint on."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from accelerate import PartialState
from trl import GRPOConfig

from covgrpo_kernels.grpo.checkpoint import save_folder_atomically
from covgrpo_kernels.integrations.trl import CovGRPOTrainer

from .config import Recipe
from .data import training_prompts, write_lines
from .rewards import REWARDS

MODEL, LOG = "model", "training.jsonl"  # in the folder of a run


def train(recipe: Recipe, arguments: GRPOConfig, out: Path) -> None:
    """The trained model and its tokenizer in ``out/model``, and TRL's log beside it.

    Raises:
        ValueError: too few problems for a single generation.
    """
    data = training_prompts(recipe.data)
    prompts = (arguments.generation_batch_size or 0) // (arguments.num_generations or 1)
    if len(data) < prompts:  # TRL would take no step at all, and say that training is done
        raise ValueError(f"data.name: {recipe.data.name} has {len(data)} problems; one generation takes {prompts}")
    trainer = CovGRPOTrainer(
        model=recipe.model.name,
        reward_funcs=[REWARDS[name] for name in recipe.rewards],
        args=arguments,
        train_dataset=data,
        **recipe.weighting.keywords(),
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(out))

    # All processes take part where each has a shard of the model; one of them writes.
    if PartialState().is_main_process:
        write_lines(out / LOG, trainer.state.log_history)
        save_folder_atomically(out / MODEL, lambda folder: trainer.save_model(str(folder)))
    else:
        trainer.save_model(str(out / MODEL))
    PartialState().wait_for_everyone()

    trainer.accelerator.free_memory()  # for the benchmarks
    gc.collect()
    torch.cuda.empty_cache()


def _last_checkpoint(out: Path) -> str | None:
    """The trainer writes its state last: where that is missing, a checkpoint was cut off."""
    whole = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None
