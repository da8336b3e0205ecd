"""The minimal GRPO loop: exact rewards, exact log-probs, exact accumulation, exact resumption."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from covgrpo_kernels import linear_logprob  # noqa: E402
from covgrpo_kernels.grpo import checkpoint, tasks  # noqa: E402
from covgrpo_kernels.grpo import train as training  # noqa: E402
from covgrpo_kernels.grpo.checkpoint import TrainingError  # noqa: E402
from covgrpo_kernels.grpo.config import LOSS_TYPES, TrainConfig  # noqa: E402
from covgrpo_kernels.grpo.logs import MetricsLog  # noqa: E402
from covgrpo_kernels.grpo.policy import Policy, byte_tokenizer, load_policy, new_policy  # noqa: E402
from covgrpo_kernels.grpo.rollout import (  # noqa: E402
    Batch,
    Rollout,
    encode_solutions,
    finished,
    group_advantages,
    reward,
    sample,
)
from covgrpo_kernels.grpo.train import generator_of, train  # noqa: E402

CPU = torch.device("cpu")
FOLDER = tempfile.TemporaryDirectory()


def guesses() -> str:
    """A file of sums modulo 7: what a small policy does not work out it guesses, and one guess in seven is right."""
    path = Path(FOLDER.name) / "sums.jsonl"
    sums = ((a, b) for a in range(12) for b in range(12))
    path.write_text("".join(f'{{"prompt": "{a} +{b} mod 7 =", "answer": "{(a + b) % 7}"}}\n' for a, b in sums))
    return str(path)


# After this warm start about one response in seven is right, a guess: groups differ, so every step learns.
TINY = TrainConfig(
    hidden_size=64,
    layers=1,
    warm_start_steps=25,
    warm_start_reward=1.0,
    warm_start_lr=5e-3,
    data=guesses(),
    steps=4,
    prompts_per_step=4,
    group_size=8,
    max_new_tokens=4,
    inner_steps=2,
    checkpoint_every=2,
    eval_every=2,
    eval_problems=8,
    warmup_steps=2,
    lr=1e-3,
    beta=0.0,
    temperature=1.0,
)


def tiny(out: Path, **changes: object) -> TrainConfig:
    return dataclasses.replace(TINY, out=str(out), **changes)


def metrics(out: Path) -> list[dict]:
    """What must not depend on when a run was interrupted."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from threads, and loses much to other tests' threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return new_policy(64, 2, seed=0, device=CPU)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time. That of `uninterrupted` is real: it runs before this."""
    monkeypatch.setattr(training, "save_report", lambda run, runs: None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(tiny(out))
    return out


# --- tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", [1, 2, 5, 8])
def test_generated_problems(difficulty: int) -> None:
    task, again, other = (tasks.countdown_task(difficulty, seed) for seed in (3, 3, 4))
    training_half = [task.training_problem("train", i) for i in range(200)]
    held_out = [task.held_out_problem(i) for i in range(50)]
    for problem in training_half + held_out:
        assert problem.is_correct(problem.solution)
        assert problem.is_correct(f" {problem.solution} ")
        assert not problem.is_correct("")
        assert not problem.is_correct(problem.solution + "0")
    assert not {p.prompt for p in training_half} & {p.prompt for p in held_out}
    # A function of seed, stream and index, whatever was asked before.
    prompts = [p.prompt for p in training_half]
    assert prompts == [again.training_problem("train", i).prompt for i in reversed(range(200))][::-1]
    assert prompts != [other.training_problem("train", i).prompt for i in range(200)]
    assert prompts != [task.training_problem("warm start", i).prompt for i in range(200)]
    assert [p.prompt for p in held_out] == [other.held_out_problem(i).prompt for i in range(50)]


def test_no_guess_solves_held_out_problems() -> None:
    """Problems are different ones, and one response to all of them is right for a few percent at most."""
    for difficulty in (1, 2):
        held_out = tasks.countdown_task(difficulty, 0).held_out_problems(100)
        assert len({problem.prompt for problem in held_out}) == 100
        guesses = {problem.solution for problem in held_out[:50]} | {str(number) for number in range(40)}
        assert max(sum(problem.is_correct(guess) for problem in held_out) for guess in guesses) <= 4


def test_fewer_problems_than_were_asked_for() -> None:
    held_out = tasks.countdown_task(1, 0).held_out_problems(200)
    assert 100 < len({problem.prompt for problem in held_out}) == len(held_out) < 200


def test_a_model_of_the_users_is_told_what_to_do() -> None:
    plain, told = (tasks.countdown_task(2, 0, instruct=instruct) for instruct in (False, True))
    problem = told.training_problem("train", 0)
    assert problem.prompt.startswith("Use each of the numbers before =")
    assert problem.is_correct(f"Let me see.\n1+1 is no good\n\n {problem.solution} \n")
    assert not problem.is_correct(f"{problem.solution}\nor so")
    assert plain.training_problem("train", 0).prompt[0].isdigit()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        *(
            ("It is 42.", "42"),
            ("42", "42"),
            ("so 6*7=42", "42"),
            ("\\boxed{42}, as 7 says", "42"),
            ("1,234.0 m", "1234"),
        ),
        *(("**Answer:** Paris.", "paris"), ("so\nthe answer is (b)", "(B)"), ("\\boxed{x+1}", "x+1"), ("-3", "-3")),
        *(("10-3", "3"), ("1\\boxed{2}\\boxed{ 3 }4", "3")),
    ],
)
def test_an_answer_is_found_at_the_end(response: str, answer: str) -> None:
    assert tasks.ends_in(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        *(("41, 42, 43", "42"), ("142", "42"), ("42 or 43", "42"), ("-42", "42"), ("", "42"), ("none", "42")),
        *(("Paris\nLondon", "Paris"), ("Paris is it", "Paris"), ("Nonparis", "Paris"), ("", "Paris"), ("4.2", "2")),
        *(("42 \\boxed{41}", "42"), ("\\boxed{42", "43")),
    ],
)
def test_an_answer_in_passing_is_none(response: str, answer: str) -> None:
    assert not tasks.ends_in(response, answer)


@pytest.mark.parametrize("response", ["3*7+5", "5+7*3", " (3*7) + 5 ", "2+3*7+3", "26", "(((((26)))))", "28-2"])
def test_countdown_takes_any_expression(response: str) -> None:
    assert tasks._reaches(response, numbers=[3, 7, 5, 3, 2, 26, 28], target=26)


@pytest.mark.parametrize(
    "response",
    [
        *(
            "3*7+5=26",
            "7+7+7+5",
            "3*7+5+3-3",
            "26",
            "3*7",
            "3*7+5-0",
            "3*7+5*1",
            "7*3+3+2",
            "3+7+5+3+7+1",
            "21+5",
        ),  # value or numbers
        *("3**3-1", "3*7--5", "-5+3*7+10", "+3*7+5", "3*7+5;", "3*7+05", "0x3*7+5", "3.0*7+5", "3*7+5.0"),
        *(
            "3(7)+5",
            "3*7+5 #",
            "3*7\n+5",
            "3,7,5",
            "(3*7+5",
            "3*7+5)",
            "",
            " ",
            "+",
            "()",
            "3 7 5",
            "5+3*7+()",
        ),
        *("__import__('os')", "x", "³*7+5", "٣*7+5", "3*7+5" + " " * 500 + "+0", "(" * 5000, "(" * 90 + "1"),
        *("3*7" + "+5" * 99, "9" * 5000, "1_0+16", "3*7+5 if 1 else 0", "26 or 1", "3//1*7+5", "~3"),
    ],
)
def test_countdown_takes_nothing_else(response: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tasks._reaches(response, numbers=[3, 7, 5], target=26)


def test_problems_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"say {i}", "answer": f" {i} ", "source": "extra keys are fine"} for i in range(40)]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    task = tasks.file_task(str(path), seed=0)
    drawn = [task.training_problem("train", i) for i in range(500)]
    held_out = [task.held_out_problem(i) for i in range(100)]
    assert len({p.prompt for p in drawn}) == 36
    assert len({p.prompt for p in held_out}) == 4
    assert not {p.prompt for p in drawn} & {p.prompt for p in held_out}
    for problem in drawn:
        number = problem.prompt.split()[1]
        assert problem.is_correct(f"\n{number} ")
        assert not problem.is_correct(f"{number}0")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "JSONDecodeError: Expecting property name enclosed in double quotes, column 2"),
        ('{"prompt": "a", "answer": "b"', "JSONDecodeError: .*, column 30"),
        ("[1, 2]", "TypeError"),
        ('{"prompt": "a"}', "KeyError: 'answer'"),
        ('{"answer": "a"}', "KeyError: 'prompt'"),
        ('{"prompt": "a", "answer": 3}', "must be strings, and not empty"),
        ('{"prompt": " ", "answer": "3"}', "must be strings, and not empty"),
        ("\udcff", "UnicodeDecodeError"),
        ('{"prompt": "a", "answer": "\\ud800"}', "UnicodeEncodeError"),
    ],
)
def test_malformed_rows(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    good = '{"prompt": "a", "answer": "b"}\n{"prompt": "b", "answer": "b"}\n'
    path.write_bytes((good + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"mine.jsonl, line 3: not JSON of the form .*{message}"):
        train(tiny(tmp_path / "out", data=str(path)))
    assert not (tmp_path / "out").exists()  # before any work


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    with pytest.raises(ValueError, match="two different prompts"):
        tasks.file_task(str(path), seed=0)


# --- policy ------------------------------------------------------------------------------------------------


def test_tokenizer_takes_any_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    new_policy(64, 1, 0, CPU).model.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("3 7 5 -> 26 :", "  a\n\tb'll  ", "é漢字🙂", "\x00\x7f", "123456"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert loaded(text).input_ids == ids
        assert loaded.decode(ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def random_model(family: str, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    common = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        initializer_range=0.5,
    )  # fmt: skip
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**common),
        "llama": lambda: transformers.LlamaConfig(**common),
        "gemma2": lambda: transformers.Gemma2Config(**common, final_logit_softcapping=3.0, sliding_window=8),
        "granite": lambda: transformers.GraniteConfig(**common, logits_scaling=8.0),
        "cohere": lambda: transformers.CohereConfig(**common, logit_scale=0.3),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common),
        "phi": lambda: transformers.PhiConfig(**common),  # its head has a bias
        "gpt2": lambda: transformers.GPT2Config(**common),  # its positions are absolute
        "mamba": lambda: transformers.MambaConfig(**common),  # a state in place of keys and values
        "jamba": lambda: transformers.JambaConfig(**common, attn_layer_period=2, attn_layer_offset=1),  # both
    }[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias)
    return model.eval()


FAMILIES = ["qwen2", "llama", "gemma2", "granite", "cohere", "gpt_neox", "phi", "gpt2", "mamba", "jamba"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_lm(family: str, tmp_path: Path) -> None:
    """Sampling, scoring and the model itself agree, whatever the architecture does to its logits."""
    tokenizer = byte_tokenizer()
    model = random_model(family, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), CPU)
    prompts = ["1 +1 =", "a much longer prompt :", "x"]
    batch = sample(policy, prompts, 2, max_new_tokens=12, temperature=0)
    for row, prompt in enumerate(p for p in prompts for _ in range(2)):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :]
        assert batch.responses[row][batch.mask[row]].tolist() == want.tolist()
        # The log-probs that training uses, from a padded batch, against the model's own logits, unpadded.
        logits = model(torch.cat([ids[0], want]).unsqueeze(0)).logits[0, ids.shape[1] - 1 : -1]
        expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, want.unsqueeze(-1)).squeeze(-1)
        config = dataclasses.replace(TINY, temperature=0.7)
        got = training.logprobs(policy, batch, config)[row][batch.mask[row]]
        bound = 64 * torch.finfo(torch.float32).eps * logits.abs().max().item() / 0.7
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


def test_prompts_are_messages_where_there_is_a_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    random_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for template, text in (("auto", "<user>1 +1</><assistant>"), ("none", "1 +1")):
        policy = load_policy(str(tmp_path), CPU, chat_template=template)
        assert policy.encode(["1 +1"]) == [tokenizer(text).input_ids]
        tokens = sample(policy, ["1 +1"], 1, 1, 0.0).tokens
        assert tokens[0, :-1].tolist() == list(tokenizer(text).input_ids)
    byte_tokenizer().save_pretrained(tmp_path / "without")
    random_model("llama", tokenizer).save_pretrained(tmp_path / "without")
    assert (
        load_policy(str(tmp_path / "without"), CPU, chat_template="auto").encode(["1 +1"])
        == tokenizer(["1 +1"]).input_ids
    )


def test_products_in_bfloat16(tmp_path: Path) -> None:
    """Parameters and their steps stay in float32; the log-probs of sampling and scoring are those of bfloat16."""
    tokenizer = byte_tokenizer()
    random_model("qwen2", tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    train(tiny(tmp_path / "out", model=str(tmp_path / "start"), dtype="bfloat16", warm_start_steps=0, steps=1))
    row = metrics(tmp_path / "out")[1]
    assert abs(row["ratio/mean"] - 1) < 0.2
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").dtype == torch.float32
    policies = [load_policy(str(tmp_path / "start"), CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
    batch = sample(policies[0], ["1 +1 ="], 4, 6, 1.0, torch.Generator().manual_seed(0))
    exact, rounded = (training.logprobs(policy, batch, TINY) for policy in policies)
    logits = policies[1].forward(batch.tokens, batch.attention).logits[:, -batch.mask.shape[1] - 1 : -1]
    assert logits.dtype == torch.bfloat16
    eager = logits.log_softmax(-1).gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
    ours, eagers = ((x - exact)[batch.mask].norm() for x in (rounded, eager))
    assert 0 < ours < 1.5 * eagers


def test_unknown_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    random_model("granite", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = dict(logit_scale=1.0, softcap=None)
    monkeypatch.setattr("covgrpo_kernels.integrations.transformers.head_options", lambda model: options)
    with pytest.raises(ValueError, match="granite"):
        load_policy(str(tmp_path), CPU)


def test_the_logits_are_never_built(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    head, linear = policy.model.get_output_embeddings().weight, torch.nn.functional.linear

    def refuse(x: torch.Tensor, weight: torch.Tensor, *bias: object) -> torch.Tensor:
        assert weight is not head, "the head ran as a layer"
        return linear(x, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    batch = encode_solutions(policy, ["1 +1 =", "2"], ["2", "34"])
    with pytest.raises(AssertionError, match="as a layer"):
        policy.model(batch.tokens)
    assert batch.apply_head(policy, lambda hidden, weight, **how: hidden).shape == (2, 3, 64)
    assert training.logprobs(policy, batch, TINY).shape == (2, 3)


# --- rollouts ----------------------------------------------------------------------------------------------


@contextmanager
def scripted(policy: Policy, tokens: Iterable[list[int]]) -> Iterator[None]:
    """The model's logits choose these tokens [B], one call after the other."""
    script = iter(tokens)

    def choose(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:  # [B, 1, V]
        chosen = torch.tensor(next(script)).unsqueeze(1)
        return torch.nn.functional.one_hot(chosen, logits.shape[-1]).float() * 1e4

    hook = policy.model.get_output_embeddings().register_forward_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def test_end_of_sequence(policy: Policy) -> None:
    """The end-of-sequence token is part of a response, nothing after it is; a response without one was cut
    off. The sampler's choices are scripted."""
    eos, pad = int(policy.eos_ids[0]), policy.pad_id
    with scripted(policy, zip([5, eos, 6, 7], [eos, 5, 5, 5], [8, 9, 8, 9], strict=True)):
        batch = sample(policy, ["ab", "c", "d"], 1, max_new_tokens=4, temperature=0)
    assert batch.responses.tolist() == [[5, eos, pad, pad], [eos, pad, pad, pad], [8, 9, 8, 9]]
    assert batch.mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert batch.attention.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert finished(policy, batch).tolist() == [True, True, False]
    seen: list[str] = []
    reward(policy, batch, [tasks.Problem("", "", lambda text: bool(seen.append(text)))])
    decode = policy.tokenizer.decode
    assert seen == [decode([5]), "", decode([8, 9, 8, 9])]


def test_sampling_stops_when_all_have_ended(policy: Policy) -> None:
    eos = int(policy.eos_ids[0])
    with scripted(policy, [[eos] * 4]):
        batch = sample(policy, ["ab", "c"], 2, max_new_tokens=9, temperature=1.0)
    assert batch.mask.shape == (4, 1)


def test_cut_off_responses_get_no_reward(policy: Policy) -> None:
    problems = [tasks.Problem("", "", lambda text: text == "7")]  # of all three rows
    batch = encode_solutions(policy, ["a"] * 3, ["7", "7", "8"])
    assert reward(policy, batch, problems).tolist() == [1, 1, 0]
    cut = Batch(batch.tokens.clone(), batch.attention, batch.mask)
    cut.tokens[1, -1] = 9
    cut.mask[1, -1] = False  # "7", and no end of sequence
    assert reward(policy, cut, problems).tolist() == [1, 0, 0]


def test_each_row_is_judged_by_its_problem(policy: Policy) -> None:
    problems = [tasks.Problem("", "", partial(str.__eq__, answer)) for answer in ("7", "8")]
    batch = encode_solutions(policy, ["a"] * 4, ["7", "8", "7", "8"])
    assert reward(policy, batch, problems).tolist() == [1, 0, 0, 1]


def test_sampling_follows_the_temperature(policy: Policy) -> None:
    """The first token's frequencies against the softmax the loss scores with, by a chi-squared test."""
    draws, temperature = 5_000, 0.3
    generator = torch.Generator().manual_seed(0)
    batch = sample(policy, ["1 +1 ="], draws, 1, temperature, generator)
    counts = batch.responses[:, 0].bincount(minlength=policy.model.config.vocab_size)
    with torch.no_grad():
        logits = policy.forward(batch.tokens[:1, :-1], batch.attention[:1, :-1]).logits[0, -1]
    expected = draws * (logits / temperature).softmax(-1)
    common = expected > 20
    assert common.sum() > 10
    statistic = ((counts - expected)[common].square() / expected[common]).sum() / common.sum()
    assert statistic < 2
    assert (expected[common].max() / expected[common].min()) > 3  # the temperature shows
    again = sample(policy, ["1 +1 ="], draws, 1, temperature, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, batch.tokens)


def test_group_advantages() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 0.1, 0.1, 0.1, 0.1, 0, 0, 0, 0, 1, 1, 1, 0])
    got = group_advantages(rewards, 4).view(4, 4)
    assert (got[1] == 0).all()  # although the mean of 0.1 four times need not be 0.1
    assert (got[2] == 0).all()
    for row in (0, 3):
        group = rewards.view(4, 4)[row].double()
        exact = (group - group.mean()) / (group.std() + 1e-4)
        torch.testing.assert_close(got[row].double(), exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    for size in range(2, 40):
        assert (group_advantages(torch.full((size,), 0.1), size) == 0).all()


# --- the update --------------------------------------------------------------------------------------------


def gradients(config: TrainConfig, policy: Policy, reference: Policy | None) -> tuple[list[torch.Tensor], dict]:
    """What one optimiser step sees and reports. About every second response counts as right."""
    policy = copy.deepcopy(policy)
    seen: list[torch.Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    optimizer = Recorder(policy.model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "reward", lambda policy, batch, problems: (batch.responses.sum(1) % 2).float())
        problems = training.make_task(config).training_problems(1, config.prompts_per_step)
        generator = torch.Generator().manual_seed(0)
        reported = training.grpo_step(policy, reference, optimizer, problems, config, generator)
    assert 0.2 < reported["reward/mean"] < 0.8
    return seen, reported


def in_float64(policy: Policy) -> Policy:
    """What differs by rounding alone differs by a few of its epsilons there."""
    policy = copy.deepcopy(policy)
    policy.model.double()
    return policy


EPS32, EPS64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("weighting", ["none", "covariance"])  # the others choose among a batch's tokens
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulation_is_exact(policy: Policy, loss_type: str, weighting: str) -> None:
    whole = dataclasses.replace(
        TINY, loss_type=loss_type, weighting=weighting, beta=0.1, entropy_coef=0.01, grad_tol=0.0,
        inner_steps=1, max_new_tokens=6, max_grad_norm=1e9,
    )  # fmt: skip
    policy, reference = (in_float64(p) for p in (policy, new_policy(64, 2, seed=1, device=CPU)))
    want, reported = gradients(whole, policy, reference)
    got, in_parts = gradients(dataclasses.replace(whole, microbatch_prompts=1), policy, reference)
    size = torch.stack([g.norm() for g in want]).norm()
    assert size > 0
    tokens = whole.prompts_per_step * whole.group_size * whole.max_new_tokens
    few = 64 * tokens * EPS64  # sums over tokens, in another order
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= few * size
    for name in ("loss", "loss/policy", "loss/kl", "optim/grad_norm", "weight/max", "weight/min"):
        assert in_parts[name] == pytest.approx(reported[name], rel=8 * EPS32, abs=8 * EPS32), name  # float32 sums


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_minibatches_are_whole_groups_and_cover_the_batch(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, microbatch: int | None
) -> None:
    """Rows are numbered by their advantages; the loss sees every group once. Three steps on seven groups: shares that
    are as equal as can be."""
    config = dataclasses.replace(TINY, prompts_per_step=7, inner_steps=3, microbatch_prompts=microbatch)
    seen: list[list[int]] = []
    normalizers: list[int] = []

    rows = torch.arange(56.0)
    batch = encode_solutions(policy, [str(i) for i in range(56)], ["1"] * 56)
    real = training.covgrpo_loss

    def numbered(data: Rollout) -> None:
        data.batch, data.advantages, data.old_logprobs = batch, rows, rows.unsqueeze(1).expand(56, 2)

    def record(*head: torch.Tensor, **arguments: torch.Tensor) -> object:
        seen.append(arguments["advantages"].long().tolist())
        normalizers.append(arguments["normalizer"])
        assert torch.equal(arguments["advantages"], arguments["old_logprobs"][:, 0])
        return real(*head, **(arguments | {"old_logprobs": None}))

    monkeypatch.setattr(training, "covgrpo_loss", record)
    optimizer = torch.optim.SGD(copy.deepcopy(policy).model.parameters(), lr=0.0)
    problems = training.make_task(config).training_problems(1, 7)
    generator = torch.Generator().manual_seed(0)
    training.grpo_step(policy, None, optimizer, problems, config, generator, before_update=numbered)
    sizes = {None: [3, 2, 2], 1: [1] * 7, 2: [2, 1, 2, 2]}[microbatch]
    assert [len(part) for part in seen] == [8 * size for size in sizes]
    assert sorted(normalizers) == sorted({None: [24, 16, 16], 1: [24] * 3 + [16] * 4, 2: [24, 24, 16, 16]}[microbatch])
    for part in seen:
        for group in (part[i : i + 8] for i in range(0, len(part), 8)):
            assert group == list(range(group[0], group[0] + 8))
            assert group[0] % 8 == 0
    assert sorted(row for part in seen for row in part) == list(range(56))
    assert [part[0] for part in seen] != sorted(part[0] for part in seen)  # shuffled


def test_first_inner_step_has_ratio_one(policy: Policy) -> None:
    config = dataclasses.replace(TINY, inner_steps=1)
    _, reported = gradients(config, in_float64(policy), None)
    few = 1024 * EPS64  # of log-probs in batches of another shape
    assert reported["ratio/mean"] == pytest.approx(1, abs=few)
    assert reported["ratio/max"] == pytest.approx(1, abs=few)
    assert reported["clip/low"] == reported["clip/high"] == 0


def test_kl_is_to_the_starting_policy(policy: Policy) -> None:
    config = dataclasses.replace(TINY, inner_steps=1, beta=0.5)
    policy, another = (in_float64(p) for p in (policy, new_policy(64, 2, seed=1, device=CPU)))
    _, same = gradients(config, policy, copy.deepcopy(policy))
    assert abs(same["kl"]) <= 8 * EPS64  # exp(d) - 1 - d, where d is some epsilons
    _, other = gradients(config, policy, another)
    assert other["kl"] > 1e-3


def test_learns(tmp_path: Path) -> None:
    """From a policy that is right now and then to one that mostly is."""
    data = tmp_path / "dice.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": str(i), "answer": "ab"[i % 7 == 0]}) for i in range(70)))
    changes = dict(data=str(data), prompts_per_step=16, eval_every=0, checkpoint_every=100)
    train(tiny(tmp_path / "out", steps=20, warm_start_steps=12, **changes))
    rewards = [row["reward/mean"] for row in metrics(tmp_path / "out")[1:]]
    assert 0.1 < sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.5


# --- runs --------------------------------------------------------------------------------------------------


def test_a_run_leaves(uninterrupted: Path) -> None:
    rows = metrics(uninterrupted)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["eval/accuracy" in row for row in rows] == [True, False, True, False, True]
    for row in rows[1:]:
        assert row.keys() >= {
            "reward/mean", "reward/std", "reward/equal_groups", "response/length", "response/truncated",
            "response/tokens", "loss", "loss/policy", "optim/grad_norm", "optim/lr", "entropy", "kl",
            "ratio/max", "clip/low", "covariance/q50", "weight/ess", "rows/live_fraction",
        }  # fmt: skip
    assert all(0 < row["reward/mean"] < 1 for row in rows[1:])  # or the tests below would test nothing
    assert [row["optim/lr"] for row in rows[1:]] == [5e-4, 1e-3, 1e-3, 1e-3]
    timed = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[1])
    assert timed["seconds"] > 0
    assert (uninterrupted / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(uninterrupted.rglob("*tmp"))
    model = transformers.AutoModelForCausalLM.from_pretrained(uninterrupted / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(uninterrupted / "model")
    assert json.loads((uninterrupted / "model" / checkpoint.RUN_FILE).read_text())["step"] == 4
    state = torch.load(uninterrupted / "model" / "optimizer.pt", weights_only=True)["state"]
    assert {name: moments["exp_avg"].shape for name, moments in state.items()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("1 +1").input_ids) == "1 +1"


def test_a_checkpoint_on_the_way_is_a_model(tmp_path: Path) -> None:
    """Of a run that is killed between two: transformers loads it, with its tokenizer, and it is the one that a run of
    fewer steps ends with."""
    real = training.generator_of

    def killed(policy: Policy, seed: int, step: int) -> torch.Generator:
        if step == 4:
            raise Killed
        return real(policy, seed, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "generator_of", killed)
        with pytest.raises(Killed):
            train(tiny(tmp_path / "out"))
    train(tiny(tmp_path / "shorter", steps=2))
    loaded = []
    for out in (tmp_path / "out", tmp_path / "shorter"):
        assert (out / "model" / "model.safetensors").is_file()
        loaded.append(transformers.AutoModelForCausalLM.from_pretrained(out / "model"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert all(map(torch.equal, *(model.parameters() for model in loaded)))
    ids = tokenizer("3 +4 mod 7 =", return_tensors="pt").input_ids
    assert loaded[0].generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3


def test_runs_are_reproducible(uninterrupted: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path))
    assert metrics(tmp_path) == metrics(uninterrupted)
    train(tiny(tmp_path / "seed", seed=1, steps=1, warm_start_steps=2))
    assert metrics(tmp_path / "seed")[1]["reward/mean"] != metrics(uninterrupted)[1]["reward/mean"]


def test_every_step_has_its_own_randomness(policy: Policy) -> None:
    """The same in every run, another one for every step and seed."""
    pairs = [(seed, step) for seed in range(5) for step in range(1, 20)]
    seeds = [generator_of(policy, *pair).initial_seed() for pair in pairs]
    assert len(set(seeds)) == len(pairs)
    assert seeds == [generator_of(policy, *pair).initial_seed() for pair in pairs]


def test_a_finished_run_is_left_as_it_is(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    train(tiny(uninterrupted))
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_more_steps_continue_a_run(uninterrupted: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=2))
    train(tiny(tmp_path, checkpoint_every=3))
    assert metrics(tmp_path) == metrics(uninterrupted)


@pytest.mark.parametrize("option", ["seed", "weighting", "lr", "beta", "group_size", "warm_start_steps"])
def test_other_options_do_not_continue_a_run(uninterrupted: Path, option: str) -> None:
    value = {"weighting": "none", "group_size": 16}.get(option, 7)
    with pytest.raises(TrainingError, match=f"--{option.replace('_', '-')} .* not {value}"):
        train(tiny(uninterrupted, **{option: value}))


class Killed(BaseException):
    """Nothing in the program may catch this, as nothing can catch a kill."""


def test_a_crash_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is stopped before its k-th rename, within its k-th file or within a line of metrics, for every k; then it
    is resumed."""
    countdown = [0]

    def tick() -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    real_replace, real_save, real_rmtree, real_append = os.replace, torch.save, shutil.rmtree, MetricsLog._append

    def replace(*arguments: object) -> None:
        tick()
        real_replace(*arguments)

    def save(state: object, path: Path) -> None:
        path.write_bytes(b"half of a file")
        tick()
        real_save(state, path)

    def rmtree(path: Path, **options: bool) -> None:
        if path.exists():
            tick()
        real_rmtree(path, **options)

    def append(log: MetricsLog, line: bytes) -> None:
        before = log._path.read_bytes()
        log._path.write_bytes(before + line[:20])
        tick()
        log._path.write_bytes(before)
        real_append(log, line)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(MetricsLog, "_append", append)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    options = dict(steps=2, warm_start_steps=3, eval_problems=1, inner_steps=1, checkpoint_every=1, prompts_per_step=2)
    train(tiny(tmp_path / "whole", **options))
    want = metrics(tmp_path / "whole")
    weights = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    crashes, k = 0, 0
    while True:
        k += 1
        out = tmp_path / str(k)
        countdown[0] = k
        try:
            train(tiny(out, **options))
        except Killed:
            crashes += 1
        else:
            break
        countdown[0] = 0
        saved = (out / "model").exists() or (out / "model.old.covgrpo-tmp").exists()
        first_lines = (out / "metrics.jsonl").read_text().splitlines()[:2] if saved else []
        train(tiny(out, **options))
        assert not list(out.rglob("*.covgrpo-tmp")), k
        assert metrics(out) == want, k
        assert (out / "model" / "model.safetensors").read_bytes() == weights, k
        # What a checkpoint has was not done again: that would have taken another time.
        assert (out / "metrics.jsonl").read_text().splitlines()[: len(first_lines)] == first_lines, k
    assert crashes > 10


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_and_resume(tmp_path: Path) -> None:
    """kill -9 of the command, wherever it is after some steps; the second run ends it."""
    options = {"steps": 14, "checkpoint_every": 3, "eval_every": 10}
    train(tiny(tmp_path / "whole", **options))
    out = tmp_path / "killed"
    config = tiny(out, **options)
    arguments = []
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) is not None:
            arguments += [f"--{field.name.replace('_', '-')}", str(value)]
    command = subprocess.Popen(
        [sys.executable, "-m", "covgrpo_kernels", "train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = out / "metrics.jsonl"
    while command.poll() is None and (not lines.exists() or lines.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    command.kill()
    assert command.wait() == -signal.SIGKILL
    assert 5 <= lines.read_bytes().count(b"\n") < 15
    train(config)
    assert metrics(out) == metrics(tmp_path / "whole")


def test_nan_stops_the_run(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = training.covgrpo_loss, [0]

    def poisoned(*arguments: object, **named: object) -> object:
        calls[0] += 1
        result = real(*arguments, **named)
        return result._replace(loss=result.loss * float("nan")) if calls[0] == 6 else result

    monkeypatch.setattr(training, "covgrpo_loss", poisoned)
    with pytest.raises(
        TrainingError, match=r"step 3: the norm of the gradient is nan: .* the last checkpoint is untouched"
    ):
        train(tiny(tmp_path))
    assert json.loads((tmp_path / "model" / checkpoint.RUN_FILE).read_text())["step"] == 2
    assert all(bool(p.isfinite().all()) for p in load_policy(str(tmp_path / "model"), CPU).model.parameters())
    assert len(metrics(tmp_path)) == 3
    monkeypatch.undo()
    train(tiny(tmp_path))
    assert metrics(tmp_path) == metrics(uninterrupted)


@pytest.mark.parametrize("weighting", ["none", "clip_cov", "kl_cov", "steer", "high_entropy"])
def test_every_weighting_resumes(tmp_path: Path, weighting: str) -> None:
    options = dict(weighting=weighting, beta=0.01, warm_start_steps=5, eval_every=1)
    train(tiny(tmp_path / "whole", **options, steps=2))
    train(tiny(tmp_path / "parts", **options, steps=1))
    train(tiny(tmp_path / "parts", **options, steps=2))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mamba"])
def test_training_a_saved_model(tmp_path: Path, family: str) -> None:
    tokenizer = byte_tokenizer()
    random_model(family, tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = tiny(tmp_path / "out", model=str(tmp_path / "start"), warm_start_steps=None, steps=2, beta=0.1)
    train(config)
    assert not (tmp_path / "out" / "warm_start").exists()
    rows = metrics(tmp_path / "out")
    assert len(rows) == 3
    assert abs(rows[1]["ratio/mean"] - 1) < 0.2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert loaded.config.model_type == family


def test_log_probs_of_the_warm_start(policy: Policy) -> None:
    """What the warm start minimises is the cross-entropy of solution and end-of-sequence token."""
    batch = encode_solutions(policy, ["1 +1 =", "2"], ["2", "345"])
    targets = batch.responses.where(batch.mask, -100)
    got = batch.apply_head(policy, partial(linear_logprob, targets=targets)).logprob
    for row, (prompt, solution) in enumerate([("1 +1 =", "2"), ("2", "345")]):
        prompt_ids, ids = (policy.tokenizer(t).input_ids for t in (prompt, solution))
        ids = [*ids, policy.tokenizer.eos_token_id]
        logits = policy.model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        want = -torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
        bound = 64 * torch.finfo(torch.float32).eps * logits.abs().max().item()
        torch.testing.assert_close(got[row][batch.mask[row]], want, rtol=0, atol=bound)
        assert batch.mask[row].sum() == len(ids)


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("group_size", 1, ValueError),
        ("group_size", 2.5, TypeError),
        ("steps", 0, ValueError),
        ("steps", True, TypeError),
        ("lr", 0.0, ValueError),
        ("lr", float("nan"), ValueError),
        ("lr", "fast", TypeError),
        ("beta", -1.0, ValueError),
        ("temperature", 0, ValueError),
        ("difficulty", 9, ValueError),
        ("weighting", "cov", ValueError),
        ("loss_type", "ppo", ValueError),
        ("hidden_size", 96, ValueError),
        ("inner_steps", 5, ValueError),
        ("microbatch_prompts", -1, ValueError),
        ("dtype", "float16", ValueError),
        ("warm_start_reward", 1.5, ValueError),
        ("grad_tol", "auto", TypeError),
        ("grad_tol", -1.0, ValueError),
        ("grad_tol", 1.0, ValueError),
        ("grad_tol", float("nan"), ValueError),
        ("out", None, TypeError),
    ],
)
def test_wrong_options(option: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=option):
        dataclasses.replace(TINY, **{option: value})


def test_defaults_with_a_model_are_those_of_real_ones() -> None:
    small, real = TrainConfig(), TrainConfig(model="folder")
    differ = {n: v for n, v in dataclasses.asdict(real).items() if v != getattr(small, n)}
    assert differ == dict(
        model="folder", warm_start_steps=0, warm_start_lr=1e-5, max_new_tokens=512, microbatch_prompts=1,
        lr=1e-6, dtype="auto",
    )  # fmt: skip
    assert TrainConfig(model="folder", lr=1e-3).lr == 1e-3
