"""Objectives of edits: monotone, and ordered so that none can hide the others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonalize.edits.config import EditConfig
from orthogonalize.selection.search.objectives import (
    LEFT,
    Trial,
    best,
    drifts_more,
    pareto_front,
    share_flipped,
    share_left,
    shortlist,
)

SCORES = st.lists(st.floats(-20, 20), min_size=1, max_size=30)
NAN = float("nan")


def trial(left: float, kl: float | list[float], first_kl: float = 0.0, **others) -> Trial:
    """A trial with these objectives; `kl` may be given by prompt."""
    kls = kl if isinstance(kl, list) else [kl] * 8
    mean = sum(kls) / len(kls)
    choice = EditConfig(method="ablate", strength=1.0)
    return Trial(
        choice=choice, left=left, score=0.0, kl=mean, first_kl=first_kl, ce_increase=0.0, kls={"": kls}, **others
    )


@settings(deadline=None)
@given(SCORES)
def test_share_left_is_never_below_the_observed_share(scores):
    found = share_left(torch.tensor(scores, dtype=torch.float64))
    assert sum(s > 0 for s in scores) / len(scores) <= found <= 1


def test_scores_just_below_zero_do_not_count_as_removed():
    assert share_left(torch.tensor([-0.5, -3.0, -1.0, -2.0])) > 0.01
    assert share_left(torch.tensor([-9.0, -8.0, -7.0, -8.5])) < 1e-6


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(0, 20)), min_size=1, max_size=30))
def test_lower_scores_never_raise_the_share_left(pairs):
    scores = torch.tensor([score for score, _ in pairs], dtype=torch.float64)
    lowered = scores - torch.tensor([drop for _, drop in pairs], dtype=torch.float64)
    assert share_left(lowered) <= share_left(scores)


def test_spread_on_the_safe_side_is_not_behaviour():
    near, far = [-4.0, -4.2, -3.8, -4.1] * 4, [-16.0, -16.1, -15.9, -16.2] * 4
    assert share_left(torch.tensor(near + far)) < LEFT
    assert share_left(torch.tensor(near + [s - 2 for s in far])) <= share_left(torch.tensor(near + far))


def test_share_left_is_larger_for_fewer_prompts():
    assert share_left(torch.full((3,), -2.5)) > share_left(torch.full((100,), -2.5)) > 0


def test_broken_outputs_count_as_all_of_the_behaviour():
    assert share_left(torch.tensor([NAN, NAN])) == 1
    assert share_left(torch.tensor([NAN, -9.0])) >= 0.5


def test_a_tiny_gain_of_behaviour_does_not_buy_an_enormous_kl():
    """Neither above the threshold nor across it."""
    mild = trial(0.012, 0.01)
    for left in (0.0110, 0.0099):
        wild = trial(left, 3.0)
        assert mild.cost < wild.cost
        assert best([wild, mild]) is mild


def test_edits_that_remove_the_behaviour_are_ordered_by_kl_alone():
    assert trial(0.009, 0.1).cost < trial(0.0, 0.2).cost
    assert trial(0.0, 0.1).cost == trial(LEFT, 0.1).cost


def test_doing_nothing_is_not_a_good_edit():
    assert trial(0.0, 0.5).cost < trial(0.9, 0.0).cost
    assert trial(0.02, 0.05).cost < trial(0.5, 0.01).cost


def test_preserved_sets_count_as_much_as_the_negative_prompts():
    spares, harms = trial(0.0, 0.03, preserved={"other": 0.01}), trial(0.0, 0.02, preserved={"other": 0.5})
    assert spares.cost == pytest.approx(0.02)
    assert spares.cost < harms.cost


def test_what_is_not_a_number_is_never_the_best():
    broken = trial(0.0, [NAN] * 8)
    assert best([broken, trial(0.5, 1.0)]) is not broken
    assert broken.cost == math.inf
    assert pareto_front([broken, trial(0.0, 1.0)]) == [trial(0.0, 1.0)]


def test_pareto_front_holds_what_no_other_edit_beats():
    a, b, c = trial(0.0, 0.5), trial(0.1, 0.1), trial(0.2, 0.2)
    assert pareto_front([a, b, c]) == [a, b]
    first_token = trial(0.1, 0.2, first_kl=-1.0)
    assert pareto_front([a, b, c, first_token]) == [a, b, first_token]
    kept = trial(0.1, 0.3, preserved={"other": 0.0})
    lost = trial(0.1, 0.2, preserved={"other": 0.1})
    assert pareto_front([kept, lost]) == [kept, lost]
    assert pareto_front([a, a]) == [a, a], "equals do not beat each other"


def test_shortlist_begins_with_the_best_even_off_the_front():
    a, b, c = trial(0.0, 0.5), trial(0.1, 0.1), trial(0.2, 0.2)
    assert shortlist([c, a, b]) == [c, a, b]
    assert shortlist([a, c, b]) == [a, b]
    assert shortlist([]) == []


def test_kl_is_compared_prompt_by_prompt():
    low = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3]
    shifted = [x + 0.01 + 0.001 * i for i, x in enumerate(low)]
    noisy = [0.5, 0.1, 0.9, 0.3, 0.2, 0.5]
    assert drifts_more({"": shifted}, {"": low}), "a small difference that every prompt shows is real"
    assert not drifts_more({"": noisy}, {"": low}), "a larger one that prompts disagree about is not"
    assert not drifts_more({"": low}, {"": low})
    assert not drifts_more({"": low}, {"": shifted})
    assert drifts_more({"": [0.2]}, {"": [0.1]}), "one prompt gives no interval"
    assert drifts_more({"": [NAN, 1.0]}, {"": [0.1, 1.0]})


def test_every_set_of_prompts_is_compared():
    low, noisy, high = [0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.4, 0.31], [1.1, 1.2, 1.3, 1.41]
    assert not drifts_more({"": noisy, "other": low}, {"": low, "other": low})
    assert drifts_more({"": noisy, "other": high}, {"": low, "other": low})


def test_no_less_is_asked_than_negative_prompts_show():
    """Answers to these may begin with the behaviour's tokens, too; going below that would cost for nothing."""
    gentle, strong = trial(0.03, [0.1, 0.2], usual=0.04), trial(0.001, [0.4, 0.5], usual=0.04)
    assert gentle.cost == gentle.kl
    assert best([gentle, strong]) is gentle
    assert trial(0.05, [0.1, 0.2], usual=0.04).excess == pytest.approx(0.01)
    assert trial(0.03, [0.1, 0.2], usual=0.0).excess == pytest.approx(0.02)


def test_among_edits_tied_in_kl_the_one_that_leaves_less_is_best():
    low, noisy = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3], [0.5, 0.1, 0.9, 0.3, 0.2, 0.5]
    cheapest, tied = trial(0.015, low), trial(0.001, noisy)
    assert cheapest.kl < tied.kl
    assert best([cheapest, tied]) is tied
    really = trial(0.001, [x + 0.02 for x in low])
    assert best([cheapest, really]) is cheapest
    dominated = trial(0.001, noisy, first_kl=1.0)
    assert best([cheapest, dominated, tied]) is tied


def test_one_wild_prompt_does_not_make_a_tie():
    """The interval of its difference includes 0, but the mean is many times as large."""
    calm, wild = trial(0.009, [0.01] * 8), trial(0.0, [0.01] * 7 + [9.0])
    assert not drifts_more(wild.kls, calm.kls)
    assert best([calm, wild]) is calm


@settings(deadline=None)
@given(SCORES, st.integers(0, 1000))
def test_share_flipped_is_never_below_the_observed_share(scores, seed):
    base = torch.tensor(scores, dtype=torch.float64)
    edited = base[torch.randperm(len(base), generator=torch.Generator().manual_seed(seed))]
    observed = sum((a > 0) != (b > 0) for a, b in zip(base.tolist(), edited.tolist(), strict=True)) / len(scores)
    assert observed <= share_flipped(base, edited) <= 1
    assert share_flipped(base, base) == 0.0


def test_behaviour_that_fades_on_a_preserved_set_counts_before_it_is_gone():
    base = torch.full((8,), 9.0)
    faded = [share_flipped(base, base - drop) for drop in (0.0, 4.0, 8.0, 12.0)]
    assert faded == sorted(faded)
    assert faded[0] < LEFT < faded[2] < faded[3]


def test_an_edit_that_takes_preserved_behaviour_loses_to_a_stronger_one():
    """At the same behaviour left, a tenth of the preserved refusals weighs more than twice the KL."""
    sharp = trial(0.0, 0.002, preserved={"kept": 0.002}, flipped={"kept": 0.1})
    mild = trial(0.0, 0.004, preserved={"kept": 0.004}, flipped={"kept": 0.0})
    assert best([sharp, mild]) is mild
    assert len(pareto_front([sharp, mild])) == 2
    assert trial(0.0, 0.1, preserved={"kept": 0.3}, flipped={"kept": 0.5}).drift == pytest.approx(0.2)
