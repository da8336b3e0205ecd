"""The tests of the backward's kernels can fail: every deliberate fault below is applied to a copy of the kernels and
must turn one of them red. If the code moves on, the fault has to follow, or this file is red itself."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import test_triton_backward as tests

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here", allow_module_level=True)
MODULES = (
    "plan_rows",
    "row_classes",
    "tails",
    "tail_weights",
    "pairs",
    "dlogits",
    "head_grad",
    "hidden_grad",
    "configs",
)


class Fault(NamedTuple):
    module: str
    old: str
    new: str


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
    "sort leaves runs as they are": (
        any_order,
        Fault(
            "numerics",
            "takes_larger = ((i_k & DISTANCE) != 0) != ((i_k & RUN) != 0)",
            "takes_larger = (i_k & DISTANCE) != 0",
        ),
    ),
    "expm1 by subtraction": (sure, Fault("numerics", "return 2.0 * t / (1.0 - t)", "return tl.exp(x) - 1.0")),
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
    "temperature of the heavy row lost": (mixed, Fault("tails", "slope_h /= tl.load(temperature + i_h)", "pass")),
    "dead rows among the tails": (too_few, Fault("tails", "is_heavy = possible & (", "is_heavy = (")),
    "no mass, no number": (
        no_mass,
        Fault("tails", "tl.where(mass_h > 0.0, 1.0 / (mass_h * slope_h), 0.0)", "1.0 / (mass_h * slope_h)"),
    ),
    "tails of dense rows": (states, Fault("tails", "other=0) == _SPARSE)", "other=0) != 0)")),
    "first part only": (states, Fault("tails", "i_p = part * T + i\n", "i_p = i\n")),
    "above the floor in the tail": (
        dense_rows,
        Fault("dlogits", ")[:, None])) & (is_target == 0)", ")[:, None]) + 99.0) & (is_target == 0)"),
    ),
    "target in the tail": (dense_rows, Fault("dlogits", " & (is_target == 0)\n", "\n")),
    "tail without its slope": (
        dense_rows,
        Fault("dlogits", "tl.exp(log_p - log_min_prob) * slope", "tl.exp(log_p - log_min_prob)"),
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


def apply(fault: Fault, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The tests' modules become those of a copy with the fault in it."""
    source = Path(importlib.import_module(tests.FOLDER).__file__).parent
    for path in source.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    changed = folder / f"{fault.module}.py"
    assert fault.old in changed.read_text(), f"{fault.old!r} is no longer in {changed.name}"
    changed.write_text(changed.read_text().replace(fault.old, fault.new))
    name = tests.FOLDER.rpartition(".")[0] + ".faulty_backward"
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    faulty = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    for module in MODULES:
        patch.setattr(tests, module, importlib.import_module(f"{name}.{module}"))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_turns_the_tests_red(name, monkeypatch, tmp_path):
    check, fault = FAULTS[name]
    apply(fault, monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check(monkeypatch)


@pytest.mark.parametrize("check", list(dict.fromkeys(check for check, _ in FAULTS.values())), ids=lambda c: c.__name__)
def test_the_same_checks_are_green_with_kernels_as_they_are(check, monkeypatch, tmp_path):
    apply(Fault("numerics", "tanh", "tanh"), monkeypatch, tmp_path)
    check(monkeypatch)
