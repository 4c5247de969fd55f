"""Intervals, paired tests and the shape of a report, against independent computations."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import chi2, ttest_1samp

from orthogonalize.core.errors import ran_out_of_memory
from orthogonalize.evals.intervals import (
    compared_increase,
    compared_means,
    mcnemar,
    paired_permutation,
    proportion_interval,
    share_difference_interval,
)
from orthogonalize.evals.metrics import (
    Divergence,
    Loss,
    Paired,
    Rate,
    Score,
    Series,
    compare,
    nested,
    same_kind,
    yes_no_series,
)
from orthogonalize.reports.findings import findings
from orthogonalize.reports.schema import Measures, Report, compare_all
from orthogonalize.reports.tables import summary_rows


@given(st.integers(1, 200), st.data())
def test_wilson_interval_matches_the_formula(n, data):
    """Against the formula in Wilson (1927)."""
    count = data.draw(st.integers(0, n))
    z, p = 1.959963984540054, count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = proportion_interval(count, n)
    assert low == pytest.approx(centre - half, abs=1e-9)
    assert high == pytest.approx(centre + half, abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_equals_the_chi_squared_test(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    expected = chi2.sf((lost - gained) ** 2 / (lost + gained), 1) if lost + gained else 1.0
    assert mcnemar(before, after) == pytest.approx(expected)


@pytest.mark.parametrize("n", [7, 12, 41])
def test_interval_and_test_of_shares_agree_for_every_table(n):
    """An interval that leaves out zero beside p = 0.12 (or the other way round) contradicts itself."""
    decided = set()
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            found = compare(*map(yes_no_series, table(0, gained, lost, n - gained - lost)))
            leaves_out_zero = found.ci95[0] > 0 or found.ci95[1] < 0
            assert leaves_out_zero == (found.p < 0.05), (gained, lost, found)
            decided.add(leaves_out_zero)
    assert decided == {True, False}


@settings(deadline=None, max_examples=60)
@given(st.integers(6, 40), st.floats(-1.2, 1.2), st.booleans(), st.integers(0, 10**6))
def test_interval_and_test_of_means_and_losses_agree(n, shift, whole, seed):
    """On data of few distinct values, too, where many resamples are exactly zero."""
    rng = np.random.default_rng(seed)
    base = rng.exponential(2, n)
    steps = rng.normal(shift * 2 / math.sqrt(n), 1, n)
    edited = base + (np.round(steps) if whole else steps)
    for compared in (compared_means, compared_increase):
        found = compared(list(base), list(edited))
        low, high = found.ci95
        assert (low > 0 or high < 0) == (found.p < 0.05)
        assert 0 < found.p <= 1


def test_bootstrap_p_is_about_that_of_the_t_test():
    rng = np.random.default_rng(1)
    for shift in (0.1, 0.3, 0.5):
        differences = rng.normal(shift, 1, 40)
        found = compared_means([0.0] * 40, list(differences))
        assert found.p == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.03)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=7))
def test_permutation_test_is_exact_for_few_pairs(pairs):
    before, after = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    differences = np.array(after) - np.array(before)
    if not differences.any():
        assert paired_permutation(before, after) == 1.0
        return
    sums = [float((np.array(s) * differences).sum()) for s in itertools.product((1, -1), repeat=len(pairs))]
    observed = float(differences.sum())
    up, down = sum(s >= observed - 1e-9 for s in sums), sum(s <= observed + 1e-9 for s in sums)
    expected = min(1.0, 2 * min(up, down) / len(sums))
    assert paired_permutation(before, after) == pytest.approx(expected)


def test_paired_interval_has_about_nominal_coverage():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(120):
        before = rng.random(60) < 0.5
        after = np.where(rng.random(60) < 0.3, rng.random(60) < 0.9, before)
        low, high = compared_means(list(before.astype(float)), list(after.astype(float))).ci95
        inside += low <= 0.3 * (0.9 - 0.5) <= high
    assert inside / 120 >= 0.88


def table(kept: int, gained: int, lost: int, never: int) -> tuple[list[bool], list[bool]]:
    """Paired yes/no values of items with yes in both, only after, only before, and in neither."""
    before = [True] * kept + [False] * gained + [True] * lost + [False] * never
    return before, [True] * (kept + gained) + [False] * (lost + never)


def score(n: int, gained: int, lost: int, difference: float) -> float:
    """Standardised distance of the counts from `difference`, under the likeliest shares with that difference."""
    counts = np.array([gained, lost, n - gained - lost])

    def unlikely(share: float) -> float:
        shares_of = np.clip([share + difference, share, 1 - 2 * share - difference], 1e-300, 1)
        return -float((counts * np.log(shares_of)).sum())

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    share = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * share + difference - difference**2))


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_share_difference_interval_inverts_the_score_test(n, data):
    """Tango (1998), against the likelihood maximised numerically."""
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    low, high = share_difference_interval(*table(0, gained, lost, n - gained - lost))
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    for end, z in ((low, 1.959964), (high, -1.959964)):
        if abs(end) < 1 - 1e-6:
            assert score(n, gained, lost, end) == pytest.approx(z, abs=1e-3)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0.0, 0.02, 100), (0.05, 0.9, 20), (0.3, 0.2, 40)])
def test_share_difference_interval_covers_near_the_extremes(gained, lost, n):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        drawn = rng.random(n)
        more, less = int((drawn < gained).sum()), int(((drawn >= gained) & (drawn < gained + lost)).sum())
        low, high = share_difference_interval(*table(0, more, less, n - more - less))
        inside += low <= gained - lost <= high
    assert inside / 400 >= 0.93


def test_interval_is_not_degenerate_when_all_or_none_changed():
    nobody, everybody = table(0, 0, 0, 100), table(0, 0, 5, 0)
    assert share_difference_interval(*nobody) == pytest.approx((-0.037, 0.037), abs=1e-3)
    assert share_difference_interval(*everybody) == pytest.approx((-1, -0.131), abs=1e-3)


@pytest.mark.parametrize("kind", ["share", "loss", "divergence", "score"])
def test_single_item_is_compared_without_significance(kind):
    base, edited = (Series(kind=kind, values=[v], tokens=[3]) for v in (0.0, 1.0))
    found = compare(base, edited)
    assert found.n == 1
    assert found.p is None or found.p > 0.3
    assert base.measure().n == 1


def test_report_with_zero_base_loss_round_trips():
    for losses in ([0.0, 0.0, 0.0, 0.5], [0.0] * 4):
        base = {"loss.pile": Series(kind="loss", values=losses, tokens=[3] * 4)}
        edited = {"loss.pile": Series(kind="loss", values=[0.0, 0.1, 0.0, 0.6], tokens=[3] * 4)}
        found = report_of(base, edited)
        assert Report.model_validate_json(found.model_dump_json()) == found
        assert found.paired["loss.pile"].difference > 0
        assert summary_rows(found)


@pytest.mark.parametrize("n", [6, 8, 20])
def test_small_sample_intervals_have_near_nominal_coverage(n):
    """Plain bootstrap percentiles would cover 82%, 88% and 93% of the time."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        low, high = compared_means([0.0] * n, list(rng.normal(1, 1, n))).ci95
        inside += low <= 1 <= high
    assert inside / 300 >= 0.9


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_items_have_no_interval(n):
    for kind in ("loss", "score", "divergence"):
        base, edited = (Series(kind=kind, values=[v + i for i in range(n)], tokens=[2] * n) for v in (1.0, 2.0))
        assert base.measure().ci95 is None
        assert compare(base, edited).ci95 is None


def test_items_without_a_value_are_excluded():
    base = Series(kind="loss", values=[2.0, None, 4.0], tokens=[1, 5, 2])
    edited = Series(kind="loss", values=[3.0, 7.0, 6.0], tokens=[1, 5, 2])
    found = base.measure()
    assert isinstance(found, Loss)
    assert (found.value, found.n, found.tokens) == (2.0, 2, 3)
    assert compare(base, edited).difference == pytest.approx(0.5)
    some = Series(kind="score", values=[0.5, None]).measure()
    assert (some.value, some.n) == (0.5, 1)


def test_finding_covers_the_items_that_both_models_have():
    """Of 80 and 20 answers that a judge could read, 20 are the same ones."""
    key = "judges.wildguard.harmful.target"
    base = {key: yes_no_series([True] * 60 + [False] * 20)}
    edited = {key: yes_no_series([None] * 60 + [True] * 8 + [False] * 12)}
    found = report_of(base, edited)
    (sentence,) = findings(found)
    assert "rose by 40% on the 20 items in common (of 80 readable)" in sentence
    assert "on the 20 items in common" in summary_rows(found)[0][3]
    few = report_of({key: yes_no_series([True] + [None] * 99)}, {key: yes_no_series([True] * 100)})
    assert findings(few)[0].endswith("no detectable change on the 1 item in common (of 100 readable).")
    none = report_of({key: yes_no_series([None, True])}, {key: yes_no_series([True, None])})
    assert findings(none)[0].endswith("no item was readable for both models (base 1, edited 1).")


def test_unreadable_verdicts_are_counted_separately():
    base = yes_no_series([True, None, False, True], ["a", "a", "b", "b"])
    edited = yes_no_series([False, True, None, True], ["a", "a", "b", "b"])
    rate = base.measure()
    assert isinstance(rate, Rate)
    assert (rate.value, rate.n, rate.unparseable) == (2 / 3, 3, 1)
    assert (rate.by_category["a"].value, rate.by_category["a"].unparseable) == (1.0, 1)
    pair = compare(base, edited)
    assert (pair.n, pair.difference) == (2, -0.5)
    nothing = yes_no_series([None, None]).measure()
    assert (nothing.n, nothing.unparseable) == (0, 2)
    assert compare(yes_no_series([None]), yes_no_series([True])).n == 0


def test_losses_are_weighted_by_tokens_and_compared_relatively():
    base = Series(kind="loss", values=[2.0, 30.0], tokens=[1, 10])
    edited = Series(kind="loss", values=[4.0, 30.0], tokens=[1, 10])
    loss = base.measure()
    assert isinstance(loss, Loss)
    assert loss.value == pytest.approx(32 / 11)
    assert loss.perplexity == pytest.approx(math.exp(32 / 11))
    assert compare(base, edited).difference == pytest.approx(2 / 32)
    assert compare(base, edited).p == 1.0  # only one of two pairs changed: every swap is as extreme
    kl = Series(kind="divergence", values=[0.0, 3.0], tokens=[2, 4])
    zero = Series(kind="divergence", values=[0.0, 0.0], tokens=[2, 4])
    assert isinstance(kl.measure(), Divergence)
    assert kl.measure().value == pytest.approx(0.5)
    assert compare(zero, kl).difference == pytest.approx(0.5)
    assert compare(zero, kl).p is None
    assert Series(kind="score", values=[1.5, 2.5]).measure().value == 2.0


def report_of(base: dict[str, Series], edited: dict[str, Series]) -> Report:
    return Report(
        engine="hf", engine_version="x", base_model="a", checkpoint="b", edit=None, max_new_tokens=1, sensitive=False,
        base=Measures.of(base), edited=Measures.of(edited), paired=compare_all(base, edited), answers=[],
    )  # fmt: skip


EVERY_KEY = {
    "behaviour.target": yes_no_series([True]),
    "behaviour.harmless": yes_no_series([False]),
    "refusal.target": yes_no_series([True, False], ["x", None]),
    "refusal.harmless": yes_no_series([False, False]),
    "refusal.sets.xstest": yes_no_series([False]),
    "judges.wildguard.harmful.target": yes_no_series([None, True]),
    "judges.wildguard.refusal.sets.xstest": yes_no_series([True]),
    "loss.own_completions": Series(kind="loss", values=[1.0, 2.0], tokens=[3, 4]),
    "loss.pile": Series(kind="loss", values=[1.0], tokens=[3]),
    "kl.first_token": Series(kind="divergence", values=[0.1, 0.2], tokens=[1, 1]),
    "kl.completions": Series(kind="divergence", values=[0.1, 0.2], tokens=[3, 4]),
    "choices.mmlu": yes_no_series([True], ["anatomy"]),
    "tasks.some_task.acc": yes_no_series([True]),
    "tasks.some_task.words": Series(kind="score", values=[3.0, 4.5]),
}


def test_report_stores_every_measure_under_its_key():
    """With value, n and interval."""
    measures = Measures.of(EVERY_KEY)
    assert measures.flat().keys() == EVERY_KEY.keys()
    assert isinstance(measures.tasks["some_task"]["acc"], Rate)
    assert isinstance(measures.tasks["some_task"]["words"], Score)
    again = Measures.model_validate_json(measures.model_dump_json())
    assert again == measures
    raw = json.loads(measures.model_dump_json())
    for key in EVERY_KEY:
        place = raw
        for part in key.split("."):
            place = place[part]
        assert {"value", "n", "ci95"} <= place.keys()
    assert raw["refusal"]["target"]["value"] == 0.5


def test_categories_are_compared_pairwise_too():
    before = yes_no_series([True] * 6 + [False] * 4, ["a"] * 6 + ["b"] * 4)
    after = yes_no_series([False] * 6 + [False] * 4, ["a"] * 6 + ["b"] * 4)
    found = compare(before, after).by_category
    assert (found["a"].difference, found["a"].n, found["a"].p) == (-1.0, 6, pytest.approx(chi2.sf(6, 1)))
    assert (found["b"].difference, found["b"].n, found["b"].p) == (0.0, 4, 1.0)


def test_losses_have_categories_with_their_own_tokens():
    kinds = ["a", "b", "a"]
    before = Series(kind="loss", values=[2.0, 30.0, 4.0], tokens=[1, 10, 2], categories=kinds)
    after = Series(kind="loss", values=[4.0, 30.0, 5.0], tokens=[1, 10, 2], categories=kinds)
    measured = before.measure()
    assert {name: (part.value, part.tokens, part.n) for name, part in measured.by_category.items()} == {
        "a": (2.0, 3, 2), "b": (3.0, 10, 1),
    }  # fmt: skip
    assert (measured.value, measured.tokens) == (36 / 13, 13)
    pair = compare(before, after)
    assert pair.difference == pytest.approx(3 / 36)
    assert {name: part.difference for name, part in pair.by_category.items()} == pytest.approx({"a": 0.5, "b": 0.0})


def test_report_schema_is_documented():
    """docs/report.md names every field, and no field that does not exist."""
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    named = set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))
    fields = set(Report.model_fields)
    assert {n for n in named if "." not in n} == (fields | set(Measures.model_fields) | set(Paired.model_fields)
        | set(Rate.model_fields) | set(Loss.model_fields) | {"set", "prompt", "category", "base_refused",
        "edited_refused", "base_shows", "edited_shows"})  # fmt: skip


def test_nested_undoes_dotted_keys():
    assert nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_share_of_one_model_and_score_of_other_compare_as_scores():
    whole, part = Series(kind="share", values=[0.0, 1.0, 1.0]), Series(kind="score", values=[0.5, 0.4, 0.3])
    for base, edited in ((whole, part), (part, whole)):
        found = compare(base, edited)
        assert found.p == paired_permutation(base.known(), edited.known())
        assert [series.kind for series in same_kind(base, edited)] == ["score", "score"]
    with pytest.raises(AssertionError, match="share is compared with a loss"):
        same_kind(whole, Series(kind="loss", values=[1.0], tokens=[1]))


def test_task_perplexities_and_scores_are_labelled_correctly():
    losses = [Series(kind="loss", values=[3.0 * scale] * 20, tokens=[1] * 20) for scale in (1.0, 1.2)]
    scores = [Series(kind="score", values=[29.5 - i + 0.1 * n for n in range(20)]) for i in (0, 10)]
    base, edited = (
        {"tasks.wiki.word_perplexity": loss, "tasks.mt.bleu": score} for loss, score in zip(losses, scores, strict=True)
    )
    report = report_of(base, edited)
    rows = {row[0]: row[1] for row in summary_rows(report)}
    assert rows["wiki, word_perplexity: cross-entropy (n = 20)"].startswith("3.0000")
    assert rows["wiki, word_perplexity"].startswith("20.086")
    said = " ".join(findings(report))
    assert "Wiki, word_perplexity: cross-entropy rose by 20.0%" in said
    assert "mt, bleu fell from 30.45 to 20.45 (n = 20)." in said
    assert "%" not in said.partition("mt, bleu")[2]


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_real_out_of_memory_errors_are_recognised(error, short):
    assert (ran_out_of_memory(error) is not None) == short


@pytest.mark.parametrize("kind", ["share", "loss", "divergence", "score"])
def test_series_without_any_value_has_no_items(kind):
    """A suite may find nothing readable in any answer; that is no value, and no crash."""
    empty = Series(kind=kind, values=[None, None], tokens=[3, 4] if kind in ("loss", "divergence") else [])
    assert empty.measure().n == 0
    assert compare(empty, empty).n == 0


def test_divergence_is_paired_over_items_of_both():
    base = Series(kind="divergence", values=[0.0, None, 0.0], tokens=[2, 50, 3])
    edited = Series(kind="divergence", values=[1.0, 7.0, 4.0], tokens=[2, 50, 3])
    found = compare(base, edited)
    assert found.n == 2
    assert found.difference == pytest.approx(5 / 5)
