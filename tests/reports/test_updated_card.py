"""The card of a checkpoint after `eval`."""

from __future__ import annotations

import shutil

import pytest
from helpers.command_line import UNTRIED, command

RUN_SETTINGS = UNTRIED
QUICK = ("--suite", "refusal", "--engine", "hf", "--max-new-tokens", "4")


@pytest.fixture
def measured(model, run, edited, tmp_path):
    """Evaluates a copy of the edited checkpoint; returns its card."""

    def evaluate(card: str | None = None, *more: str) -> str:
        folder = tmp_path / "edited"
        shutil.copytree(edited, folder)
        if card is not None:
            (folder / "README.md").write_text(card)
        words = ("eval", folder, "--base", model, "--run", run, *QUICK, *more, "--out", tmp_path / "report")
        status, said = command(*words)
        assert status == 0, said
        return (folder / "README.md").read_text()

    return evaluate


def test_card_holds_what_eval_measured(measured, edited):
    assert "Not measured yet." in (edited / "README.md").read_text()
    card = measured()
    assert "Not measured yet." not in card
    assert "| refusal, target prompts (n = 6) |" in card


def test_card_of_the_users_own_is_left_alone(measured):
    assert measured("# My model\n") == "# My model\n"
