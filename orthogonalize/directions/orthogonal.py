"""Directions orthogonal to the harmless (negative) side's mean, by one Gram-Schmidt step ("projected abliteration").

A difference of means usually has a component along the harmless mean itself, which removing the direction would take
from every prompt. What is left after this step (Lai 2025, https://huggingface.co/blog/grimjim/projected-abliteration)
moves the harmless mean nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch

from ..core.errors import OrthogonalizeError
from .direction_set import NEGLIGIBLE, Directions
from .inlp.nullspace import Subspace

HARMLESS_MEAN = "harmless-mean"  # the one thing that directions can be made orthogonal to


def orthogonal_to(vectors: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`vectors` [..., d] without their component along `mean` [..., d], in float64; 0 where nothing else is left."""
    rest = wide = vectors.to(torch.float64)
    unit = torch.nn.functional.normalize(mean.to(torch.float64), dim=-1)
    for _ in range(2):  # the second time removes what rounding left
        rest = rest - (rest * unit).sum(-1, keepdim=True) * unit
    left = rest.norm(dim=-1, keepdim=True) > NEGLIGIBLE * wide.norm(dim=-1, keepdim=True)
    return torch.where(left, rest, 0.0)


def orthogonal_to_harmless_mean(directions: Directions, layer_norm: bool = False) -> Directions:
    """`directions` with mean differences and bases orthogonal to the negative side's mean, place by place.

    LEACE's erasers stay as they are; so do the accuracies of INLP's classifiers.

    Args:
        layer_norm: whether LayerNorms read the stream. They see vectors without the mean over their coordinates, and so
            it is to what they see of the negative side's mean that directions are made orthogonal.

    Raises:
        OrthogonalizeError: a finder has no direction left at any place, or the negative side's means are not stored.
    """
    means = torch.stack(
        [
            torch.stack([directions.negative_mean(position, layer) for layer in range(directions.layer_count + 1)])
            for position in directions.positions
        ]
    )
    if layer_norm:
        means = means - means.mean(-1, keepdim=True)
    diffs = orthogonal_to(directions.mean_diffs, means)
    _refuse_nothing("dim", directions.mean_diffs, diffs)
    subspaces = {
        (position, layer): _orthogonal_subspace(found, means[directions.positions.index(position), layer])
        for (position, layer), found in directions.subspaces.items()
    }
    if any(s.rank for s in directions.subspaces.values()) and not any(s.rank for s in subspaces.values()):
        raise _nothing_left("inlp")
    erased = directions.mean_diffs if directions.leace_differences is None else directions.leace_differences
    return replace(
        directions,
        mean_diffs=diffs,
        subspaces=subspaces,
        tensors=_orthogonal_bases(directions.tensors, means),
        leace_differences=None if directions.readers is None else erased,
    )


def _orthogonal_basis(rows: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """An orthonormal basis [m, d] of what `rows` [k, d] span besides `mean` [d], and which rows contributed to it.

    Gram-Schmidt in the order of the rows, from the mean on. If they span the mean, one row has nothing left.
    """
    basis = torch.nn.functional.normalize(mean, dim=0)[None]
    kept: list[int] = []
    for i, row in enumerate(rows.to(torch.float64)):
        rest = row
        for _ in range(2):  # the second time removes what rounding left
            rest = rest - basis.mT @ (basis @ rest)
        if rest.norm() > NEGLIGIBLE * row.norm():
            basis = torch.cat([basis, (rest / rest.norm())[None]])
            kept.append(i)
    return basis[1:], kept


def _orthogonal_subspace(found: Subspace, mean: torch.Tensor) -> Subspace:
    basis, kept = _orthogonal_basis(found.basis, mean)
    return replace(found, basis=basis, accuracies=tuple(found.accuracies[i] for i in kept))


def _orthogonal_bases(tensors: Mapping[str, torch.Tensor], means: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of other finders, with the rows of each `FINDER.basis` [positions, layers, k, d] made orthogonal."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        finder, _, key = name.partition(".")
        if key == "basis":
            result[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            for place in product(*map(range, tensor.shape[:2])):
                basis, _ = _orthogonal_basis(tensor[place], means[place])
                result[name][place][: len(basis)] = basis
            _refuse_nothing(finder, tensor, result[name])
    return result


def _refuse_nothing(finder: str, before: torch.Tensor, after: torch.Tensor) -> None:
    if before.any() and not after.any():
        raise _nothing_left(finder)


def _nothing_left(finder: str) -> OrthogonalizeError:
    return OrthogonalizeError(
        f"nothing is left of the {finder} directions once they are orthogonal to the harmless mean; "
        "leave out --orthogonal-to"
    )
