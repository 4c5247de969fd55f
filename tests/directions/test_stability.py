"""Stability of directions: split halves tell what independent draws would."""

from __future__ import annotations

import pytest
import torch

from orthogonalize.directions.fit import DirectionSettings
from orthogonalize.directions.stability import spearman_brown, split_half_cosines

WIDTH, GAP, N = 200, 3.2, 40  # chosen so that independent draws of N prompts per side have a cosine of about 0.56


def side(count: int, sign: int, generator: torch.Generator) -> torch.Tensor:
    """Activations [count, 1, 1, d] of one side: unit noise around plus or minus half the gap on one axis."""
    x = torch.randn(count, 1, 1, WIDTH, generator=generator, dtype=torch.float64)
    x[..., 0] += sign * GAP / 2
    return x


def independent_cosine(count: int) -> float:
    """The mean cosine of mean differences of fresh samples of `count` per side."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(300):
        a, b = (side(count, 1, generator).mean(0) - side(count, -1, generator).mean(0) for _ in range(2))
        found.append(torch.nn.functional.cosine_similarity(a, b, dim=-1).item())
    return sum(found) / len(found)


def of(draws: int, *finders: str, **others) -> DirectionSettings:
    return DirectionSettings(finders, None, "newton", "logistic", 0, draws, **others)


def reported_cosine(count: int, pool: int) -> float:
    """What is reported for runs on `count` prompts per side out of pools of `pool`, over many such pools."""
    generator = torch.Generator().manual_seed(2)
    pools = [[side(pool, sign, generator) for sign in (1, -1)] for _ in range(40)]
    return sum(split_half_cosines(p, [count, count], of(3, "dim"))["dim"].mean().item() for p in pools) / len(pools)


@pytest.mark.parametrize("pool", [2 * N, N], ids=["spare prompts enough", "halves corrected to full size"])
def test_reported_stability_is_that_of_independent_draws(pool):
    """Draws that share prompts would say more: the same samples in both look like agreement."""
    expected = independent_cosine(N)
    assert 0.4 < expected < 0.8, "a cosine at which being wrong shows"
    assert reported_cosine(N, pool) == pytest.approx(expected, abs=0.05)
    generator = torch.Generator().manual_seed(3)
    pools = [side(N + N // 4, sign, generator) for sign in (1, -1)]
    overlapping = [torch.randperm(len(pools[0]), generator=generator)[:N] for _ in range(2)]
    means = [pools[0][rows].mean(0) - pools[1][rows].mean(0) for rows in overlapping]
    assert torch.nn.functional.cosine_similarity(*means, dim=-1).item() > expected + 0.15


def test_noise_alone_is_reported_as_no_stability():
    generator = torch.Generator().manual_seed(4)
    pools = [torch.randn(80, 2, 3, WIDTH, generator=generator) for _ in range(2)]
    found = split_half_cosines(pools, [40, 40], of(4, "dim", "inlp"))
    assert found["dim"].shape == found["inlp"].shape == (4, 2, 3)
    assert found["dim"].abs().mean() < 0.15
    assert found["inlp"].abs().mean() < 0.15
    again = split_half_cosines(pools, [40, 40], of(4, "dim", "inlp"))
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_spearman_brown_for_known_sizes():
    assert spearman_brown(torch.tensor(0.5), 2).item() == pytest.approx(2 / 3)
    assert spearman_brown(torch.tensor(1.0), 3).item() == 1.0
    assert spearman_brown(torch.tensor(-0.2), 2).item() == pytest.approx(-0.2)
