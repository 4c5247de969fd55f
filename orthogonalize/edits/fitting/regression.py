"""The regression of one write matrix: what it takes in of each set of tokens, and the map that solves it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch

from ...core.interventions import ConditionalMap
from ...directions.conditional import InputMoments, InputTokens, Weights, solve
from ...models.stream import Stream, squares_of
from ...models.write_matrices import WriteModule

# An expert that saw fewer tokens of a set is left as it is: its own regression would mean nothing.
FEWEST = 16
TARGET, EXAMPLES, HARMLESS = "target", "examples", "harmless"
FIRST = f"{HARMLESS}, first"
FURTHER = f"{FIRST}, further"  # tokens that are added to those of `FIRST`


class Mean:
    """A streaming mean of vectors, in float64."""

    def __init__(self) -> None:
        self.count, self._sum = 0, torch.zeros(())

    def update(self, values: torch.Tensor) -> None:
        """Add vectors [count, k]."""
        total = values.to(torch.float64).sum(0)
        self._sum = total if not self.count else self._sum + total
        self.count += len(values)

    def add(self, other: Mean) -> None:
        """Add the vectors of another mean, which may be on another device."""
        self._sum = other._sum if not self.count else self._sum + other._sum.to(self._sum.device)
        self.count += other.count

    @property
    def mean(self) -> torch.Tensor:
        """The mean [k]."""
        return self._sum / self.count


class _Reading:
    """How a matrix is read: as the stream gets what it puts out, behind the norm that may follow."""

    def __init__(self, module: WriteModule, stream: Stream) -> None:
        self.norm: tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None = None
        scale = stream.post_scale(module.matrix.site, module.part)
        if scale is not None:
            self.norm = scale, squares_of(stream.architecture.norms, stream.architecture.epsilon(stream.config))

    def __call__(self, inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.norm is None:
            return inputs, outputs
        scale, squares = self.norm  # the stream gets D y / rms(y): the map is linear in x / rms(y)
        length = squares(outputs).sqrt()
        return inputs.to(length) / length, scale.to(length) * (outputs.to(length) / length)


class KeptInputs:
    """What one write matrix takes in of tokens that should not move, and what it puts out for harmless ones on average.

    It is read in the unedited model, also for fits behind earlier edits: those leave these tokens where they are, but
    for what they fail to keep. So it depends on no edit and no direction, and fits of one model share it.

    Attributes:
        shares: the weight of each set besides the harmless one.
        written: the mean outputs [d] of harmless tokens, by expert (None: there are no experts).
    """

    def __init__(self, module: WriteModule, stream: Stream, shares: Mapping[str, float]) -> None:
        self.shares, self.reading = shares, _Reading(module, stream)
        self.seen: dict[int | None, dict[str, InputTokens]] = {}
        self.written: dict[int | None, Mean] = {}

    def take(self, name: str, expert: int | None, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add the tokens of one set: inputs [tokens, n], outputs [tokens, d]."""
        inputs, outputs = self.reading(inputs, outputs)
        if name == HARMLESS:
            self.written.setdefault(expert, Mean()).update(outputs)
        sets = self.seen.setdefault(expert, {})
        sets.setdefault(FIRST if name == FURTHER else name, InputTokens()).update(inputs, outputs[:, :0])

    def weighed(self, shares: Mapping[str, float]) -> KeptInputs:
        """The same tokens with other weights."""
        other = copy.copy(self)
        other.shares = shares
        return other

    def part(self) -> KeptInputs:
        """What further tokens are added to, before it is added to this."""
        other = copy.copy(self)
        other.seen, other.written = {}, {}
        return other

    @torch.inference_mode()
    def add(self, part: KeptInputs, device: torch.device) -> None:
        """Add what a part has seen, which may be on another device; sums are kept on `device`."""
        for expert, mean in part.written.items():
            self.written.setdefault(expert, Mean()).add(mean)
        _add(self.seen, part.seen, device)

    @torch.inference_mode()
    def merge(self) -> None:
        """Keep the weighted sum of all sets instead of each; nothing can be added then."""
        for expert, sets in self.seen.items():
            if HARMLESS in sets:
                parts = [(1.0, sets[HARMLESS].moments)]
                parts += [(share, sets[name].moments) for name, share in self.shares.items() if name in sets]
                merged = InputMoments.weighted(parts)
                self.seen[expert] = {HARMLESS: InputTokens.summed(merged, sets[HARMLESS].count)}

    def sets(self, expert: int | None) -> tuple[InputTokens, list[tuple[float, InputTokens]]]:
        """The harmless tokens, and the other sets with their weights."""
        seen = self.seen.get(expert, {})
        weighted = [(share, seen[name]) for name, share in self.shares.items() if name in seen]
        return seen.get(HARMLESS, InputTokens()), weighted


class Regression:
    """The regression of one write matrix, or of each of its experts; `kept` may be shared with other regressions."""

    def __init__(self, module: WriteModule, basis: torch.Tensor, stream: Stream, kept: KeptInputs) -> None:
        self.matrix, self.basis, self.kept = module.matrix, basis, kept
        self.images_attended = stream.architecture.images_attended
        self.experts = len(module.module.get_parameter(module.parameter)) if module.matrix.routed else 0
        self.target: dict[int | None, dict[str, InputTokens]] = {}
        self.origins: dict[tuple[int | None, str], Mean] = {}  # of the target's values, by expert and place

    def take(self, name: str, expert: int | None, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add the tokens of one set: inputs [tokens, n], outputs [tokens, d]."""
        kind, at, place = name.partition("@")
        if kind not in (TARGET, EXAMPLES):
            self.kept.take(name, expert, inputs, outputs)
            return
        read = self.basis.to(outputs.device, torch.promote_types(outputs.dtype, torch.float32))
        inputs, outputs = self.kept.reading(inputs, outputs)
        values = outputs.to(read) @ read.mT
        if at:
            origin = self.origins.setdefault((expert, place), Mean())
            if kind == EXAMPLES:
                origin.update(values)
                return
            if not origin.count:  # an expert that no example is routed to at this place
                return
            values = values - origin.mean.to(values)
        self.target.setdefault(expert, {}).setdefault(TARGET, InputTokens()).update(inputs, values)

    def part(self) -> Regression:
        """A regression of further target tokens, to be added to this one, whose means of examples it knows."""
        other = copy.copy(self)
        other.target, other.origins = {}, dict(self.origins)
        return other

    @torch.inference_mode()
    def add(self, part: Regression, device: torch.device) -> None:
        """Add what a part has seen of the target, which may be on another device; sums are kept on `device`."""
        for key, mean in part.origins.items():
            if mean is not self.origins.get(key):
                self.origins.setdefault(key, Mean()).add(mean)
        _add(self.target, part.target, device)

    def solve(self, weights: Weights) -> tuple[ConditionalMap | None, int]:
        """The map, or None if there are too few tokens; and how many experts are left alone."""
        if not self.target and not self.kept.seen and self.images_attended:
            return None, 0  # its block runs only beside an image, and there was none
        if not self.experts:
            return self._solve(None, weights), 0
        solved = {e: self._solve(e, weights).c for e in range(self.experts) if self._enough(e)}
        if not solved:
            return None, self.experts
        first = next(iter(solved.values()))
        c = torch.stack([solved.get(e, torch.zeros_like(first)) for e in range(self.experts)])
        return ConditionalMap(self.basis, c), self.experts - len(solved)

    def _solve(self, expert: int | None, weights: Weights) -> ConditionalMap:
        harmless, weighted = self.kept.sets(expert)
        written = self.kept.written.get(expert)
        if self.origins or written is None:  # values are relative to their origins already
            origin = torch.zeros(len(self.basis), dtype=torch.float64)
        else:
            origin = self.basis.to(written.mean) @ written.mean
        return solve(self.basis, (self._target(expert), harmless, weighted), weights, origin)

    def _target(self, expert: int | None) -> InputTokens:
        return self.target.get(expert, {}).get(TARGET, InputTokens())

    def _enough(self, expert: int) -> bool:
        return min(self._target(expert).count, self.kept.sets(expert)[0].count) >= FEWEST


def _add(
    own: dict[int | None, dict[str, InputTokens]], other: dict[int | None, dict[str, InputTokens]], device: torch.device
) -> None:
    for expert, sets in other.items():
        mine = own.setdefault(expert, {})
        for name, tokens in sets.items():
            mine.setdefault(name, InputTokens()).add(tokens, device)
