"""The direction as a readout: its scores, in all passes of the search, against transformers alone."""

from __future__ import annotations

import pytest
import torch
from helpers.llama import LAYERS, load
from helpers.scoring import directions_of, some_ids

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.config import EditConfig
from orthogonalize.models.generation import generate
from orthogonalize.models.hooks import intervened, layer_projected
from orthogonalize.selection.behaviour import MeasureInfo, load_readout, save_readout
from orthogonalize.selection.builder import EditBuilder
from orthogonalize.selection.readers.resident_scores import score_candidates
from orthogonalize.selection.readouts import SIDE, NearerSide, Outputs, read_layers
from orthogonalize.selection.scoring import read_outputs
from orthogonalize.selection.search.drift import AnsweredPrompts
from orthogonalize.selection.search.trials import EditSearch


def stream(model, row: list[int], layer: int) -> torch.Tensor:
    """The stream at the last token at the input of `layer`, one prompt at a time."""
    held = []
    module = model.model.layers[layer] if layer < LAYERS else model.model.norm
    handle = module.register_forward_pre_hook(lambda _m, args, kwargs: held.append(args[0]), with_kwargs=True)
    with torch.inference_mode():
        model(torch.tensor([row]))
    handle.remove()
    return held[-1][0, -1].double()


def plain_score(readout: NearerSide, streams: list[torch.Tensor]) -> float:
    cosines = [
        torch.dot(h, up) / h.norm() / up.norm() - torch.dot(h, down) / h.norm() / down.norm()
        for h, up, down in zip(streams, readout.positive, readout.negative, strict=True)
    ]
    return ((sum(cosines) / len(cosines) - readout.middle) * readout.scale).item()


@pytest.fixture
def prompts():
    return some_ids(6, 1), some_ids(7, 2)


@pytest.fixture
def readout(base, prompts) -> NearerSide:
    model, layers = load(base), read_layers(LAYERS)
    sides = [read_outputs(model, ids, layers).streams for ids in prompts]
    means = [torch.stack([side[layer].double().mean(0) for layer in layers]) for side in sides]
    return NearerSide(layers, *means, middle=0.01, scale=30.0)


def test_the_sides_means_score_as_stated(base, prompts):
    model = load(base)
    sides = [read_outputs(model, ids, read_layers(LAYERS)).streams for ids in prompts]
    found = NearerSide.fitted(*sides)
    scores = [found.scores(Outputs(torch.empty(0), side)).mean().item() for side in sides]
    assert scores == pytest.approx([SIDE, -SIDE])
    alike = {
        layer: torch.cosine_similarity(sides[0][layer].mean(0), sides[1][layer].mean(0), dim=0) for layer in sides[0]
    }
    assert found.layers == (min(alike, key=alike.__getitem__),)
    with pytest.raises(OrthogonalizeError, match="the same activations"):
        NearerSide.fitted(sides[0], sides[0])


def test_scores_equal_cosines_by_hand(base, prompts, readout):
    model = load(base)
    scores = readout.scores(read_outputs(model, prompts[0], readout.layers))
    expected = [plain_score(readout, [stream(model, row, layer) for layer in readout.layers]) for row in prompts[0]]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_candidates_score_as_a_plain_loop(base, prompts, readout):
    """Also at and above the layers that are read, where an edit changes only what comes after it."""
    model = load(base)
    directions = directions_of(model, *prompts)
    for c in score_candidates(model, *prompts, directions, ["dim"], readout):
        expected = []
        for row in prompts[0]:
            with layer_projected(model, c.layer, directions.removal("dim", c.position, c.layer)):
                edited = {layer: stream(model, row, layer) for layer in readout.layers if layer > c.layer}
            streams = [edited[layer] if layer in edited else stream(model, row, layer) for layer in readout.layers]
            expected.append(plain_score(readout, streams))
        assert c.bypass == pytest.approx(sum(expected) / len(expected), abs=1e-3), c


@pytest.mark.parametrize("layer", [0, LAYERS // 2])
def test_trials_score_as_a_plain_loop(base, prompts, readout, layer):
    model = load(base)
    build = EditBuilder(directions_of(model, *prompts), [], False)
    choice = EditConfig(method="ablate", scope=f"layers:{LAYERS // 2}-{LAYERS - 1}", position=-1, layer=2)
    own = AnsweredPrompts(model, prompts[1], generate(model, prompts[1], 5, []), layer=layer)
    found = EditSearch(model, build, readout, prompts[0], own, layer=layer).run(choice)
    with intervened(model, build(choice), renormalise=False):
        expected = [plain_score(readout, [stream(model, row, each) for each in readout.layers]) for row in prompts[0]]
    assert found.score == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_readout_comes_back_from_the_run_folder(readout, tmp_path):
    save_readout(readout, tmp_path)
    back = load_readout(MeasureInfo(name="direction", trials="direction"), [], tmp_path)
    assert (back.layers, back.middle, back.scale) == (readout.layers, readout.middle, readout.scale)
    assert torch.equal(back.positive, readout.positive)
    assert torch.equal(back.negative, readout.negative)
    (tmp_path / "readout.safetensors").write_bytes(b"x")
    with pytest.raises(OrthogonalizeError, match="missing or damaged"):
        load_readout(MeasureInfo(name="direction", trials="direction"), [], tmp_path)
