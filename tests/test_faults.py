"""The suite can fail: every deliberate fault below is applied to the source and must turn one of its tests red.

A fault names the function, what stands there and what is put in its place; if the code moves on, the fault has to
follow, or this file is red itself.
"""

import __future__

import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import test_entropy_weights
import test_logprob
import test_loss
import test_plan
import test_token_terms
import test_weights
import torch
from faulty_kernels import NO_FAULT, KernelFault, faulty_kernels

from covgrpo_kernels import (
    covariance,
    engines,
    inputs,
    kernels,
    objective,
    plan,
    segments,
    sparse,
    token_terms,
    weighting,
)
from covgrpo_kernels.engines import chunked, collecting, scaling, streaming, tiling
from covgrpo_kernels.kernels import eager, interface
from covgrpo_kernels.kernels.interface import VOCAB_BLOCK


class Fault(NamedTuple):
    function: Callable
    old: str
    new: str


def many_tiles(patch):
    with engines.use((4, VOCAB_BLOCK)):
        test_logprob.test_many_tiles_agree_with_the_reference("alternate", None)


def dense_tiles(patch):
    patch.setattr(streaming, "_ROWS_AT_ONCE", 4)
    with engines.use((4, VOCAB_BLOCK)):
        test_logprob.test_many_tiles_agree_with_the_reference("all but the first", None)


def sums_to_zero(patch):
    test_logprob.test_rows_of_dlogits_sum_to_zero(torch.float32, {}, None)


def sure(patch):
    test_logprob.test_sure_tokens_keep_their_digits(60.0, VOCAB_BLOCK, torch.float32)


def uniform(patch):
    test_logprob.test_equal_logits_are_uniform()


def far(patch):
    test_logprob.test_offsets_beyond_32_bits()


def float16(patch):
    test_logprob.test_small_coefficients_survive_float16()


def losses(patch):
    test_loss.test_every_option_equals_the_reference("covariance")


def kl_cov(patch):
    test_loss.test_every_option_equals_the_reference("kl_cov")


def steer(patch):
    test_loss.test_every_option_equals_the_reference("steer")


def not_finite(patch):
    test_entropy_weights.test_a_change_that_is_not_finite_counts_as_none(True)


def small_changes(patch):
    test_entropy_weights.test_small_changes_are_left_alone()


def zero_entropies(patch):
    test_entropy_weights.test_entropies_of_zero()


def high_entropy(patch):
    test_loss.test_every_option_equals_the_reference("high_entropy")


def how_many(patch):
    test_entropy_weights.test_how_many_are_kept(0.07, 100, 7)


def equal_entropies(patch):
    test_entropy_weights.test_equal_entropies_stay_or_go_together(0.2, 4, torch.float32)


def left_out(patch):
    test_entropy_weights.test_what_is_left_out_has_no_influence("rollout_weights", float("inf"), True)


def nan_entropy(patch):
    test_entropy_weights.test_a_nan_entropy_is_not_among_the_highest(True)


def differentiated(patch):
    test_loss.test_every_option_equals_the_reference("differentiated")


def weights(patch):
    test_weights.test_equals_the_reference("paper")


def no_variance(patch):
    test_weights.test_no_variance_means_one("two tokens", torch.float64)


def poisoned(patch):
    test_weights.test_bad_values_stay_in_their_group_and_are_not_hidden()


def certificate(patch):
    test_plan.test_tolerance_is_kept_and_used(2e-3)


def one_dlogits(patch):
    test_plan.test_all_gradients_are_of_one_dlogits("all", torch.float64, "eager")


def above_the_floor(patch):
    test_plan.test_every_entry_above_the_floor_is_kept(torch.float64, "eager")


def largest(patch):
    test_plan.test_the_largest_candidates_whatever_their_order(4, "eager")


def overflow(patch):
    test_plan.test_a_row_that_has_lost_candidates_is_never_sparse()


def unbiased(patch):
    test_plan.test_unbiased_gradients_are_exact_on_average()


def loose_certificate(patch):
    test_plan.test_tolerance_is_kept_and_used(2e-2)


def skipping(patch):
    test_plan.test_rows_without_coefficient_enter_no_product("eager")


FAULTS = {
    "last chunk skipped": (many_tiles, Fault(tiling.vocab_slices, "whole, vocab}", "whole}")),
    "-1 at the target lost": (
        sums_to_zero,
        Fault(
            eager.dlogits,
            "torch.where(is_here.unsqueeze(1)", "torch.where(is_here.unsqueeze(1) & False",
        ),
    ),
    "running sum not rescaled": (many_tiles, Fault(eager.online_softmax_, "s.copy_(w * s + ", "s.copy_(s + ")),
    "lesser maximum forgotten": (many_tiles, Fault(eager.online_softmax_, "wb * sb + lesser)", "wb * sb)")),
    "maximum kept in the sum": (sure, Fault(eager.online_softmax_, "e.masked_fill_(at_max, 0)", "ties.fill_(-1)")),
    "ties dropped": (uniform, Fault(eager.online_softmax_, "e.sum(-1).add_(ties)", "e.sum(-1)")),
    "entropy gradient without H": (
        many_tiles, Fault(eager.dlogits, "log_p.add_(coefficients.entropy.unsqueeze(1))", "log_p")
    ),
    "softcap's slope lost": (many_tiles, Fault(eager.dlogits, "dz.mul_(softcap_slope)", "pass")),
    "int32 offset": (
        far,
        Fault(
            chunked._slice_of_head, "rows.weight[a:b]",
            "rows.weight.as_strided((b - a, rows.depth), rows.weight.stride(), a * rows.weight.stride(0) % 2**31)",
        ),
    ),
    "rows moved in the wrong order": (
        dense_tiles,
        Fault(
            streaming._scatter_in_place,
            "reversed(range(0, len(index), _ROWS_AT_ONCE))", "range(0, len(index), _ROWS_AT_ONCE)",
        ),
    ),
    "coefficients rounded as they are": (
        float16, Fault(scaling.to_unit_scale, ".clamp(-100, 100)", " * 0")
    ),
    "KL under the mask": (
        losses,
        Fault(inputs.flatten_floats, ".where(valid, 0)", ""),
        Fault(token_terms._token_shares, "share.where(inputs.valid, 0)", "share"),
        Fault(token_terms.token_terms, "*means]).where(valid, 0).sum(1)", "*means]).sum(1)"),
    ),
    "KL weighted": (
        losses,
        Fault(token_terms.token_terms, "share * options.beta * kl_grad", "share * weights * options.beta * kl_grad"),
    ),
    "weights from the wrong group": (
        weights,
        Fault(
            covariance.weights_from_moments,
            "scopes.gather(moments.normalizer)", "scopes.gather(moments.normalizer.roll(1))",
        ),
    ),
    "means of the wrong group": (
        weights, Fault(segments.Segments.gather, "value[self.segment]", "value[(self.segment + 1) % self.bound]")
    ),
    "normaliser counts padding": (
        losses,
        Fault(objective.policy_objective, "sequences.sum(valid)", "sequences.sum(torch.ones_like(valid))"),
    ),
    "empty sequences counted": (
        losses, Fault(inputs.Tokens.count_sequences, "> 0).sum()", ">= 0).sum()")
    ),
    "noise taken for variance": (
        no_variance, Fault(covariance.scope_moments, "variance <= noise.square()", "variance < 0")
    ),
    "NaN weight under the mask": (
        poisoned, Fault(covariance.weights_from_moments,
            "kernel.where(valid, 0) * scopes.gather(moments.normalizer)).where(valid, 0)",
            "kernel * scopes.gather(moments.normalizer))",)
    ),
    "clip on the wrong side": (
        losses, Fault(token_terms.token_terms, "within * a < policy_ratio * a", "within * a > policy_ratio * a")
    ),
    "KL-Cov without its penalty's sign": (kl_cov, Fault(token_terms.token_terms, "gap.sign()", "gap.sign().abs()")),
    "STEER without the entropy": (steer, Fault(weighting._steer_weights, "(logprobs + entropy)", "logprobs")),
    "STEER without the ratio": (steer, Fault(weighting._steer_weights, "* ratio *", "*")),
    "STEER's least change forgotten": (
        small_changes, Fault(weighting._steer_weights, "value=weighting.min_change", "value=0.0")
    ),
    "an infinite change": (
        not_finite, Fault(weighting._steer_weights, "nan_to_num(nan=0.0, posinf=0.0)", "nan_to_num()")
    ),
    "lowest entropies kept": (
        high_entropy, Fault(weighting._high_entropy_weights, "ranked >= threshold", "ranked <= threshold")
    ),
    "not normalised by those kept": (
        high_entropy, Fault(weighting._high_entropy_weights, "count / (of_all >= threshold).sum()", "count / count")
    ),
    "masked entropies ranked": (
        zero_entropies, Fault(weighting._high_entropy_weights, ".where(tokens.valid, -torch.inf)", "")
    ),
    "rounding of the share counted": (
        how_many, Fault(weighting._high_entropy_weights, " + 0.9999).floor()", ").ceil()")
    ),
    "equal entropies told apart": (
        equal_entropies, Fault(weighting._high_entropy_weights, "ranked >= threshold", "ranked > threshold")
    ),
    "left out with a rollout weight": (
        left_out, Fault(objective._advantages, "tokens.advantages.where(weights != 0, 0)", "tokens.advantages")
    ),
    "a NaN among the highest": (
        nan_entropy,
        Fault(weighting._high_entropy_weights, "torch.finfo(entropy.dtype).min", "torch.finfo(entropy.dtype).max"),
    ),
    "bandwidth taken for a constant": (
        differentiated,
        Fault(covariance.covariance_weights_grad,
            "scopes.gather(dvariance * 2 / n)", "0 * scopes.gather(dvariance)",),
    ),
    "tolerance ignored": (
        certificate, Fault(plan._within_budget, "grad_tol**2 * budget_total(norm)", "0.05 * budget_total(norm)")
    ),
    "tolerance not used": (
        certificate, Fault(plan._within_budget, "grad_tol**2 * budget_total(norm)", "0.0 * budget_total(norm)")
    ),
    "sparse rows without the entropy": (
        certificate, Fault(sparse.sparse_entries, "+ entropy_grad.unsqueeze(1)", "+ 0 * entropy_grad.unsqueeze(1)")
    ),
    "tails dropped": (
        certificate, Fault(sparse.SparseGradient.__init__, "= entries.tail[block]", "= 0 * entries.tail[block]")
    ),
    "tail of another size": (
        certificate, Fault(sparse.SparseGradient.__init__, "(min_prob / mass)", "(2 * min_prob / mass)")
    ),
    "target twice in the tail": (
        loose_certificate, Fault(eager.tail_probabilities, "p.scatter_(1, column", "p.scatter_(1, 0 * column")
    ),
    "dW of the slice beside": (
        one_dlogits,
        Fault(
            sparse.SparseGradient.weight_rows,
            "self.touched_ids[a:b] -", "self.touched_ids[a:b].flip(0) -",
        ),
    ),
    "tail not in the bias": (
        one_dlogits, Fault(chunked._bias_sum, "+ tails.bias_counts @", "+ 0 * tails.bias_counts @")
    ),
    "thresholds too high": (
        above_the_floor, Fault(collecting.CandidateCollector.__init__, "math.log(min_prob)", "math.log(min_prob) + 2")
    ),
    "floor below what was dropped": (
        above_the_floor,
        Fault(interface.Candidates.most_probable, "torch.maximum(min_logits, ", "torch.minimum(min_logits, ")
    ),
    "equal logits cut in two": (
        largest, Fault(interface.largest_candidates, "largest > next_largest", "largest >= next_largest")
    ),
    "bound of a lower floor": (
        certificate, Fault(sparse.sparse_entries, "(candidates.min_logits)", "(stats.min_logits(1e-9))")
    ),
    "candidates of one tile": (above_the_floor, Fault(eager._collect, "+ found[row]", "")),
    "lost candidates not noticed": (
        overflow, Fault(plan.plan_backward, "candidates.found <= candidates.capacity", "candidates.found >= 0")
    ),
    "kept rows not reweighted": (
        unbiased, Fault(plan._drop_at_random, "(1 / probability)", "(0 * probability + 1)")
    ),
    "all but the largest left to chance": (
        unbiased, Fault(plan._drop_at_random, "c = c.amax()", "c = 4 * c.amax()")
    ),
    "dead rows computed": (
        skipping, Fault(streaming._dense_index,
            "plan.dense.index_fill(0, sparse.tail_rows, False)", "torch.ones_like(plan.dense)",)
    ),
}  # fmt: skip


def sequences(patch):
    test_weights.test_equals_the_reference("author")


def gradient(patch):
    test_weights.test_gradient_of_the_weights("paper")


def sequence_gradient(patch):
    test_weights.test_gradient_of_the_weights("author")


def terms(patch):
    test_token_terms.use_small_blocks(patch)
    test_token_terms.test_every_option("all", torch.float64)


def cispo(patch):
    test_token_terms.test_every_option("cispo", torch.float64)


def penalty(patch):
    test_token_terms.test_every_option("penalty", torch.float64)


def few_tokens(patch):
    test_token_terms.use_small_blocks(patch)
    test_token_terms.test_any_number_of_tokens(32)


def zero_advantage(patch):
    test_token_terms.test_a_zero_advantage_has_no_policy_term(float("inf"))


def nan_weight(patch):
    test_token_terms.test_what_is_not_finite("all", "weights", float("nan"))


def masked_covariance(patch):
    test_token_terms.test_what_is_not_finite("all", "covariance", float("inf"))


def partitions(patch):
    test_token_terms.use_small_blocks(patch)
    test_token_terms.test_segments(torch.int64)


KERNEL_FAULTS = {
    "segment of the next id": (partitions, KernelFault("segments", "end - 1, mask", "end, mask")),
    "segments end where they begin": (
        partitions, KernelFault("segments", "tl.where(m_p, begin,", "tl.where(m_p, end,")
    ),
    "bisection one step short": (partitions, KernelFault("segments", "range(steps)", "range(steps - 1)")),
    "last token of a segment lost": (partitions, KernelFault("segment_sums", "i_t < end", "i_t < end - 1")),
    "sums of the first value": (partitions, KernelFault("segment_sums", "i_m * row_stride", "0 * row_stride")),
    "clip on the wrong side": (
        terms, KernelFault("token_terms", "within * a < policy_ratio * a", "within * a > policy_ratio * a")
    ),
    "clipped tokens have a gradient": (
        terms, KernelFault("token_terms", "held = clipped | dual_clipped", "held = dual_clipped")
    ),
    "no upper bound": (terms, KernelFault("token_terms", "(within > OPTIONS.ratio_high)", "(within < 0.0)")),
    "dual clip of positive advantages": (terms, KernelFault("token_terms", "(a < 0.0) & (slope", "(a > 0.0) & (slope")),
    "share without the length": (terms, KernelFault("token_terms", "share /= tl.load", "tl.load")),
    "ratio of the token instead of its sequence": (
        terms, KernelFault("token_terms", "else _load(inputs.mean_log_ratio, i_s, m_v)", "else gap")
    ),
    "KL weighted": (terms, KernelFault("token_terms", "g += share * kl_grad", "g += w * share * kl_grad")),
    "KL by subtraction": (
        terms, KernelFault("token_terms", "kl_grad = -expm1(d)", "kl_grad = -(tl.exp(d.to(tl.float32)) - 1.0)")
    ),
    "rollout weights lost": (
        terms, KernelFault("token_terms", "policy_share = share * rollout_weight", "rollout_weight")
    ),
    "entropy bonus of the wrong sign": (
        terms, KernelFault("token_terms", "-entropy_coef * share", "entropy_coef * share")
    ),
    "blocks' means taken for the mean": (terms, KernelFault("token_terms", " + n * shift * shift", "")),
    "last block lost": (
        terms,
        KernelFault(
            "token_terms",
            "sums += tl.load(partial + row * n_blocks + i_b, mask=i_b < n_blocks",
            "sums += tl.load(partial + row * n_blocks + i_b, mask=i_b < n_blocks - 1",
        ),
    ),
    "quantiles rounded down": (terms, KernelFault("token_terms", "tl.floor(place + 0.5)", "tl.floor(place)")),
    "CISPO's bound forgotten": (
        cispo,
        KernelFault(
            "token_terms",
            "zero + OPTIONS.ratio_high, policy_ratio)\n        policy_x",
            "policy_ratio, policy_ratio)\n        policy_x",
        ),
    ),
    "penalty without its sign": (penalty, KernelFault("token_terms", "sign * OPTIONS", "tl.abs(sign) * OPTIONS")),
    "penalty of every token": (
        penalty, KernelFault("token_terms", "else tl.load(inputs.penalised + i_t, mask=m_v, other=0) != 0", "else m_v")
    ),
    "last token lost": (few_tokens, KernelFault("token_terms", "m_t = i_t < n_tokens", "m_t = i_t < n_tokens - 1")),
    "a zero advantage has a ratio": (
        zero_advantage,
        KernelFault(
            "token_terms",
            "policy_ratio = tl.where(has_term, ratio, 1.0)", "policy_ratio = ratio",
        ),
    ),
    "NaN lost in a maximum": (nan_weight, KernelFault("token_terms", "(x != x)", "(x < x)")),
    "masked covariances counted": (
        masked_covariance, KernelFault("token_terms", "inputs.covariance, i_t, m_v", "inputs.covariance, i_t, m_t")
    ),
    "gradient without the bandwidth's": (
        gradient, KernelFault("covariance_weights_grad", "+ dvariance * 2.0", "+ 0.0 * dvariance")
    ),
    "gradient of the mean lost": (
        gradient, KernelFault("covariance_weights_grad", "other=0.0) - mean, 0.0)", "other=0.0), 0.0)")
    ),
    "gradient of the normaliser lost": (gradient, KernelFault("covariance_weights_grad", "w * (u - mean_u)", "w * u")),
    "gradient centred in nothing": (
        sequence_gradient,
        KernelFault(
            "covariance_weights_grad",
            "tl.sum(n_b, 0), tl.sum(ddx_b, 0), B_T)", "tl.sum(n_b, 0), 0.0 * tl.sum(ddx_b, 0), B_T)",
        ),
    ),
    "ties dropped": (uniform, KernelFault("numerics", " + tl.maximum(ties, 0.0)", "")),
    "running sum not rescaled": (many_tiles, KernelFault("numerics", "return top, w * s +", "return top, s +")),
    "lesser maximum forgotten": (many_tiles, KernelFault("numerics", "wb * sb + lesser, u", "wb * sb, u")),
    "maximum kept in the sum": (sure, KernelFault("numerics", "tl.where(at_max, 0.0, tl.exp(d))", "tl.exp(d) + 0.0")),
    "last column lost": (many_tiles, KernelFault("online_softmax", "m_c = i_c < width", "m_c = i_c < width - 1")),
    "target of the column beside": (
        many_tiles, KernelFault("online_softmax", "other=-1) - first", "other=-1) - first - 1")
    ),
    "bias of the first column": (
        many_tiles, KernelFault("online_softmax", "tl.load(bias + column", "tl.load(bias + 0 * column")
    ),
    "tanh near zero": (many_tiles, KernelFault("numerics", "17325.0", "17235.0")),
    "-1 at the target lost": (many_tiles, KernelFault("dlogits", "y, dz) * slope", "dz, dz) * slope")),
    "entropy gradient without H": (many_tiles, KernelFault("dlogits", "(log_p + h)", "log_p")),
    "softcap's slope lost": (many_tiles, KernelFault("dlogits", "y, dz) * slope", "y, dz)")),
    "temperature lost in the slope": (many_tiles, KernelFault("numerics", "slope *= per_temperature", "pass")),
    "last row lost": (many_tiles, KernelFault("dlogits", "i_o < n_rows", "i_o < n_rows - 1")),
    "variance about zero": (weights, KernelFault("covariance_weights", "tl.where(m_v, c - mean_c, 0.0)", "c")),
    "noise taken for variance": (no_variance, KernelFault("covariance_weights", "<= floor * floor", "< 0")),
    "masked tokens weighed": (
        poisoned, KernelFault("covariance_weights", "w = tl.where(m_v, tl.exp", "w = tl.where(m_t, tl.exp")
    ),
    "normaliser counts padding": (
        weights,
        KernelFault(
            "covariance_weights",
            "to(tl.float64) if NUMEL else n", "to(tl.float64) if NUMEL else n + 1",
        ),
    ),
    "sequence of the first token": (
        sequences,
        KernelFault(
            "covariance_weights",
            "means + tl.load(segment + i_t", "means + tl.load(segment + 0 * i_t",
        ),
    ),
}  # fmt: skip


def apply_to_kernels(fault: KernelFault, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A copy of the whole backend with the fault in it takes the backend's place."""
    faulty = faulty_kernels(fault, folder)
    patch.setattr(kernels, "_import", lambda name: faulty)


@pytest.fixture
def interpreted(monkeypatch, few_examples):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    few_examples(test_weights.test_equals_the_reference)
    few_examples(test_weights.test_bad_values_stay_in_their_group_and_are_not_hidden)


@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_fault_in_a_kernel_turns_the_suite_red(name, monkeypatch, tmp_path, interpreted):
    check, fault = KERNEL_FAULTS[name]
    apply_to_kernels(fault, monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check(monkeypatch)


@pytest.mark.parametrize("check", list(dict.fromkeys(c for c, _ in KERNEL_FAULTS.values())), ids=lambda c: c.__name__)
def test_the_same_checks_are_green_with_kernels_as_they_are(check, monkeypatch, tmp_path, interpreted):
    apply_to_kernels(NO_FAULT, monkeypatch, tmp_path)
    check(monkeypatch)


def apply(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    function = fault.function
    source = textwrap.dedent(inspect.getsource(function))
    assert fault.old in source, f"{fault.old!r} is no longer in {function.__qualname__}"
    module = sys.modules[function.__module__]
    scope: dict = {}
    code = compile(
        source.replace(fault.old, fault.new), inspect.getfile(function), "exec", __future__.annotations.compiler_flag
    )
    exec(code, vars(module), scope)
    *owner, _ = function.__qualname__.split(".")
    holder = vars(module)[owner[0]] if owner else module
    changed = scope[function.__name__]
    patch.setattr(holder, function.__name__, changed)
    for other in list(sys.modules.values()):
        if other.__name__.startswith(("covgrpo_kernels", "test_")) and vars(other).get(function.__name__) is function:
            patch.setattr(other, function.__name__, changed)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_turns_the_suite_red(name, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    check, *faults = FAULTS[name]
    for fault in faults:
        apply(fault, monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


@pytest.mark.parametrize("check", list(dict.fromkeys(check for check, *_ in FAULTS.values())), ids=lambda c: c.__name__)
def test_the_same_checks_are_green_without_a_fault(check, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    check(monkeypatch)


class CppFault(NamedTuple):
    file: str  # of csrc
    old: str
    new: str


MANY_TILES = "test_logprob.py::test_many_tiles_agree_with_the_reference[{}-alternate]"
UNIFORM, SURE = (
    "test_logprob.py::test_equal_logits_are_uniform[{}]",
    "test_logprob.py::test_sure_tokens_keep_their_digits",
)
GROUPS = "test_weights.py::test_equals_the_reference[cpp-{}]"
ONE_DLOGITS = "test_plan.py::test_all_gradients_are_of_one_dlogits[cpp-all-dtype0]"
ABOVE = "test_plan.py::test_every_entry_above_the_floor_is_kept"
CPP_FAULTS = {
    "candidates of the lane beside": (
        f"{ABOVE}[cpp-dtype0]",
        CppFault("fused.h", "candidates.add(lanes.first + lane,", "candidates.add(lanes.first + (lane ^ 1),"),
    ),
    "a quarter of the candidates": (
        "test_plan.py::test_the_largest_candidates_whatever_their_order[portable-4]",
        CppFault("softmax.h", "sorted.begin() + room / 2", "sorted.begin() + room / 4"),
    ),
    "candidates of a tile numbered from zero": (
        f"{ABOVE}[portable-dtype1]",
        CppFault("tiles.h", "candidates.add(r, tile.first + o + c", "candidates.add(r, o + c"),
    ),
    "target in the tail": (
        "test_cpp_tails.py::test_tails",
        CppFault("fused.h", "is_target || !(z < min_logits)", "!(z < min_logits)"),
    ),
    "probable entries in the tail": (
        "test_cpp_tails.py::test_tails",
        CppFault("fused.h", "is_target || !(z < min_logits)", "is_target"),
    ),
    "tail of the wrong lanes": (
        "test_cpp_tails.py::test_tails",
        CppFault("fused.h", "is_tail ? 1 : vector;", "is_tail ? 0 : vector;"),
    ),
    "tail counted once in the bias": (
        ONE_DLOGITS,
        CppFault("fused.h", "is_tail ? dz * bias_counts : dz", "dz"),
    ),
    "addend of another row": (
        ONE_DLOGITS,
        CppFault("fused.h", "g.addend + addend_row * depth", "g.addend + 0 * depth"),
    ),
    "sparse sums not from zero": (
        "test_plan.py::test_sparse_product",
        CppFault("bindings.cpp", "std::fill(sum, sum + depth, T(0));", ""),
    ),
    "chains not added": (
        "test_cpp.py::test_pooled_errors_of_long_sums",
        CppFault("gemm.h", "if (out.add) sum", "if (false) sum"),
    ),
    "half a unit lost": (
        "test_logprob.py::test_any_shape[cpp]",
        CppFault("gemm.h", "if (depth % Format::PER_UNIT)", "if (false)"),
    ),
    "long chains": (
        "test_cpp.py::test_pooled_errors_of_long_sums",
        CppFault("gemm.h", "CHAIN = 128;", "CHAIN = 4096;"),
    ),
    "bfloat16 cut off": (
        "test_cpp.py::test_gradient_of_the_head_is_rounded_once",
        CppFault("gemm.h", "_mm512_set1_epi32(0x7FFF)", "_mm512_set1_epi32(0)"),
    ),
    "lanes without a token take part": (
        "test_cpp.py::test_bad_bias",
        CppFault("fused.h", "tokens.load(g.coefficients.maximum, INFINITY)", "tokens.load(g.coefficients.maximum, 0)"),
    ),
    "ties dropped": (UNIFORM.format("cpp"), CppFault("fused.h", "larger(sums.ties - 1.0F, F32{})", "F32{}")),
    "ties dropped from a tile": (
        UNIFORM.format("portable"),
        CppFault("tiles.h", "sum_of<T>(sums.sum) + ties", "sum_of<T>(sums.sum)"),
    ),
    "maximum kept in the sum": (SURE, CppFault("softmax.h", "at_maximum ? zero : e;", "e;")),
    "lesser maximum forgotten": (MANY_TILES.format("portable"), CppFault("softmax.h", "b.sum + lesser;", "b.sum;")),
    "target of another slice": (
        MANY_TILES.format("cpp"),
        CppFault("fused.h", "s.targets[tokens.first + i] - s.first - row", "s.targets[tokens.first + i] - row"),
    ),
    "entropy gradient without H": (MANY_TILES.format("portable"), CppFault("softmax.h", "(log_p + entropy)", "log_p")),
    "softcap's slope lost": (MANY_TILES.format("cpp"), CppFault("fused.h", "dz *= 1.0F - t * t;", "")),
    "softcap's slope lost from a tile": (MANY_TILES.format("portable"), CppFault("tiles.h", "dz *= 1 - t * t;", "")),
    "exponential": ("test_cpp.py::test_exponential", CppFault("vectors.h", "1.6666665459e-1F", "1.6667665459e-1F")),
    "tanh near zero": (
        "test_cpp.py::test_hyperbolic_tangent",
        CppFault("vectors.h", "1.33314422036e-1F", "1.33324422036e-1F"),
    ),
    "32-bit offset": (
        "test_logprob.py::test_offsets_beyond_32_bits[cpp]",
        CppFault("gemm.h", "+ (first + i) * m_.row_stride", "+ static_cast<int32_t>((first + i) * m_.row_stride)"),
    ),
    "order of threads": (
        "test_cpp.py::test_bits_do_not_depend_on_where_the_vocabulary_is_cut",
        CppFault("softmax.h", "VOCAB_BLOCK = 1024", "VOCAB_BLOCK = 1536"),
    ),
    "variance about zero": (
        GROUPS.format("paper"),
        CppFault("covariance_weights.h", "(c - mean_c) * (c - mean_c)", "c * c"),
    ),
    "noise taken for variance": (
        "test_weights.py::test_no_variance_means_one",
        CppFault("covariance_weights.h", "variance <= noise * noise", "variance < 0"),
    ),
    "sequence of the first token": (
        GROUPS.format("author"),
        CppFault("covariance_weights.h", "how.means[how.sequence[t]]", "how.means[how.sequence[0]]"),
    ),
}

WITH_ANOTHER_EXTENSION = """
import importlib.util, sys
import torch, covgrpo_kernels
spec = importlib.util.spec_from_file_location("covgrpo_kernels._cpp", sys.argv[1])
covgrpo_kernels._cpp = sys.modules["covgrpo_kernels._cpp"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(covgrpo_kernels._cpp)
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
"""


def run_with_fault(fault: CppFault, test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The extension is built from a copy of its sources with the fault in it, and the test run with that."""
    root = Path(__file__).parent.parent
    shutil.copytree(root / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder)
    (folder / "covgrpo_kernels").mkdir()
    changed = folder / "csrc" / fault.file
    assert fault.old in changed.read_text(), f"{fault.old!r} is no longer in {fault.file}"
    changed.write_text(changed.read_text().replace(fault.old, fault.new))
    environment = os.environ | dict(COVGRPO_BUILD_CPP="1", COVGRPO_CXXFLAGS="-O1")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    built = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [extension] = (folder / "built" / "covgrpo_kernels").glob("*.so")
    return subprocess.run(
        [sys.executable, "-c", WITH_ANOTHER_EXTENSION, str(extension), str(root / "tests" / test)],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def own_products():
    cpp = pytest.importorskip("covgrpo_kernels.kernels.cpp", reason="the C++ extension was not built")
    if not cpp.can_multiply(torch.float32):
        pytest.skip("needs AVX512-BF16")


@pytest.mark.deep
@pytest.mark.parametrize("name", CPP_FAULTS)
def test_fault_in_cpp_turns_the_suite_red(name, tmp_path, own_products):
    test, fault = CPP_FAULTS[name]
    result = run_with_fault(fault, test, tmp_path)
    crashed = result.returncode < 0
    assert crashed or result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.deep
def test_the_same_tests_are_green_with_the_sources_as_they_are(tmp_path, own_products):
    tests = list(dict.fromkeys(test for test, _ in CPP_FAULTS.values()))
    root = Path(__file__).parent
    first, *others = tests
    result = run_with_fault(CppFault("gemm.h", "#pragma once", "#pragma once"), first, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(root / test) for test in others)]
    assert subprocess.run(command, cwd=root.parent).returncode == 0
