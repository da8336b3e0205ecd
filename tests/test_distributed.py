"""The loss over ranks and micro-batches equals the reference's on the whole batch: groups, responses and the vocabulary
cut anywhere. Every worker makes the whole batch from a seed and takes its part; nothing is sent but what is tested."""

import copy
import random
import sys

import pytest
import torch
import torch.distributed as dist
from processes import processes
from test_faults import Fault, apply

from covgrpo_kernels import (
    CovarianceWeighting,
    CovGRPOConfig,
    GroupMoments,
    HighEntropy,
    Steer,
    collectives,
    covariance_weights,
    covgrpo_loss,
    group_moments,
    inputs,
    kernels,
    linear_logprob,
    operators,
    reference,
    vocab_parallel,
    weighting,
)  # fmt: skip
from covgrpo_kernels.testing import ErrorBook, random_batch, rms, run_logprob, run_loss

F64 = torch.float64
PER_TOKEN = ("hidden", "targets", "mask", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights")
WEIGHTINGS = {
    "none": "none",
    "covariance": "covariance",
    "differentiated": CovarianceWeighting(differentiate_weights=True),
    "author": CovGRPOConfig.author_code().token_weighting,
    "numel by response": CovarianceWeighting(advantage_centering="response", normalizer="numel"),
    "steer": Steer(0.3, 0.1),
    "high_entropy": HighEntropy(0.3),
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def configs():
    settings = (dict(beta=0.1, entropy_coef=0.05, dual_clip=1.3), dict(clip_low=None, clip_high=0.1))
    for i, (name, loss_type) in enumerate((w, t) for w in WEIGHTINGS for t in LOSS_TYPES):
        options = dict(settings[i % 2]) if loss_type != "cispo" else dict(beta=0.1, entropy_coef=0.05)
        level = "token" if name in ("steer", "high_entropy") else ("token", "sequence")[i // 2 % 2]
        yield CovGRPOConfig(
            weighting=WEIGHTINGS[name], loss_type=loss_type, importance_level=level, max_completion_length=7, **options
        )


# --- how a batch is cut ------------------------------------------------------------------------------------
# Each takes a batch and the number of ranks, and gives for each rank the indices of its tokens in the flat batch, the
# keywords that its call has, and by which of them it names the ranks.


def rows_anywhere(seed, ranks):
    """Rows in the order of the ranks, cut anywhere: through groups, and a rank may have none."""
    batch = random_batch(seed, groups=3, group_size=4, bias=True)
    cuts = sorted(random.Random(seed).choices(range(13), k=ranks - 1))
    parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    return batch, [cut_rows(batch, torch.arange(12)[part]) for part in parts], ("process_group",)


def rows_by_id(seed, ranks):
    """Rows in any order on any rank, their groups by ids."""
    batch = random_batch(seed, groups=3, group_size=4, shuffled=True, bias=True)
    of_row = torch.tensor(random.Random(seed).choices(range(ranks), k=12))
    return batch, [cut_rows(batch, (of_row == rank).nonzero()[:, 0]) for rank in range(ranks)], ("process_group",)


def one_rank_idle(seed, ranks):
    """A rank whose tokens are masked, and one whose advantages are zero."""
    batch = random_batch(seed, groups=4, group_size=2, shuffled=True)
    of_row = torch.arange(8) % ranks
    batch["mask"][of_row == 0] = False
    batch["advantages"][of_row == ranks - 1] = 0
    return batch, [cut_rows(batch, (of_row == rank).nonzero()[:, 0]) for rank in range(ranks)], ("process_group",)


def packed_responses(seed, ranks):
    """Packed responses, each whole on a rank, numbered on each rank anew."""
    batch = random_batch(seed, groups=3, group_size=4, packed=True, shuffled=True)
    number = batch["sequence_ids"].unique(return_inverse=True)[1]
    parts = []
    for rank in range(ranks):
        tokens = (number % ranks == rank).nonzero()[:, 0]
        part = cut_tokens(batch, tokens)
        parts.append((tokens, part | dict(sequence_ids=number[tokens] // ranks)))
    return batch, parts, ("process_group",)


def packed_tokens(seed, ranks):
    """Every token on any rank."""
    batch = random_batch(seed, groups=3, group_size=4, packed=True, shuffled=True)
    of_token = torch.tensor(random.Random(seed).choices(range(ranks), k=len(batch["targets"])))
    parts = [(of_token == rank).nonzero()[:, 0] for rank in range(ranks)]
    return batch, [(t, cut_tokens(batch, t)) for t in parts], ("process_group", "sequence_group")


def columns(seed, ranks):
    """Sequence parallelism: every rank has a stretch of every row."""
    batch = random_batch(seed, groups=2, group_size=3, length=7, shuffled=True, bias=True)
    cuts = sorted(random.Random(seed).choices(range(8), k=ranks - 1))
    parts = []
    for a, b in zip([0, *cuts], [*cuts, 7], strict=True):
        part = {n: v[:, a:b] if n in PER_TOKEN and v.ndim > 1 else v for n, v in batch.items()}
        parts.append((torch.arange(42).view(6, 7)[:, a:b].reshape(-1), part))
    return batch, parts, ("sequence_group",)


def vocabulary(seed, ranks):
    """Slices of the head, of any sizes, one of them perhaps empty; all tokens everywhere."""
    batch = random_batch(seed, bias=True)
    cuts = sorted(random.Random(seed).choices(range(12), k=ranks - 1))
    parts = []
    for a, b in zip([0, *cuts], [*cuts, 11], strict=True):
        parts.append((None, batch | dict(weight=batch["weight"][a:b], bias=batch["bias"][a:b])))
    return batch, parts, ("vocab_group",)


CUTS = (rows_anywhere, rows_by_id, one_rank_idle, packed_responses, packed_tokens, columns, vocabulary)


def cut_rows(batch, rows):
    part = {n: v[rows] if n in (*PER_TOKEN, "group_ids") else v for n, v in batch.items()}
    length = batch["targets"].shape[1]
    return (rows[:, None] * length + torch.arange(length)).reshape(-1), part


def cut_tokens(batch, tokens):
    return {n: v[tokens] if n in (*PER_TOKEN, "group_ids", "sequence_ids") else v for n, v in batch.items()}


# --- what ranks do -----------------------------------------------------------------------------------------


def loss_of_rank(cut, seed, config, metrics):
    _, parts, groups = cut(seed, dist.get_world_size())
    indices, part = parts[dist.get_rank()]
    options = dict.fromkeys(groups, dist.group.WORLD)
    return indices, run_loss(covgrpo_loss, part, config, dtype=F64, grad_tol=0.0, metrics=metrics, **options)


def losses_of_rank(cut, cases):
    return [loss_of_rank(cut, *case) for case in cases]


def assemble(cut, seed, results):
    """The results of all ranks as one: losses and gradients of the head add up, or are those of every rank."""
    batch = cut(seed, len(results))[0]
    whole = {}
    if cut is vocabulary:
        for _, result in results[1:]:
            for name in ("loss", "logprob", "weights", "dhidden"):
                assert torch.equal(result[name], results[0][1][name]), name
        whole = {name: results[0][1][name] for name in ("loss", "logprob", "weights", "dhidden")}
        return whole | {name: torch.cat([r[name] for _, r in results]) for name in ("dweight", "dbias")}
    whole["loss"] = sum(r["loss"] for _, r in results)
    for name in ("dweight", "dbias"):
        if name in results[0][1]:
            whole[name] = sum(r[name] for _, r in results)
    shape = batch["targets"].shape
    for name in ("logprob", "weights", "dhidden"):
        like = batch["hidden"] if name == "dhidden" else batch["advantages"].new_zeros(shape)
        flat = torch.full_like(like, torch.nan).reshape(shape.numel(), -1)
        for indices, r in results:
            flat[indices] = r[name].reshape(len(indices), flat.shape[1])
        whole[name] = flat.reshape(like.shape)
    return whole


def check(whole, batch, config, names=("loss", "logprob", "weights", "dhidden", "dweight", "dbias")):
    exact = run_loss(reference.covgrpo_loss, batch, config, dtype=F64)
    for name in names:
        if name in exact:
            error = rms(whole[name] - exact[name])
            assert error <= 512 * torch.finfo(F64).eps * (1e-3 + rms(exact[name])), (name, error, config)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.__name__)
@pytest.mark.parametrize(("ranks", "few"), [(2, False), (4, True), pytest.param(4, False, marks=pytest.mark.deep)])
def test_every_cut_equals_the_reference(cut, ranks, few):
    """Loss, log-probs, weights and gradients, for every loss type and weighting, with metrics and without, where rows
    without influence are not scored. Few configurations have each weighting once, with another loss type each."""
    cases = [(seed, config, seed % 3 == 0) for seed, config in enumerate(configs())]
    cases = [
        case for case in cases if not few or case[0] // len(LOSS_TYPES) % len(LOSS_TYPES) == case[0] % len(LOSS_TYPES)
    ]
    by_rank = processes(ranks).run(losses_of_rank, cut, cases)
    for (seed, config, metrics), results in zip(cases, zip(*by_rank, strict=True), strict=True):
        names = ("loss", "weights", "dhidden", "dweight", "dbias", *(["logprob"] if metrics else []))
        check(assemble(cut, seed, results), cut(seed, ranks)[0], config, names)


def loss_on_mesh(inner, seed, config):
    """Rows over the first two of four ranks and the others, and within each pair columns or the vocabulary."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    batch = random_batch(seed, groups=2, group_size=4, length=6, shuffled=True, bias=True)
    rows = (slice(0, 3), slice(3, 8))[rank // 2]
    part = {n: v[rows] if n in (*PER_TOKEN, "group_ids") else v for n, v in batch.items()}
    if inner == "columns":
        columns = (slice(0, 2), slice(2, 6))[rank % 2]
        part |= {n: v[:, columns] for n, v in part.items() if n in PER_TOKEN and v.ndim > 1}
        groups = dict(process_group=dist.group.WORLD, sequence_group=pairs[rank // 2])
    else:
        entries = (slice(0, 7), slice(7, 11))[rank % 2]
        part |= {n: part[n][entries] for n in ("weight", "bias")}
        groups = dict(process_group=across[rank % 2], vocab_group=pairs[rank // 2])
    result = run_loss(covgrpo_loss, part, config, dtype=F64, grad_tol=0.0, **groups)
    for group in pairs + across:
        dist.destroy_process_group(group)
    return result


@pytest.mark.parametrize("inner", ["columns", "vocabulary"])
def test_two_kinds_of_parallelism_at_once(inner):
    for seed, config in enumerate(list(configs())[::6]):
        r = processes(4).run(loss_on_mesh, inner, seed, config)
        batch = random_batch(seed, groups=2, group_size=4, length=6, shuffled=True, bias=True)
        if inner == "columns":
            whole = {n: sum(x[n] for x in r) for n in ("loss", "dweight", "dbias")}
            for n in ("weights", "dhidden"):
                whole[n] = torch.cat([torch.cat([r[i][n], r[i + 1][n]], 1) for i in (0, 2)])
        else:
            whole = {n: torch.cat([r[0][n], r[2][n]]) for n in ("weights", "dhidden")} | dict(
                loss=r[0]["loss"] + r[2]["loss"]
            )
            for n in ("dweight", "dbias"):
                whole[n] = torch.cat([r[i][n] + r[i + 2][n] for i in (0, 1)])
        check(whole, batch, config, ("loss", "weights", "dhidden", "dweight", "dbias"))


# --- the vocabulary over ranks -----------------------------------------------------------------------------


def sliced_logprob(dtype, backend, seed, capped=True):
    """In that dtype, with the head cut in uneven slices."""
    h, w, y, options = confident_head(seed)
    if not capped:
        options |= dict(temperature=1.0, softcap=None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    edges = [*[0, 1100, 1100 + 513, 4000][:ranks], len(w)]
    here = slice(edges[rank], edges[rank + 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, backend)
        return run_logprob(
            linear_logprob, h, w[here], y, options["bias"][here], dtype=dtype, grad_tol=0.0, entropy=True,
            vocab_group=dist.group.WORLD, **{n: v for n, v in options.items() if n != "bias"},
        )  # fmt: skip


def confident_head(seed):
    """256 rows of 5000 entries, half of them all but sure of their target."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(256, 24, generator=g, dtype=F64)
    w = torch.randn(5000, 24, generator=g, dtype=F64)
    y = torch.randint(0, 5000, (256,), generator=g)
    h[::2] += torch.linspace(0.5, 3.0, 128, dtype=F64).unsqueeze(1) * w[y[::2]]
    h, w = h.bfloat16().double(), w.bfloat16().double()
    options = dict(
        bias=torch.randn(5000, generator=g, dtype=F64).bfloat16().double(), temperature=0.9, softcap=50.0,
        logprob_grad=torch.randn(256, generator=g, dtype=F64), entropy_grad=torch.randn(256, generator=g, dtype=F64),
    )  # fmt: skip
    return h, w, y, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_slices_are_as_exact_as_the_whole(dtype, backend):
    """The rule for numbers with a head over four ranks, rows that are sure of their target included: dH is summed over
    ranks before it is rounded, and 1 - p and the entropy do not cancel where results are merged."""
    book = ErrorBook()
    for seed in range(4):
        slices = processes(4).run(sliced_logprob, dtype, backend, seed)
        ours = slices[0] | {n: torch.cat([r[n] for r in slices]) for n in ("dweight", "dbias")}
        for r in slices[1:]:
            assert all(torch.equal(r[n], ours[n]) for n in ("logprob", "entropy", "dhidden"))
        h, w, y, options = confident_head(seed)
        bias = options.pop("bias")
        exact, eager = (run_logprob(reference.linear_logprob, h, w, y, bias, dtype=d, **options) for d in (F64, dtype))
        book.add(ours, eager, exact)
    book.check(dtype)


def test_sure_tokens_keep_their_digits_where_slices_are_merged():
    """log p down to -1e-9, of which the oracle still has its digits: the relative error, also of the entropy, is the
    error of the logits, no more."""
    h, w, y, options = confident_head(0)
    plain = {n: options[n] for n in ("logprob_grad", "entropy_grad", "bias")}
    exact = run_logprob(reference.linear_logprob, h, w, y, dtype=F64, **plain)
    sure = (exact["logprob"] > -1e-6) & (exact["logprob"] < -1e-9)
    assert sure.sum() > 10
    got = processes(4).run(sliced_logprob, torch.float32, "eager", 0, False)[0]
    logits = 8 * torch.finfo(torch.float32).eps * (h.abs() @ w.abs().T + options["bias"].abs()).amax()
    for name in ("logprob", "entropy"):
        off = (got[name] / exact[name] - 1)[sure].abs()
        assert off.max() <= logits, (name, off.max(), logits)


def empty_slices(which):
    """`sliced_logprob` of a bias that leaves nothing of the first slice, or of any."""
    bias = torch.zeros(5000)
    bias[: 2000 if which == "one" else 5000] = -torch.inf
    h, w, y, _ = confident_head(0)
    half = slice(0, 2000) if dist.get_rank() == 0 else slice(2000, 5000)
    out = linear_logprob(h, w[half], y, bias=bias[half].to(h.dtype), entropy=True, vocab_group=dist.group.WORLD)
    return out.logprob, out.entropy, linear_logprob(h, w, y, bias=bias.to(h.dtype), entropy=True)


def test_slices_of_a_head_without_a_finite_logit():
    """One has no share; where all are such, log-prob and entropy are NaN as on one rank."""
    for which in ("one", "all"):
        for logprob, entropy, whole in processes(2).run(empty_slices, which):
            assert whole.entropy.isfinite().all() == (which == "one")
            torch.testing.assert_close(logprob, whole.logprob, equal_nan=True)
            torch.testing.assert_close(entropy, whole.entropy, equal_nan=True)


def test_gradient_of_hidden_states_is_rounded_once():
    """As exact over four ranks as on one."""
    h, w, y, options = confident_head(0)
    exact = run_logprob(reference.linear_logprob, h, w, y, dtype=F64, **options)["dhidden"]
    got = processes(4).run(sliced_logprob, torch.bfloat16, "eager", 0)[0]["dhidden"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "eager")
        alone = run_logprob(linear_logprob, h, w, y, dtype=torch.bfloat16, grad_tol=0.0, entropy=True, **options)
    assert rms(got - exact) <= 1.01 * rms(alone["dhidden"] - exact)


def unbiased_slices():
    h, w, y, options = confident_head(0)
    half = slice(0, 2000) if dist.get_rank() == 0 else slice(2000, 5000)
    return run_logprob(
        linear_logprob, h, w[half], y, options["bias"][half], dtype=F64, logprob_grad=options["logprob_grad"],
        grad_tol=0.5, grad_mode="unbiased", generator=torch.Generator().manual_seed(dist.get_rank()),
        vocab_group=dist.group.WORLD,
    )  # fmt: skip


def test_ranks_of_a_head_leave_out_the_same_rows():
    """The first rank's dice count: each leaving out rows of its own would give a gradient of no row."""
    first, second = processes(2).run(unbiased_slices)
    h, w, y, options = confident_head(0)
    whole = run_logprob(
        linear_logprob, h, w, y, options["bias"], dtype=F64, logprob_grad=options["logprob_grad"],
        grad_tol=0.5, grad_mode="unbiased", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    left_out = (whole["dhidden"] == 0).all(1)
    assert 20 < left_out.sum() < 236
    assert torch.equal((first["dhidden"] == 0).all(1), left_out)
    assert torch.equal(first["dhidden"], second["dhidden"])
    for name, part in (("dhidden", first), ("dweight", None), ("dbias", None)):
        got = torch.cat([first[name], second[name]]) if part is None else part[name]
        assert rms(got - whole[name]) <= 1e-12 * rms(whole[name]), name


def slices_of_nothing():
    """A NaN in one slice, an ignored row, a target in no slice."""
    h, w, y, _ = confident_head(0)
    half = slice(0, 2000) if dist.get_rank() == 0 else slice(2000, 5000)
    y[1], y[2:] = -100, 4999
    w[3000, :], h = torch.nan, h.clone().requires_grad_()
    out = linear_logprob(h, w[half], y, entropy=True, vocab_group=dist.group.WORLD)
    y[3] = 5000
    try:
        linear_logprob(h, w[half], y, vocab_group=dist.group.WORLD)
    except ValueError as error:
        return out.logprob.detach(), out.entropy.detach(), str(error)


def test_what_is_wrong_in_a_slice_is_seen_on_every_rank():
    for x, entropy, message in processes(2).run(slices_of_nothing):
        assert x[1] == 0 == entropy[1]
        assert x[2:].isnan().all()
        assert entropy[0].isnan()
        assert message == "targets must be in [0, 5000) or -100, got 5000"


# --- groups over micro-batches -----------------------------------------------------------------------------


def micro_batches(batch, sizes):
    rows = torch.arange(len(batch["targets"])).split(sizes)
    return [{n: v[r] if n in (*PER_TOKEN, "group_ids") else v for n, v in batch.items()} for r in rows]


def moments_of(part, weighting, logprobs="old_logprobs"):
    named = {n: part[n] for n in ("advantages", "mask", "group_ids")}
    return GroupMoments.of(part[logprobs], **named, weighting=weighting)


def on_policy(seed, **options):
    """A batch whose old log-probs are the current ones, as before the first update."""
    batch = random_batch(seed, groups=3, group_size=4, shuffled=True, bias=True, **options)
    x, _ = reference.linear_logprob(batch["hidden"], batch["weight"], batch["targets"], bias=batch["bias"])
    return batch | dict(old_logprobs=x)


@pytest.mark.parametrize("name", ["covariance", "author", "numel by response", "batch"])
def test_micro_batches_equal_the_whole(name):
    """Groups cut into micro-batches anywhere: with moments the parts add up to the loss of the whole, and its
    gradients."""
    weighting = WEIGHTINGS.get(name, CovarianceWeighting(scope="batch"))
    weighting = CovarianceWeighting(**(vars(CovarianceWeighting() if isinstance(weighting, str) else weighting) | dict(
        differentiate_weights=False
    )))  # fmt: skip
    for seed, loss_type in enumerate(LOSS_TYPES):
        batch = on_policy(seed)
        config = CovGRPOConfig(weighting=weighting, loss_type=loss_type, beta=0.1, max_completion_length=7)
        per_sequence = loss_type in ("grpo", "dr_grpo")
        count = int(batch["mask"].any(1).sum() if per_sequence else batch["mask"].sum())
        parts = micro_batches(batch, [5, 1, 0, 6])
        first, *others = (moments_of(part, weighting) for part in parts)
        moments = first.merge(*others)
        results = [
            run_loss(covgrpo_loss, part, config, dtype=F64, grad_tol=0.0, moments=moments, normalizer=count)
            for part in parts
        ]
        whole = {n: sum(r[n] for r in results) for n in ("loss", "dweight", "dbias")}
        whole |= {n: torch.cat([r[n] for r in results]) for n in ("logprob", "weights", "dhidden")}
        check(whole, batch, config)


def test_micro_batches_have_the_bits_of_the_whole(monkeypatch):
    """Moments are made of the same tokens in the same order by the same sums."""
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    for seed in range(20):
        batch = on_policy(seed, dtype=torch.float32, length=9)
        inputs = {n: batch[n] for n in ("advantages", "mask", "group_ids")}
        whole = covariance_weights(batch["old_logprobs"], **inputs)
        parts = micro_batches(batch, [2, 3, 7])
        moments = moments_of(parts[0], None).merge(moments_of(parts[1], None), moments_of(parts[2], None))
        got = [
            covariance_weights(p["old_logprobs"], p["advantages"], p["mask"], group_ids=p["group_ids"], moments=moments)
            for p in parts
        ]
        assert torch.equal(torch.cat(got), whole)


def moments_of_rank(seed, sizes):
    """Ranks with different numbers of micro-batches, one of them with none at all."""
    weighting, rank = CovarianceWeighting(), dist.get_rank()
    batch = on_policy(seed)
    config = CovGRPOConfig(loss_type="dapo", beta=0.1)
    first = sum(map(sum, sizes[:rank]))
    of_rank = micro_batches(batch, [first, sum(sizes[rank]), 12 - first - sum(sizes[rank])])[1]
    parts = micro_batches(of_rank, list(sizes[rank]))
    moments = moments_of(of_rank, weighting) if not parts else moments_of(parts[0], weighting)
    for part in parts[1:]:
        moments = moments.merge(moments_of(part, weighting))
    moments = moments.reduce(dist.group.WORLD)
    count = int(batch["mask"].sum())
    return [
        run_loss(covgrpo_loss, part, config, dtype=F64, grad_tol=0.0, moments=moments, normalizer=count)
        for part in parts
    ]


def test_micro_batches_over_ranks_equal_the_whole():
    sizes = ((3, 1, 2), (5,), (), (1,))
    for seed in range(4):
        by_rank = processes(4).run(moments_of_rank, seed, sizes)
        results = [r for rank in by_rank for r in rank]
        whole = {n: sum(r[n] for r in results) for n in ("loss", "dweight", "dbias")}
        whole |= {n: torch.cat([r[n] for r in results]) for n in ("logprob", "weights", "dhidden")}
        check(whole, on_policy(seed), CovGRPOConfig(loss_type="dapo", beta=0.1))


def weights_of_rank(seed):
    batch = random_batch(seed, groups=4, group_size=3, length=9, dtype=torch.float32, shuffled=True)
    mine = batch["group_ids"] // 7 % dist.get_world_size() == dist.get_rank()
    inputs = {n: batch[n][mine] for n in ("advantages", "mask", "group_ids")}
    got = covariance_weights(batch["old_logprobs"][mine], **inputs, process_group=dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "eager")
        alone = covariance_weights(batch["old_logprobs"][mine], **inputs)
    return torch.equal(got, alone)


def test_whole_groups_have_the_bits_of_one_process():
    """What other ranks add to a group that they have no token of is nothing."""
    for seed in range(5):
        assert all(processes(2).run(weights_of_rank, seed))


# --- what is refused ---------------------------------------------------------------------------------------


def test_moments_refuse_what_does_not_belong_together():
    batch = on_policy(0)
    moments = moments_of(batch, CovarianceWeighting())
    inputs = (batch["old_logprobs"], batch["advantages"], batch["mask"])
    with pytest.raises(ValueError, match="others must have the weighting"):
        moments.merge(moments_of(batch, CovarianceWeighting(scope="batch")))
    with pytest.raises(TypeError, match="others must be GroupMoments"):
        moments.merge(batch)
    reduced = copy.copy(moments)
    reduced._process_group = object()  # stands for what `reduce` sets
    for first, second in ((moments, reduced), (reduced, moments)):
        with pytest.raises(ValueError, match="others must be merged before reduce, got moments of several ranks"):
            first.merge(second)
    with pytest.raises(ValueError, match="weighting must not have differentiate_weights"):
        moments_of(batch, CovarianceWeighting(differentiate_weights=True))
    with pytest.raises(ValueError, match="group_ids must be given"):
        GroupMoments.of(*inputs)
    with pytest.raises(TypeError, match="process_group must be a torch"):
        moments.reduce(None)
    with pytest.raises(TypeError, match="moments must be a GroupMoments"):
        covariance_weights(*inputs, group_ids=batch["group_ids"], moments=1)
    with pytest.raises(ValueError, match="group_ids must be given where moments are"):
        covariance_weights(*inputs, moments=moments)
    with pytest.raises(ValueError, match="moments must be of the weighting"):
        covgrpo_loss(**batch, config=CovGRPOConfig.author_code(), moments=moments)
    with pytest.raises(ValueError, match="group_ids must be among those of moments, got 99"):
        covariance_weights(*inputs, group_ids=torch.full((12,), 99), moments=moments)
    with pytest.raises(TypeError, match="process_group must be a torch"):
        covariance_weights(*inputs, group_ids=batch["group_ids"], process_group="world")
    with pytest.raises(TypeError, match="vocab_group must be a torch"):
        linear_logprob(batch["hidden"], batch["weight"], batch["targets"], vocab_group=2)


def wrong_calls():
    """Every rank raises, so that none waits for the others."""
    world, batch = dist.group.WORLD, random_batch(0)
    rows = 3 + dist.get_rank()
    part = {n: v[:rows] if n in PER_TOKEN else v for n, v in batch.items()}
    ids = torch.zeros(rows, dtype=torch.int64)
    moments = GroupMoments.of(part["old_logprobs"], part["advantages"], group_ids=ids)
    by_id = {n: v for n, v in part.items() if n != "group_size"} | dict(group_ids=ids)
    messages = []
    for arguments in (
        part | dict(process_group=world),
        part | dict(sequence_group=world),
        by_id | dict(sequence_group=world),
        by_id | dict(process_group=world, moments=moments),
    ):
        try:
            covgrpo_loss(**arguments)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_wrong_calls_raise_on_every_rank():
    for rank, messages in enumerate(processes(2).run(wrong_calls)):
        assert messages == [
            "group_size must divide the 7 rows of all ranks, got 3",
            f"group_size needs [B, T] rows of one response each, got [{3 + rank}, 5]; "
            "packed tokens and parts of sequences take group_ids",
            f"sequence_group must share its rows, or get sequence_ids: here are {3 + rank} rows",
            "process_group and sequence_group must be None where moments are given, which know all ranks by `reduce`",
        ]


def sharded_head():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    h, w, y, _ = confident_head(0)
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(w, mesh, [Shard(0)])
    with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor"):
        linear_logprob(h, weight, y)
    got = linear_logprob(h, weight.to_local(), y, vocab_group=mesh.get_group()).logprob
    return rms(got - reference.linear_logprob(h, w, y)[0])


def test_a_head_that_is_a_dtensor():
    assert max(processes(2).run(sharded_head)) <= 1e-12


# --- deliberate faults -------------------------------------------------------------------------------------


def with_fault(name, function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        apply(FAULTS[name][1], patch)
        return function(*arguments)


of_size = processes


class FaultyProcesses:
    """Processes in which the fault is there."""

    def __init__(self, size, name):
        self.size, self.name = size, name

    def run(self, function, *arguments):
        return of_size(self.size).run(with_fault, self.name, function, *arguments)


def two(cut):
    return lambda: test_every_cut_equals_the_reference(cut, 2, False)


FAULTS = {
    "sums of a rank": (two(rows_anywhere), Fault(collectives.all_reduce_sum, "SUM, group", "SUM, None")),
    "maxima of a rank": (two(rows_by_id), Fault(collectives.all_reduce_max, "MAX, group", "MAX, None")),
    "groups of a rank": (
        two(rows_anywhere), Fault(inputs._consecutive_groups, "(before + torch", "(0 * before + torch")
    ),
    "largest entropy change of a rank": (
        two(rows_anywhere), Fault(weighting._steer_weights, "(largest, tokens.process_group)", "(largest, None)")
    ),
    "highest entropies of a rank": (
        two(rows_by_id), Fault(weighting._high_entropy_weights, "if tokens.process_group is None", "if True")
    ),
    "responses counted by every rank": (two(columns), Fault(inputs.Tokens.count_sequences, "// ranks", "")),
    "responses of a rank": (
        two(packed_tokens), Fault(inputs.flatten_tokens, "reshape(-1), sequence_group", "reshape(-1)")
    ),
    "denominator of a rank": (
        two(packed_responses), Fault(inputs.Tokens.count_valid, ", self.process_group", ", None")
    ),
    "target of the slice beside": (two(vocabulary), Fault(vocab_parallel.VocabSlice.local_targets, "- self.first", "")),
    "gradient of a slice": (
        two(vocabulary), Fault(operators.backward, "all_reduce_sum(hidden_grad, vocab_slice.group)", "hidden_grad")
    ),
    "gradient rounded before it is summed": (
        test_gradient_of_hidden_states_is_rounded_once,
        Fault(operators.backward, "list(needs), vocab_slice is not None", "list(needs), False"),
    ),
    "largest slice twice": (two(vocabulary), Fault(vocab_parallel.merge_stats, ".scatter(0, lead, 0)", "")),
    "entropy without that of the slices": (
        two(vocabulary), Fault(vocab_parallel.merge_stats, "(entropy - log_share)", "(entropy - 0 * log_share)")
    ),
    "the largest entry in the sum": (
        test_sure_tokens_keep_their_digits_where_slices_are_merged,
        Fault(
            vocab_parallel.merge_stats,
            ".exp().scatter(0, lead, 0).sum(0, keepdim=True)", ".exp().sum(0, keepdim=True) - 1",
        ),
    ),
    "dice of every rank": (
        test_ranks_of_a_head_leave_out_the_same_rows, Fault(inputs._draw_uniform, "dist.broadcast", "dict")
    ),
    "responses of another micro-batch": (
        lambda: test_micro_batches_equal_the_whole("numel by response"),
        Fault(group_moments.GroupMoments.merge, "part.sequences + first", "part.sequences"),
    ),
    "moments of a rank": (
        test_micro_batches_over_ranks_equal_the_whole,
        Fault(group_moments.GroupMoments.reduce, "self.weighting, process_group)", "self.weighting)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_turns_these_tests_red(name, monkeypatch):
    check, fault = FAULTS[name]
    monkeypatch.setattr(sys.modules[__name__], "processes", lambda size: FaultyProcesses(size, name))
    apply(fault, monkeypatch)  # for what needs no other process
    with pytest.raises(AssertionError):
        check()
