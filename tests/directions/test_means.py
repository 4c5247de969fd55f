"""Robust means against independent references, and what one outlier does to a direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import UNTRIED, command
from helpers.recordings import store_recording
from scipy.optimize import minimize
from scipy.stats.mstats import winsorize

from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.directions.direction_set import Directions
from orthogonalize.directions.fit import DirectionSettings, find_directions
from orthogonalize.directions.leace import leace
from orthogonalize.directions.means import arithmetic_mean, find_mean, geometric_median, winsorized_mean
from orthogonalize.directions.stability import split_half_cosines
from orthogonalize.selection.run_folder import load_run

RUN_SETTINGS = UNTRIED
ROBUST = ["winsorized", "winsorized:0.9", "geometric-median"]


def samples(n: int = 30, *shape: int, seed: int = 0) -> torch.Tensor:
    """Samples [n, *shape] of a skewed distribution, so that the means differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).exp()


def settings(*finders: str, mean: str = "arithmetic", seeds: int = 1) -> DirectionSettings:
    return DirectionSettings(finders, 2, "newton", "logistic", 0, seeds, mean)


def fit(recording, *finders: str, **others) -> Directions:
    return find_directions(recording, (-2, -1), 3, settings(*finders, **others), torch.device("cpu"))


@pytest.mark.parametrize(("n", "quantile", "clipped"), [
    (30, 0.9, 3), (200, 0.995, 1), (1000, 0.995, 5), (40, 0.8, 8),
    (128, 0.995, 1), (31, 0.9, 4),  # rounded up: 0.64 and 3.1 values
    (3, 0.6, 1), (2, 0.9, 0), (1, 0.9, 0),  # never more than leaves a value
])  # fmt: skip
def test_winsorized_mean_equals_that_of_scipy(n, quantile, clipped):
    x = samples(n, 2, 5)
    expected = np.asarray(winsorize(x.numpy(), limits=(clipped / n + 1e-12,) * 2, axis=0)).mean(0)
    assert np.allclose(winsorized_mean(x, quantile).numpy(), expected, atol=1e-12)
    if clipped:
        assert not np.allclose(expected, x.mean(0).numpy(), atol=1e-3)


@pytest.mark.parametrize(("n", "d"), [(7, 2), (30, 5), (20, 60)])
def test_geometric_median_minimises_the_sum_of_distances(n, d):
    """Against a quasi-Newton optimiser, and by the condition of optimality: the unit vectors to the samples cancel."""
    x = samples(n, 2, d, seed=n)
    found = geometric_median(x)
    for i in range(2):
        here = x[:, i].numpy()

        def distances(y, here=here):
            return np.linalg.norm(here - y, axis=1).sum()

        best = minimize(distances, here.mean(0), method="BFGS", options={"gtol": 1e-10})
        assert distances(found[i].numpy()) <= best.fun + 1e-9
        assert np.allclose(found[i].numpy(), best.x, atol=1e-4)
        assert not np.allclose(found[i].numpy(), here.mean(0), atol=1e-2)
        offsets = x[:, i] - found[i]
        assert (offsets / offsets.norm(dim=-1, keepdim=True)).sum(0).norm() < 1e-6


def test_geometric_median_may_be_a_sample():
    """Where plain Weiszfeld divides by zero: a sample that is the median, and the start at one that is not."""
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) + 50
    centre = torch.tensor([[50.0, 50]])
    assert torch.allclose(geometric_median(torch.cat([corners, centre])), centre[0].double(), atol=1e-9)
    assert torch.allclose(geometric_median(torch.cat([centre, corners, centre])), centre[0].double(), atol=1e-9)
    line = torch.tensor([[0.0], [1], [2], [10], [100]])
    assert geometric_median(line).item() == pytest.approx(2)
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [3, 3]])  # its coordinates' median is the first sample
    found = geometric_median(x)
    crossing = torch.tensor([0.5, 0.5], dtype=torch.float64)  # of the diagonals of a convex quadrilateral
    assert torch.allclose(found, crossing, atol=1e-6)
    star = torch.tensor([[0.0, 0], [1, 0], [-1, 0.1], [0, 1], [0.1, -1]])  # pulled with 0.15, which the first resists
    assert torch.equal(geometric_median(star), star[0].double())
    same = torch.full((5, 3), 2.5)
    assert torch.equal(geometric_median(same), same[0].double())


def test_large_common_part_costs_no_accuracy():
    x = samples(25, 8)
    for mean in map(find_mean, ["arithmetic", *ROBUST]):
        assert torch.allclose(mean(x + 1e5) - 1e5, mean(x), atol=1e-8)


@pytest.mark.parametrize("mean", ROBUST)
def test_outlier_moves_the_arithmetic_mean_but_not_the_robust(mean, tmp_path):
    """One prompt with a massive activation in one coordinate of its last token turns the plain direction."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(40, 2, 3, 16, generator=generator) for _ in range(2))
    positive[..., 0] += 4
    clean = store_recording(tmp_path / "clean", positive=positive, negative=negative)
    spoilt = positive.clone()
    spoilt[7, -1, 1, 5] = 1e5
    outlying = store_recording(tmp_path / "outlying", positive=spoilt, negative=negative)

    def cosine(mean):
        pair = [fit(recording, "dim", mean=mean).basis("dim", -1, 1)[0] for recording in (clean, outlying)]
        return (pair[0] @ pair[1]).item()

    assert abs(cosine("arithmetic")) < 0.1
    assert cosine(mean) > 0.99


@pytest.mark.parametrize("mean", ROBUST)
def test_fitted_directions_are_differences_of_the_chosen_means(mean, tmp_path):
    sides = {"positive": samples(20, 2, 3, 8).float(), "negative": samples(24, 2, 3, 8, seed=1).float()}
    recording = store_recording(tmp_path, **sides)
    plain, found = fit(recording, "dim", "leace"), fit(recording, "dim", "leace", mean=mean)
    own = {side: find_mean(mean)(x) for side, x in sides.items()}
    assert torch.allclose(found.mean_diffs, own["positive"] - own["negative"], atol=1e-12)
    assert torch.allclose(found.negative_means, own["negative"], atol=1e-12)
    assert torch.allclose(plain.negative_means, sides["negative"].double().mean(0), atol=1e-12)
    assert not torch.allclose(found.mean_diffs, plain.mean_diffs, atol=1e-2)
    assert torch.equal(found.means, plain.means)


def test_leace_is_fitted_to_arithmetic_means_in_any_case(tmp_path):
    sides = {"positive": samples(20, 2, 3, 8).float(), "negative": samples(24, 2, 3, 8, seed=1).float()}
    recording = store_recording(tmp_path, **sides)
    plain, found = fit(recording, "dim", "leace"), fit(recording, "dim", "leace", mean="geometric-median")
    assert plain.leace_differences is None
    expected = leace(sides["positive"], sides["negative"])[1, 2]
    found.save(tmp_path / "directions.safetensors")
    stored = Directions.load(tmp_path / "directions.safetensors")
    for directions, tolerance in ((plain, 1e-9), (found, 1e-9), (stored, 1e-5)):
        affine = directions.eraser(-1, 2).affine()
        for name in "uvs":
            assert torch.allclose(getattr(affine, name), getattr(expected.affine(), name), atol=tolerance), name
        unit = torch.nn.functional.normalize(expected.u, dim=0)
        assert torch.allclose(directions.basis("leace", -1, 2)[0], unit, atol=tolerance)
    assert torch.allclose(found.centred().eraser(-1, 2).u, expected.u - expected.u.mean(), atol=1e-9)
    assert not torch.allclose(found.basis("dim", -1, 2), found.basis("leace", -1, 2), atol=1e-3)


def test_stability_is_that_of_the_chosen_mean():
    pools = [samples(40, 1, 1, 6, seed=seed) for seed in range(2)]
    found = split_half_cosines(pools, [20, 20], settings("dim", mean="geometric-median", seeds=1))["dim"]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(40, generator=generator) for _ in pools]
    halves = [
        [geometric_median(pool[order[k : k + 20]]) for k in (0, 20)] for pool, order in zip(pools, orders, strict=True)
    ]
    first, second = (halves[0][k] - halves[1][k] for k in range(2))
    assert torch.allclose(found[0], torch.nn.functional.cosine_similarity(first, second, dim=-1), atol=1e-9)


@pytest.mark.parametrize("text", ["median", "winsorized:", "winsorized:1", "winsorized:1.5", "winsorized:0.5", ""])
def test_unknown_mean_says_which_exist(text):
    with pytest.raises(OrthogonalizeError, match=r"give arithmetic, winsorized .* or geometric-median"):
        find_mean(text)


def test_means_have_their_names():
    x = samples(20, 3)
    assert find_mean("arithmetic") is arithmetic_mean
    assert torch.equal(find_mean("winsorized")(x), winsorized_mean(x, 0.995))
    assert torch.equal(find_mean("winsorized:.8")(x), winsorized_mean(x, 0.8))
    assert find_mean("geometric-median") is geometric_median


def test_extract_with_another_mean_redoes_the_directions(run, model, sources, tmp_path):
    words = ("--positive", sources["positive"], "--negative", sources["negative"], "--train", "12", "--val", "4")
    words += ("--test", "6", "--no-filter", "--behaviour-tokens", "sorry", "--max-rank", "2", "--trials", "0")
    status, said = command("extract", model, "--out", tmp_path / "run", *words, "--mean", "winsorized:0.8")
    assert status == 0, said
    plain, found = load_run(run).directions, load_run(tmp_path / "run").directions
    assert (tmp_path / "run" / "activations.safetensors").read_bytes() == (run / "activations.safetensors").read_bytes()
    assert torch.equal(plain.means, found.means)
    assert not torch.allclose(plain.mean_diffs, found.mean_diffs, atol=1e-4)
    with pytest.raises(OrthogonalizeError, match="was done with a different mean; use --force"):
        extract(str(model), Path(run), **sources, settings=RUN_SETTINGS, mean="geometric-median")
    status, said = command("extract", model, "--out", tmp_path / "other", *words, "--mean", "mode")
    assert (status, said[:19]) == (1, "error: --mean mode:")
