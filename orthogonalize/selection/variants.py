"""The edits that a sweep compares: every method over every scope, as in the tables of the papers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, centred
from ..core.progress import note
from ..directions.finders.registry import FINDERS
from ..edits.build import finder_of, intervention_from_basis, intervention_from_directions
from ..edits.config import EditConfig
from ..edits.methods.base import EditMethod
from ..edits.methods.registry import METHODS
from ..edits.scopes import layers_in_scope, parse_scope
from .candidates import layer_ranking
from .fits import Fits
from .resolve import choose
from .run_folder import Run

MULTIPLIERS = (0.5, 1.0, 2.0)
ADDED = ("dim", "inlp")  # finders whose first directions a sweep adds


@dataclass(frozen=True)
class Variant:
    """One edit of a sweep.

    `direction` is the finder of its direction and `layers` are those of its scope. `on_stream` is its effect on the
    whole stream as one map, for hooks on block inputs and outputs; None for edits that depend on the input.
    """

    name: str
    choice: EditConfig
    direction: str
    intervention: Intervention
    layers: tuple[int, ...]
    on_stream: AffineMap | None


def _first_direction(run: Run, finder: str, choice: EditConfig) -> torch.Tensor:
    """The first direction [1, d] of `finder` at the position and layer of `choice`, pointing to the positive side."""
    assert choice.position is not None
    assert choice.layer is not None
    basis = run.directions.basis(finder, choice.position, choice.layer, rank=1)
    if basis is None:
        raise OrthogonalizeError(
            f"{FINDERS[finder].lacking} direction at position {choice.position}, layer {choice.layer}"
        )
    towards = basis[0] @ run.directions.mean_diff(choice.position, choice.layer)
    return basis if towards >= 0 else -basis


def _additions(run: Run, method: EditMethod, scope: str) -> Iterator[Variant]:
    """Additions of each finder's first direction, at multiples of the length of the best mean difference."""
    best = choose(run, method=method.name, scope=scope)
    own = method.finder(run.directions)
    assert best.position is not None
    assert best.layer is not None
    length = run.directions.mean_diff(best.position, best.layer).norm().item()
    for finder in dict.fromkeys((own, *ADDED)):
        if not FINDERS[finder].found(run.directions):
            continue
        ranking = layer_ranking(run.candidates, finder)
        place = best
        if finder != own:
            found = next(c for c in run.candidates if c.finder == finder)
            place = best.model_copy(update={"position": found.position, "layer": found.layer})
        layers = tuple(layers_in_scope(parse_scope(scope), run.info.layer_count, place.layer, ranking))
        for multiplier in (*(-m for m in reversed(MULTIPLIERS)), *MULTIPLIERS):
            choice = place.model_copy(update={"coefficient": multiplier * length})
            if finder == own:
                intervention = intervention_from_directions(choice, run.directions, ranking)
            else:
                basis = _first_direction(run, finder, choice)
                intervention = intervention_from_basis(choice, basis, length, run.info.layer_count, ranking)
            shared = next(iter(intervention.writes.values()))
            yield Variant(
                f"{method.name} {finder} {multiplier:+g} {scope}", choice, finder, intervention, layers, shared
            )


def _fitted(run: Run, method: EditMethod, scope: str, fits: Fits) -> Iterator[Variant]:
    for settings in method.grid:
        choice = choose(run, method=method.name, scope=scope, **settings)
        ranking = layer_ranking(run.candidates, finder_of(choice.method, run.directions))
        intervention = fits.intervention(choice, ranking)
        layers = sorted({int(matrix.site.layer or 0) for matrix in intervention.conditional})
        values = (f"{value:g}" if isinstance(value, int | float) else str(value) for value in settings.values())
        yield Variant(" ".join([method.name, *values, scope]), choice, "dim", intervention, tuple(layers), None)


def _removals(run: Run, method: EditMethod, scope: str) -> Iterator[Variant]:
    for settings in method.grid:
        choice = choose(run, method=method.name, scope=scope, **settings)
        finder = finder_of(choice.method, run.directions)
        ranking = layer_ranking(run.candidates, finder)
        intervention = intervention_from_directions(choice, run.directions, ranking)
        layers = tuple(layers_in_scope(parse_scope(scope), run.info.layer_count, choice.layer, ranking))
        values = (f"{value:g}" if isinstance(value, int | float) else str(value) for value in settings.values())
        name = " ".join([method.name, *values, scope])
        on_stream = method.on_stream(choice, run.directions, intervention)
        yield Variant(name, choice, finder, intervention, layers, on_stream)


def centre(variant: Variant, run: Run) -> Variant:
    """The variant as `edit` writes it into a model with LayerNorms."""
    if METHODS[variant.choice.method].fitted:
        return variant
    if METHODS[variant.choice.method].restores_mean(variant.choice):
        ranking = layer_ranking(run.candidates, variant.direction)
        edit = intervention_from_directions(variant.choice, run.directions, ranking, layer_norm=True)
    else:
        edit = centred(variant.intervention)
    return replace(variant, intervention=edit)


def make_variants(
    run: Run, wanted: Sequence[str] = (), scopes: Sequence[str] = (), fits: Fits | None = None
) -> list[Variant]:
    """Every edit of `wanted` methods (by default all that the run has directions for) over `scopes`.

    Fitted edits come from `fits`, and are left out without it.

    Raises:
        OrthogonalizeError: a method or scope is unknown or given twice, or the run has no directions for a method.
    """
    twice = next((name for names in (wanted, scopes) for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise OrthogonalizeError(f"{twice} is given twice")
    for scope in scopes:
        if parse_scope(scope).kind == "from":
            raise OrthogonalizeError("a sweep cannot use scope 'from', which edits reads; its other scopes edit writes")
    result: list[Variant] = []
    for method in [METHODS.find(name) for name in wanted or METHODS]:
        if method.fitted and (fits is None or not fits.possible):
            if wanted:
                raise OrthogonalizeError(
                    f"{method.name} needs a run with the model's own answers, and --semantics weights; extract again"
                )
            continue
        finder = method.finder(run.directions)
        if not FINDERS[finder].found(run.directions):
            needed = ",".join(dict.fromkeys(("dim", finder)))
            if wanted:
                raise OrthogonalizeError(
                    f"the run has no directions for {method.name}; extract again with --finders {needed}"
                )
            note(f"skipping {method.name}: the run has no directions for it (extract --finders {needed})")
            continue
        for scope in scopes or method.swept_scopes:
            if method.fitted and fits is not None:
                result += _fitted(run, method, scope, fits)
            else:
                result += _additions(run, method, scope) if method.adds else _removals(run, method, scope)
    return result
