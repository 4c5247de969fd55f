"""The demo that calibrates: a wrong refusal goes, a right one stays, measured as the demo measures them.

As long as the other demo, so only `make prove` runs it.
"""

from __future__ import annotations

import pytest

from orthogonalize.commands.demo import demo
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.reports.schema import Report

KEPT, NEAR = "preserved contrast_astronomy", "own near astronomy"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    return demo(tmp_path_factory.mktemp("demonstration") / "demo", goal="calibrate").report


@pytest.mark.prove
def test_both_refusals_are_planted(report):
    refusal = report.base.refusal
    assert refusal.target.value >= 0.95
    assert refusal.sets[KEPT].value >= 0.9
    assert refusal.harmless.value <= 0.1
    assert refusal.sets[NEAR].value <= 0.1


@pytest.mark.prove
def test_the_wrong_one_goes_and_the_right_one_stays(report):
    refusal = report.edited.refusal
    assert refusal.target.value <= 0.1
    assert report.kept[f"refusal.sets.{KEPT}"].value >= 0.98
    assert refusal.harmless.value <= 0.1
    assert refusal.sets[NEAR].value <= 0.15


def test_other_goals_have_no_demo(tmp_path):
    with pytest.raises(OrthogonalizeError, match="--goal must be one of remove, calibrate; got strengthen"):
        demo(tmp_path / "demo", goal="strengthen")
