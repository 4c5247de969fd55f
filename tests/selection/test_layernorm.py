"""Models with LayerNorm: the edit that is scored, tried and swept is the centred one that `edit` writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.command_line import UNTRIED
from helpers.scoring import directions_of, plain_probabilities, some_ids
from helpers.tiny_models import store_tiny

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.commands.sweep import sweep
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import centred, centred_map
from orthogonalize.edits.bake import bake
from orthogonalize.edits.build import intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.models.hooks import layer_projected
from orthogonalize.models.loading import model_class
from orthogonalize.selection.builder import EditBuilder
from orthogonalize.selection.candidates import layer_ranking
from orthogonalize.selection.readers.resident_scores import score_candidates
from orthogonalize.selection.readouts import FirstToken, behaviour_score
from orthogonalize.selection.search.drift import AnsweredPrompts
from orthogonalize.selection.search.trials import EditSearch

TOKENS = [5, 9]
READOUT = FirstToken(tuple(TOKENS))


@pytest.fixture(scope="module")
def run_settings():
    return dataclasses.replace(UNTRIED, max_rank=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = store_tiny("gpt_neox", tmp_path_factory.mktemp("layernorm") / "model", torch.float32)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path):
    return model_class(folder).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def scored(model):
    """Prompts, directions with a large mean, and their scores."""
    held, positive, negative = load(model), some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(held, positive, negative)
    slanted = directions.mean_diffs + directions.mean_diffs.abs().amax()
    directions = dataclasses.replace(directions, mean_diffs=slanted)
    return (
        held,
        positive,
        negative,
        directions,
        score_candidates(held, positive, negative, directions, ["dim"], READOUT),
    )


def test_candidates_are_scored_with_centred_directions(scored):
    held, positive, _, directions, candidates = scored
    uncentred = []
    for c in candidates:
        affine = directions.removal(c.finder, c.position, c.layer)
        values = []
        for removed in (centred_map(affine), affine):
            with layer_projected(held, c.layer, removed):
                values.append(behaviour_score(plain_probabilities(held, positive), TOKENS).mean().item())
        assert c.bypass == pytest.approx(values[0], abs=1e-4), c
        uncentred.append(abs(values[1] - values[0]))
    assert max(uncentred) > 1e-2


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("scope", ["all", "layers:1-2"])
def test_leace_restores_the_mean_that_the_norms_see(scored, scope, per_layer):
    """What the linear parts take from the mean of all writes, as far as a LayerNorm sees it, the shifts give back."""
    *_, directions, _ = scored
    choice = EditConfig(method="leace", scope=scope, position=-1, layer=None if per_layer else 2, per_layer=per_layer)
    edit = intervention_from_directions(choice, directions, layer_norm=True)

    def visible(vector):
        return vector - vector.mean()

    def written(site):
        """The mean that the block of `site` adds to the stream, or the embedding's."""
        if site.kind == "embed":
            return directions.mean(-1, 0) if per_layer or scope != "all" else directions.mean(-1, 2)
        return directions.mean(-1, site.layer + 1) - directions.mean(-1, site.layer)

    restored = sum(affine.s for affine in edit.writes.values())
    if scope == "all" and not per_layer:  # the stream's whole mean, where the eraser was fitted
        sites = [site for site in edit.writes if site.kind == "embed"]
    else:  # each block's own, which its last write restores
        sites = [site for site in edit.writes if site.kind in ("embed", "mlp")]
    lost = sum(edit.writes[site].u @ (edit.writes[site].v.mT @ written(site)) for site in sites)
    assert visible(lost).norm() > 0
    assert (visible(restored) - visible(lost)).norm() <= 1e-6 * visible(lost).norm()


def test_trial_scores_as_the_written_checkpoint(scored, model, tmp_path):
    held, positive, negative, directions, candidates = scored
    choice = EditConfig(method="ablate", scope="all", position=-1, layer=2)
    build = EditBuilder(directions, candidates, True)
    trials = EditSearch(held, build, READOUT, positive, AnsweredPrompts(held, negative, some_ids(7, 3)))
    intervention = intervention_from_directions(choice, directions, layer_ranking(candidates, "dim"))
    bake(open_checkpoint(model), centred(intervention)).write(tmp_path)
    expected = behaviour_score(plain_probabilities(load(tmp_path), positive), TOKENS).mean().item()
    assert trials.run(choice).score == pytest.approx(expected, abs=1e-4)


def test_only_edits_that_can_be_written_are_tried(model, sources, tmp_path):
    """GPT-NeoX has no bias to keep what its head reads of the norm's own, so no `from:` scope can be baked into it."""
    settings = dataclasses.replace(UNTRIED, trials=6, max_rank=1)
    found = extract(str(model), tmp_path / "run", **sources, settings=settings)
    assert found.trials
    assert {"ablate", "conditional"} <= {trial.choice.method for trial in found.trials}
    plain = [trial.choice for trial in found.trials if trial.choice.method != "conditional"]
    assert not [choice for choice in plain if choice.scope.startswith("from:")]
    edit(str(model), tmp_path / "edited", run=tmp_path / "run", pick=1)
    with pytest.raises(OrthogonalizeError, match="LayerNorm with a bias"):
        edit(str(model), tmp_path / "read", run=tmp_path / "run", method="ablate", scope="from:2")


def test_swept_edit_measures_as_the_written_checkpoint(model, run, tmp_path):
    quick = {"engine": "hf", "max_new_tokens": 4, "suites": ["kl"]}
    (found,) = sweep(str(model), run, tmp_path / "sweep", methods=["ablate"], scopes=["all"], **quick).variants
    place = {"position": found.choice.position, "layer": found.choice.layer}
    edit(str(model), tmp_path / "edited", run=run, method="ablate", scope="all", **place)
    report = evaluate(tmp_path / "edited", str(model), run, tmp_path / "report", **quick)
    expected = report.edited.flat()
    assert expected
    for key, measure in found.measures.flat().items():
        assert measure.value == pytest.approx(expected[key].value, rel=1e-4), key
