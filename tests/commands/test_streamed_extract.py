"""`extract --engine stream`: the run of the resident engine, one block at a time, and resumed where it was stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.command_line import UNTRIED, command

from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.models import loading
from orthogonalize.models.streaming import passes, state
from orthogonalize.models.streaming.weights import PartialModel
from orthogonalize.selection.readers import streamed_fits
from orthogonalize.selection.readers.choose import choose_engine
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.source import read_source

pytestmark = pytest.mark.usefixtures("one_thread")
RUN_SETTINGS = replace(UNTRIED, engine="hf", behaviour_tokens=None, scoring=("local", "global"), seeds=2,
                       enough=0)  # fmt: skip
STREAMED = replace(RUN_SETTINGS, engine="stream")


@pytest.fixture(scope="module")
def streamed(model, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed") / "run"
    extract(model, out, **sources, settings=STREAMED)
    return out


def candidates(folder) -> dict:
    return {(c.finder, c.position, c.layer): c for c in load_run(folder).candidates}


def test_a_streamed_run_is_the_resident_one(run, streamed):
    resident, found = load_run(run), load_run(streamed)
    assert found.prompts == resident.prompts or all(
        abs((a.score or 0) - (b.score or 0)) < 1e-5 for a, b in zip(found.prompts, resident.prompts, strict=True)
    )
    assert found.info.behaviour_tokens == resident.info.behaviour_tokens
    scale = resident.directions.mean_diffs.abs().max()
    assert (found.directions.mean_diffs - resident.directions.mean_diffs).abs().max() < 1e-6 * scale
    for place, subspace in resident.directions.subspaces.items():
        assert found.directions.subspaces[place].accuracies == subspace.accuracies
    for side, split in (("positive", "train"), ("negative", "val"), ("positive", "spare")):
        for layer in (2, 4):
            expected = resident.activations(side, split, -1, layer)
            gap = (found.activations(side, split, -1, layer) - expected).abs().max()
            assert gap < 1e-6 * expected.abs().max()


def test_streamed_scores_are_those_of_the_resident_model(run, streamed):
    expected, found = candidates(run), candidates(streamed)
    assert found.keys() == expected.keys()
    for place, candidate in expected.items():
        for score in ("bypass", "induce", "kl", "global_bypass", "global_kl"):
            assert getattr(found[place], score) == pytest.approx(getattr(candidate, score), abs=1e-5), (place, score)


def test_streams_that_do_not_fit_at_once_take_more_passes_with_the_same_scores(
    model, sources, run, tmp_path, monkeypatch
):
    passed = []
    whole = passes.Pass.run
    monkeypatch.setattr(passes.Pass, "run", lambda self, text: (passed.append(self), whole(self, text)))
    monkeypatch.setattr(streamed_fits, "SHARE", 0.0)
    extract(model, tmp_path / "run", **sources, settings=STREAMED, scoring=("local",))
    assert len(passed) == 1 + 4  # the prompts, and one pass for each of four layers
    expected, found = candidates(run), candidates(tmp_path / "run")
    assert all(found[place].bypass == pytest.approx(expected[place].bypass, abs=1e-5) for place in expected)


def test_a_run_stopped_at_any_block_resumes_there_with_the_same_numbers(
    model, sources, streamed, tmp_path, monkeypatch
):
    monkeypatch.setattr(state, "WRITTEN", 1e6)  # tiny blocks are small beside the streams
    whole, read = PartialModel._fill_block, []

    class StoppedError(Exception):
        pass

    def stop_at(count: int):
        def fill(self, layer):
            read.append(layer)
            if len(read) == count:
                raise StoppedError
            return whole(self, layer)

        return fill

    out = tmp_path / "run"
    for _ in range(20):  # the fourth reading of a block is the last, every time
        read.clear()
        monkeypatch.setattr(PartialModel, "_fill_block", stop_at(4))
        try:
            extract(model, out, **sources, settings=STREAMED)
            break
        except StoppedError:
            continue
    else:
        pytest.fail("the run does not get on")
    for file in ("prompts.jsonl", "candidates.json", "activations.safetensors", "directions.safetensors"):
        assert (out / file).read_bytes() == (streamed / file).read_bytes(), file
    assert not [path.name for path in out.iterdir() if path.name.endswith((".streams", ".partial", ".journal"))]


def test_auto_streams_what_does_not_fit_and_says_why(model, sources, monkeypatch):
    def source(settings):
        return read_source(
            str(model), settings, concept_name=None, positive=sources["positive"], negative=sources["negative"],
            column=None, hub_split="train", data=None, revision=None,
        )  # fmt: skip

    settings = replace(STREAMED, engine="auto", device="cpu")
    assert choose_engine(source(settings), settings)[0].engine == "hf"
    monkeypatch.setattr(loading, "available_memory", lambda: 10_000)
    chosen, why = choose_engine(source(settings), settings)
    assert chosen.engine == "stream"
    assert "does not fit into the memory of cpu" in why
    assert "0.0 GB free" in why
    assert choose_engine(source(settings), replace(settings, engine="hf"))[0].engine == "hf"


def test_an_unknown_engine_is_refused(model, sources, tmp_path):
    with pytest.raises(OrthogonalizeError, match="--engine must be one of auto, hf, stream, vllm"):
        extract(model, tmp_path / "run", **sources, settings=replace(STREAMED, engine="other"))
    with pytest.raises(OrthogonalizeError, match="not --trust-remote-code"):
        extract(model, tmp_path / "run", **sources, settings=replace(STREAMED, trust_remote_code=True))


def test_the_command_line_takes_the_engine(model, sources, tmp_path):
    paths = [word for side in sources for word in (f"--{side}", sources[side])]
    small = ["--train", "12", "--val", "4", "--test", "6", "--no-filter", "--trials", "0", "--finders", "dim"]
    status, output = command(
        "extract", model, *paths, *small, "--behaviour-tokens", "sorry", "--engine", "stream", "--out", tmp_path / "run"
    )
    assert status == 0, output
    assert load_run(tmp_path / "run").candidates
