"""The card of a checkpoint after `eval` and `verify`, its header, and strangers' text in it."""

from __future__ import annotations

import shutil

import pytest
from helpers.command_line import UNTRIED, command
from helpers.made_up import report
from huggingface_hub import ModelCard

from orthogonalize.edits.methods.registry import METHODS
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.evals.metrics import Paired, Rate
from orthogonalize.reports.model_card import CardContext, card_text, update_card
from orthogonalize.reports.schema import Measures, Report

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


def test_card_stays_as_it_is_if_asked(measured, edited, tmp_path):
    assert measured(None, "--no-card") == (edited / "README.md").read_text()
    assert (tmp_path / "report" / "report.json").is_file()


def test_card_of_the_users_own_is_left_alone(measured):
    assert measured("# My model\n") == "# My model\n"


def test_verify_refreshes_the_card_and_keeps_what_was_measured(measured, model, tmp_path):
    before = measured()
    assert "## Verified" not in before
    status, said = command("verify", tmp_path / "edited", "--base", model)
    assert status == 0, said
    after = (tmp_path / "edited" / "README.md").read_text()
    assert "## Verified" in after
    assert section(after, "What it did") == section(before, "What it did")
    assert "| refusal, target prompts (n = 6) |" in after


def section(card: str, name: str) -> str:
    return card.split(f"## {name}\n")[1].split("\n## ")[0].strip()


def test_results_on_public_questions_are_in_the_model_index_and_stay_there(edited, tmp_path):
    """Read back by huggingface_hub's own parser."""
    folder = tmp_path / "edited"
    shutil.copytree(edited, folder)
    rate = Rate(value=0.5, n=40, ci95=(0.35, 0.65))
    choices = Report(
        engine="hf", engine_version="transformers", base_model="base", checkpoint="edited", edit=None,
        max_new_tokens=8, sensitive=False, base=Measures(choices={"mmlu": rate, "own": rate}),
        edited=Measures(choices={"mmlu": rate, "own": rate}),
        paired={"choices.mmlu": Paired(difference=0.0, n=40, p=1.0)}, answers=[],
    )  # fmt: skip
    update_card(folder, choices)
    update_card(folder)
    found = ModelCard((folder / "README.md").read_text()).data.eval_results
    assert [(each.dataset_type, each.metric_type, each.metric_value) for each in found] == [
        ("cais/mmlu", "accuracy", 0.5)
    ]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "recipe"])
def test_card_says_what_was_done_how_to_use_it_and_its_limits(kind, edited):
    recipe = load_recipe(edited)
    recipe.base.model = "some/base"
    licence = {
        "license": "other",
        "license_name": "own",
        "license_link": "https://some.where/licence",
        "language": ["en"],
    }
    measured = report(kept={"behaviour.sets.preserved other": Rate(value=0.98, n=50, ci95=(0.9, 1.0))})
    measured.paired["behaviour.target"] = Paired(difference=-0.8, n=50, p=1e-9)
    context = CardContext(kind, "me/edited", concept="cooking", picture="rates.png")
    card = ModelCard(card_text(recipe, licence, measured, context=context, config={"model_type": "llama"}))
    relation = "adapter" if kind == "adapter" else "finetune"
    assert (card.data.base_model, card.data.base_model_relation) == ("some/base", relation)
    assert {key: card.data[key] for key in licence} == licence
    assert card.data.tags == ["orthogonalize", "ablate"]
    sections = ["What was edited", "What it did", "How to use it", "Limits, and use with care"]
    assert [line[3:] for line in card.text.splitlines() if line.startswith("## ")] == sections
    for part in (
        "**Concept:** cooking", f"**In words:** the edit {METHODS['ablate'].summary}", METHODS["ablate"].formula,
        "(rates.png)", "| lists, target prompts (n = 50) | 90.0% [80.0, 100.0] | 10.0% [0.0, 20.0] |",
        "98.0% [90.0, 100.0] (n = 50)", "orthogonalize edit some/base --recipe me/edited", "licence still hold",
    ):  # fmt: skip
        assert part in card.text, part
    for part in ("vllm serve", "from_pretrained"):
        assert (part in card.text) == (kind != "recipe"), part
    assert ("| llama.cpp | yes |" in card.text) == (kind == "checkpoint")


NASTY = "| a | <img src=x> `b`\n# Heading\n---\nlicense: other"


def test_text_of_strangers_is_text_on_the_card(edited):
    recipe = load_recipe(edited)
    recipe.base.model = NASTY
    recipe.source.concept = NASTY
    text = card_text(recipe, {"license": "x\n---\n# Not a header"}, context=CardContext(title=NASTY))
    card = ModelCard(text)
    assert card.data.license == "x\n---\n# Not a header"
    assert "<img" not in card.text.replace("\\<img", "")
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert len([line for line in headings if line.startswith("# ")]) == 1
    assert "orthogonalize edit BASE --recipe" in card.text, "a command to paste must not hold a stranger's text"
