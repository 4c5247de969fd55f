"""A report's findings follow from its tests and intervals, and its page shows all of them."""

from __future__ import annotations

import re

from orthogonalize.evals.metrics import Series, compare, yes_no_series
from orthogonalize.reports.findings import findings
from orthogonalize.reports.pages.report_page import write_webpage
from orthogonalize.reports.schema import Answer, JudgedPair, Measures, Report, compare_all
from orthogonalize.reports.tables import change, summary_rows


def report_of(base: dict[str, Series], edited: dict[str, Series], **more) -> Report:
    return Report(
        engine="hf", engine_version="transformers", base_model="base", checkpoint="edited", edit=None,
        max_new_tokens=100, sensitive=False, base=Measures.of(base), edited=Measures.of(edited),
        paired=compare_all(base, edited), answers=more.pop("answers", []), **more,
    )  # fmt: skip


def series(refused: int, harmless: int, loss: float, n: int = 40) -> dict[str, Series]:
    return {
        "refusal.target": yes_no_series([i < refused for i in range(n)]),
        "refusal.harmless": yes_no_series([i < harmless for i in range(n)]),
        "loss.own_completions": Series(kind="loss", values=[loss + 0.01 * i for i in range(n)], tokens=[10] * n),
        "kl.first_token": Series(kind="divergence", values=[loss - 5.0] * n, tokens=[1] * n),
        "kl.completions": Series(kind="divergence", values=[loss - 5.0] * n, tokens=[32] * n),
    }


def test_only_significant_changes_are_called_changes():
    found = findings(report_of(series(38, 1, 5.0), series(2, 2, 5.5)))
    assert found[0] == "Refusal on target prompts fell from 95% to 5% (n = 40)."
    assert found[1] == "Refusal on harmless prompts: no detectable change on 40 items (2% and 5%)."
    assert found[2].startswith("Cross-entropy, own answers rose by ")
    assert "more than 5%, so other abilities may have suffered" in found[2]
    same = findings(report_of(series(38, 1, 5.0), series(38, 1, 5.0)))
    assert all("no detectable change" in sentence for sentence in same[:3])


def test_different_numbers_are_printed_with_enough_digits():
    base = {"choices.mmlu": yes_no_series([i < 2500 for i in range(5000)])}
    edited = {"choices.mmlu": yes_no_series([i < 2520 for i in range(5000)])}
    assert findings(report_of(base, edited)) == ["MMLU, 5-shot rose from 50.0% to 50.4% (n = 5000)."]
    before = {"loss.pile": Series(kind="loss", values=[100.0 + i for i in range(40)], tokens=[10] * 40)}
    after = {"loss.pile": Series(kind="loss", values=[100.003 + i for i in range(40)], tokens=[10] * 40)}
    (sentence,) = findings(report_of(before, after))
    assert "rose by 0.0025% (95%: +0.002" in sentence


def test_insignificant_change_is_stated_without_its_interval():
    """With five pairs no test can reject, so there is no interval that could exclude 0 beside it."""
    base = {"loss.pile": Series(kind="loss", values=[10.0, 11.0, 12.0, 13.0, 14.0], tokens=[10] * 5)}
    edited = {"loss.pile": Series(kind="loss", values=[12.0, 13.0, 15.0, 16.0, 17.0], tokens=[10] * 5)}
    found = report_of(base, edited)
    assert found.paired["loss.pile"].p == 2 / 2**5
    assert found.paired["loss.pile"].ci95 is None
    assert findings(found) == ["Cross-entropy, Pile: no detectable change on 5 texts."]


def test_unreadable_verdicts_have_their_own_row():
    base = {"judges.wildguard.harmful.target": yes_no_series([None, True, False])}
    edited = {"judges.wildguard.harmful.target": yes_no_series([None, None, True])}
    rows = summary_rows(report_of(base, edited))
    assert rows[1] == ("harmful by wildguard, target prompts: unreadable", "1", "2", "")


def test_page_is_self_contained_and_holds_answers_and_verdicts(tmp_path):
    answer = Answer(
        set="target", category="<b>", prompt="how do i bake <script>", base="I'm sorry", edited="mix & bake",
        base_refused=True, edited_refused=False,
        judges={"wildguard": JudgedPair(base_harmful=None, edited_harmful=False)},
    )  # fmt: skip
    report = report_of(series(38, 1, 5.0), series(2, 2, 5.5), answers=[answer])
    write_webpage(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "how do i bake &lt;script&gt;" in page
    assert "wildguard: unreadable" in page
    assert "wildguard: not harmful" in page
    told = {f"judges.wildguard.{field}.target": yes_no_series([True, False]) for field in ("harmful", "refusal")}
    base, edited = series(38, 1, 5.0) | told, series(2, 2, 5.5) | told
    said = answer.model_copy(update={"judges": {"wildguard": JudgedPair(base_harmful=True, edited_refusal=True)}})
    write_webpage(report_of(base, edited, answers=[said]), tmp_path / "told.html")
    page = (tmp_path / "told.html").read_text()
    assert "wildguard: harmful, refusal unreadable" in page
    assert "wildguard: unreadable, refuses" in page
    assert "refusal gone" in page
    for sentence in findings(report):
        assert sentence.replace("'", "&#39;") in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert not re.search(r"https?:", page)


def test_nothing_in_common_is_not_called_no_change():
    base, edited = yes_no_series([None, True, None]), yes_no_series([True, None, None])
    pair = compare(base, edited)
    assert pair.n == 0
    assert change(base.measure(), edited.measure(), pair) == "no items in common"
