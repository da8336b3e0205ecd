"""Whether training notices what the backward leaves out: the same runs with `grad_tol` exact, auto and ten times auto,
and exact ones that differ by rounding alone, among them one by eager PyTorch. These say how far apart runs are that
nobody would tell apart. Distances are those of weights, and those of policies in nats.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
import os
import random
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.measure import environment, write_json
from covgrpo_kernels import CovGRPOOutput, covgrpo_loss, kernels, linear_logprob, reference
from covgrpo_kernels.inputs import resolve_grad_tol

from . import RESULTS
from .languages import OWN_TAILS, SHARED_TAILS, Head, Languages, make_batch
from .study.summary import six_digits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from covgrpo_kernels.grpo.config import TrainConfig
    from covgrpo_kernels.grpo.policy import Policy
    from covgrpo_kernels.grpo.rollout import Rollout
    from covgrpo_kernels.grpo.tasks import Problem

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """How a run differs from the exact one, which is the first."""

    name: str
    grad_tol: float = 0.0
    dtype: torch.dtype = torch.bfloat16  # of products; weights and AdamW's steps are float32
    reorder: bool = False  # the rows of every batch
    backend: str | None = None
    eager: bool = False  # logits and gradients by PyTorch

    @property
    def is_yardstick(self) -> bool:
        return self.grad_tol == 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, {kernels.VARIABLE: self.backend} if self.backend else {}))
            if self.eager:
                stack.enter_context(mock.patch("covgrpo_kernels.grpo.train.covgrpo_loss", eager_loss))
            yield


def eager_loss(hidden: Tensor, weight: Tensor, **how: Any) -> CovGRPOOutput:
    """`covgrpo_loss` with the loss, and so the gradients, of the reference."""
    out = covgrpo_loss(hidden.detach(), weight.detach(), **how)
    for name in ("grad_tol", "process_group"):  # of one process
        how.pop(name)
    return out._replace(loss=reference.covgrpo_loss(hidden, weight, **how).loss)


EXACT = Variant("exact")


def variants() -> list[Variant]:
    auto = resolve_grad_tol("auto", torch.bfloat16)
    # Rounds dZ to bfloat16 where the C++ backend does, or does not.
    other = Variant("exact, other kernel", backend="eager")
    return [
        EXACT,
        Variant("auto", auto),
        Variant("10x auto", 10 * auto),
        Variant("exact, reordered", reorder=True),
        *([] if kernels.describe(CPU) == "eager" else [other]),
        Variant("exact, float32", dtype=torch.float32),
        Variant("eager", eager=True),
    ]


class Tokens(NamedTuple):
    """What policies are compared on."""

    ids: Tensor  # [B, L]
    attention: Tensor  # [B, L]


class Run:
    """One variant on its way."""

    def __init__(
        self, variant: Variant, like: Policy, held_out: Tokens, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.variant, self._held_out = variant, held_out
        self.policy = _policy(copy.deepcopy(like.model), like.tokenizer, variant.dtype)
        self.optimizer = self.new_optimizer()
        if optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.model.parameters(), weight_decay=0.0)

    def weights(self) -> Weights:
        return Weights.of(self.policy)

    @torch.no_grad()
    def log_policy(self) -> Tensor:  # [n, V] float64, of logits in float32, whatever the run computes in
        logits = self.policy.model(input_ids=self._held_out.ids, attention_mask=self._held_out.attention).logits
        return logits[self._held_out.attention != 0].double().log_softmax(1)


class HeadRun:
    """One variant of the head of two languages."""

    def __init__(self, variant: Variant, weight: Tensor, held_out: Tensor) -> None:
        self.variant = variant
        self.head = Head(weight, held_out, variant.grad_tol, variant.dtype, variant.eager)
        self.optimizer = self.head.optimizer

    def weights(self) -> Weights:
        return Weights([self.head.weight.detach()], [self.head.weight.detach()])

    def log_policy(self) -> Tensor:  # [n, V] float64
        return self.head.log_policy()


WARMUP = 5  # steps


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, step / WARMUP)


def _policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Policy:
    from covgrpo_kernels.grpo.policy import Policy

    return Policy(model, tokenizer, CPU, dtype)


# -------------------------------------------------------------------------------------------------- text and a model


@dataclass(frozen=True)
class Sizes:
    vocab: int = 16384
    files: int | None = None  # from which the vocabulary is made; None: all
    memorised: int = 32768  # tokens of the training text: few, so that the policy grows sure, as those of RL are
    held_out: int = 100_000  # tokens, of other files
    hidden: int = 128
    layers: int = 3
    batch: int = 16
    length: int = 64  # tokens of a row
    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 24
    new_tokens: int = 16
    warm_start: int = 150  # steps at most, of the minimal loop
    shared_tails: Languages = SHARED_TAILS
    own_tails: Languages = OWN_TAILS


TOY = Sizes(
    vocab=600, files=12, memorised=2000, held_out=2000, hidden=64, layers=1, batch=2, length=16, prompts=4, group=4,
    prompt_tokens=8, new_tokens=6, warm_start=10, shared_tails=Languages(128, 32, 300),
    own_tails=Languages(128, 32, 300, 4, 1.0),
)  # fmt: skip


class Corpus(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    train: Tensor  # [n] tokens
    held_out: Tensor  # [m]


def make_corpus(sizes: Sizes) -> Corpus:
    """The standard library's sources in tokens of a byte-pair vocabulary made from them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    stdlib, skip = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "test", "tests", "idlelib"}
    paths = sorted(path for path in stdlib.rglob("*.py") if not skip & set(path.relative_to(stdlib).parts))
    random.Random(0).shuffle(paths)
    texts = [path.read_text(errors="replace") for path in paths[: sizes.files]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocab, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != sizes.vocab:
        raise ValueError(f"{stdlib} has text for a vocabulary of {bpe.get_vocab_size()} only, {sizes.vocab} are needed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    half = len(texts) // 2
    return Corpus(
        tokenizer,
        _tokens(tokenizer, texts[:half], sizes.memorised),
        _tokens(tokenizer, texts[half:], sizes.held_out),
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], count: int) -> Tensor:
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        if len(tokens) >= count:
            break
    return torch.tensor(tokens[:count])


def _windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:  # [count, length]
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def new_model(corpus: Corpus, sizes: Sizes, seed: int) -> Policy:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 32,
        num_key_value_heads=sizes.hidden // 64,
        tie_word_embeddings=True,
        pad_token_id=corpus.tokenizer.pad_token_id,
        eos_token_id=corpus.tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _policy(Qwen2ForCausalLM(config), corpus.tokenizer, EXACT.dtype)


# ------------------------------------------------------------------------------------------------------------- steps


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


def pretrain(run: Run, tokens: Tensor, step: int) -> dict[str, float]:  # [B, T + 1]
    from covgrpo_kernels.grpo.rollout import Batch

    if run.variant.reorder:
        tokens = tokens[torch.randperm(len(tokens), generator=_generator("reorder", step))]
    policy, targets = run.policy, tokens[:, 1:]
    batch = Batch(tokens, torch.ones_like(tokens), torch.ones_like(targets, dtype=torch.bool))
    score: Callable[..., Any] = functools.partial(reference.linear_logprob, targets=targets)
    if not run.variant.eager:
        score = functools.partial(linear_logprob, targets=targets, entropy=True, grad_tol=run.variant.grad_tol)
    logprob, entropy = batch.apply_head(policy, score)
    loss = -logprob.mean()
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    run.optimizer.step()
    return dict(loss=loss.item(), entropy=entropy.detach().mean().item())


def overlap(response: list[int], truth: list[int]) -> float:
    """The reward: the share of the true continuation's tokens, in any order, that the response has."""
    return (Counter(response) & Counter(truth)).total() / len(truth)


def grpo(run: Run, corpus: Corpus, sizes: Sizes, config: TrainConfig, step: int) -> dict[str, float]:
    from covgrpo_kernels.grpo.rollout import group_advantages
    from covgrpo_kernels.grpo.tasks import Problem

    generator = _generator(config.seed, "grpo", step)
    windows = _windows(corpus.held_out, sizes.prompts, sizes.prompt_tokens + sizes.new_tokens, generator)
    prompts = corpus.tokenizer.batch_decode(windows[:, : sizes.prompt_tokens])
    truths = windows[:, sizes.prompt_tokens :].repeat_interleave(sizes.group, 0)
    rewards: list[float] = []

    def judge(data: Rollout) -> None:
        rows = zip(data.batch.responses, data.batch.mask, truths, strict=True)
        rewards.extend(overlap(response[mask].tolist(), truth.tolist()) for response, mask, truth in rows)
        data.advantages = group_advantages(torch.tensor(rewards), sizes.group)

    problems = [Problem(prompt, "", lambda response: False) for prompt in prompts]  # judged above
    made = _step(run, problems, config, step, generator, judge)
    return made | dict(reward=torch.tensor(rewards).mean().item())


def loop(run: Run, config: TrainConfig, step: int) -> dict[str, float]:
    """A step of `covgrpo train`."""
    from covgrpo_kernels.grpo.train import make_task

    problems = make_task(config).training_problems(step, config.prompts_per_step)
    return _step(run, problems, config, step, _generator(config.seed, "loop", step))


def _step(
    run: Run,
    problems: list[Problem],
    config: TrainConfig,
    step: int,
    generator: torch.Generator,
    judge: Callable[[Rollout], None] | None = None,
) -> dict[str, float]:
    from covgrpo_kernels.grpo.train import grpo_step

    def before_update(data: Rollout) -> None:
        if judge is not None:
            judge(data)
        if run.variant.reorder:
            _reorder(data, config.group_size, _generator("reorder", step))

    config = dataclasses.replace(config, grad_tol=run.variant.grad_tol)
    metrics = grpo_step(run.policy, None, run.optimizer, problems, config, generator, before_update=before_update)
    kept = {name: value for name, value in metrics.items() if name.startswith("rows/")}
    return dict(reward=metrics["reward/mean"], loss=metrics["loss"], entropy=metrics["entropy"]) | kept


def _reorder(data: Rollout, group_size: int, generator: torch.Generator) -> None:
    """Within groups: every minibatch keeps what is in it."""
    count = len(data.advantages) // group_size
    inside = torch.rand(count, group_size, generator=generator).argsort(1)
    rows = (inside + group_size * torch.arange(count).unsqueeze(1)).flatten()
    data.batch, data.advantages, data.old_logprobs = (
        data.batch.rows(rows), data.advantages[rows], data.old_logprobs[rows],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- runs

Curves = dict[str, list[float]]  # name -> a value for each step

PHASES = {
    "scratch": "pretraining from random weights",
    "later": "pretraining of a model that knows its text",
    "grpo": "GRPO with covariance weights, goes on from there",
    "loop": "the package's minimal GRPO loop",
    "languages": "a head for two languages, each with one tail for all of its rows",
    "own tails": "a head for two languages whose rows' tails vary",
}


class Weights(NamedTuple):
    everything: list[Tensor]
    head: list[Tensor]

    @classmethod
    def of(cls, policy: Policy) -> Weights:
        head = policy.model.get_output_embeddings().weight.detach()
        return cls([parameter.detach() for parameter in policy.model.parameters()], [head])

    def copy(self) -> Weights:
        return Weights(*([x.clone() for x in part] for part in self))

    def distances(self, other: Weights) -> dict[str, float]:
        """L2, relative to the other's."""
        parts = zip(("weights", "head"), self, other, strict=True)
        return {name: _distance(a, b) for name, a, b in parts}


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    apart = sum((x - y).double().square().sum().item() for x, y in zip(a, b, strict=True))
    return math.sqrt(apart / sum(y.double().square().sum().item() for y in b))


def divergence(a: Tensor, b: Tensor) -> float:  # [n, V] float64 log-probs, both
    """Mean KL(a || b) in nats."""
    parts = zip(a.split(64), b.split(64), strict=True)
    return max(sum((p.exp() * (p - q)).sum().item() for p, q in parts), 0.0) / len(a)


def lockstep(
    runs: Sequence[Run] | Sequence[HeadRun], steps: int, lr: float, advance: Callable[[Any, int], dict[str, float]]
) -> dict[str, Curves]:
    """Every run a step further in turn, and how far each is from the first: curves of each variant."""
    curves: dict[str, Curves] = {run.variant.name: {} for run in runs}
    exact = runs[0].weights()
    start, start_policy = exact.copy(), runs[0].log_policy()
    policy = start_policy
    for step in range(1, steps + 1):
        for run in runs:
            set_lr(run.optimizer, lr, step)
            with run.variant.active():
                made = advance(run, step)
            made |= run.weights().distances(exact)
            if run is runs[0]:
                policy = run.log_policy()
                made |= {f"{part} moved": far for part, far in start.distances(exact).items()}
                made |= {"policy": 0.0, "policy moved": divergence(policy, start_policy)}
            else:
                made["policy"] = divergence(policy, run.log_policy())
            for curve, value in made.items():
                curves[run.variant.name].setdefault(curve, []).append(value)
    return curves


def language_model(
    seed: int, corpus: Corpus, sizes: Sizes, steps: int, chosen: list[Variant]
) -> Iterator[tuple[str, dict[str, Curves]]]:
    """(phase, curves of each variant). Between the first two phases the exact run goes on alone."""
    from covgrpo_kernels.grpo.config import TrainConfig

    def advance(phase: str) -> Callable[[Run, int], dict[str, float]]:
        def pretraining_step(run: Run, step: int) -> dict[str, float]:
            tokens = _windows(corpus.train, sizes.batch, sizes.length + 1, _generator(seed, phase, step))
            return pretrain(run, tokens, step)

        return pretraining_step

    start = new_model(corpus, sizes, seed)
    ids = _windows(corpus.held_out, sizes.prompts, sizes.prompt_tokens + sizes.new_tokens, _generator(seed, "held out"))
    held_out = Tokens(ids, torch.ones_like(ids))
    runs = [Run(variant, start, held_out) for variant in chosen]
    yield "scratch", lockstep(runs, steps, 3e-3, advance("scratch"))
    trunk = runs[0]
    lockstep([trunk], 5 * steps, 3e-3, advance("alone"))
    runs = [Run(variant, trunk.policy, held_out, trunk.optimizer) for variant in chosen]
    yield "later", lockstep(runs, steps, 1e-3, advance("later"))
    for run in runs:
        run.optimizer = run.new_optimizer()
    config = TrainConfig(
        seed=seed, prompts_per_step=sizes.prompts, group_size=sizes.group, max_new_tokens=sizes.new_tokens,
        temperature=1.0,
    )  # fmt: skip

    def grpo_step(run: Run, step: int) -> dict[str, float]:
        return grpo(run, corpus, sizes, config, step)

    yield "grpo", lockstep(runs, max(steps // 2, 1), 3e-4, grpo_step)


def minimal_loop(seed: int, sizes: Sizes, steps: int, chosen: list[Variant]) -> dict[str, Curves]:
    from covgrpo_kernels.grpo.config import TrainConfig
    from covgrpo_kernels.grpo.policy import new_policy
    from covgrpo_kernels.grpo.rollout import sample
    from covgrpo_kernels.grpo.train import make_task, warm_start

    config = TrainConfig(
        seed=seed, prompts_per_step=2 * sizes.prompts, group_size=sizes.group, max_new_tokens=8,
        warm_start_steps=sizes.warm_start,
    )  # fmt: skip
    policy = new_policy(64, 2, seed, CPU)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bar
        warm_start(policy, make_task(config), config)
    prompts = [problem.prompt for problem in make_task(config).training_problems(0, config.prompts_per_step)]
    sampled = sample(
        policy, prompts, config.group_size, config.max_new_tokens, config.temperature, _generator(seed, "held out")
    )
    held_out = Tokens(sampled.tokens, sampled.attention)
    runs = [Run(variant, policy, held_out) for variant in chosen]
    return lockstep(runs, max(steps // 2, 1), 3e-4, lambda run, step: loop(run, config, step))


def two_languages(seed: int, sizes: Languages, steps: int, lr: float, chosen: list[Variant]) -> dict[str, Curves]:
    """Two batches in turn, as one prompt set is gone through again and again: what a gradient lacks adds up."""
    (first, weight), (second, _), (held_out, _) = (make_batch(3 * seed + i, sizes) for i in range(3))

    def advance(run: HeadRun, step: int) -> dict[str, float]:
        batch = (first, second)[step % 2]
        order = torch.randperm(sizes.tokens, generator=_generator("reorder", step)) if run.variant.reorder else None
        return run.head.step(batch, order)

    return lockstep([HeadRun(variant, weight, held_out.hidden) for variant in chosen], steps, lr, advance)


def train(
    seed: int, corpus: Corpus, sizes: Sizes, steps: int, chosen: list[Variant], names: Sequence[str] = tuple(PHASES)
) -> dict[str, dict[str, Curves]]:
    """The phases of these names."""
    start, phases = time.monotonic(), {}

    def others() -> Iterator[tuple[str, dict[str, Curves]]]:
        if "loop" in names:
            yield "loop", minimal_loop(seed, sizes, steps, chosen)
        if "languages" in names:
            yield "languages", two_languages(seed, sizes.shared_tails, steps, 3e-4, chosen)
        if "own tails" in names:
            yield "own tails", two_languages(seed, sizes.own_tails, steps, 1e-4, chosen)

    of_model = {"scratch", "later", "grpo"} & set(names)
    found = language_model(seed, corpus, sizes, steps, chosen) if of_model else iter(())
    for name, curves in itertools.chain(found, others()):
        phases[name] = curves
        print(f"seed {seed}, {name}: done after {time.monotonic() - start:.0f} s", flush=True)
    return {name: phases[name] for name in names}


# ----------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Comparison:
    """Distances of a tolerance and of a yardstick to the exact run, one for each seed."""

    tolerance: str
    yardstick: str
    curve: str
    distances: list[float]
    noise: list[float]

    @property
    def distinguishable(self) -> bool:
        """Further away than the yardstick in every seed, by a factor that is larger than what the factor varies by."""
        pairs = list(zip(self.distances, self.noise, strict=True))
        if any(far <= noise for far, noise in pairs):
            return False
        factors = [math.log(far / noise) if noise else math.inf for far, noise in pairs]
        return statistics.mean(factors) > (max(factors) - min(factors) if max(factors) < math.inf else 0)


DISTANCES = ("weights", "head", "policy")  # to the exact run's: of weights relative to their size, of policies in nats
SHOWN = ("loss", "reward", "entropy")


def apart(curve: str, run: Curves, exact: Curves) -> float:
    """Distances: after the last step. Of what is logged: root mean square over the steps."""
    if curve in DISTANCES:
        return run[curve][-1]
    return math.sqrt(statistics.mean((a - b) ** 2 for a, b in zip(run[curve], exact[curve], strict=True)))


def compare(seeds: list[dict[str, Curves]], chosen: list[Variant]) -> list[Comparison]:
    """Every tolerance with every yardstick on every curve of one phase; the first variant is what is compared to."""
    exact, *others = chosen
    found = []
    for curve in [name for name in (*SHOWN, *DISTANCES) if name in seeds[0][exact.name]]:
        far = {v.name: [apart(curve, runs[v.name], runs[exact.name]) for runs in seeds] for v in others}
        for tolerance in others:
            for yardstick in others:
                if yardstick.is_yardstick and not tolerance.is_yardstick:
                    names = tolerance.name, yardstick.name
                    found.append(Comparison(*names, curve, *(far[name] for name in names)))
    return found


def beyond(comparisons: list[Comparison], tolerance: str, curve: str) -> tuple[list[str], int]:
    """The yardsticks that the tolerance is further away than, and how many there are."""
    mine = [c for c in comparisons if (c.tolerance, c.curve) == (tolerance, curve)]
    return [c.yardstick for c in mine if c.distinguishable], len(mine)


def verdicts(comparisons: dict[str, list[Comparison]]) -> dict[str, bool]:
    """Tolerance -> whether it is distinguishable from rounding: in some phase, its weights or its policy end further
    from the exact run's than those of every yardstick."""
    tolerances = dict.fromkeys(c.tolerance for found in comparisons.values() for c in found)
    return {
        tolerance: any(
            len(names) == count
            for found in comparisons.values()
            for names, count in (beyond(found, tolerance, curve) for curve in DISTANCES)
            if count
        )
        for tolerance in tolerances
    }


# ------------------------------------------------------------------------------------------------------------- output


def run(
    *,
    steps: int = 45,
    seeds: int = 4,
    phases: Sequence[str] | None = None,
    smoke: bool = False,
    out: Path | None = None,
) -> None:
    """Trains, prints what was found, and writes training.json and training.png.

    Args:
        steps: of pretraining, in each of its two phases.
        seeds: as many; each on a core of its own.
        phases: of `PHASES`; None: all. Some of them only are not written without `out`.
        smoke: toy sizes, to see that all works; `steps` and `seeds` are then 2, and nothing is written without `out`.
        out: folder of the results; None: `RESULTS`.

    Raises:
        ValueError: fewer than two seeds.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be >= 2, got {seeds}: what differs between seeds is part of the verdict")
    console = Console(width=None if sys.stdout.isatty() else 160)
    start = time.monotonic()
    sizes, steps, seeds = (TOY, 2, 2) if smoke else (Sizes(), steps, seeds)
    # Products this small gain little from a second thread, and lose much where cores are shared: seeds share them.
    torch.set_num_threads(1)
    processes = 1 if smoke else min(seeds, os.cpu_count() or 1)
    report = measure(sizes, steps, range(seeds), variants(), processes, tuple(phases or PHASES))
    report["seconds"] = time.monotonic() - start
    show(console, report)
    out = out or (None if smoke or phases else RESULTS)
    if out is not None:
        write_json(out / "training.json", report | dict(phases=six_digits(report["phases"])))
        save_plot(report, out / "training.png")


def measure(
    sizes: Sizes,
    steps: int,
    seeds: Iterable[int],
    chosen: list[Variant],
    processes: int = 1,
    names: Sequence[str] = tuple(PHASES),
) -> dict[str, Any]:
    corpus = make_corpus(sizes)
    of_seed = functools.partial(train, corpus=corpus, sizes=sizes, steps=steps, chosen=chosen, names=names)
    if processes == 1:
        by_seed = list(map(of_seed, seeds))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
            by_seed = list(pool.map(of_seed, seeds))
    by_phase = {name: [made[name] for made in by_seed] for name in names}
    comparisons = {name: compare(found, chosen) for name, found in by_phase.items()}
    return dict(
        environment=environment() | dict(processes=processes),
        sizes=dataclasses.asdict(sizes),
        parameters=sum(x.numel() for x in new_model(corpus, sizes, 0).model.parameters()),
        variants={v.name: dict(grad_tol=v.grad_tol, dtype=str(v.dtype).removeprefix("torch.")) for v in chosen},
        phases={
            name: dict(
                what=PHASES[name],
                seeds=found,
                comparisons=[
                    dataclasses.asdict(c) | dict(distinguishable=c.distinguishable) for c in comparisons[name]
                ],
            )
            for name, found in by_phase.items()
        },
        distinguishable=verdicts(comparisons),
    )


def show(console: Console, report: dict[str, Any]) -> None:
    for name, phase in report["phases"].items():
        console.print(_phase_table(name, phase))
    console.print(_verdict_table(report))
    for tolerance, distinguishable in report["distinguishable"].items():
        grad_tol = report["variants"][tolerance]["grad_tol"]
        console.print(
            f"{tolerance} (grad_tol={grad_tol:.3g}) is [bold]{'' if distinguishable else 'not '}distinguishable[/bold] "
            f"from rounding: {'in some phase' if distinguishable else 'in no phase'} its weights or its policy end "
            "further from the exact run's than those of every exact run that rounds otherwise, by more than seeds do"
        )
    console.print(f"{report['seconds']:.0f} s; {report['parameters']:,} parameters", highlight=False)


def _phase_table(name: str, phase: dict[str, Any]) -> Table:
    seeds = phase["seeds"]
    exact = next(iter(seeds[0]))
    shown = [curve for curve in SHOWN if curve in seeds[0][exact]]
    table = Table(
        title=f"{name}: {phase['what']}, {len(seeds[0][exact]['loss'])} steps, {len(seeds)} seeds. Last fifth of the "
        "steps; distances to the exact run (RMS over steps; of weights after the last one, in % of the way it came, of "
        "policies in nats)"
    )
    rows = "rows/live_fraction" in seeds[0][exact]
    for column in ("", *shown, *(f"off in {curve}" for curve in shown), *DISTANCES, *["tokens used"] * rows):
        table.add_column(column, justify="left" if column == "" else "right")
    for variant in seeds[0]:
        cells = [f"{statistics.mean(_late(runs[variant][curve]) for runs in seeds):.4f}" for curve in shown]
        for curve in shown:
            far = [apart(curve, runs[variant], runs[exact]) for runs in seeds]
            cells.append(f"{statistics.mean(far):.1e}")
        for curve in ("weights", "head"):
            shares = [_share(runs[variant][curve][-1], runs[exact][f"{curve} moved"][-1]) for runs in seeds]
            cells.append(f"{statistics.mean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
        nats = [runs[variant]["policy moved" if variant == exact else "policy"][-1] for runs in seeds]
        moved = "moved " if variant == exact else ""
        cells.append(f"{moved}{statistics.mean(nats):.1e} ({min(nats):.1e} to {max(nats):.1e})")
        if rows:
            cells.append(f"{statistics.mean(_late(r[variant]['rows/live_fraction']) for r in seeds):.0%}")
        table.add_row(variant, *cells)
    return table


def _share(part: float, whole: float) -> float:  # %
    return 100 * part / whole if whole else 0.0  # equal rewards everywhere: nothing moves


def _late(values: list[float]) -> float:
    return statistics.mean(values[-max(len(values) // 5, 1) :])


def _verdict_table(report: dict[str, Any]) -> Table:
    table = Table(title="Exact runs that a tolerance is further from the exact run than, by more than seeds differ")
    for column in ("", "", *report["phases"]):
        table.add_column(column)
    for tolerance in report["distinguishable"]:
        for curve in (*SHOWN, *DISTANCES):
            cells = []
            for phase in report["phases"].values():
                found = [c for c in phase["comparisons"] if (c["tolerance"], c["curve"]) == (tolerance, curve)]
                names = [c["yardstick"].removeprefix("exact, ") for c in found if c["distinguishable"]]
                cells.append(", ".join(names) or ("none" if found else ""))
            table.add_row(tolerance, curve, *cells)
    return table


def save_plot(report: dict[str, Any], path: Path) -> None:
    """A row for each phase: what is logged, and the distance of the weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = report["phases"]
    figure = Figure(figsize=(22, 3.6 * len(phases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(phases), len(SHOWN) + len(DISTANCES), squeeze=False)
    for row, (name, phase) in zip(axes, phases.items(), strict=True):
        for axis, curve in zip(row, (*SHOWN, *DISTANCES), strict=True):
            axis.set_visible(any(curve in run for run in phase["seeds"][0].values()))
            axis.set_title(f"{name}: {curve}" + (", distance to the exact run" if curve in DISTANCES else ""))
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            for i, variant in enumerate(report["variants"]):
                _draw(axis, [runs[variant].get(curve) for runs in phase["seeds"]], variant, f"C{i}", curve)
            if curve in DISTANCES:
                axis.set_yscale("log")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(report["variants"]))
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _draw(axis: Any, seeds: list[list[float] | None], label: str, color: str, curve: str) -> None:
    """The mean over seeds, and for distances from the smallest to the largest."""
    by_step = list(zip(*[values for values in seeds if values is not None], strict=True))
    if not by_step or (curve in DISTANCES and not any(map(any, by_step))):  # none: a distance that is zero
        return
    steps = range(1, len(by_step) + 1)
    axis.plot(steps, [statistics.mean(values) for values in by_step], color=color, linewidth=1, label=label)
    if curve in DISTANCES:
        axis.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=color, alpha=0.15, linewidth=0)
