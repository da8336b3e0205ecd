"""verl's own functions, from its wheel, with what `covgrpo_kernels.integrations.verl` registers."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from covgrpo_kernels import CovarianceWeighting, reference
from covgrpo_kernels.testing import leaf, random_batch

EPS = torch.finfo(torch.float32).eps
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.fixture(scope="module")
def verl():
    """Its modules, then ours, as in its trainer. Not at the top, where every worker would import them."""
    v1 = pytest.importorskip("verl.trainer.ppo.v1.utils", reason="verl and what its trainer imports are not installed")
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils import losses

    from covgrpo_kernels.integrations import verl as integration

    return SimpleNamespace(
        v1=v1, DataProto=DataProto, core_algos=core_algos, ray_trainer=ray_trainer, losses=losses,
        tensordict_utils=tensordict_utils, ActorConfig=ActorConfig, PolicyLossConfig=PolicyLossConfig,
        integration=integration,
    )  # fmt: skip


def rollout(verl, seed, groups=3, group_size=4, length=7):
    """What verl has when it computes advantages: shuffled rows, ragged responses, rewards at their last token."""
    batch = random_batch(seed, groups=groups, group_size=group_size, length=length, shuffled=True)
    lengths = torch.randint(1, length + 1, (groups * group_size,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) < lengths[:, None]
    rewards = torch.zeros(mask.shape).scatter_(1, lengths[:, None] - 1, batch["advantages"][:, None].float())
    uid = np.array([f"prompt {i}" for i in batch["group_ids"].tolist()], dtype=object)
    tensors = dict(
        token_level_rewards=rewards,
        response_mask=mask.long(),
        old_log_probs=batch["old_logprobs"].float().where(mask, 0),
        log_probs=batch["ref_logprobs"].float().where(mask, 0),
        rollout_is_weights=batch["rollout_weights"].float(),
    )
    return verl.DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid}), batch["group_ids"]


def actor(verl, mode="token-mean"):
    return verl.ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode,
        clip_ratio_low=0.1, clip_ratio_high=0.3, policy_loss=verl.PolicyLossConfig(loss_mode="covgrpo"),
    )  # fmt: skip


@pytest.mark.parametrize("module", ["ray_trainer", "v1"])
@pytest.mark.parametrize("norm", [True, False])
def test_advantages_are_grpo_times_the_weights_of_whole_groups(verl, module, norm):
    """The weights are those of the reference in float64, by verl's own way from the batch to the estimator."""
    for seed in range(5):
        data, groups = rollout(verl, seed)
        config = {"norm_adv_by_std_in_grpo": norm}
        call = dict(norm_adv_by_std_in_grpo=norm, config=config)
        plain = verl.ray_trainer.compute_advantage(rollout(verl, seed)[0], "grpo", **call).batch["advantages"]
        if module == "v1":
            keys = [f"{uid}_{i}_0" for i, uid in enumerate(data.non_tensor_batch["uid"])]
            data = verl.v1.compute_advantage_for_multi_trajectories(data, keys, "covgrpo", **call)
        else:
            data = verl.ray_trainer.compute_advantage(data, "covgrpo", **call)
        mask = data.batch["response_mask"]
        weights = reference.covariance_weights(
            data.batch["old_log_probs"].double(), plain.double(), mask, group_ids=groups
        )
        assert weights[mask != 0].std() > 0.1
        torch.testing.assert_close(data.batch["advantages"].double(), weights * plain, rtol=8 * EPS, atol=0)
        torch.testing.assert_close(data.batch["returns"], plain, rtol=0, atol=0)


def test_other_estimators_are_left_alone(verl):
    data, _ = rollout(verl, 0)
    expected, _ = verl.core_algos.compute_rloo_outcome_advantage(
        data.batch["token_level_rewards"], data.batch["response_mask"], data.non_tensor_batch["uid"]
    )
    assert torch.equal(verl.ray_trainer.compute_advantage(data, "rloo").batch["advantages"], expected)


def test_the_estimator_asks_for_log_probs_and_keeps_none(verl):
    data, _ = rollout(verl, 0)
    verl.ray_trainer.compute_advantage(data, "covgrpo")
    assert verl.core_algos.get_adv_estimator_fn("covgrpo") is verl.integration.compute_covgrpo_advantage
    data.batch.pop("old_log_probs")
    with pytest.raises(TypeError, match="old_log_probs"):
        verl.ray_trainer.compute_advantage(data, "covgrpo")
    assert verl.core_algos.get_adv_estimator_fn("covgrpo") is verl.integration.compute_covgrpo_advantage


def test_threads_have_their_own_batches(verl, monkeypatch):
    """Each batch is weighted by its own log-probs, where two calls have begun before either gets to the estimator."""
    wanted = [verl.ray_trainer.compute_advantage(rollout(verl, i)[0], "covgrpo").batch["advantages"] for i in range(2)]
    both, get = Barrier(2, timeout=60), verl.core_algos.get_adv_estimator_fn

    def get_when_both_are_there(name):
        both.wait()
        return get(name)

    monkeypatch.setattr(verl.core_algos, "get_adv_estimator_fn", get_when_both_are_there)
    with ThreadPoolExecutor(2) as pool:
        batches = [rollout(verl, i)[0] for i in range(2)]
        results = list(pool.map(lambda batch: verl.ray_trainer.compute_advantage(batch, "covgrpo"), batches))
    assert all(torch.equal(data.batch["advantages"], want) for data, want in zip(results, wanted, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("correction", [False, True])
def test_policy_loss_is_vanilla_on_weighted_advantages(verl, mode, correction):
    """Loss, gradient and metrics of verl's own loss, given advantages weighted by the reference."""
    data, _ = rollout(verl, 1)
    data = verl.ray_trainer.compute_advantage(data, "grpo").batch
    advantages, mask = data["advantages"], data["response_mask"].bool()
    shared = dict(
        response_mask=mask, loss_agg_mode=mode, config=actor(verl, mode),
        rollout_is_weights=data["rollout_is_weights"] if correction else None,
    )  # fmt: skip

    def run(function, advantages, dtype):
        x = leaf(data["log_probs"], dtype)
        loss, metrics = function(data["old_log_probs"].to(dtype), x, advantages.to(dtype), **shared)
        loss.backward()
        return loss.double(), x.grad.double(), metrics

    weights = reference.covariance_weights(
        data["log_probs"].double(), advantages.double(), mask, weighting=CovarianceWeighting(scope="batch")
    )
    ours = run(verl.core_algos.get_policy_loss_fn("covgrpo"), advantages, torch.float32)
    theirs = run(verl.core_algos.compute_policy_loss_vanilla, weights * advantages, torch.float64)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=64 * EPS, atol=16 * EPS * theirs[1].abs().max().item())
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)
    assert ours[2].keys() == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_a_micro_batch_of_one_group_has_the_weights_of_the_group(verl):
    data, groups = rollout(verl, 2)
    data = verl.ray_trainer.compute_advantage(data, "covgrpo").batch
    rows = groups == groups[0]
    on_policy = data["old_log_probs"][rows]
    call = (data["response_mask"][rows].bool(), "token-mean", actor(verl))
    exact, _ = verl.core_algos.compute_policy_loss_vanilla(on_policy, on_policy, data["advantages"][rows], *call)
    ours, _ = verl.core_algos.get_policy_loss_fn("covgrpo")(on_policy, on_policy, data["returns"][rows], *call)
    torch.testing.assert_close(ours, exact, rtol=64 * EPS, atol=64 * EPS)
    plain, _ = verl.core_algos.compute_policy_loss_vanilla(on_policy, on_policy, data["returns"][rows], *call)
    assert (plain - exact).abs() > 1e-3


def test_the_workers_loss_reaches_it(verl):
    """verl's loss of its workers, on a micro-batch as they have it: nested tensors, the model's output for prompts of
    one token and their responses."""
    data, _ = rollout(verl, 3)
    data = verl.ray_trainer.compute_advantage(data, "grpo").batch
    lengths = data["response_mask"].sum(-1).tolist()

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    fields = ("response_mask", "old_log_probs", "advantages", "rollout_is_weights")
    batch = {name: nested([row[:n] for row, n in zip(data[name], lengths, strict=True)]) for name in fields}
    batch |= {"prompts": nested([torch.zeros(1)] * len(lengths)), "responses": batch["response_mask"]}
    output = nested([F.pad(row[:n], (0, 1)) for row, n in zip(data["log_probs"], lengths, strict=True)])
    numbers = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": 2 * len(lengths)}
    config = actor(verl, "seq-mean-token-mean")
    loss, metrics = verl.losses.ppo_loss(
        config, {"log_probs": output}, verl.tensordict_utils.get_tensordict(batch, numbers)
    )

    expected, _ = verl.integration.compute_policy_loss_covgrpo(
        data["old_log_probs"], data["log_probs"], data["advantages"], data["response_mask"].bool(),
        "seq-mean-token-mean", config, data["rollout_is_weights"],
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=64 * EPS, atol=0)
    assert "actor/pg_clipfrac" in metrics
