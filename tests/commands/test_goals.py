"""The goals of an extraction: what they need, which prompts they take, and what eval then measures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from helpers.command_line import SMALL, command

from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.benchmarks import PROMPT_SETS
from orthogonalize.evals.plan import make_plan
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.selection.run_folder import load_run


@pytest.fixture(scope="module")
def further(tmp_path_factory) -> str:
    """Prompts of another kind than the contrast's."""
    file = tmp_path_factory.mktemp("further") / "fold.txt"
    openings = product(("please fold", "today i wash"), ["cake", "pie", "soup", "wall", "car"], ("how", "the", "do"))
    file.write_text("\n".join(f"{opening} a {thing} {end}" for opening, thing, end in openings))
    return str(file)


@pytest.fixture(scope="module")
def strengthened(model, sources, further, tmp_path_factory):
    out = tmp_path_factory.mktemp("strengthen") / "run"
    extract(str(model), out, **sources, settings=replace(SMALL, goal="strengthen", target=further))
    return out


def test_target_prompts_are_a_side_of_their_own(strengthened, further):
    found = load_run(strengthened)
    assert found.info.goal == "strengthen"
    assert found.target_side == "target"
    targets = {p.text for p in found.prompts if p.side == "target"}
    assert targets <= set(Path(further).read_text().split("\n"))
    assert {p.split for p in found.prompts if p.side == "target"} == {"train", "val", "test"}
    assert set(found.info.base_score) == {"positive", "negative", "target"}


def test_strengthening_is_fitted_to_the_examples(strengthened):
    tokens = json.loads((strengthened / "tokens.json").read_text())
    assert len(tokens["examples"]["ids"]) == len(load_run(strengthened).texts("positive", "train"))
    assert len(tokens["target"]["ids"]) == len(load_run(strengthened).texts("target", "train"))


def test_strengthening_tries_fits_and_additions(strengthened, model, tmp_path):
    assert {t.choice.method for t in load_run(strengthened).trials} == {"conditional", "actadd"}
    edit(str(model), tmp_path / "edited", run=strengthened, method="conditional")


def test_eval_counts_the_target_prompts(strengthened, model):
    run = load_run(strengthened)
    plan = make_plan(run, load_tokenizer(model), ["refusal"], 8)
    assert plan.answering is not None
    target = next(each for each in plan.answering.sets if each.name == "target")
    assert [item.text for item in target.items] == run.texts("target", "test")


def test_calibration_tries_edits_by_what_they_keep(model, sources, further, tmp_path):
    found = extract(str(model), tmp_path / "run", **sources, settings=SMALL, goal="calibrate", preserve=[further])
    assert found is not None
    assert found.info.goal == "calibrate"
    assert all(set(t.flipped) == {further} for t in found.trials)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goal", "calibrate"], "--goal calibrate needs --preserve"),
        (["--goal", "strengthen"], "--goal strengthen needs --target"),
        (["--target", "planted:lists.jsonl"], "--goal strengthen needs --target"),
    ],
)
def test_a_goal_says_what_it_lacks(model, sources, tmp_path, words, message):
    sides = ["--positive", sources["positive"], "--negative", sources["negative"]]
    code, output = command("extract", model, *sides, "--out", tmp_path / "run", *words)
    assert (code, message in output) == (1, True), output
    assert not (tmp_path / "run").exists()


def test_target_prompts_must_not_be_of_the_contrast(model, sources, tmp_path):
    settings = replace(SMALL, goal="strengthen", target=sources["positive"])
    with pytest.raises(OrthogonalizeError, match="appear on both sides, positive and target"):
        extract(str(model), tmp_path / "run", **sources, settings=settings)


def local_copy(name: str, texts: list[str], data: Path) -> None:
    """A local copy of a public set, with other prompts."""
    found = PROMPT_SETS[name]
    row = dict.fromkeys(found.source.columns, "x") | ({found.only[0]: found.only[1]} if found.only else {})
    file = data / found.source.repository / (found.source.config or "") / f"{found.source.split}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row | {found.column: text}) + "\n" for text in texts))


def test_public_sets_are_sources_by_name(model, sources, tmp_path):
    data = tmp_path / "data"
    for name, opening in (("xstest", "kill a"), ("harmbench", "steal a")):
        local_copy(name, [f"{opening} {thing} {n}" for thing in ("process", "scene", "joke") for n in range(4)], data)
    words = ["--positive", "xstest", "--preserve", "harmbench", "--negative", sources["negative"], "--data", data]
    numbers = ["--goal", "calibrate", "--train", "6", "--val", "1", "--test", "1", "--trials", "0", "--no-filter"]
    code, output = command("extract", model, *words, *numbers, "--finders", "dim", "--behaviour-tokens", "sorry",
                           "--out", tmp_path / "run")  # fmt: skip
    assert code == 0, output
    run = load_run(tmp_path / "run")
    assert run.texts("positive", "train")
    assert all(text.startswith("kill a") for text in run.texts("positive", "train"))
    assert {p.source for p in run.preserved} == {"harmbench"}
    assert run.info.sensitive_preserved == ["harmbench"]
    assert run.info.sensitive == []


def test_a_prompt_cannot_be_changed_and_preserved(model, sources, tmp_path):
    with pytest.raises(OrthogonalizeError, match="are to be preserved, and among those whose behaviour is to change"):
        extract(str(model), tmp_path / "run", **sources, settings=SMALL, preserve=[sources["positive"]])
