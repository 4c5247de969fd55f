"""The demo of calibration: one of two planted refusals goes, the other stays.

It takes as long as the other demo, so `make prove` runs it.
"""

from __future__ import annotations

import pytest

from orthogonalize.commands.demo import demo
from orthogonalize.core.errors import OrthogonalizeError

KEPT = "preserved contrast_astronomy"


@pytest.mark.prove
def test_calibration_removes_one_refusal_and_keeps_the_other(tmp_path):
    report = demo(tmp_path / "demo", goal="calibrate").report
    base, edited = report.base.refusal, report.edited.refusal
    assert base.target.value >= 0.95
    assert base.sets[KEPT].value >= 0.9
    assert edited.target.value <= 0.05
    assert edited.harmless.value <= 0.05
    assert report.kept[f"refusal.sets.{KEPT}"].value >= 0.95


def test_there_is_no_demo_of_other_goals(tmp_path):
    with pytest.raises(OrthogonalizeError, match="no demo of 'strengthen'; --goal is one of remove, calibrate"):
        demo(tmp_path / "demo", goal="strengthen")
