"""What write matrices take in of tokens that should not move: read in the unedited model, and shared by fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.interventions import WriteMatrix
from ...models.stream import Stream
from ...models.write_matrices import WriteModule
from ...models.write_reading import Readers, TokenSet, WriteReader
from .regression import KeptInputs

AT_ONCE = 2**30  # bytes of sums that one reading adds up, unless those of one group alone are more
HELD = 2**31  # bytes of sums that are held for further fits


class KeptReader:
    """Reads the sets of a model that fits should not move.

    What was read is held as one sum for every matrix while there is room, so that most fits of a small model read
    their target alone. What has no room is read again for each fit, a group of layers at a time.
    """

    def __init__(self, model: Any, sets: Mapping[str, TokenSet]) -> None:
        self.model, self.sets = model, sets
        self._readers = Readers(model, sets)
        self._reader: WriteReader | None = None
        self._held: dict[WriteMatrix, KeptInputs] = {}
        self._bytes, self._shares = 0, dict[str, float]()

    def read(
        self, group: Sequence[WriteModule], ahead: Sequence[WriteModule], shares: Mapping[str, float]
    ) -> dict[WriteMatrix, KeptInputs]:
        """What the matrices of a group of layers take in, weighted by `shares`.

        Of those `ahead`, in order, as many are read along with them as there is room for.
        """
        if shares != self._shares:
            self._held, self._bytes, self._shares = {}, 0, dict(shares)
        missing = [module for module in group if module.matrix not in self._held]
        if not missing:
            return {module.matrix: self._held[module.matrix] for module in group}
        needed = sum(map(_sum_bytes, missing))
        holds = self._bytes + needed <= HELD
        for module in ahead if holds else ():
            size = _sum_bytes(module)
            if module.matrix in self._held or self._bytes + needed + size > HELD:
                break
            if (needed + size) * len(self.sets) > AT_ONCE:
                break
            missing.append(module)
            needed += size
        found = self._read(missing, shares)
        if holds:
            for each in found.values():
                each.merge()
            self._held |= found
            self._bytes += needed
        return {m.matrix: found[m.matrix] if m.matrix in found else self._held[m.matrix] for m in group}

    def _read(self, modules: Sequence[WriteModule], shares: Mapping[str, float]) -> dict[WriteMatrix, KeptInputs]:
        stream = Stream.of(self.model)
        found = {module.matrix: KeptInputs(module, stream, shares) for module in modules}
        first = min(int(matrix.site.layer or 0) for matrix in found)
        if self._reader is None or self._reader.at > first:
            self._reader = self._readers.at(first)
        self._reader.read(list(found), lambda name, matrix, *rest: found[matrix].take(name, *rest))
        return found


def _sum_bytes(module: WriteModule) -> int:
    """At most the size of the second moments [n, n] of a matrix's inputs, of all its experts, in float64."""
    shape = module.module.get_parameter(module.parameter).shape
    return 8 * shape[:-2].numel() * max(shape[-2:]) ** 2
