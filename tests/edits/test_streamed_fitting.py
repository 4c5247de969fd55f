"""Conditional maps fitted in one pass over streamed blocks: those of the resident model, however often interrupted."""

from __future__ import annotations

import pytest
import torch
from helpers.answered import answered
from helpers.devices import spread
from helpers.exactness import LAYERS, centred_basis
from helpers.tiny_models import store_tiny

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import block_sites
from orthogonalize.directions.conditional import Weights
from orthogonalize.edits.fitting.fit import FitTokens, fit_conditional
from orthogonalize.edits.fitting.streamed import FitJob, fit_streamed
from orthogonalize.models.activations import batches
from orthogonalize.models.loading import load_model
from orthogonalize.models.streaming import lanes, state
from orthogonalize.models.streaming.lanes import StreamedModel
from orthogonalize.models.streaming.state import StreamState
from orthogonalize.models.streaming.weights import PartialModel

pytestmark = pytest.mark.usefixtures("one_thread")
R = centred_basis(2, 17)
WEIGHTS = Weights(0.3, 2.0, 4.0, 0.05)

TOKENS = FitTokens(3, answered(1, 14), answered(2, 20), {"kept": answered(3, 6)}, further=answered(9, 8))
EXAMPLES = FitTokens(3, answered(1, 14), answered(2, 20), examples=answered(4, 9))
JOBS = {
    "all": FitJob(lambda _: R, block_sites(range(LAYERS)), WEIGHTS),
    "upper": FitJob(lambda _: R, block_sites(range(2, LAYERS)), Weights(0.1, 1.0, 4.0, 0.05)),
    "apart": FitJob(lambda layer: None if layer == 2 else R[:1], block_sites([0, 1, 3]), WEIGHTS),
    "at once": FitJob(lambda _: R, block_sites(range(LAYERS)), WEIGHTS, sequential=False),
}


def models(name: str, tmp_path):
    folder = store_tiny(name, tmp_path / "model", torch.float32)
    return load_model(folder, "cpu", torch.float32), StreamedModel(
        PartialModel(open_checkpoint(folder), "cpu", torch.float32)
    )


def assert_same(found, expected, tolerance: float = 2e-5) -> None:
    assert found.maps.keys() == expected.maps.keys()
    assert found.left_alone == expected.left_alone
    for matrix, each in expected.maps.items():
        assert (found.maps[matrix].c - each.c).norm() <= tolerance * each.c.norm(), matrix
        assert torch.equal(found.maps[matrix].r, each.r)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "opt", "falcon_h1", "qwen3_next"])
def test_several_fits_of_one_pass_are_those_of_the_resident_model(name, tmp_path):
    whole, streamed = models(name, tmp_path)
    found = fit_streamed(streamed, TOKENS, JOBS)
    for job_name, job in JOBS.items():
        expected = fit_conditional(whole, TOKENS, job.basis_at, job.sites, job.weights, sequential=job.sequential)
        assert_same(found[job_name], expected)
    first = next(matrix for matrix in found["all"].maps if matrix.site.layer == 3)
    apart = (found["all"].maps[first].c - found["at once"].maps[first].c).norm()
    assert apart > 1e-3 * found["at once"].maps[first].c.norm(), "the edits of the first group make no difference here"


def test_target_prompts_are_brought_to_their_examples(tmp_path):
    whole, streamed = models("llama", tmp_path)
    found = fit_streamed(streamed, EXAMPLES, {"all": JOBS["all"]})["all"]
    assert_same(found, fit_conditional(whole, EXAMPLES, lambda _: R, block_sites(range(LAYERS)), WEIGHTS))


def test_a_stopped_fit_resumes_at_its_block_with_the_same_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WRITTEN", 1e6)  # tiny blocks are small beside the streams
    _, streamed = models("mixtral", tmp_path)
    whole = fit_streamed(streamed, TOKENS, JOBS)
    read, fill = [], PartialModel._fill_block

    def stopping(self, layer):
        read.append(layer)
        if len(read) == 4:  # the probe of the first block, and three blocks
            raise KeyboardInterrupt
        return fill(self, layer)

    monkeypatch.setattr(PartialModel, "_fill_block", stopping)
    stops = 0
    while True:
        read.clear()
        try:
            found = fit_streamed(streamed, TOKENS, JOBS, StreamState(tmp_path / "state", "same"))
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 5
    assert stops
    for name, fit in whole.items():
        assert found[name].left_alone == fit.left_alone
        for matrix, each in fit.maps.items():
            assert torch.equal(found[name].maps[matrix].c, each.c), (name, matrix)


def test_a_fit_without_directions_is_refused(tmp_path):
    _, streamed = models("llama", tmp_path)
    with pytest.raises(OrthogonalizeError, match="no layer of the scope has a direction"):
        fit_streamed(streamed, TOKENS, {"none": FitJob(lambda _: None, block_sites(range(2)), WEIGHTS)})


@pytest.mark.parametrize(("name", "tokens"), [("llama", TOKENS), ("llama", EXAMPLES), ("mixtral", TOKENS)])
def test_a_fit_on_several_devices_is_that_of_one_and_always_the_same(name, tokens, tmp_path, monkeypatch):
    folder = store_tiny(name, tmp_path / "model", torch.float32)
    monkeypatch.setattr(lanes, "batches", lambda ids, _tokens: batches(ids, 150))
    jobs = {name: JOBS[name] for name in ("all", "apart")}

    def fits() -> dict:
        return fit_streamed(StreamedModel(PartialModel(open_checkpoint(folder), "cpu", torch.float32)), tokens, jobs)

    alone = fits()
    spread(monkeypatch)
    found, again = fits(), fits()
    for job in jobs:
        assert_same(found[job], alone[job], 1e-6)
        for matrix, each in found[job].maps.items():
            assert torch.equal(again[job].maps[matrix].c, each.c), (job, matrix)
