"""Whole edits tried in passes over streamed blocks: the numbers of the resident model along the same answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from helpers.command_line import SMALL
from helpers.devices import spread

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.fitting.fit import FitTokens
from orthogonalize.models import loading
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.models.streaming import passes, state
from orthogonalize.models.streaming.weights import PartialModel
from orthogonalize.selection.readers import open_fits, streamed_fits
from orthogonalize.selection.readers.base import ResidentReader
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.search import try_edits
from orthogonalize.selection.search.trials import EditSearch

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = replace(SMALL, trials=9, finders=("dim",), behaviour_tokens=["sorry", "sure"])

APART = {"choice", "preserved", "flipped", "kls", "confirmed", "degenerate", "degenerate_before"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("kept") / "kept.txt"
    things = ("pie", "car", "wall", "soup", "a")
    file.write_text("\n".join(f"how {verb} the {thing} now" for verb in ("wash", "cake") for thing in things))
    return str(file)


@pytest.fixture(scope="module")
def streamed(model, sources, kept, tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed") / "run"
    extract(model, out, **sources, settings=SETTINGS, engine="stream", preserve=[kept])
    return out


@pytest.fixture
def resident(model, sources, kept, tmp_path, monkeypatch):
    """A resident run whose answers have one token, and whose search measures as many edits together."""
    answers = ResidentReader.answers
    monkeypatch.setattr(ResidentReader, "answers", lambda self, ids, _tokens, advance: answers(self, ids, 1, advance))
    monkeypatch.setattr(EditSearch, "at_once", 1000)
    monkeypatch.setattr(try_edits, "confirm", lambda _search, trials, _journal, _left: trials)
    extract(model, tmp_path / "resident", **sources, settings=SETTINGS, engine="hf", preserve=[kept])
    return tmp_path / "resident"


def test_streamed_trials_are_those_of_the_resident_model(streamed, resident):
    assert (streamed / "tokens.json").read_bytes() == (resident / "tokens.json").read_bytes()
    found, expected = ({t.choice: t for t in load_run(folder).trials} for folder in (streamed, resident))
    assert found.keys() == expected.keys()
    assert {choice.method for choice in found} == {"ablate", "conditional"}
    for choice, trial in expected.items():
        values, other = (t.model_dump(exclude=APART) for t in (trial, found[choice]))
        assert other == pytest.approx(values, abs=2e-5, rel=1e-3), choice
        assert found[choice].preserved == pytest.approx(trial.preserved, abs=2e-5, rel=1e-3)
        assert found[choice].flipped == pytest.approx(trial.flipped, abs=2e-5, rel=1e-3)
    assert any(trial.kl > 1e-3 for trial in expected.values()), "the edits hardly change the model"


def test_many_edits_are_tried_in_few_passes(model, sources, kept, tmp_path, monkeypatch):
    passed, whole = [], passes.Pass.run
    monkeypatch.setattr(passes.Pass, "run", lambda self, text: (passed.append(text), whole(self, text)))
    found = extract(model, tmp_path / "run", **sources, settings=SETTINGS, engine="stream", preserve=[kept])
    assert found is not None
    assert len(found.trials) == SETTINGS.trials
    assert passed[:2] == ["reading activations", "scoring directions"]
    assert passed.count("trying edits") < len(found.trials) / 2


def test_a_run_stopped_at_any_block_ends_with_the_same_trials(model, sources, kept, streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WRITTEN", 1e6)  # tiny blocks are small beside the streams
    read, fill = [], PartialModel._fill_block

    def stopping(self, layer):
        read.append(layer)
        if len(read) == 4:
            raise KeyboardInterrupt
        return fill(self, layer)

    monkeypatch.setattr(PartialModel, "_fill_block", stopping)
    for _ in range(60):
        read.clear()
        try:
            extract(model, tmp_path / "run", **sources, settings=SETTINGS, engine="stream", preserve=[kept])
            break
        except KeyboardInterrupt:
            continue
    assert load_run(tmp_path / "run").trials == load_run(streamed).trials
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_run_on_several_devices_is_that_of_one(model, sources, kept, streamed, tmp_path, monkeypatch):
    spread(monkeypatch)
    extract(model, tmp_path / "run", **sources, settings=SETTINGS, engine="stream", preserve=[kept])
    for file in ("prompts.jsonl", "activations.safetensors", "directions.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (streamed / file).read_bytes(), file
    found, expected = (load_run(folder) for folder in (tmp_path / "run", streamed))
    assert found.candidates == expected.candidates
    assert [trial.choice for trial in found.trials] == [trial.choice for trial in expected.trials]
    for one, other in zip(found.trials, expected.trials, strict=True):  # fits are summed in another order
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert one == other or one.choice.method == "conditional"


def test_given_answers_stand_for_generated_ones(model, sources, kept, tmp_path, monkeypatch):
    """A streamed run with answers from a file, and a resident one whose model gives these, have the same trials."""
    monkeypatch.setattr(EditSearch, "at_once", 1000)
    monkeypatch.setattr(try_edits, "confirm", lambda _search, trials, _journal, _left: trials)
    tokenizer, rows = load_tokenizer(model), {}

    def answer(_self, ids, tokens, _advance):
        for row in ids:
            words = tokenizer.decode(row[2:-3]).split()  # the prompt's, without the template's
            rows[" ".join(words)] = " ".join(["sure", *reversed(words * 4)][: 3 + sum(row) % 30])
        texts = [rows[tokenizer.decode(row[2:-3])] for row in ids]
        return [tokenizer(text, add_special_tokens=False)["input_ids"][:tokens] for text in texts]

    monkeypatch.setattr(ResidentReader, "answers", answer)
    extract(model, tmp_path / "resident", **sources, settings=SETTINGS, engine="hf", preserve=[kept])
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows.items()))
    extract(
        model, tmp_path / "streamed", **sources, settings=SETTINGS, engine="stream", preserve=[kept], own_answers=file
    )
    tokens = [(tmp_path / run / "tokens.json").read_text() for run in ("resident", "streamed")]
    assert tokens[0] == tokens[1]
    found, expected = ({t.choice: t for t in load_run(tmp_path / run).trials} for run in ("streamed", "resident"))
    assert found.keys() == expected.keys()
    for choice, trial in expected.items():
        assert found[choice].kl == pytest.approx(trial.kl, abs=2e-5, rel=1e-3)
        assert found[choice].ce_increase == pytest.approx(trial.ce_increase, abs=2e-5, rel=1e-3)
    assert any(trial.kl != pytest.approx(trial.first_kl, rel=0.01) for trial in expected.values())


def test_answers_of_another_form_are_refused(model, sources, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"prompt": "how"}\n')
    for file, why in (("answers.jsonl", "row 1 does not have"), ("none.jsonl", "no such file")):
        with pytest.raises(OrthogonalizeError, match=why):
            extract(model, tmp_path / "run", **sources, settings=SETTINGS, engine="stream", own_answers=tmp_path / file)
    with pytest.raises(OrthogonalizeError, match="--own-answers is for --engine stream"):
        extract(
            model, tmp_path / "run", **sources, settings=SETTINGS, engine="hf", own_answers=tmp_path / "answers.jsonl"
        )


def test_a_fit_that_the_run_does_not_have_yet_is_streamed_as_the_run_was(model, streamed, tmp_path, monkeypatch):
    chosen = {"method": "conditional", "scope": "from:1", "ridge": 0.02}
    found, expected = (shutil.copytree(streamed, tmp_path / name) for name in ("found", "expected"))
    passed, fitted = [], open_fits.StreamedFits._fit_all
    monkeypatch.setattr(open_fits.StreamedFits, "_fit_all", lambda *args: (passed.append(args), fitted(*args)))
    with monkeypatch.context() as patched:
        patched.setattr(open_fits, "load_model", None)
        edit(model, tmp_path / "streamed", run=found, **chosen)
    assert len(passed) == 1
    monkeypatch.setattr(open_fits, "_is_streamed", lambda *_: False)
    edit(model, tmp_path / "resident", run=expected, **chosen)
    base, one, other = (open_checkpoint(folder) for folder in (model, tmp_path / "streamed", tmp_path / "resident"))
    for name in base.tensors:
        change = (other.read(name).double() - base.read(name).double()).norm()
        assert (one.read(name).double() - other.read(name).double()).norm() <= 1e-4 * change, name
    assert len(passed) == 1


def test_what_is_not_here_or_does_not_fit_is_fitted_streamed_whatever_the_run(model, run, monkeypatch):
    source, made = open_checkpoint(model), load_run(run)
    assert not isinstance(open_fits.open_fits(made, source, "cpu"), open_fits.StreamedFits)
    monkeypatch.setattr(loading, "available_memory", lambda: 10_000)
    assert isinstance(open_fits.open_fits(made, source, "cpu"), open_fits.StreamedFits)


def test_fits_that_do_not_fit_at_once_take_more_passes_with_the_same_maps(model, streamed, tmp_path, monkeypatch):
    run, source = load_run(shutil.copytree(streamed, tmp_path / "run")), open_checkpoint(model)
    shutil.rmtree(tmp_path / "run" / "fits")
    passed, whole = [], streamed_fits.fit_streamed
    monkeypatch.setattr(streamed_fits, "fit_streamed", lambda *args: (passed.append(len(args[2])), whole(*args))[1])
    choices = [
        EditConfig(method="conditional", scope=f"from:{first}", position=-1, per_layer=True) for first in (0, 1, 2)
    ]
    fits = open_fits.open_fits(run, source, "cpu")
    fits.prepare(choices)
    assert passed == [3]
    expected = {file.name: file.read_bytes() for file in (tmp_path / "run" / "fits").iterdir()}
    shutil.rmtree(tmp_path / "run" / "fits")
    tokens = FitTokens.load(tmp_path / "run" / "tokens.json")
    every, target = (
        sum(len(row) for ids in {id(each.ids): each.ids for each in sets.values()}.values() for row in ids)
        for sets in (tokens.sets, tokens.changed)
    )
    fits.budget = fits.streamed.width * 4 * (every + 2 * 2 * target)  # the base's streams, and those of two fits
    fits.prepare(choices)
    assert passed == [3, 2, 1]
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "fits").iterdir()} == expected
