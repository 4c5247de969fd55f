"""`extract --orthogonal-to harmless-mean`: directions have no component along the negative side's mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.command_line import UNTRIED, command
from helpers.recordings import store_recording

from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import centred_map, removal
from orthogonalize.directions.direction_set import Directions
from orthogonalize.directions.finders.base import DirectionFinder, Fitted
from orthogonalize.directions.finders.registry import FINDERS
from orthogonalize.directions.fit import DirectionSettings, find_directions
from orthogonalize.directions.inlp.nullspace import Subspace
from orthogonalize.directions.means import geometric_median
from orthogonalize.directions.orthogonal import orthogonal_to, orthogonal_to_harmless_mean
from orthogonalize.directions.stability import split_half_cosines
from orthogonalize.edits.build import intervention_from_directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.settings import Settings

RUN_SETTINGS = UNTRIED.with_changes(enough=0)
WIDTH, LAYERS, POSITIONS = 12, 2, (-2, -1)
PLACES = [(position, layer) for position in POSITIONS for layer in range(LAYERS + 1)]


class Spread(DirectionFinder):
    """Two directions per place, so that the rows of a registered finder's basis are seen to change."""

    name, title, summary = "spread", "spread", "largest variances"

    def fit(self, positive, negative, settings) -> Fitted:
        samples = torch.cat([positive, negative]).double().permute(1, 2, 0, 3)
        return Fitted({"basis": torch.linalg.svd(samples, full_matrices=False)[2][..., :2, :]})


@pytest.fixture(scope="module", autouse=True)
def spread():
    FINDERS.add(Spread())
    yield
    FINDERS.remove("spread")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two sides far from the origin, so that their difference has much along the harmless mean."""
    generator = torch.Generator().manual_seed(0)
    shape = (40, len(POSITIONS), LAYERS + 1, WIDTH)
    positive, negative = (torch.randn(shape, generator=generator) + 3 for _ in range(2))
    positive[..., :3] += 2
    return store_recording(tmp_path_factory.mktemp("recording"), positive=positive, negative=negative)


def settings(*finders: str, **others) -> DirectionSettings:
    return DirectionSettings(finders or ("dim", "inlp", "leace", "spread"), 3, "newton", "logistic", 0, 1, **others)


def fit(recording, *finders: str, layer_norm: bool = False, **others) -> Directions:
    device = torch.device("cpu")
    return find_directions(
        recording, POSITIONS, LAYERS + 1, settings(*finders, **others), device, layer_norm=layer_norm
    )


@pytest.mark.parametrize("mean", ["arithmetic", "geometric-median"])
def test_every_direction_is_orthogonal_to_the_harmless_mean(mean, recording):
    plain, found = (fit(recording, mean=mean, orthogonal_to=to) for to in (None, "harmless-mean"))
    assert torch.equal(plain.negative_means, found.negative_means)
    for finder in ("dim", "inlp", "spread"):
        for position, layer in PLACES:
            harmless = found.negative_mean(position, layer)
            before, after = (each.basis(finder, position, layer) for each in (plain, found))
            assert (before @ harmless).abs().max() > 0.1
            assert (after @ harmless).abs().max() <= 1e-9
            assert len(after) == len(before)
            assert torch.allclose(after @ after.T, torch.eye(len(after), dtype=torch.float64), atol=1e-9)
            with_mean = torch.linalg.matrix_rank(
                torch.cat([before, after, harmless[None] / harmless.norm()]), atol=1e-6
            )
            assert with_mean == len(before) + 1, "what is left is in the span of the directions and the mean"
    if mean == "geometric-median":
        rows = recording.read("negative.train", 1)
        assert torch.allclose(found.negative_means[:, 1], geometric_median(rows), atol=1e-9)


def test_one_gram_schmidt_step_is_all_that_changes(recording):
    plain, found = fit(recording), fit(recording, orthogonal_to="harmless-mean")
    for position, layer in PLACES:
        diff, harmless = plain.mean_diff(position, layer), plain.negative_mean(position, layer)
        expected = diff - (diff @ harmless) / (harmless @ harmless) * harmless
        assert torch.allclose(found.mean_diff(position, layer), expected, atol=1e-9)
        assert found.subspaces[position, layer].accuracies == plain.subspaces[position, layer].accuracies
        for name in ("u", "v", "mean"):  # LEACE's erasers would not erase otherwise
            pair = [getattr(each.eraser(position, layer), name) for each in (plain, found)]
            assert torch.allclose(*pair, atol=1e-12)
        assert torch.allclose(*(each.basis("leace", position, layer) for each in (plain, found)), atol=1e-12)


def test_orthogonality_survives_saving_and_removal_spares_the_mean(recording, tmp_path):
    fit(recording, orthogonal_to="harmless-mean").save(tmp_path / "directions.safetensors")
    stored = Directions.load(tmp_path / "directions.safetensors")
    for finder in ("dim", "inlp", "spread"):
        harmless = stored.negative_mean(-1, 2)
        assert (removal(stored.basis(finder, -1, 2))(harmless) - harmless).norm() <= 1e-6 * harmless.norm()
    choice = EditConfig(method="ablate", position=-1, layer=2, to="harmless-mean")
    shifts = [affine.s.norm() for affine in intervention_from_directions(choice, stored).writes.values()]
    assert max(shifts) <= 1e-6 * harmless.norm(), "that mean's component is zero now"


def test_behind_layer_norm_it_is_the_mean_that_the_norms_see(recording):
    found = fit(recording, orthogonal_to="harmless-mean", layer_norm=True)
    for finder in ("dim", "inlp", "spread"):
        for position, layer in PLACES:
            mean = found.negative_mean(position, layer)
            visible = mean - mean.mean()
            affine = centred_map(removal(found.basis(finder, position, layer)))  # as `edit` writes it
            assert (affine.v.T @ visible).abs().max() <= 1e-9
            assert (found.basis(finder, position, layer) @ mean).abs().max() > 1e-3


def test_direction_that_a_place_loses_is_missing_there(recording):
    plain = fit(recording)
    harmless = plain.negative_means
    diffs = plain.mean_diffs.clone()
    diffs[1, 1] = -0.3 * harmless[1, 1]
    unit = torch.nn.functional.normalize(harmless[1, 1], dim=0)
    axes = torch.eye(WIDTH, dtype=torch.float64)
    basis = torch.linalg.qr(torch.stack([axes[0], unit + axes[0], axes[1]]).T)[0].T  # spans the mean with two rows
    subspaces = plain.subspaces | {(-1, 1): Subspace(basis, (0.9, 0.8, 0.7))}
    given = dataclasses.replace(plain, mean_diffs=diffs, subspaces=subspaces)
    found = orthogonal_to_harmless_mean(given)
    assert found.basis("dim", -1, 1) is None
    assert found.basis("leace", -1, 1) is not None
    assert found.subspaces[-1, 1].accuracies == (0.9, 0.7)
    assert found.basis("inlp", -1, 1).shape == (2, WIDTH)
    assert (found.basis("inlp", -1, 1) @ unit).abs().max() <= 1e-9
    for method in ("ablate", "actadd"):
        with pytest.raises(OrthogonalizeError, match="no direction at position -1, layer 1"):
            intervention_from_directions(EditConfig(method=method, scope="one", position=-1, layer=1), found)


def test_nothing_left_anywhere_is_an_error(recording):
    plain = fit(recording)
    units = torch.nn.functional.normalize(plain.negative_means, dim=-1)
    along = {place: Subspace(units[POSITIONS.index(place[0]), place[1]][None], (0.9,)) for place in PLACES}
    for finder, changes in {
        "dim": {"mean_diffs": 2 * plain.negative_means},
        "inlp": {"subspaces": along},
        "spread": {"tensors": {"spread.basis": -plain.negative_means[:, :, None]}},
    }.items():
        with pytest.raises(OrthogonalizeError, match=f"nothing is left of the {finder} directions once"):
            orthogonal_to_harmless_mean(dataclasses.replace(plain, **changes))
    with pytest.raises(OrthogonalizeError, match="stored without the negative side's means"):
        orthogonal_to_harmless_mean(dataclasses.replace(plain, negative_means=None))


def test_zero_mean_changes_nothing():
    vectors = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(orthogonal_to(vectors, torch.zeros(5)), vectors)


def test_stability_is_that_of_the_orthogonal_directions(recording):
    pools = [recording.read(f"{side}.train", 1)[:, :, None] for side in ("positive", "negative")]
    found = split_half_cosines(pools, [20, 20], settings("dim", orthogonal_to="harmless-mean"))["dim"]
    plain = split_half_cosines(pools, [20, 20], settings("dim"))["dim"]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(40, generator=generator) for _ in pools]
    halves = [
        [pool[order[k : k + 20]].double().mean(0) for pool, order in zip(pools, orders, strict=True)] for k in (0, 20)
    ]
    cleaned = [orthogonal_to(positive - negative, negative) for positive, negative in halves]
    assert torch.allclose(found[0], torch.nn.functional.cosine_similarity(*cleaned, dim=-1), atol=1e-9)
    assert not torch.allclose(found, plain, atol=1e-4)


def test_command_line_makes_directions_orthogonal(run, model, sources, tmp_path):
    words = ("--positive", sources["positive"], "--negative", sources["negative"], "--train", "12", "--val", "4")
    words += (
        "--test",
        "6",
        "--no-filter",
        "--behaviour-tokens",
        "sorry",
        "--max-rank",
        "2",
        "--trials",
        "0",
        "--enough",
        "0",
    )
    out = tmp_path / "run"
    status, said = command("extract", model, "--out", out, *words, "--orthogonal-to", "harmless-mean")
    assert status == 0, said
    plain, found = load_run(run).directions, load_run(out).directions
    for each, orthogonal in ((plain, False), (found, True)):
        harmless = each.negative_mean(-1, 2)
        for finder in ("dim", "inlp"):
            cosines = each.basis(finder, -1, 2) @ harmless / harmless.norm()
            assert (cosines.abs().max() < 1e-6) == orthogonal
    assert torch.equal(plain.readers, found.readers)
    scores = [
        {(c.finder, c.position, c.layer): c for c in load_run(folder).candidates if c.finder != "inlp"}
        for folder in (run, out)
    ]
    places = [(position, layer) for finder, position, layer in scores[1] if finder == "leace" and layer > 0]
    assert places
    for place in places:
        assert scores[1]["leace", *place].bypass == pytest.approx(scores[0]["leace", *place].bypass, abs=1e-5)
        assert scores[0]["leace", *place].induce == scores[0]["dim", *place].induce, "the same direction is added"
        assert scores[1]["leace", *place].induce != scores[1]["dim", *place].induce, "not the same, so each is scored"
    with pytest.raises(OrthogonalizeError, match="a different orthogonal_to; use --force"):
        extract(str(model), run, **sources, settings=RUN_SETTINGS, orthogonal_to="harmless-mean")
    with pytest.raises(OrthogonalizeError, match="--orthogonal-to must be harmless-mean; got zero"):
        Settings(orthogonal_to="zero").check()
