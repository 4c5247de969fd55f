"""`extract --engine stream` of a model on the Hub, which is read there and never downloaded whole."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.command_line import UNTRIED
from helpers.disk_use import peak_disk_use
from helpers.hub_server import Hub, Repository, use_hub
from helpers.llama import store, tiny_llama

from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.engines.base import EngineOptions
from orthogonalize.models import hub_files
from orthogonalize.models.streaming import state
from orthogonalize.models.streaming.weights import PartialModel
from orthogonalize.selection.readers import open_fits
from orthogonalize.selection.run_folder import load_run

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = True  # of runs, whose size a test compares
SETTINGS = replace(UNTRIED, engine="stream", finders=("dim",))


def store_model(folder):
    tiny = tiny_llama(intermediate_size=4096)
    tiny_tokenizer().save_pretrained(store(tiny, folder, torch.float32, shards=4))
    return folder


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    with Hub("hf_loopbacktoken") as hub:
        files = {file.name: file.read_bytes() for file in model.iterdir()}
        hub.state.repositories["some/model"] = Repository(False, files)
        (tmp_path / "disk").mkdir()
        use_hub(hub, tmp_path / "disk" / "hub", monkeypatch)
        yield hub


@pytest.mark.parametrize("engine", ["stream", "auto"])
def test_a_run_of_a_model_on_the_hub_is_that_of_the_same_model_here(model, sources, hub, tmp_path, engine):
    expected, found = tmp_path / "expected", tmp_path / "disk" / "run"
    extract(model, expected, **sources, settings=SETTINGS)
    with peak_disk_use(tmp_path / "disk") as peak:
        hub.state.before_file = lambda *_: peak.look()
        extract("some/model", found, **sources, settings=SETTINGS, engine=engine, download=False)
    for file in ("candidates.json", "activations.safetensors", "directions.safetensors", "prompts.jsonl"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    assert load_run(found).info.weights == load_run(expected).info.weights
    run = sum(file.stat().st_size for file in found.rglob("*") if file.is_file())
    assert peak.bytes < 2 * run + 2**18  # the activations of all prompts and of the chosen ones; the tokenizer's files
    assert peak.bytes < 0.5 * min(file.stat().st_size for file in model.glob("*.safetensors"))


def test_engines_that_load_the_model_from_the_disk_do_not_read_it_on_the_hub(sources, hub, tmp_path):
    with pytest.raises(OrthogonalizeError, match="--no-download needs --engine stream; --engine hf loads"):
        extract("some/model", tmp_path / "run", **sources, settings=SETTINGS, engine="hf", download=False)
    options = EngineOptions(tensor_parallel_size=2)  # which choose vLLM
    with pytest.raises(OrthogonalizeError, match="--engine vllm loads"):
        extract(
            "some/model",
            tmp_path / "run",
            **sources,
            settings=SETTINGS,
            engine="auto",
            engine_options=options,
            download=False,
        )


def test_an_edit_that_is_not_fitted_yet_is_fitted_there_too(model, sources, hub, tmp_path, monkeypatch):
    run, chosen = tmp_path / "run", {"method": "conditional", "scope": "from:1", "ridge": 0.02}
    extract(model, run, **sources, settings=SETTINGS, trials=1)
    edit(model, tmp_path / "expected", run=run, **chosen)
    shutil.rmtree(run / "fits")
    monkeypatch.setattr(open_fits, "load_model", None)
    edit("some/model", tmp_path / "found", run=run, download=False, **chosen)
    for file in model.glob("*.safetensors"):
        found, expected = (tmp_path / out / file.name for out in ("found", "expected"))
        assert found.read_bytes() == expected.read_bytes()
        assert not list((tmp_path / "disk").rglob(file.name))


def test_a_pass_that_loses_the_hub_resumes_at_its_block(model, sources, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WRITTEN", 1e6)  # tiny blocks are small beside the streams
    monkeypatch.setattr(hub_files, "WAIT", 0.0)
    expected, found = tmp_path / "expected", tmp_path / "run"
    extract(model, expected, **sources, settings=SETTINGS)
    read, fill = [], PartialModel._fill_block

    def losing(self, layer):
        read.append(layer)
        hub.state.before_file = lambda name, _: 0 if layer == 3 and name.endswith(".safetensors") else None
        return fill(self, layer)

    with monkeypatch.context() as patched:
        patched.setattr(PartialModel, "_fill_block", losing)
        with pytest.raises(OrthogonalizeError, match=r"model-.*safetensors of some/model at 0+ cannot be read"):
            extract("some/model", found, **sources, settings=SETTINGS, download=False)
        assert read[-1] == 3
        read.clear()
        patched.setattr(PartialModel, "_fill_block", lambda self, layer: (read.append(layer), fill(self, layer))[1])
        hub.state.before_file = lambda *_: None
        extract("some/model", found, **sources, settings=SETTINGS, download=False)
    assert read[:2] == [0, 3], "the first is to see what blocks return; then the pass resumes"
    for file in ("candidates.json", "activations.safetensors", "directions.safetensors", "prompts.jsonl"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file
