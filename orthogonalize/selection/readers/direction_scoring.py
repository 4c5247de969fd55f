"""The scores of single directions, by whatever measures them, and the places that are scored."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch

from ...core.errors import OrthogonalizeError
from ...core.interventions import AffineMap, centred_map, shift, stack_maps
from ...data.prompts import Side
from ...directions.direction_set import Directions
from ...directions.finders.registry import FINDERS
from ..candidates import Candidate, Mean
from .estimates import ScoreGradients
from .meters import Meter, ScoredMaps

MULTIPLIERS = (0.5, 1.0, 2.0)  # lengths at which a direction is added, in units of the mean difference


@dataclass(frozen=True)
class Places:
    """Where directions may come from: tokens, counted from the end of the prompt, and layers."""

    positions: tuple[int, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(
        cls,
        positions: Sequence[int],
        layer_count: int,
        chosen_positions: Sequence[int] | None = None,
        chosen_layers: Sequence[int] | None = None,
    ) -> Places:
        """The chosen ones among those that a run has; None chooses all.

        Raises:
            OrthogonalizeError: a chosen one does not exist.
        """
        found = []
        for name, chosen, known in (
            ("position", chosen_positions, list(positions)),
            ("layer", chosen_layers, list(range(layer_count))),
        ):
            beyond = [each for each in chosen or [] if each not in known]
            if beyond:
                raise OrthogonalizeError(
                    f"--{name}s: there is no {name} {beyond[0]}; this model's {name}s are {known[0]} to {known[-1]}"
                )
            found.append(tuple(each for each in known if chosen is None or each in chosen))
        return cls(*found)


def score_key(finder: str, layer: int) -> str:
    """The name of the scores of a finder at a layer in a `ScoreStore`."""
    return f"candidates:{finder}:{layer}"


def adds_mean_difference(finder: str, directions: Directions) -> bool:
    """Whether adding the first direction of `finder` is the same as adding that of every other such finder."""
    return FINDERS[finder].adds_mean_difference and directions.leace_erases_mean_diffs


@dataclass
class DirectionScoring:
    """Scores the directions of a run; `meter` measures, and `layer_norm` says whether the model has LayerNorms."""

    meter: Meter
    directions: Directions
    everywhere: bool
    layer_norm: bool

    def removals(self, finder: str, layer: int, positions: Sequence[int]) -> dict[int, AffineMap]:
        """The map that removes each position's direction, as `edit` does; none where there is no direction."""
        found = {p: self.directions.removal(finder, p, layer) for p in positions}
        return {p: centred_map(m) if self.layer_norm else m for p, m in found.items() if m is not None}

    def estimates(
        self, finder: str, layer: int, positions: Sequence[int], gradients: Mapping[Side, ScoreGradients]
    ) -> list[Candidate]:
        """Estimate bypass and induce of `finder` at some positions of `layer` to first order."""
        return [
            self._candidate(
                finder, p, layer, m.rank,
                Mean(gradients["positive"].projected(layer, m), None),
                Mean(gradients["negative"].shifted(layer, shift(self._added(finder, p, layer))), None),
            )
            for p, m in self.removals(finder, layer, positions).items()
        ]  # fmt: skip

    def _added(self, finder: str, position: int, layer: int) -> torch.Tensor:
        """The first direction [d] of `finder`, as long as the mean difference."""
        basis = self.directions.basis(finder, position, layer)
        assert basis is not None
        length: torch.Tensor = self.directions.mean_diff(position, layer).norm()
        return length * basis[0]

    def bypass(self, finder: str, layer: int, positions: Sequence[int]) -> list[Candidate]:
        """Score `finder` at some positions of `layer` by bypass alone."""
        maps = self.removals(finder, layer, positions)
        if not maps:
            return []
        scores = _means(self.meter.behaviour(ScoredMaps("positive", stack_maps(list(maps.values())), layer)))
        return [
            self._candidate(finder, p, layer, m.rank, bypass)
            for (p, m), bypass in zip(maps.items(), scores, strict=True)
        ]

    def kl(self, finder: str, layer: int, positions: Sequence[int]) -> dict[int, Mean]:
        """The KL of removing each direction of `finder` at some positions of `layer`."""
        maps = self.removals(finder, layer, positions)
        means = _means(self.meter.kl(ScoredMaps("negative", stack_maps(list(maps.values())), layer)))
        return dict(zip(maps, means, strict=True))

    def layer(
        self, finder: str, layer: int, positions: Sequence[int], induced: MutableMapping[tuple[int, int], Mean]
    ) -> list[Candidate]:
        """Score `finder` at some positions of `layer`; `induced` keeps the scores of added mean differences."""
        maps = self.removals(finder, layer, positions)
        if not maps:
            return []
        removals = stack_maps(list(maps.values()))
        bypassed = _means(self.meter.behaviour(ScoredMaps("positive", removals, layer)))
        kl = _means(self.meter.kl(ScoredMaps("negative", removals, layer)))
        induce = self._induce(finder, layer, list(maps), induced)
        bypass_all, kl_all = self._everywhere(removals)
        return [
            self._candidate(
                finder, p, layer, m.rank, bypassed[i], induce[i], kl[i],
                bypass_all[i] if bypass_all else None, kl_all[i] if kl_all else None,
            )
            for i, (p, m) in enumerate(maps.items())
        ]  # fmt: skip

    def _candidate(
        self,
        finder: str,
        position: int,
        layer: int,
        rank: int,
        bypass: Mean,
        induce: Mean | None = None,
        kl: Mean | None = None,
        global_bypass: float | None = None,
        global_kl: float | None = None,
    ) -> Candidate:
        count, accuracy = self.directions.layer_count, FINDERS[finder].accuracy(self.directions, position, layer)
        return Candidate(
            finder, position, layer, count, bypass.value,
            induce.value if induce else None, kl.value if kl else None, rank, accuracy, global_bypass, global_kl,
            bypass_ci95=bypass.ci95, induce_ci95=induce.ci95 if induce else None, kl_ci95=kl.ci95 if kl else None,
        )  # fmt: skip

    def _induce(
        self, finder: str, layer: int, positions: list[int], induced: MutableMapping[tuple[int, int], Mean]
    ) -> list[Mean]:
        """The median over the multipliers of the mean score with the first direction added, per position."""
        shared = adds_mean_difference(finder, self.directions)  # which another finder may have scored
        known = {p: induced[p, layer] for p in positions if shared and (p, layer) in induced}
        missing = [p for p in positions if p not in known]
        if missing:
            added = [self._added(finder, position, layer) for position in missing]
            shifts = [multiplier * each for each in added for multiplier in MULTIPLIERS]
            scores = self.meter.behaviour(ScoredMaps("negative", shift(torch.stack(shifts)), layer, projected=False))
            means = _means(scores)
            for i, position in enumerate(missing):
                lengths = sorted(means[i * len(MULTIPLIERS) : (i + 1) * len(MULTIPLIERS)], key=lambda m: m.value)
                known[position] = lengths[len(lengths) // 2]
        if shared:
            induced.update({(p, layer): value for p, value in known.items()})
        return [known[p] for p in positions]

    def _everywhere(self, removals: AffineMap) -> tuple[list[float], list[float]]:
        if not self.everywhere:
            return [], []
        bypassed = self.meter.behaviour(ScoredMaps("positive", removals, None))
        kl = self.meter.kl(ScoredMaps("negative", removals, None))
        return bypassed.mean(-1).tolist(), kl.mean(-1).tolist()


def _means(scores: torch.Tensor) -> list[Mean]:
    """The means of scores [maps, prompts], by map."""
    return [Mean.of(row) for row in scores.tolist()]
