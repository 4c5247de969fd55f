"""Rank and directions of the difference of two tensors, and whether a projection explains it.

Nothing here knows a model, and only a block of rows is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

MOST = 24  # singular values computed; a difference of higher rank counts as full rank
GRAIN = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float8_e4m3fn: 2.0**-4}
ABOVE_NOISE = 1.5  # singular values count from this many times the largest that rounding alone would give

Blocks = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class ChangeDirections:
    """The leading directions of a difference along one axis of a tensor.

    `basis` is [k, width], orthonormal rows in float64. `left` is the share of the base's component along
    them that the other tensor still has: 0 after a projection. `strength` is how much was removed, in units
    of a projection (2: mirrored).
    """

    axis: int
    basis: torch.Tensor
    left: float
    strength: float


@dataclass(frozen=True)
class Difference:
    """One tensor's difference: `change` is `|W' - W| / |W|`; `rank` None means more than `MOST`.

    `energy` is the share of the squared change that lies in `rank` (or the first `MOST`) directions.
    """

    change: float
    rank: int | None
    energy: float
    directions: tuple[ChangeDirections, ...] = ()


def _unfold(block: torch.Tensor, axis: int) -> torch.Tensor:
    """[entries of all other axes, size of `axis`] of a block, in float32."""
    return block.movedim(axis, -1).reshape(-1, block.shape[axis]).float()


def _leading_directions(blocks: Blocks, axis: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading singular values of the difference unfolded along `axis`, and their directions [k, width].

    Randomised subspace iteration (Halko et al. 2011, algorithm 4.4): three passes, each of which forms
    `D^T D Q` block by block. Exact for small `width`.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(width, MOST + 8)
    q = torch.linalg.qr(torch.randn(width, size, generator=generator, dtype=torch.float64))[0]
    for _ in range(3):
        product = torch.zeros(width, size, dtype=torch.float64)
        for old, new in blocks():
            difference = _unfold(new.float() - old.float(), axis)
            product += (difference.mT @ (difference @ q.float())).double()
        values = product.norm()
        q = torch.linalg.qr(product)[0] if values else q
    gram = torch.zeros(size, size, dtype=torch.float64)
    for old, new in blocks():
        part = (_unfold(new.float() - old.float(), axis) @ q.float()).double()
        gram += part.mT @ part
    squares, vectors = torch.linalg.eigh(gram)
    order = squares.argsort(descending=True)[: min(MOST, width)]
    return squares[order].clamp(min=0).sqrt(), (q @ vectors[:, order]).mT


def _left_directions(blocks: Blocks, values: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The left singular vectors [k, rows] of a matrix's difference that belong to the right ones, `basis`: `D v / s`.

    A block is a range of rows, so the vectors are concatenated from blocks.
    """
    parts = [(new.float() - old.float()) @ basis.float().mT for old, new in blocks()]
    return (torch.cat(parts).double() / values.clamp(min=1e-300)).mT


def _components(
    blocks: Blocks, axis: int, basis: torch.Tensor, matrix: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The components of base and edited tensor along `basis`, block by block."""
    if not (matrix and axis == 0):
        for old, new in blocks():
            yield _unfold(old, axis).double() @ basis.mT, _unfold(new, axis).double() @ basis.mT
        return
    sums: list[torch.Tensor] = []
    start = 0
    for pair in blocks():
        here = basis[:, start : start + len(pair[0])]
        parts = [here @ block.double() for block in pair]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        start += len(pair[0])
    yield sums[0], sums[1]


def removal_along(blocks: Blocks, axis: int, basis: torch.Tensor, shape: Sequence[int]) -> ChangeDirections:
    """What is left of the base's component along `basis` [k, width], along `axis`, and the strength of the removal."""
    return ChangeDirections(axis, basis, *_measure_removal(blocks, axis, basis, _is_matrix(shape)))


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[1] > 1


def _measure_removal(blocks: Blocks, axis: int, basis: torch.Tensor, matrix: bool) -> tuple[float, float]:
    before = after = product = 0.0
    for a, b in _components(blocks, axis, basis, matrix):
        before += a.square().sum().item()
        after += b.square().sum().item()
        product += (a * b).sum().item()
    return (math.sqrt(after / before), 1 - product / before) if before else (math.inf, math.nan)


class _SquareSums:
    """Sums of a tensor's squares over its vectors and over its coordinates, which bound the norm of rounding noise.

    A stored value is rounded in proportion to its size, so noise is as uneven as the tensor: the long rows of an
    embedding have far more of it than the others.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.axes = range(len(shape))
        self.by_coordinate: dict[int, torch.Tensor | float] = dict.fromkeys(self.axes, 0.0)
        self.first: list[torch.Tensor] = []
        self.longest = dict.fromkeys(self.axes, 0.0)

    def add(self, squares: torch.Tensor) -> None:
        """Add the squares of the next block of rows."""
        for axis in self.axes[1:]:
            others = [other for other in self.axes if other != axis]
            self.by_coordinate[axis] = self.by_coordinate[axis] + squares.sum(others)
            self.longest[axis] = max(self.longest[axis], squares.sum(axis).max().item())
        self.first.append(squares.reshape(len(squares), -1).sum(1))

    def norm_of_noise(self, axis: int) -> float:
        """The largest singular value of a random matrix with these sizes of entries, unfolded along `axis`.

        The expected norm is about the longest row plus the longest column of standard deviations (Bandeira and van
        Handel 2016), which for equal entries is `sqrt(m) + sqrt(n)` times their size.
        """
        first = torch.cat(self.first).max().item()
        if axis == 0:  # of a matrix: its columns are the vectors
            return math.sqrt(first) + math.sqrt(float(torch.as_tensor(self.by_coordinate[1]).max()))
        return math.sqrt(self.longest[axis]) + math.sqrt(float(torch.as_tensor(self.by_coordinate[axis]).max()))


def difference(shape: Sequence[int], dtype: torch.dtype, blocks: Blocks) -> Difference:
    """Describe the difference of two tensors of `shape`; each call of `blocks` iterates over blocks of rows of both.

    `dtype` is the coarser of their stored dtypes; what its rounding explains does not count towards the rank.
    """
    change = total = 0.0
    squares = _SquareSums(shape)
    for old, new in blocks():
        total += old.double().square().sum().item()
        change += (new.double() - old.double()).square().sum().item()
        squares.add(new.double().square())
    share = math.sqrt(change / total) if total else math.inf
    if not math.isfinite(share) or len(shape) == 1:
        basis = None
        if len(shape) == 1 and change and math.isfinite(change):
            basis = torch.cat([new.double() - old.double() for old, new in blocks()])
            basis = (basis / basis.norm()).unsqueeze(0)
        directions = () if basis is None else (ChangeDirections(0, basis, math.nan, math.nan),)
        return Difference(share, 1 if directions else None, 1.0 if directions else math.nan, directions)
    found, ranks = [], []
    # The rounding error of a stored value is uniform over its grain: its variance is a twelfth of the square.
    deviation = GRAIN.get(dtype, 0.0) * 2 / math.sqrt(12)
    matrix = _is_matrix(shape)
    across: tuple[torch.Tensor, torch.Tensor] | None = None  # along the columns, computed first
    for axis, width in sorted(enumerate(shape), reverse=matrix):
        if width < 2 or (len(shape) > 2 and axis == 0):
            continue
        if axis == 0 and across is not None:
            values = across[0][:width]
            basis = _left_directions(blocks, across[0], across[1])[:width]
        else:
            values, basis = _leading_directions(blocks, axis, width)
            across = (values, basis) if matrix else None
        edge = ABOVE_NOISE * deviation * squares.norm_of_noise(axis)
        rank = int((values > max(edge, 1e-6 * values[0].item())).sum())
        ranks.append((rank, values.square()))
        if 0 < rank < len(values):
            found.append(ChangeDirections(axis, basis[:rank], *_measure_removal(blocks, axis, basis[:rank], matrix)))
        elif rank == len(values) == width:
            found.append(ChangeDirections(axis, basis, *_measure_removal(blocks, axis, basis, matrix)))
    found.sort(key=lambda directions: directions.axis)
    if not ranks:
        return Difference(share, None, math.nan)
    rank, energies = min(ranks, key=lambda r: r[0])
    full = rank >= len(energies) and len(energies) < max(shape)
    energy = min(1.0, energies[: rank or len(energies)].sum().item() / change) if change else math.nan
    return Difference(share, None if full and not found else rank, energy, tuple(found))


@dataclass(frozen=True)
class SharedDirections:
    """Directions that many differences share: `basis` [k, width], how many tensors share each, and of how many."""

    basis: torch.Tensor
    shared_by: tuple[int, ...]
    of: int


def common_directions(differences: dict[str, Difference]) -> SharedDirections | None:
    """The directions along which at least half of the tensors of one width, and at least two, were changed."""
    best: SharedDirections | None = None
    widths = {d.basis.shape[1] for found in differences.values() for d in found.directions}
    for width in widths:
        bases = [[d.basis for d in found.directions if d.basis.shape[1] == width] for found in differences.values()]
        bases = [found for found in bases if found]
        stacked = torch.cat([basis for found in bases for basis in found])
        _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
        shared = [(round(v.item() ** 2), vector) for v, vector in zip(values, vectors, strict=True)]
        shared = [(count, vector) for count, vector in shared if count >= max(2, len(bases) / 2)]
        if shared and (best is None or shared[0][0] > best.shared_by[0]):
            best = SharedDirections(
                torch.stack([vector for _, vector in shared]),
                tuple(min(count, len(bases)) for count, _ in shared),
                len(bases),
            )
    return best
