"""The tests of the GPU engine's kernels can fail: every deliberate fault below is applied to a copy of the kernels and
must turn one of them red. If the code moves on, the fault has to follow, or this file is red itself. (Faults of the
kernels that every engine uses on a GPU are in test_faults.py.)"""

import importlib
import inspect

import pytest
import torch
from faulty_kernels import COPY, NO_FAULT, PACKAGE, faulty_kernels
from faulty_kernels import KernelFault as Fault

from covgrpo_kernels import kernels
from covgrpo_kernels.testing import random_head

pytest.importorskip("triton")
import test_token_terms
import test_triton_backward as tests
import test_triton_collect
import test_triton_forward

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here", allow_module_level=True)
F64 = torch.float64

# ----------------------------------------------------------------------------------------------- what finds the faults


def forward(**options):
    """Of a few rows, some of them ignored, and two splits; the last tile overhangs."""
    head = random_head(2, 19, 24, 70, std=3.0, bias=True)
    assert (head["targets"] < 0).any()
    test_triton_forward.close(head, F64, options, 2)


def plain(patch):
    forward()


def scaled(patch):
    forward(logit_scale=1.5)


def softcapped(patch):
    forward(softcap=4.0, logit_scale=1.5)


def temperatures(patch):
    forward(temperature="rows")


def unequal_splits(patch):
    """Three of five tiles."""
    test_triton_forward.close(random_head(2, 5, 8, 130), F64, {}, 3)


def pointers(patch):
    test_triton_forward.test_descriptors_and_pointers_load_the_same(torch.float32)


def extreme(patch):
    test_triton_forward.test_sure_tokens_keep_their_digits(15, torch.float32)


def equal_logits(patch):
    test_triton_forward.test_equal_logits_are_uniform(33)


def ignored(patch):
    head = test_triton_forward.whole_numbers(0, 20, 8, 40)
    skipped = head["targets"] < 0
    results = test_triton_forward.forward(**head)
    assert results.rows.tolist() == (~skipped).nonzero().squeeze(1).tolist()
    assert results.stats[:, skipped].count_nonzero() == 0


def outside(patch):
    test_triton_forward.test_targets_outside_of_the_vocabulary()


def peaks(patch):
    test_triton_forward.test_peaks(32, 16, 2, patch)


def logarithm(patch):
    test_triton_forward.test_logarithm(torch.float32)


def chunks(patch):
    test_triton_forward.test_chunks_change_no_bit(16, patch)


def far_weight(patch):
    test_triton_forward.test_offsets_beyond_32_bits(1)


def far_hidden(patch):
    test_triton_forward.test_hidden_states_beyond_32_bits()


def at_the_minimum(patch):
    """The minimum is the largest logit, which is its tile's peak."""
    head = test_triton_forward.whole_numbers(2, 20, 24, 100)
    z = test_triton_forward.logits(head["hidden"], head["weight"], head["bias"])
    least = z.amax(1)
    got = test_triton_collect.collect(**head, min_logits=least.float())
    assert got.vocab_ids == test_triton_collect.expected(z, least, head["targets"])


def exactly(patch):
    test_triton_collect.test_exactly_the_entries_that_reach_the_minimum(torch.float32, "all")


def some_rows(patch):
    head = test_triton_forward.whole_numbers(3, 10, 8, 70) | dict(bias=None)
    least = torch.full((10,), -90.0).masked_fill_(torch.arange(10) % 2 == 0, torch.inf)
    got = test_triton_collect.collect(**head, min_logits=least, room=128)
    assert got.found.tolist() == [70 * (i % 2 and y >= 0) for i, y in enumerate(head["targets"].tolist())]


def everything(patch):
    """All entries of three tiles with equal peaks: more tiles than are collected from, and as many."""
    head = test_triton_forward.whole_numbers(3, 10, 8, 70) | dict(bias=None)
    head["hidden"][:] = 0
    for max_tiles, found in ((2, 9), (3, 70)):
        got = test_triton_collect.collect(**head, min_logits=torch.full((10,), -torch.inf), max_tiles=max_tiles)
        assert got.found.tolist() == [found if y >= 0 else 0 for y in head["targets"].tolist()]
    assert got.floors.eq(-torch.inf).all(), "no row is flat"


def flat_rows(patch):
    """Two of five tiles are collected from: the floor rises until no more peaks reach it, and no further."""
    head = test_triton_forward.whole_numbers(3, 12, 24, 150)
    z = test_triton_forward.logits(head["hidden"], head["weight"], head["bias"])
    got = test_triton_collect.collect(**head, min_logits=torch.full((12,), -90.0), room=64, max_tiles=2)
    floors, complete = got.floors.double(), (got.found <= 64) & (head["targets"] >= 0)
    assert complete.sum() > 5
    pairs, ids = test_triton_collect.pairs, test_triton_collect.expected(z, floors, head["targets"])
    assert (pairs(z, floors, head["targets"]).sum(1) <= 2)[complete].all()
    assert (pairs(z, floors - 0.01, head["targets"]).sum(1) > 2)[complete].all()
    assert all(got.vocab_ids[r] == ids[r] for r in complete.nonzero().squeeze(1).tolist())


def largest(patch):
    test_triton_collect.test_the_largest_entries(2)


def terms(tokens=60, **settings):
    inputs = test_token_terms.draw(tokens, F64, optional=True)
    options = test_token_terms.TermOptions(**test_token_terms.PLAIN | settings)
    test_token_terms.check(*test_token_terms.both(inputs, options), F64)


def clipped(patch):
    terms(dual_clip=1.3)


def cispo(patch):
    terms(cispo=True, differentiate_weights=True)


def k1(patch):
    terms(beta=0.1, kl_estimator="k1")


def k2(patch):
    terms(beta=0.1, kl_estimator="k2")


def k3(patch):
    terms(beta=0.1)


def expm1_of_large_numbers(patch):
    inputs = test_token_terms.draw(20, F64, optional=True)
    inputs = inputs._replace(ref=inputs.logprobs + 50.0)
    options = test_token_terms.TermOptions(**test_token_terms.PLAIN | dict(beta=0.1))
    test_token_terms.check(*test_token_terms.both(inputs, options), F64)


def per_length(patch):
    terms(max_length=512)


def few(patch):
    """So few that the place of a quantile lies halfway between two tokens."""
    inputs = test_token_terms.draw(8, F64, optional=False)
    for valid in (2, 4):
        some = inputs._replace(valid=torch.arange(8) < valid)
        options = test_token_terms.TermOptions(**test_token_terms.PLAIN)
        test_token_terms.check(*test_token_terms.both(some, options), F64)


def any_order(patch):
    tests.test_candidates_come_in_any_order()


def sure(patch):
    tests.test_sure_tokens_keep_their_digits()


def plan(patch):
    tests.test_row_plan_equals_the_specification("all")


def bounds(patch):
    tests.test_bounds_are_bounds_and_close("entropy")


def anything(patch):
    tests.test_rows_without_a_gradient_may_hold_anything()


def classes(patch):
    for case in ("finite", "not finite"):
        tests.test_rows_are_classified_one_by_one(case, 0.3)


def equal_bounds(patch):
    tests.test_of_rows_with_equal_bounds_the_first_are_dropped()


def room(patch):
    tests.test_no_row_makes_room_for_all_others(2.0)


def in_order(patch):
    tests.test_pairs_are_in_order()


def mixed(patch):
    tests.test_every_row_uses_the_tails_most_like_its_own(torch.float16, 10.0, "all")


def nearest(patch):
    tests.test_every_row_uses_the_tails_most_like_its_own(torch.float16, None, "all")


def too_few(patch):
    tests.test_rows_that_cannot_be_sparse_are_no_tail_rows()


def weights(patch):
    tests.test_weights_of_tails(True)


def overflow(patch):
    tests.test_a_bound_that_overflows_shows_in_the_norm()


def no_mass(patch):
    tests.test_no_mass_in_a_tail()


def states(patch):
    tests.test_states_of_tails(torch.float16, patch)


def dense_rows(patch):
    tests.test_gradient_of_dense_rows_and_tails(settings="all", in_place=False)


def head(patch):
    tests.test_gradient_of_the_head(torch.float16, 150, 700)


def hidden(patch):
    tests.test_gradient_of_hidden_states(torch.float16)


FAULTS = {
    # The forward.
    "maximum kept in the sum of a tile": (
        extreme,
        Fault("numerics", "tl.where(at_max, 0.0, tl.exp(d))", "tl.exp(d) + 0.0"),
    ),
    "maximum kept in the sum of the splits": (
        extreme,
        Fault("forward", "tl.where(at_max, 0.0, w), 0) + ties", "w, 0)"),
    ),
    "ties lost between splits": (equal_logits, Fault("forward", ", 0) + ties, 0.0)", ", 0), 0.0)")),
    "logarithm by addition": (
        logarithm,
        Fault("numerics", "tl.log(total) * (x * inverse(tl.where(added == 0.0, 1.0, added)))", "tl.log(total)"),
    ),
    "bias of the first entry": (plain, Fault("forward", "tl.load(bias + i_s", "tl.load(bias + 0 * i_s")),
    "no softcap": (softcapped, Fault("numerics", "z = t * CAP", "z = x * SCALE")),
    "softcap of the logit without its scale": (
        softcapped,
        Fault("numerics", "tanh(x * (SCALE / CAP))", "tanh(x / CAP)"),
    ),
    "no scale": (scaled, Fault("numerics", "z = x * SCALE", "z = x * 1.0")),
    "temperature of the first token": (
        temperatures,
        Fault("forward", "tl.load(temperature + row", "tl.load(temperature + 0 * row"),
    ),
    "temperature by scored row": (
        temperatures,
        Fault("forward", "tl.load(temperature + row", "tl.load(temperature + i_r"),
    ),
    "target by scored row": (plain, Fault("forward", "tl.load(targets + row", "tl.load(targets + i_r")),
    "target of the first slice": (plain, Fault("forward", "(y >= o_s) & (y < o_s + B_S)", "(y >= 0) & (y < B_S)")),
    "target outside taken for an entry": (
        outside,
        Fault("forward", "(y >= 0) & (y < vocab), y, -1)", "y >= 0, y, -1)"),
    ),
    "ignored rows scored": (ignored, Fault("select_rows", "!= ignore_index", "!= ignore_index - 1")),
    "numbers of ignored rows": (ignored, Fault("forward", "tl.where(m_r, log_sum, 0.0)", "log_sum + 1.0")),
    "entropy without the maximum": (plain, Fault("forward", "gap * (sb + 1.0)", "gap * sb")),
    "entropy of a tile not moved": (plain, Fault("numerics", "w * (u + gap * s)", "w * u")),
    "entropy of the lesser maximum lost": (
        plain,
        Fault("numerics", " + lesser * tl.maximum(gap, gap_b)\n", "\n"),
    ),
    "running sum not rescaled": (plain, Fault("numerics", "return top, w * s +", "return top, s +")),
    "overhang of the last tile counted": (plain, Fault("forward", 'tl.where(m_s[None, :], z, float("-inf"))', "z")),
    "overhang of the depth counted": (
        pointers,
        Fault("forward", "m_d = (i_d < depth)[None, :]", "m_d = (i_d < depth + 8)[None, :]"),
    ),
    "units left over lost": (
        unequal_splits,
        Fault(
            "forward", "end_unit = first_unit + units // splits + (", "end_unit = first_unit + units // splits + 0 * ("
        ),
    ),
    "split of the group beside": (plain, Fault("forward", "in_group // group\n", "0 * in_group\n")),
    "chunk of the first rows": (chunks, Fault("forward", "tl.load(rows + first + i_r", "tl.load(rows + i_r")),
    "chunk at the wrong place": (chunks, Fault("forward", "i_r = i_p - first", "i_r = i_p")),
    "peak rounded to the nearest": (
        peaks,
        Fault(
            "numerics", "tl.where(bits < 0, bits, bits + 0xFFFF) >> 16", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16"
        ),
    ),
    "peak cut off": (peaks, Fault("numerics", "tl.where(bits < 0, bits, bits + 0xFFFF) >> 16", "bits >> 16")),
    "peak of the last tile alone": (peaks, Fault("forward", "peak = tl.maximum(peak, largest)", "peak = largest")),
    "peak never begun anew": (peaks, Fault("forward", 'tl.where(last, float("-inf"), peak)', "peak")),
    "32-bit offset of the head": (
        far_weight,
        Fault("forward", "tl.arange(0, x.shape[1])).to(tl.int64)", "tl.arange(0, x.shape[1]))"),
    ),
    "32-bit offset of hidden states": (far_hidden, Fault("select_rows", "other=0).to(tl.int64)", "other=0)")),
    # The candidates.
    "at the minimum is below it": (at_the_minimum, Fault("collect", "(z >= limit[:, None])", "(z > limit[:, None])")),
    "tile at the minimum left out": (
        at_the_minimum,
        Fault("collect", "peak >= tl.load(limits", "peak > tl.load(limits"),
    ),
    "coefficient of the entropy does not count": (
        exactly,
        Fault("collect", "has_grad | (tl.load(entropy_grad", "has_grad & (tl.load(entropy_grad"),
    ),
    "rows without a coefficient are collected": (
        some_rows,
        Fault("collect", 'limit = tl.where(has_grad, limit, float("inf"))', "pass"),
    ),
    "probability of the sum of the row": (exactly, Fault("collect", "(log_sum + log_", "(0 * log_sum + log_")),
    "floor of the first token": (exactly, Fault("collect", "tl.load(limits + row", "tl.load(limits + 0 * row")),
    "bias of the first entry of the tile": (exactly, Fault("collect", "tl.load(bias + i_s", "tl.load(bias + 0 * i_s")),
    "temperature of the first token of all": (
        exactly,
        Fault("collect", "tl.load(temperature + row", "tl.load(temperature + 0 * row"),
    ),
    "slices numbered from the tile": (exactly, Fault("collect", "o_v + i * B_S + tl.arange", "o_v + tl.arange")),
    "overhang of the last tile collected": (everything, Fault("collect", " & m_s[None, :]", "")),
    "tiles beyond the last reach the minimum": (
        everything,
        Fault("collect", "((peak >= limit[None, :]) & m_b)", "((peak >= limit[None, :]) & wanted[None, :])"),
    ),
    "rows in too many tiles are complete": (everything, Fault("collect", "tl.where(too_many, ROOM + 1, 0)", "0 * i_n")),
    "floor of a flat row not raised": (flat_rows, Fault("collect", "limit = tl.where(is_flat, high, limit)", "pass")),
    "floor of a flat row too high": (flat_rows, Fault("collect", "range(_HALVINGS)", "range(1)")),
    "places for tokens in the lists": (
        exactly,
        Fault("collect", "row = tl.load(rows + i_r, mask=hit, other=0)", "row = i_r"),
    ),
    "first item of a tile again": (exactly, Fault("collect", "first_pair + (item - first_item) * B_R", "first_pair")),
    "items of the tile beside": (exactly, Fault("collect", "(all_ends <= item)", "(all_ends < item)")),
    "equal logits cut in two": (largest, Fault("collect", "(rank > next_largest", "(rank >= next_largest")),
    "negative logits in reverse": (
        largest,
        Fault("collect", "return bits ^ ((bits >> 31) & 0x7FFFFFFF)", "return bits"),
    ),
    "rows that lost entries are complete": (
        largest,
        Fault("collect", "tl.where(n_found <= ROOM, count, K + 1)", "count"),
    ),
    "floor of the largest that goes": (largest, Fault("collect", "(smallest - above) * 0.5", "0.0")),
    # The terms of a token.
    "no lower bound": (clipped, Fault("token_terms", "(within < OPTIONS.ratio_low)", "(within < 0.0)")),
    "no upper bound": (clipped, Fault("token_terms", "(within > OPTIONS.ratio_high)", "(within < 0.0)")),
    "no dual clip": (clipped, Fault("token_terms", "(slope > OPTIONS.dual_clip)", "(slope < 0.0)")),
    "gradient where the dual clip holds": (
        clipped,
        Fault("token_terms", "held = clipped | dual_clipped", "held = clipped"),
    ),
    "no bound of CISPO": (cispo, Fault("token_terms", "(policy_ratio > OPTIONS.ratio_high", "(policy_ratio < 0.0")),
    "CISPO's gradient through the ratio": (
        cispo,
        Fault("token_terms", "-slope * a, -slope * policy_x", "-slope * a * x, -slope * policy_x"),
    ),
    "k1 of the other sign": (k1, Fault("token_terms", "kl, kl_grad = -d, tl.full", "kl, kl_grad = d, tl.full")),
    "no gradient of k1": (k1, Fault("token_terms", "tl.full(d.shape, 1.0, d.dtype)", "tl.full(d.shape, 0.0, d.dtype)")),
    "k2 not halved": (k2, Fault("token_terms", "d * d * 0.5", "d * d")),
    "k2's gradient of the other sign": (k2, Fault("token_terms", "0.5, -d", "0.5, d")),
    "k3 without its linear term": (k3, Fault("token_terms", "kl = -kl_grad - d", "kl = -kl_grad")),
    "k3's gradient is exp": (k3, Fault("token_terms", "kl_grad = -expm1(d)", "kl_grad = -tl.exp(d)")),
    "expm1 of large numbers by tanh": (
        expm1_of_large_numbers,
        Fault("numerics", "tl.where(x > 1.0, tl.exp(x) - 1.0, 2.0 * t / (1.0 - t))", "2.0 * t / (1.0 - t)"),
    ),
    "total lost": (k1, Fault("token_terms", "1.0 / tl.load(inputs.total).to(tl.float64)", "1.0")),
    "longest completion lost": (per_length, Fault("token_terms", "share /= OPTIONS.max_length", "pass")),
    "length of the first sequence": (k1, Fault("token_terms", "inputs.lengths + i_s", "inputs.lengths + 0 * i_s")),
    "quantile of the odd place": (
        few,
        Fault("token_terms", "nearest - place == 0.5) & is_odd", "nearest - place == 0.5) & (is_odd == 0)"),
    ),
    "quantile of the place before": (
        clipped,
        Fault("token_terms", "tl.maximum(n - 1.0, 0.0) * q", "tl.maximum(n - 2.0, 0.0) * q"),
    ),
    # The backward.
    "sort leaves runs as they are": (
        any_order,
        Fault(
            "numerics",
            "takes_larger = ((i_k & DISTANCE) != 0) != ((i_k & RUN) != 0)",
            "takes_larger = (i_k & DISTANCE) != 0",
        ),
    ),
    "expm1 by subtraction": (
        sure,
        Fault("numerics", "tl.exp(x) - 1.0, 2.0 * t / (1.0 - t))", "tl.exp(x) - 1.0, tl.exp(x) - 1.0)"),
    ),
    "16 bits of a coefficient": (
        states,
        Fault("numerics", "acc = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc)", "pass"),
    ),
    "target twice": (plan, Fault("plan_rows", "m_k = m_k & (v != y[:, None])", "pass")),
    "lost candidates not noticed": (plan, Fault("plan_rows", "complete = n_found <= K", "complete = n_found >= 0")),
    "entropy lost in a value": (plan, Fault("plan_rows", "(log_p + h[:, None])", "log_p")),
    "softcap lost in a value": (
        plan,
        Fault("plan_rows", "values *= 1.0 - (z * per_cap[:, None]) * (z * per_cap[:, None])", "values *= 1.0"),
    ),
    "softcap lost at the target": (
        plan,
        Fault("plan_rows", "target_value *= 1.0 - capped * capped", "target_value *= 1.0"),
    ),
    "tail without the target": (plan, Fault("plan_rows", ", 1) + at_target) * slope", ", 1)) * slope")),
    "mass not rounded up": (plan, Fault("plan_rows", " + _MASS_ERROR * not_p", "")),
    "bound of the entropy lost": (bounds, Fault("plan_rows", "upper += _SQRT_2 * tl.abs(e) * h", "pass")),
    "bound of the tail without the entropy": (
        bounds,
        Fault("plan_rows", "largest += tl.abs(e) * (h - log_floor)", "pass"),
    ),
    "norm in float32": (
        sure,
        Fault(
            "plan_rows",
            "norm = target_value.to(tl.float64) * target_value.to(tl.float64)",
            "norm = (target_value * target_value).to(tl.float64)",
        ),
    ),
    "not finite is sparse": (
        anything,
        Fault("plan_rows", "possible = live & complete & finite", "possible = live & complete"),
    ),
    "dead rows count": (anything, Fault("plan_rows", "tl.where(live, norm, 0.0)", "norm")),
    "an infinite norm has room for all": (
        classes,
        Fault("numerics", "total_b += tl.where(is_finite, x, 0.0)", "total_b += x"),
    ),
    "bound hides what is not finite": (
        classes,
        Fault("numerics", "n_bad_b += (m_r & (is_finite == 0)).to(tl.int32)", "pass"),
    ),
    "prefix sum of one block": (classes, Fault("row_classes", "        before += tl.sum(x, 0)\n", "")),
    "ties all within": (equal_bounds, Fault("row_classes", " & (i_r <= last_row)", "")),
    "tail rows listed twice": (
        classes,
        Fault("row_classes", "(is_dense & ((k != _TAIL_ROW) | (n_sparse == 0)))", "is_dense"),
    ),
    "target's pair not counted": (
        classes,
        Fault("row_classes", "mask=m_r, other=0) + 1, 0)", "mask=m_r, other=0), 0)"),
    ),
    "target's pair lost": (in_order, Fault("pairs", "last = first + n_kept", "last = first")),
    "rows not in the order of ids": (in_order, Fault("pairs", "tl.load(rows + at,", "tl.load(rows + i_p,")),
    "block ends one id late": (in_order, Fault("pairs", "< i_p * PAIR_BLOCK)", "<= i_p * PAIR_BLOCK)")),
    "coefficients of tails in full": (
        weights,
        Fault("tail_weights", "tl.where(square > most, tl.sqrt", "tl.where(square < 0.0, tl.sqrt"),
    ),
    "entropy's coefficients without a weight": (weights, Fault("tail_weights", "size += tl.abs(", "size += 0.0 * (")),
    "overflow hidden": (
        overflow,
        Fault("plan_rows", 'norm = tl.where(bound < float("inf"), norm, float("inf"))', "pass"),
    ),
    "floor of another row": (
        bounds,
        Fault("plan_rows", "tl.load(min_logits + i_r, mask", "tl.load(min_logits + 0 * i_r, mask"),
    ),
    "floor of another heavy row": (
        mixed,
        Fault("tails", "tl.exp(tl.load(log_floor + i_h))", "tl.exp(tl.load(log_floor + 0 * i_h))"),
    ),
    "least similar tail": (nearest, Fault("tails", "tl.argmax(cosine, 1)", "tl.argmax(-cosine, 1)")),
    "shares of the first tail's mass": (
        mixed,
        Fault("tails", "mass_h = tl.load(mass + i_h)", "mass_h = tl.load(mass + tl.load(tail_rows + 0 * i_h))"),
    ),
    "mix of products, not of cosines": (mixed, Fault("tails", "* length[:, None] * length_h[None, :]", "")),
    "mean of the heavy rows left in": (
        mixed,
        Fault("tails", "(products - with_mean[:, None] - mean_h[None, :] + mean_square)", "products"),
    ),
    "bound of the best tail": (mixed, Fault("tails", "largest = tl.sum(mix *", "largest = tl.min(1.0 *")),
    "largest row counts in full": (room, Fault("numerics", "(x > counted * limit)", "(x > 2.0 * counted)")),
    "one step of Newton": (
        room,
        Fault("numerics", "            n_before = n_over\n", "            n_before = n_over + 100000\n"),
    ),
    "dead rows among the tails": (too_few, Fault("tails", "is_heavy = possible & (", "is_heavy = (")),
    "no mass, no number": (
        no_mass,
        Fault("tails", "tl.where(mass_h > 0.0, 1.0 / mass_h, 0.0)", "1.0 / mass_h"),
    ),
    "tails of dense rows": (states, Fault("tails", "other=0) == _SPARSE)", "other=0) != 0)")),
    "first part only": (states, Fault("tails", "i_p = part * T + i\n", "i_p = i\n")),
    "above the floor in the tail": (
        dense_rows,
        Fault("dlogits", ")[:, None])) & (is_target == 0)", ")[:, None]) + 99.0) & (is_target == 0)"),
    ),
    "target in the tail": (dense_rows, Fault("dlogits", " & (is_target == 0)\n", "\n")),
    "tail without the slope of the softcap": (dense_rows, Fault("dlogits", "if CAP is not None:", "if False:")),
    "tail with the slope of the temperature": (
        dense_rows,
        Fault("dlogits", "slope / (per_temperature * SCALE)", "slope / SCALE"),
    ),
    "row of the tile, not of all": (
        dense_rows,
        Fault("dlogits", "if rows is not None else i_o", "* 0 + i_o if rows is not None else i_o"),
    ),
    "tails count once in the bias": (
        head,
        Fault("head_grad", "terms *= tl.load(bias_factors + i_k, mask=i_k < T, other=1.0)[:, None]", "pass"),
    ),
    "pairs not in the bias": (head, Fault("head_grad", "total_bias += tl.sum(a, 1)", "pass")),
    "pairs of the first slice": (head, Fault("head_grad", "other=-1) - first", "other=-1)")),
    "scale lost": (head, Fault("head_grad", "total *= factor\n", "total *= 1.0\n")),
    "last pair lost": (head, Fault("head_grad", "m_k = i_k < end", "m_k = i_k < end - 1")),
    "dropped rows not written": (
        hidden,
        Fault("hidden_grad", "mask=m_r[:, None] & m_d)\n", "mask=(what > 0)[:, None] & m_d)\n"),
    ),
    "tail of the first heavy row": (
        hidden,
        Fault("hidden_grad", "tl.load(products + k * depth", "tl.load(products + 0 * depth"),
    ),
    "tail not multiplied back": (hidden, Fault("hidden_grad", "other=0.0) * min_prob", "other=0.0)")),
    "entry of the first place": (hidden, Fault("hidden_grad", "vocab_ids + i_r * K + k", "vocab_ids + i_r * K")),
    "dense row of another place": (hidden, Fault("hidden_grad", "at[:, None] * depth", "(at[:, None] + 1) * depth")),
}


def apply(fault, patch, folder):
    """The modules of the tests become those of a copy with the fault in it, cut small as the tests cut them."""
    faulty = faulty_kernels(fault, folder)
    patch.setenv(kernels.VARIABLE, "triton")
    patch.setattr(kernels, "_import", lambda name: faulty)
    for module in (tests, test_triton_forward, test_triton_collect):
        for name, value in list(vars(module).items()):
            if inspect.ismodule(value) and value.__name__.startswith(f"{PACKAGE}."):
                patch.setattr(module, name, importlib.import_module(COPY + value.__name__.removeprefix(PACKAGE)))
    test_token_terms.use_small_blocks(patch)
    test_triton_collect.use_small_blocks(patch)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_turns_the_tests_red(name, monkeypatch, tmp_path):
    check, fault = FAULTS[name]
    apply(fault, monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check(monkeypatch)


@pytest.mark.parametrize("check", list(dict.fromkeys(check for check, _ in FAULTS.values())), ids=lambda c: c.__name__)
def test_the_same_checks_are_green_with_kernels_as_they_are(check, monkeypatch, tmp_path):
    apply(NO_FAULT, monkeypatch, tmp_path)
    check(monkeypatch)
