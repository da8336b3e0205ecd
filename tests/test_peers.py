"""Equality with kernels written elsewhere, on the CPU.

Peers are held to the rule that ours are held to: in a single draw an error against the float64 reference of at
most the larger of three times eager's and a bound that follows from the data. A peer that meets it computes what
our reference specifies; a reading of ours that differs from the field's (a sign, a denominator, which side is
clipped) is an error of another order in one of the three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from covgrpo_kernels import CovGRPOConfig, covgrpo_loss, linear_logprob, reference
from covgrpo_kernels.testing import ErrorBook, check_draw, leaf, policy_head, random_head, rms, run_logprob

trl_kernels = pytest.importorskip("trl.kernels", reason="trl is not installed")
liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")

DTYPES = [torch.float32, torch.bfloat16]


def rounding(oracle: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """What rounding alone may cost: gradients half an epsilon of their dtype; all quantities a few of the
    accumulator's. A sum of terms with both signs, which a loss is, rounds as its terms, of size one here."""
    accumulator = 8 * torch.finfo(torch.float32).eps
    return {
        n: accumulator * max(rms(v), 1.0 if n == "loss" else 0.0)
        + (torch.finfo(dtype).eps / 2 * rms(v) if n.startswith("d") else 0.0)
        for n, v in oracle.items()
    }


def check_peer(
    ours: dict[str, Tensor],
    peer: dict[str, Tensor],
    eager: dict[str, Tensor],
    oracle: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Ours and the peer's by the single-draw rule, and the two within the sum of their limits."""
    assert set(ours) == set(peer) == set(oracle)
    bound = rounding(oracle, dtype)
    check_draw(ours, eager, oracle, bound)
    check_draw(peer, eager, oracle, bound)
    for name, exact in oracle.items():
        gap, peer_error = rms(ours[name].double() - peer[name].double()), rms(peer[name].double() - exact)
        limit = peer_error + max(3 * rms(eager[name].double() - exact), bound[name])
        assert gap <= limit, f"{name}: {gap:.3e} between ours and the peer, limit {limit:.3e}"
        # A rule that forgives errors of the quantity's own size would say nothing.
        share = 1e-3 if dtype == torch.float32 else 0.1
        assert limit < share * rms(exact), f"{name}: limit {limit:.3e} for a quantity of {rms(exact):.3e}"


# ------------------------------------------------------------------------------------- TRL: log-probs, entropy


def trl_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    function = trl_kernels.ChunkedLogProbFunction
    out = function.apply(
        hidden, weight, bias, targets, temperature, chunk, softcap, logit_scale, ("entropy",)
    )  # fmt: skip
    return out[0], out[1]


HEADS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "softcap": dict(softcap=3.0),
    "logit_scale": dict(logit_scale=0.25),
    "all": dict(temperature=1.7, softcap=4.0, logit_scale=1.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_trl_logprob(name: str, with_bias: bool, dtype: torch.dtype) -> None:
    """Log-probs, entropies, dH, dW and db for coefficients of both outputs."""
    options = HEADS[name]
    batch = random_head(1, 96, 32, 200, std=2.0, bias=with_bias)
    batch["targets"] = batch["targets"].clamp(min=0)  # TRL has no ignored rows
    # All get the values that the dtype can hold.
    batch = {n: v.to(dtype).double() if n in ("hidden", "weight", "bias") and v is not None else v
             for n, v in batch.items()}  # fmt: skip
    peer = run_logprob(trl_logprob, **batch, **options, dtype=dtype)
    ours = run_logprob(linear_logprob, **batch, **options, dtype=dtype, entropy=True, grad_tol=0.0)
    eager = run_logprob(reference.linear_logprob, **batch, **options, dtype=dtype)
    oracle = run_logprob(reference.linear_logprob, **batch, **options, dtype=torch.float64)
    check_peer(ours, peer, eager, oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trl_on_a_policy(dtype: torch.dtype) -> None:
    """Confident tokens and embeddings with a common component, over several slices of the vocabulary on both
    sides, with the tolerance that is the default."""
    batch: dict[str, Any] = policy_head(2, 128, 48, 2500)
    batch = {n: v.to(dtype).double() if n in ("hidden", "weight") else v for n, v in batch.items()}
    batch["logprob_grad"] = batch["logprob_grad"].double()
    peer = run_logprob(trl_logprob, **batch, dtype=dtype, chunk=1000)
    ours = run_logprob(linear_logprob, **batch, dtype=dtype, entropy=True)
    eager = run_logprob(reference.linear_logprob, **batch, dtype=dtype)
    oracle = run_logprob(reference.linear_logprob, **batch, dtype=torch.float64)
    check_peer(ours, peer, eager, oracle, dtype)


# ------------------------------------------------------------------------------------ Liger: the policy loss

ROWS, TIME, DEPTH, VOCAB = 6, 9, 16, 64


class Case(NamedTuple):
    ours: dict[str, Any]  # CovGRPOConfig
    liger: dict[str, Any]  # LigerFusedLinearGRPOLoss
    use: tuple[str, ...] = ("old_logprobs",)


def loss_types() -> dict[str, Case]:
    """The five aggregations. Liger's CISPO takes the cap itself where ours takes what it exceeds one by."""
    cases = {}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        high = 0.3 if kind == "cispo" else 0.25
        cap = 1 + high if kind == "cispo" else high
        both = dict(loss_type=kind, max_completion_length=11)
        cases[kind] = Case(both | dict(clip_low=0.2, clip_high=high), both | dict(epsilon_low=0.2, epsilon_high=cap))
    return cases


def variant(case: Case, ours: dict[str, Any], peer: dict[str, Any], *use: str) -> Case:
    return Case(case.ours | ours, case.liger | peer, (*case.use, *use))


TOKEN = loss_types()
SEQUENCE = {
    f"{n}, sequence": variant(c, dict(importance_level="sequence"), dict(importance_sampling_level="sequence"))
    for n, c in TOKEN.items()
    if n != "cispo"  # Liger has no sequence level there
}
KL = {f"{n}, kl": variant(c, dict(beta=0.3), dict(beta=0.3), "ref_logprobs") for n, c in TOKEN.items()}
ROLLOUT = {f"{n}, rollout": variant(c, {}, {}, "rollout_weights") for n, c in TOKEN.items()}
DUAL = {f"{n}, dual clip": variant(c, dict(dual_clip=1.5), dict(delta=1.5)) for n, c in TOKEN.items() if n != "cispo"}
ON_POLICY = {f"{n}, on policy": Case(c.ours, c.liger, ()) for n, c in TOKEN.items()}
EVERYTHING = (dict(beta=0.3, dual_clip=1.5), dict(beta=0.3, delta=1.5), "ref_logprobs", "rollout_weights")
TOGETHER = {
    "all": variant(TOKEN["dapo"], *EVERYTHING),
    "all, sequence": variant(SEQUENCE["grpo, sequence"], *EVERYTHING),
}
CASES = TOKEN | SEQUENCE | KL | ROLLOUT | DUAL | ON_POLICY | TOGETHER


def policy_batch(seed: int, dtype: torch.dtype, level: str, temperature: float, bias: bool) -> dict[str, Any]:
    """Ratios on both sides of every bound, and never so near to one that rounding decides: the gradient of a
    clipped token is discontinuous there. Every sequence has a valid token; Liger counts those without."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, TIME, DEPTH, generator=g).to(dtype).double()
    weight = (torch.randn(VOCAB, DEPTH, generator=g) * 0.4).to(dtype).double()
    b = (0.3 * torch.randn(VOCAB, generator=g)).to(dtype).double() if bias else None
    targets = torch.randint(0, VOCAB, (ROWS, TIME), generator=g)
    mask = torch.arange(TIME) < torch.tensor([[9], [4], [7], [1], [9], [6]])
    x, _ = reference.linear_logprob(hidden, weight, targets, bias=b, temperature=temperature)
    # exp of these: 0.61, 0.9, 1.0, 1.11, 1.4, 2.0; bounds at 0.8, 1.25, 1.3 and 1.5.
    steps = torch.tensor([-0.5, -0.105, 0.0, 0.105, 0.336, 0.693], dtype=torch.float64)
    if level == "sequence":
        log_ratio = steps.roll(1).unsqueeze(1).expand(ROWS, TIME)
    else:
        log_ratio = steps[torch.randint(0, len(steps), (ROWS, TIME), generator=g)]
    return dict(
        hidden=hidden,
        weight=weight,
        bias=b,
        targets=targets,
        mask=mask,
        advantages=torch.tensor([1.2, -0.7, -1.5, 0.4, 0.9, -1.1]),
        old_logprobs=(x - log_ratio).float(),
        ref_logprobs=(x + 0.3 * torch.randn(ROWS, TIME, generator=g, dtype=torch.float64)).float(),
        rollout_weights=torch.rand(ROWS, TIME, generator=g) + 0.5,
        temperature=temperature,
    )


def run_ours(function: Any, batch: dict[str, Any], case: Case, dtype: torch.dtype, **options: Any) -> Any:
    inputs = {n: leaf(batch[n], dtype) for n in ("hidden", "weight", "bias") if batch[n] is not None}
    others = {n: batch[n] for n in ("targets", "mask", "advantages", "temperature", *case.use)}
    loss = function(**inputs, **others, config=CovGRPOConfig(weighting="none", **case.ours), **options).loss
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return dict(loss=loss.detach()) | {f"d{n}": v for n, v in zip(inputs, grads, strict=True)}


def run_liger(batch: dict[str, Any], case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {n: leaf(batch[n], dtype) for n in ("hidden", "weight", "bias") if batch[n] is not None}
    settings = dict(beta=0.0, compiled=False, use_ref_model="ref_logprobs" in case.use, chunk_size=ROWS)
    module = liger.LigerFusedLinearGRPOLoss(**(settings | case.liger), temperature=batch["temperature"])
    loss, _ = module(
        inputs["hidden"],
        inputs["weight"],
        batch["targets"],
        batch["mask"].float(),
        batch["advantages"],
        bias=inputs.get("bias"),
        ref_per_token_logps=batch["ref_logprobs"] if "ref_logprobs" in case.use else None,
        old_per_token_logps=batch["old_logprobs"] if "old_logprobs" in case.use else None,
        vllm_is_ratio=batch["rollout_weights"] if "rollout_weights" in case.use else None,
    )
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return dict(loss=loss.detach()) | {f"d{n}": v for n, v in zip(inputs, grads, strict=True)}


def four_ways(name: str, seed: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Ours, the peer's, eager's and the float64 reference's."""
    case = CASES[name]
    batch = policy_batch(seed, dtype, case.ours.get("importance_level", "token"), 0.8, bias=seed % 2 == 0)
    return [
        run_ours(covgrpo_loss, batch, case, dtype, grad_tol=0.0),
        run_liger(batch, case, dtype),
        run_ours(reference.covgrpo_loss, batch, case, dtype),
        run_ours(reference.covgrpo_loss, batch, case, torch.float64),
    ]


@pytest.mark.parametrize("name", CASES)
def test_liger_grpo(name: str) -> None:
    """Loss, dH, dW and db of the policy term, its clips, the KL and the aggregations, without token weights."""
    check_peer(*four_ways(name, sorted(CASES).index(name), torch.float32), torch.float32)


@pytest.mark.parametrize("name", ["dapo", "cispo, kl", "grpo, sequence", "all"])
def test_liger_grpo_bfloat16(name: str) -> None:
    """Pooled over draws, as a loss is one number a draw: ours at most 1.1 times eager's error, the peer's, which
    rounds logits as eager does, at most 3 times. Its loss sees 16-bit logits, ours does not."""
    dtype = torch.bfloat16
    ours, peers = ErrorBook(), ErrorBook()
    for seed in range(0, 16, 2):
        our, peer, eager, oracle = four_ways(name, seed, dtype)
        ours.add(our, eager, oracle)
        peers.add(peer, eager, oracle)
    ours.check(dtype)
    assert max(peers.ratios().values()) <= 3, peers.ratios()
    assert ours.ratios()["loss"] <= 0.1, ours.ratios()
    for errors in (ours.ours, peers.ours):
        for quantity, values in errors.items():
            pooled = rms(torch.cat(values))
            assert pooled <= 8 * torch.finfo(dtype).eps * max(rms(oracle[quantity]), quantity == "loss")


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_liger_counts_empty_sequences(kind: str) -> None:
    """Ours divides by sequences with a valid token, Liger by rows: `normalizer` makes them one."""
    case = TOKEN[kind]
    batch = policy_batch(50, torch.float32, "token", 1.0, False)
    batch["mask"] = batch["mask"].clone()
    batch["mask"][2] = False
    peer = run_liger(batch, case, torch.float32)
    rows = dict(normalizer=ROWS)
    ours = run_ours(covgrpo_loss, batch, case, torch.float32, grad_tol=0.0, **rows)
    eager = run_ours(reference.covgrpo_loss, batch, case, torch.float32, **rows)
    oracle = run_ours(reference.covgrpo_loss, batch, case, torch.float64, **rows)
    check_peer(ours, peer, eager, oracle, torch.float32)
    counted = run_ours(covgrpo_loss, batch, case, torch.float32, grad_tol=0.0)
    bound = 8 * torch.finfo(torch.float32).eps * abs(ours["loss"])
    assert abs(counted["loss"] * (ROWS - 1) / ROWS - ours["loss"]) <= bound


@pytest.mark.parametrize("kind", ["dapo", "cispo"])
def test_liger_accumulates_like_normalizer(kind: str) -> None:
    """`num_items_in_batch` there, `normalizer` here: the tokens of all micro-batches."""
    case = TOKEN[kind]
    batch = policy_batch(51, torch.float32, "token", 1.0, False)
    inputs = {n: leaf(batch[n], torch.float32) for n in ("hidden", "weight")}
    module = liger.LigerFusedLinearGRPOLoss(
        **(dict(beta=0.0, compiled=False, use_ref_model=False, chunk_size=ROWS) | case.liger)
    )
    loss, _ = module(
        inputs["hidden"], inputs["weight"], batch["targets"], batch["mask"].float(), batch["advantages"],
        old_per_token_logps=batch["old_logprobs"], num_items_in_batch=500,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, list(inputs.values()))
    peer = dict(loss=loss.detach(), dhidden=grads[0], dweight=grads[1])
    results = [
        run_ours(f, batch, case, d, normalizer=500, **o)
        for f, d, o in (
            (covgrpo_loss, torch.float32, dict(grad_tol=0.0)),
            (reference.covgrpo_loss, torch.float32, {}),
            (reference.covgrpo_loss, torch.float64, {}),
        )
    ]
    check_peer(results[0], peer, results[1], results[2], torch.float32)
