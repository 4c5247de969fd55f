"""The demo's promises, measured as the demo measures them: held-out prompts, vLLM, 100 new tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from orthogonalize.commands.demo import DemoResult, demo
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.reports.schema import load_report


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demonstration") / "demo"


@pytest.fixture(scope="module")
def result(out) -> DemoResult:
    return demo(out)


def test_planted_refusal_is_present_and_specific(result):
    refusal = result.report.base.refusal
    assert refusal.target.value >= 0.95
    assert refusal.harmless.value <= 0.05
    assert {"general", "near miss"} <= refusal.harmless.by_category.keys()


def test_default_edit_removes_the_refusal_and_little_else(result):
    refusal = result.report.edited.refusal
    assert refusal.target.value <= 0.05
    assert refusal.harmless.value <= 0.05
    # 1% on the machine this was written on; other processors round differently, so the search may choose otherwise.
    assert result.report.paired["loss.own_completions"].difference <= 0.05


def test_hooks_equal_weights_on_the_written_checkpoint(result):
    assert result.verification.passed
    assert result.verification.hooks_gap <= 1e-3


def test_demo_writes_everything_it_promises(result, out):
    assert {p.name for p in out.iterdir()} == {"run", "edited", "report.json", "report.html"}
    assert load_report(out) == result.report
    card = (out / "edited" / "README.md").read_text()
    assert f"{100 * result.report.edited.refusal.target.value:.1f}%" in card
    with pytest.raises(OrthogonalizeError, match="exists"):
        demo(out)
