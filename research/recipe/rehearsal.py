"""A dry run: the same recipe with a tiny model and made-up problems on the disk, and everything short."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from covgrpo_kernels.grpo.checkpoint import save_folder_atomically

from .config import Problems, Recipe
from .data import write_lines

Source = TypeVar("Source", bound=Problems)

ANSWERS = (3, 5, 7)
# So few tokens that a model with random weights is right now and then: all groups alike would train nothing.
TOKENS = ["<pad>", "<eos>", "<unk>", "so", "</think>", *(f"\\boxed{{{answer}}}" for answer in ANSWERS)]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : <think> {% endif %}"
)


def rehearsed(recipe: Recipe, inputs: Path) -> Recipe:
    """The recipe with `write_inputs`'s files in place of its own. What else differs is how long things take, and that
    it needs no GPU."""
    evaluation = dataclasses.replace(
        recipe.evaluation, engine="transformers", dtype="float32", max_new_tokens=6,
        benchmarks={
            name: dataclasses.replace(_local(benchmark, inputs / f"{name}.jsonl"), samples=min(benchmark.samples, 2))
            for name, benchmark in recipe.evaluation.benchmarks.items()
        },
    )  # fmt: skip
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, name=str(inputs / "model"), revision=None, attn_implementation=None),
        data=_local(recipe.data, inputs / "train.jsonl"),
        trainer=recipe.trainer
        | dict(max_steps=2, save_steps=1, max_completion_length=6, use_cpu=True, bf16=False, use_vllm=False)
        | dict(report_to="none", logging_steps=1),
        evaluation=evaluation,
    )


def _local(source: Source, file: Path) -> Source:
    return dataclasses.replace(source, name=str(file), config=None)


def write_inputs(recipe: Recipe) -> None:
    """The files that a rehearsed recipe names."""
    for source in (recipe.data, *recipe.evaluation.benchmarks.values()):
        rows: list[dict[str, Any]] = [
            {source.problem: f"What is {answer - 1} + 1 ?", source.answer: str(answer)} for answer in ANSWERS
        ]
        # A step of training takes several prompts, and more of them the more processes there are.
        write_lines(Path(source.name), rows * 8 if source is recipe.data else rows)
    save_folder_atomically(Path(recipe.model.name), _save_model)


def _save_model(folder: Path) -> None:
    words = Tokenizer(models.WordLevel(vocab={token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
