"""`extract --engine vllm`: the run of the resident model, from within an engine, and resumed where it was stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.chat import store_choosing
from helpers.command_line import SMALL, command
from safetensors.torch import load_file, save_file

from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.engines.base import EngineOptions
from orthogonalize.selection.readers import choose
from orthogonalize.selection.readers.choose import choose_engine, gpus_needed
from orthogonalize.selection.readers.served.scores import ServedScoring
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.source import read_source

pytestmark = pytest.mark.usefixtures("one_thread")
RUN_SETTINGS = replace(
    SMALL, engine="hf", enough=0, scoring=("local", "global"), behaviour_tokens=None, trials=8, device="cpu"
)
SERVED = replace(RUN_SETTINGS, engine="vllm")
NAN = "model.layers.2.mlp.down_proj.weight"
CLOSE = {"abs": 2e-4, "rel": 2e-3}


def store_model(folder):
    return store_choosing(folder, hidden_size=128, intermediate_size=96)


@pytest.fixture(scope="module")
def served(model, sources, tmp_path_factory):
    """A run that is stopped while it scores directions, and resumed."""
    out = tmp_path_factory.mktemp("served") / "run"
    score = ServedScoring._score

    def stopped(self, keys, known):
        if len(known.done) > 2:
            raise KeyboardInterrupt
        score(self, keys, known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServedScoring, "_score", stopped)
        patch.setattr("orthogonalize.selection.readers.served.scores.ROWS", 1)  # a layer at a time
        with pytest.raises(KeyboardInterrupt):
            extract(model, out, **sources, settings=SERVED)
    extract(model, out, **sources, settings=SERVED)
    return out


def test_a_served_run_is_the_resident_one(run, served):
    resident, found = load_run(run), load_run(served)
    assert found.info.behaviour_tokens == resident.info.behaviour_tokens
    for ours, theirs in zip(found.prompts, resident.prompts, strict=True):
        assert (ours.text, ours.split) == (theirs.text, theirs.split)
        assert ours.score == (None if theirs.score is None else pytest.approx(theirs.score, **CLOSE))
    scale = resident.directions.mean_diffs.abs().max()
    assert (found.directions.mean_diffs - resident.directions.mean_diffs).abs().max() < 1e-5 * scale
    for side, split in (("positive", "train"), ("negative", "val")):
        for layer in (0, 2, 4):
            pair = [each.activations(side, split, -1, layer) for each in (found, resident)]
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


def test_scores_are_those_of_the_resident_model(run, served):
    expected = {(c.finder, c.position, c.layer): c for c in load_run(run).candidates}
    found = {(c.finder, c.position, c.layer): c for c in load_run(served).candidates}
    assert found.keys() == expected.keys()
    for place, candidate in expected.items():
        for score in ("bypass", "induce", "kl", "global_bypass", "global_kl"):
            assert getattr(found[place], score) == pytest.approx(getattr(candidate, score), **CLOSE), (place, score)


def test_tried_edits_measure_what_the_resident_model_does(run, served):
    expected = {t.choice.model_dump_json(): t for t in load_run(run).trials}
    found = {t.choice.model_dump_json(): t for t in load_run(served).trials}
    common = expected.keys() & found.keys()
    assert {expected[choice].choice.method for choice in common} == {"ablate", "conditional"}
    assert len(common) >= 4
    for choice in common:
        for measure in ("left", "before", "usual", "score", "kl", "first_kl", "ce_increase"):
            pair = [getattr(each[choice], measure) for each in (found, expected)]
            assert pair[0] == pytest.approx(pair[1], **CLOSE), (choice, measure)


def test_auto_takes_the_engine_where_only_several_gpus_hold_the_model(model, sources, monkeypatch):
    def source(settings):
        return read_source(
            str(model), settings, concept_name=None, positive=sources["positive"], negative=sources["negative"],
            column=None, hub_split="train", data=None, revision=None,
        )  # fmt: skip

    settings = replace(SERVED, engine="auto", device="auto")
    size = 1_000_000
    monkeypatch.setattr(choose, "resident_bytes", lambda *_: size)
    monkeypatch.setattr(choose, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(choose, "choose_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(choose, "is_spread", lambda _, needed: needed > 0.85 * here[0])
    monkeypatch.setattr(choose, "free_memory", lambda _: here)
    for each, engine, gpus in ((2, "hf", 1), (1, "vllm", 2), (0.4, "vllm", 4), (0.3, "hf", 1), (0.1, "stream", 1)):
        here = [int(each * size)] * 4
        chosen, why = choose_engine(source(settings), settings)
        assert (chosen.engine, chosen.engine_options.tensor_parallel_size) == (engine, gpus), each
        assert "memory of" in why
    here = [int(size)] * 4
    monkeypatch.setattr(choose, "find_spec", lambda _: None)
    assert choose_engine(source(settings), settings)[0].engine == "hf"  # spread over them by transformers
    assert gpus_needed(100, [1000, 1000], {"num_attention_heads": 3}) is None


def test_nan_in_a_block_is_named(sources, tmp_path):
    broken = store_model(tmp_path / "model")
    file = next(each for each in broken.glob("*.safetensors") if NAN in load_file(each))
    tensors = load_file(file)
    tensors[NAN][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OrthogonalizeError, match="input of layer 3 contain NaN or infinite values, which block 2"):
        extract(broken, tmp_path / "run", **sources, settings=SERVED)


def test_options_of_the_engine_belong_to_it(model, sources, tmp_path):
    two = EngineOptions(tensor_parallel_size=2)
    with pytest.raises(OrthogonalizeError, match="--engine hf runs without vLLM"):
        extract(model, tmp_path / "run", **sources, settings=replace(RUN_SETTINGS, engine_options=two))
    several = EngineOptions(data_parallel_size=2)
    with pytest.raises(OrthogonalizeError, match="extract uses one engine"):
        extract(model, tmp_path / "run", **sources, settings=replace(SERVED, engine_options=several))


def test_the_command_line_takes_the_engine_and_its_options(model, sources, tmp_path):
    paths = [word for side in sources for word in (f"--{side}", sources[side])]
    status, output = command("extract", model, *paths, "--engine", "stream", "--tensor-parallel-size", "2", "--out",
                             tmp_path / "run")  # fmt: skip
    assert status == 1
    assert "--engine stream runs without vLLM" in output
