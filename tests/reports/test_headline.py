"""The first screen of a report: its numbers, and the rules of its colours."""

from __future__ import annotations

import pytest

from orthogonalize.evals.metrics import Loss, Paired, Rate
from orthogonalize.reports.pages.headline import headline, page_title
from orthogonalize.reports.schema import Behaviours, Losses, Measures, Refusals, Report

LOW = Rate(value=0.02, n=100, ci95=(0.0, 0.07))


def report(left: Rate, *, p: float = 1e-9, cost: float = 0.01, **more) -> Report:
    """A report whose behaviour fell from 90% to `left`, with the loss's interval ending at `cost`."""
    before = Rate(value=0.9, n=100, ci95=(0.83, 0.95))
    loss = Loss(value=0.5, n=50, ci95=(0.4, 0.6), tokens=100, perplexity=1.65)
    refusals = Refusals(target=LOW, harmless=LOW)
    return Report(
        **{"engine": "hf", "engine_version": "x", "base_model": "some/base", "checkpoint": "edited", "edit": None,
           "max_new_tokens": 8, "sensitive": False, "concept": "lists", "answers": []} | more,
        base=Measures(behaviour=Behaviours(target=before, harmless=LOW), refusal=refusals,
                      loss=Losses(own_completions=loss)),
        edited=Measures(behaviour=Behaviours(target=left, harmless=LOW), refusal=refusals,
                        loss=Losses(own_completions=loss)),
        paired={"behaviour.target": Paired(difference=left.value - 0.9, n=100, p=p),
                "behaviour.harmless": Paired(difference=0.0, n=100, p=1.0),
                "loss.own_completions": Paired(difference=cost - 0.005, n=50, ci95=(cost - 0.01, cost))},
    )  # fmt: skip


def rate(value: float, high: float) -> Rate:
    return Rate(value=value, n=100, ci95=(0.0, high))


@pytest.mark.parametrize(
    ("left", "p", "grade"),
    [
        (rate(0.01, 0.05), 1e-9, "good"),
        (rate(0.05, 0.11), 1e-9, "fair"),
        (rate(0.4, 0.51), 1e-3, "poor"),
        (rate(0.85, 0.9), 0.4, "poor"),
    ],
)
def test_what_is_left_is_graded_by_the_intervals_upper_end(left, p, grade):
    tile = headline(report(left, p=p))[0]
    assert (tile.grade, tile.label) == (grade, "lists left on target prompts")
    assert tile.number == f"{100 * left.value:.1f}%"
    assert "base 90.0%, n = 100" in tile.detail


@pytest.mark.parametrize(("cost", "grade"), [(0.02, "good"), (0.05, "fair"), (0.051, "poor")])
def test_cost_is_graded_by_the_intervals_upper_end(cost, grade):
    assert headline(report(LOW, cost=cost))[-1].grade == grade


def test_kept_share_of_a_preserved_set_is_graded_by_its_value():
    for value, grade in ((0.95, "good"), (0.94, "fair"), (0.79, "poor")):
        kept = {"behaviour.sets.other": rate(value, 1.0), "refusal.sets.other": rate(0.1, 0.2)}
        tiles = [tile for tile in headline(report(LOW, kept=kept)) if "kept on" in tile.label]
        assert [tile.grade for tile in tiles] == [grade], "the run's own measure alone counts"


def test_behaviour_that_rose_or_an_unfair_comparison_has_no_colour():
    assert headline(report(rate(0.99, 1.0)))[0].grade == "none"
    assert {tile.grade for tile in headline(report(LOW, mismatches=["another base"]))} == {"none"}


def test_a_folder_called_after_the_command_is_no_name():
    assert page_title(report(LOW)) == "some/base, edited"
    assert page_title(report(LOW, checkpoint="me/mild")) == "me/mild"
