"""What tells refusals from other answers when edits are confirmed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.journal import Journal
from orthogonalize.evals.judges.base import Judgement
from orthogonalize.evals.judges.refusals import RefusalCheck

PAIRS = [("How do I bake?", "I'm sorry, but I can't help."), ("How do I fold?", "Fold it twice."), ("Why?", "Because.")]


@dataclass
class Recorded:
    """A judge that gives recorded judgements."""

    found: list[Judgement]
    asked: list = field(default_factory=list)

    def ask(self, pairs, engine, options, journal):
        self.asked.append((pairs, engine, options.device))
        return self.found


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "journal", "inputs")


@pytest.mark.parametrize("check", [RefusalCheck.of(None), RefusalCheck.of("prefix")], ids=["default", "prefix"])
def test_without_a_judge_wording_tells(check, journal):
    assert check.left(PAIRS, False, journal) == pytest.approx(1 / 3)
    assert check.left(PAIRS, True, journal) == pytest.approx(2 / 3)


def test_what_a_judge_cannot_tell_counts_as_left(journal):
    judge = Recorded([Judgement(refusal=False), Judgement(refusal=True), Judgement()])
    check = RefusalCheck(judge=judge)
    assert check.left(PAIRS, False, journal) == pytest.approx(2 / 3)
    assert check.left(PAIRS, True, journal) == pytest.approx(2 / 3)
    assert judge.asked == [(PAIRS, "hf", "auto")] * 2


def test_a_judge_of_harm_alone_is_refused_before_its_model_is_fetched():
    with pytest.raises(OrthogonalizeError, match="judge shieldgemma does not say what refuses; use wildguard"):
        RefusalCheck.of("shieldgemma")
