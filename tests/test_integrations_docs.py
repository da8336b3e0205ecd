"""docs/integrations.md: its functions do within each framework's call what the reference does, and its options exist.
`test_docs.py` runs every snippet."""

import ast
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import test_docs
import torch
import torch.distributed as dist
from processes import processes

import covgrpo_kernels
from covgrpo_kernels import covgrpo_loss, reference
from covgrpo_kernels.testing import random_batch

PAGE = test_docs.ROOT / "docs" / "integrations.md"
EPS = torch.finfo(torch.float32).eps


def snippet(part):
    """The snippet of the page that contains this."""
    [code] = [c for c, document in (b.values for b in test_docs._blocks("python")) if document == PAGE and part in c]
    return code


def run(code):
    namespace = {"__name__": "snippet"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def function(name):
    return run(snippet(f"def {name}("))[name]


def group_batch(seed, shuffled=False):
    """[B, T] log-probs, [B] advantages, [B, T] mask, [B] groups; float32; ragged responses, with gaps as of tools."""
    batch = random_batch(seed, groups=3, group_size=4, length=9, shuffled=True)
    lengths = torch.randint(2, 10, (12,), generator=torch.Generator().manual_seed(seed))
    mask = batch["mask"] & (torch.arange(9) < lengths[:, None])
    return batch["old_logprobs"].float(), batch["advantages"].float(), mask, batch["group_ids"], lengths.tolist()


def expected(logprobs, advantages, mask, groups):
    weights = reference.covariance_weights(logprobs.double(), advantages.double(), mask, group_ids=groups)
    assert weights[mask].std() > 0.1
    return weights * advantages.double().unsqueeze(1)


def close(ours, theirs):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=8 * EPS, atol=0)


# -------------------------------------------------------------------------------------------------------- imports


def imported(file):
    """(module, name) of what a file of the package imports from the package, the module relative to it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = ["covgrpo_kernels", "integrations"][: 3 - node.level] if node.level else []
            yield from ((".".join([*above, *filter(None, [node.module])]), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


@pytest.mark.parametrize(
    "file", sorted((test_docs.ROOT / "covgrpo_kernels" / "integrations").glob("*.py")), ids=lambda file: file.name
)
def test_integrations_use_public_names(file):
    for module, name in imported(file):
        if module.split(".")[0] == "covgrpo_kernels" and not module.startswith("covgrpo_kernels.integrations"):
            assert module == "covgrpo_kernels", f"{file.name} imports {module}"
            assert name in covgrpo_kernels.__all__, f"{file.name} imports {name}"


# ----------------------------------------------------------------------------------------------------- Accelerate


def accelerate_on_a_rank(code):
    torch.manual_seed(dist.get_rank())
    names = run(code)
    return names["tokens"], names["advantages"], [p.grad for p in names["model"].parameters()]


def test_accelerate_on_two_ranks():
    """Each has groups of its own; the gradients are those of one process with all of them."""
    code = snippet("from accelerate").split("optimizer.step()")[0]
    (*_, grads), (*_, other) = ranks = processes(2).run(accelerate_on_a_rank, code)
    tokens, advantages = (torch.cat([rank[i] for rank in ranks]) for i in range(2))
    torch.manual_seed(0)  # as rank 0, whose model the others get
    model = run(code)["model"]
    model.zero_grad()

    def policy_loss(hidden, weight, **head):
        is_response = (torch.arange(11) >= 4).expand(len(tokens), 11)
        return covgrpo_loss(hidden[:, :-1], weight, tokens[:, 1:], advantages, is_response, group_size=4, **head).loss

    model(tokens, head=policy_loss).backward()
    for parameter, grad, same in zip(model.parameters(), grads, other, strict=True):
        assert torch.equal(grad, same)
        atol = 64 * EPS * parameter.grad.abs().max().item()
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------- slime


def slime_advantages(seed, rows, process_group, key="log_probs"):
    """The advantages and returns of a data-parallel rank that has these rows. Without Megatron, its groups."""
    logprobs, advantages, mask, _, lengths = group_batch(seed)
    order = group_batch(seed)[3].argsort()  # slime numbers samples prompt by prompt
    number = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    core = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(get_data_parallel_group=lambda: process_group)
    rollout_data = {
        key: [logprobs[i, : lengths[i]] for i in rows],
        "rewards": [advantages[i].item() for i in rows],
        "loss_masks": [mask[i, : lengths[i]].int() for i in rows],
        "sample_indices": [number[i].item() for i in rows],
    }
    args = SimpleNamespace(n_samples_per_prompt=4, use_rollout_logprobs=key != "log_probs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron", ModuleType("megatron"))
        patch.setitem(sys.modules, "megatron.core", core)
        assert function("covgrpo_advantages")(args, rollout_data) is None
    return rollout_data["advantages"], rollout_data["returns"]


def slime_on_a_rank(seed):
    return slime_advantages(seed, range(dist.get_rank(), 12, dist.get_world_size()), dist.group.WORLD)


@pytest.mark.parametrize("key", ["log_probs", "rollout_log_probs"])
def test_slime(key):
    logprobs, advantages, mask, groups, lengths = group_batch(0)
    want = expected(logprobs, advantages, mask, groups)
    weighted, returns = slime_advantages(0, range(12), None, key)
    for i, n in enumerate(lengths):
        close(weighted[i], want[i, :n])
        assert torch.equal(returns[i], advantages[i].expand(n))


def test_slime_with_groups_spread_over_ranks():
    logprobs, advantages, mask, groups, lengths = group_batch(1)
    want = expected(logprobs, advantages, mask, groups)
    for rank, (weighted, _) in enumerate(processes(2).run(slime_on_a_rank, 1)):
        for i, values in zip(range(rank, 12, 2), weighted, strict=True):
            close(values, want[i, : lengths[i]])


# -------------------------------------------------------------------------------------------------------- NeMo-RL


def test_nemo_rl():
    """The keywords of its trainers' call; a sample that is masked whole takes no part."""
    logprobs, advantages, mask, groups, _ = group_batch(2)
    mask[3] = False

    class Estimator:
        def __init__(self, estimator_config, loss_config):
            self.scale = estimator_config["scale"]

        def compute_advantage(self, prompt_ids, rewards, mask, valid_mask=None, **kwargs):
            assert set(kwargs) == {"repeated_batch", "logprobs_policy", "logprobs_reference"}
            assert valid_mask is not None
            return (self.scale * rewards).unsqueeze(-1).expand(mask.shape)

    estimator = function("with_covariance_weights")(Estimator)({"scale": 2.0}, {})
    prompts = torch.stack([torch.full_like(groups, 7), groups.abs(), groups], dim=1)  # [B, P] tokens
    weighted = estimator.compute_advantage(
        prompt_ids=prompts, rewards=advantages / 2, mask=mask.float(), repeated_batch={}, valid_mask=mask.any(1),
        logprobs_policy=logprobs, logprobs_reference=None,
    )  # fmt: skip
    close(weighted, expected(logprobs, advantages, mask, groups))


# ------------------------------------------------------------------------------------------------------- prime-rl


def test_prime_rl():
    """Traces of a group as verifiers has them: nodes in turn, log-probs and advantages of the sampled tokens alone."""
    logprobs, advantages, mask, groups, _ = group_batch(3)
    want = expected(logprobs, advantages, mask, groups)
    rows = (groups == groups[0]).nonzero().flatten().tolist()
    traces = []
    for i in rows:
        sampled = [logprobs[i, span][mask[i, span]].tolist() for span in (slice(0, 4), slice(4, 9))]
        turns = [
            node
            for values in sampled
            for node in (
                SimpleNamespace(mask=[False] * 3, logprobs=[], advantages=None),
                SimpleNamespace(
                    mask=[True] * len(values), logprobs=values, advantages=[advantages[i].item()] * len(values)
                ),
            )
        ]
        traces.append(SimpleNamespace(nodes=turns))
    function("weight_advantages")(traces)
    for i, trace in zip(rows, traces, strict=True):
        got = [value for node in trace.nodes for value in node.advantages or []]
        close(torch.tensor(got), want[i][mask[i]])
        assert trace.nodes[0].advantages is None


# ----------------------------------------------------------------------------------------------------------- verl


def verl_commands():
    section = PAGE.read_text().split("\n## verl\n")[1].split("\n## ")[0]
    commands = [
        dict(re.findall(r"([\w.]+)=([\w.]+)", block)) for block in re.findall(r"```sh\n(.*?)```", section, re.S)
    ]
    assert len(commands) == 2
    return commands


def test_options_of_verl_exist_and_what_they_name_is_registered():
    pytest.importorskip("verl.trainer.ppo.v1.utils", reason="verl and what its trainer imports are not installed")
    from omegaconf import OmegaConf
    from verl.trainer.ppo import core_algos
    from verl.utils.import_utils import import_external_libs

    config = test_docs.Path(core_algos.__file__).parents[1] / "config" / "_generated_ppo_trainer.yaml"
    known = OmegaConf.load(config)
    commands = verl_commands()
    assert len(commands) == 2
    for options in commands:
        for key in options:
            assert OmegaConf.select(known, key, default="none such") != "none such", key
        import_external_libs(options["actor_rollout_ref.model.external_lib"])
        core_algos.get_adv_estimator_fn(options["algorithm.adv_estimator"])
        loss = options.get("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla")
        core_algos.get_policy_loss_fn(loss)
        weighted = [options["algorithm.adv_estimator"], loss].count("covgrpo")
        assert weighted == 1
