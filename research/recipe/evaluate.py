"""Benchmarks: sampled responses, checked by the reward for accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from .config import Benchmark, Evaluation
from .data import load_problems, read_lines, write_lines


@dataclass(frozen=True)
class Response:
    text: str
    tokens: int
    truncated: bool  # it did not end by itself


Conversation = list[dict[str, str]]
Engine = Callable[[list[Conversation]], list[Response]]


def evaluate(model: str, revision: str | None, settings: Evaluation, folder: Path) -> None:
    """Writes ``folder/BENCHMARK.jsonl``, one line a problem, as each benchmark is finished; those there are kept.
    The problems are shared out among the processes."""
    state = PartialState()
    missing = [[name for name in settings.benchmarks if not (folder / f"{name}.jsonl").exists()]]
    broadcast_object_list(missing)  # the others may not see the folder
    if not missing[0]:
        return
    engine = {"transformers": _transformers, "vllm": _vllm}[settings.engine](model, revision, settings)
    for name in missing[0]:
        rows = gather_object(_answers(engine, settings, settings.benchmarks[name]))
        if state.is_main_process:
            write_lines(folder / f"{name}.jsonl", sorted(rows, key=lambda row: row["problem"]))
        state.wait_for_everyone()


def _answers(engine: Engine, settings: Evaluation, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Of this process's share of the problems."""
    state = PartialState()
    set_seed(settings.seed + state.process_index)
    problems = load_problems(benchmark)
    share = range(state.process_index, len(problems), state.num_processes)
    prompts = [settings.prompt.replace("{problem}", problems[i]["problem"]) for i in share]
    responses = engine([[{"role": "user", "content": p}] for p in prompts for _ in range(benchmark.samples)])
    rows = []
    for position, i in enumerate(share):
        ours = responses[position * benchmark.samples : (position + 1) * benchmark.samples]
        solution = problems[i]["solution"]
        scores = accuracy_reward([[{"content": r.text}] for r in ours], [solution] * len(ours))
        rows.append(
            {
                "problem": i,
                "solution": solution,
                "correct": scores,  # null where the solution cannot be read
                "tokens": [r.tokens for r in ours],
                "truncated": [r.truncated for r in ours],
                "responses": [r.text for r in ours],
            }
        )
    return rows


def _transformers(model: str, revision: str | None, settings: Evaluation) -> Engine:
    device = PartialState().device
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=getattr(torch, settings.dtype))
    policy = policy.to(device).eval()
    ends = policy.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def respond(batch: list[Conversation]) -> list[Response]:
        inputs: Any = tokenizer.apply_chat_template(
            batch, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(device)
        output = policy.generate(
            **inputs, max_new_tokens=settings.max_new_tokens, do_sample=True, temperature=settings.temperature,
            top_p=settings.top_p, top_k=0, repetition_penalty=1.0, eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        responses = []
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
            [text] = tokenizer.batch_decode([tokens[:length]], skip_special_tokens=True)
            responses.append(Response(text, length or len(tokens), length is None))
        return responses

    size = settings.batch_size
    return lambda prompts: [r for i in range(0, len(prompts), size) for r in respond(prompts[i : i + size])]


def _vllm(model: str, revision: str | None, settings: Evaluation) -> Engine:
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, revision=revision, dtype=settings.dtype, seed=settings.seed)
    sampling = SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens
    )

    def respond(prompts: list[Conversation]) -> list[Response]:
        outputs = [output.outputs[0] for output in llm.chat(prompts, sampling)]
        return [Response(o.text, len(o.token_ids), o.finish_reason == "length") for o in outputs]

    return respond


@dataclass(frozen=True)
class Score:
    """Of one benchmark, over its problems."""

    problems: int
    unreadable: int  # solutions that cannot be read; no response to these problems counts as right
    correct: list[float]  # share of right responses to each problem
    pass_at_1: float  # in percent
    tokens: float  # mean length of a response
    truncated: float  # share of responses


def score(file: Path) -> Score:
    rows = read_lines(file)
    correct = [sum(value or 0.0 for value in row["correct"]) / len(row["correct"]) for row in rows]
    tokens = [length for row in rows for length in row["tokens"]]
    cut = [flag for row in rows for flag in row["truncated"]]
    return Score(
        problems=len(rows),
        unreadable=sum(None in row["correct"] for row in rows),
        correct=correct,
        pass_at_1=100 * sum(correct) / len(rows),
        tokens=sum(tokens) / len(tokens),
        truncated=sum(cut) / len(cut),
    )


def standard_error(values: list[float]) -> float:
    """Of the mean, over problems as the draw; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
