"""The edits of a sweep: every method over every scope, as the papers' tables have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..core import interventions
from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention
from ..core.progress import note
from ..edits.config import EditConfig, direction_kind, intervention_from_basis, intervention_from_directions
from ..edits.scopes import chosen_layers, parse_scope
from .candidates import layer_ranking
from .resolve import choose
from .run_folder import Run

MULTIPLIERS = (0.5, 1.0, 2.0)
ALPHAS = (1.0, 2.0)
SCOPES = ("one", "top:50%", "all")
KIND = {"nullspace": "dim,inlp", "leace": "dim,leace"}  # what extract is asked for them


def methods() -> tuple[str, ...]:
    """Every method that a sweep tries."""
    return tuple(interventions.METHODS)


@dataclass(frozen=True)
class Variant:
    """One edit of a sweep. `direction` is the kind of direction it goes along; `layers` are those of its scope.

    `on_stream` is what it does to a stream as a whole, where hooks can reach it.
    """

    name: str
    choice: EditConfig
    direction: str
    intervention: Intervention
    layers: tuple[int, ...]
    on_stream: AffineMap


def _first_inlp(run: Run, choice: EditConfig) -> torch.Tensor:
    """INLP's first direction [1, d] where `choice` says, pointing to the positive side."""
    assert choice.position is not None
    assert choice.layer is not None
    basis = run.directions.basis("inlp", choice.position, choice.layer, rank=1)
    if basis is None:
        raise OrthogonalizeError(f"INLP found nothing at position {choice.position}, layer {choice.layer}")
    towards = basis[0] @ run.directions.mean_diff(choice.position, choice.layer)
    return basis if towards >= 0 else -basis


def _additions(run: Run, scope: str) -> Iterator[Variant]:
    """Activation addition along both kinds of direction, at multiples of the best mean difference's length."""
    best = choose(run, method="actadd", scope=scope)
    assert best.position is not None
    assert best.layer is not None
    length = run.directions.mean_diff(best.position, best.layer).norm().item()
    for kind in ("dim", "inlp"):
        if kind == "inlp" and not run.directions.subspaces:
            continue
        ranking = layer_ranking(run.candidates, kind)
        place = best
        if kind == "inlp":
            found = choose(run, method="nullspace", scope=scope)
            place = best.model_copy(update={"position": found.position, "layer": found.layer})
        layers = tuple(chosen_layers(parse_scope(scope), run.info.layer_count, place.layer, ranking))
        for multiplier in (*(-m for m in reversed(MULTIPLIERS)), *MULTIPLIERS):
            choice = place.model_copy(update={"coefficient": multiplier * length})
            if kind == "dim":
                intervention = intervention_from_directions(choice, run.directions, ranking)
            else:
                basis = _first_inlp(run, choice)
                intervention = intervention_from_basis(choice, basis, length, run.info.layer_count, ranking)
            shared = next(iter(intervention.writes.values()))
            yield Variant(f"actadd {kind} {multiplier:+g} {scope}", choice, kind, intervention, layers, shared)


def _removals(run: Run, method: str, scope: str) -> Iterator[Variant]:
    for alpha in ALPHAS if method == "reflect" else (None,):
        choice = choose(run, method=method, scope=scope, alpha=alpha)
        kind = direction_kind(choice.method, run.directions)
        ranking = layer_ranking(run.candidates, kind)
        intervention = intervention_from_directions(choice, run.directions, ranking)
        layers = tuple(chosen_layers(parse_scope(scope), run.info.layer_count, choice.layer, ranking))
        name = f"{method} {scope}" if alpha is None else f"{method} {alpha:g} {scope}"
        shared = next(iter(intervention.writes.values()))
        if method == "leace":  # of its writes only one has the shift that restores the mean
            assert choice.position is not None
            assert choice.layer is not None
            eraser = run.directions.eraser(choice.position, choice.layer, choice.orthogonal)
            assert eraser is not None
            shared = eraser.affine(choice.strength)
        yield Variant(name, choice, kind, intervention, layers, shared)


def make_variants(run: Run, wanted: Sequence[str] = (), scopes: Sequence[str] = SCOPES) -> list[Variant]:
    """Every edit of `wanted` methods (by default all that the run has directions for) over `scopes`.

    Raises:
        OrthogonalizeError: an unknown method or scope, one named twice, or no directions for it.
    """
    twice = next((name for names in (wanted, scopes) for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise OrthogonalizeError(f"{twice} is named twice")
    wrong = [m for m in wanted if m not in methods()]
    if wrong:
        raise OrthogonalizeError(f"no method {wrong[0]!r}; there are: {', '.join(methods())}")
    for scope in scopes:
        if parse_scope(scope).kind == "from":
            raise OrthogonalizeError("a sweep edits what is written; scope 'from' edits what is read")
    result: list[Variant] = []
    missing = [m for m in ("nullspace", "leace") if not _has(run, m)]
    for method in wanted or methods():
        if method in missing and wanted:
            raise OrthogonalizeError(
                f"the run has no directions for {method}; extract again with --methods {KIND[method]}"
            )
        if method in missing:
            note(f"{method} is left out: the run has no directions for it (extract --methods {KIND[method]})")
            continue
        for scope in scopes:
            result += _additions(run, scope) if method == "actadd" else _removals(run, method, scope)
    return result


def _has(run: Run, method: str) -> bool:
    return bool(run.directions.subspaces) if method == "nullspace" else method in run.info.methods
