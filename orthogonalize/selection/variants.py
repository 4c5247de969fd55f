"""The edits that a sweep compares: every method over every scope and grid point, as in the tables of the papers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, centred
from ..core.progress import note
from ..directions.finders.inlp import RANK_BY_ACCURACY
from ..directions.finders.registry import FINDERS
from ..edits.build import finder_of, intervention_from_directions
from ..edits.config import EditConfig
from ..edits.methods.base import EditMethod
from ..edits.methods.registry import METHODS
from ..edits.scopes import layers_in_scope, parse_scope
from .candidates import layer_ranking
from .fits import Fits
from .grid import SweepGrid
from .resolve import choose
from .run_folder import Run


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


def _place_of(at: tuple[int, int] | None) -> tuple[dict[str, int], list[str]]:
    """The fields of `EditConfig` that put an edit at a position and layer, and the words for it in its name."""
    return ({}, []) if at is None else ({"position": at[0], "layer": at[1]}, [f"at {at[0]},{at[1]}"])


def _is_there(run: Run, method: EditMethod, finder: str, at: tuple[int, int] | None) -> bool:
    """Whether `finder` has a direction at a place; says so if it has none."""
    if at is None or run.directions.basis(finder, *at) is not None:
        return True
    note(f"skipping {method.name} at {at[0]},{at[1]}: {finder} found no direction there")
    return False


def _additions(
    run: Run, method: EditMethod, scope: str, multipliers: Sequence[float], at: tuple[int, int] | None
) -> Iterator[Variant]:
    """Additions of each finder's first direction, at `multipliers` of the length of the best mean difference."""
    place, words = _place_of(at)
    best = choose(run, method=method.name, scope=scope, **place)
    own = method.finder(run.directions)
    assert best.position is not None
    assert best.layer is not None
    length = run.directions.mean_diff(best.position, best.layer).norm().item()
    for finder in method.finders:
        if not FINDERS[finder].found(run.directions) or not _is_there(run, method, finder, at):
            continue
        ranking = layer_ranking(run.candidates, finder)
        chosen = best if finder == own else choose(run, method=method.name, scope=scope, finder=finder, **place)
        layers = tuple(layers_in_scope(parse_scope(scope), run.info.layer_count, chosen.layer, ranking))
        for multiplier in (*(-m for m in sorted(multipliers, reverse=True)), *sorted(multipliers)):
            choice = chosen.model_copy(update={"coefficient": multiplier * length})
            intervention = intervention_from_directions(choice, run.directions, ranking)
            shared = next(iter(intervention.writes.values()))
            name = " ".join([method.name, finder, f"{multiplier:+g}", scope, *words])
            yield Variant(name, choice, finder, intervention, layers, shared)


def _fitted(run: Run, method: EditMethod, scope: str, grid: SweepGrid, fits: Fits) -> Iterator[Variant]:
    for settings in grid.settings(method):
        choice = choose(run, method=method.name, scope=scope, **settings)
        finder = finder_of(choice.method, run.directions)
        intervention = fits.intervention(choice, layer_ranking(run.candidates, finder))
        layers = sorted({int(matrix.site.layer or 0) for matrix in intervention.conditional})
        yield Variant(
            " ".join([method.name, *_setting_words(method, settings), scope]),
            choice,
            finder,
            intervention,
            tuple(layers),
            None,
        )


def _setting_words(method: EditMethod, settings: Mapping[str, Any]) -> list[str]:
    """The settings in the name of a variant; those that the method's own grid varies go without their field's name."""
    unlabelled = {field for entry in method.grid for field in entry}
    words = []
    for field, value in settings.items():
        text = f"{value:g}" if isinstance(value, int | float) else str(value)
        words.append(text if field in unlabelled else f"{field} {text}")
    return words


def _check_rank(run: Run, choice: EditConfig, finder: str) -> None:
    """Check that `finder` found as many directions at the place of `choice` as its rank asks for."""
    assert choice.position is not None
    assert choice.layer is not None
    place = f"{finder} at position {choice.position}, layer {choice.layer}"
    if isinstance(choice.rank, str):
        accuracy = RANK_BY_ACCURACY[choice.rank]
        if FINDERS[finder].leading(run.directions, choice.position, choice.layer, accuracy) is None:
            raise OrthogonalizeError(f"--ranks {choice.rank}: {choice.method} has no classifiers' accuracies ({place})")
    elif choice.rank is not None:
        basis = run.directions.basis(finder, choice.position, choice.layer)
        found = 0 if basis is None else len(basis)
        if choice.rank > found:
            raise OrthogonalizeError(
                f"--ranks {choice.rank}: {choice.method} has only {found} directions ({place}); "
                "give a smaller rank, or extract with more prompts and a larger --max-rank"
            )


def _removals(
    run: Run, method: EditMethod, scope: str, grid: SweepGrid, at: tuple[int, int] | None
) -> Iterator[Variant]:
    place, words = _place_of(at)
    if not _is_there(run, method, method.finder(run.directions), at):
        return
    for settings in grid.settings(method):
        choice = choose(run, method=method.name, scope=scope, **settings, **place)
        finder = finder_of(choice.method, run.directions)
        _check_rank(run, choice, finder)
        ranking = layer_ranking(run.candidates, finder)
        intervention = intervention_from_directions(choice, run.directions, ranking)
        layers = tuple(layers_in_scope(parse_scope(scope), run.info.layer_count, choice.layer, ranking))
        name = " ".join([method.name, *_setting_words(method, settings), scope, *words])
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


def _tried_methods(run: Run, wanted: Sequence[str], fits: Fits | None) -> list[EditMethod]:
    """The methods `wanted`, or by default all that the run has directions for."""
    tried = []
    for method in [METHODS.find(name) for name in wanted or METHODS]:
        if method.fitted and (fits is None or not fits.possible):
            if wanted:
                raise OrthogonalizeError(
                    f"{method.name} needs a run with the model's own answers, and --semantics weights; extract again"
                )
            continue
        finder = method.finder(run.directions)
        if FINDERS[finder].found(run.directions):
            tried.append(method)
            continue
        needed = ",".join(dict.fromkeys(("dim", finder)))
        if wanted:
            raise OrthogonalizeError(
                f"the run has no directions for {method.name}; extract again with --finders {needed}"
            )
        note(f"skipping {method.name}: the run has no directions for it (extract --finders {needed})")
    return tried


def make_variants(
    run: Run,
    wanted: Sequence[str] = (),
    scopes: Sequence[str] = (),
    grid: SweepGrid | None = None,
    fits: Fits | None = None,
) -> list[Variant]:
    """Every edit of `wanted` methods (by default all that the run has directions for) over `scopes` and `grid`.

    Fitted edits come from `fits`, and are left out without it.

    Raises:
        OrthogonalizeError: a method or scope is unknown or given twice, the run has no directions for a method, or no
            method takes a value of the grid.
    """
    grid = grid or SweepGrid()
    twice = next((name for names in (wanted, scopes) for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise OrthogonalizeError(f"{twice} is given twice")
    tried = _tried_methods(run, wanted, fits)
    reads = any(parse_scope(scope).kind == "from" for scope in scopes)
    if reads and not all(method.fitted for method in tried):
        raise OrthogonalizeError("a sweep cannot use scope 'from', which edits reads; its other scopes edit writes")
    grid.check_taken(tried)
    if grid.at is not None:
        run.directions.check_place(*grid.at)
    result: list[Variant] = []
    for method in tried:
        for scope in scopes or method.scopes(run.info.layer_count):
            if method.fitted and fits is not None:
                result += _fitted(run, method, scope, grid, fits)
                continue
            for at in dict.fromkeys([None, grid.at]):
                if method.adds:
                    result += _additions(run, method, scope, grid.multipliers, at)
                else:
                    result += _removals(run, method, scope, grid, at)
    return _different(result)


def _different(variants: Sequence[Variant]) -> list[Variant]:
    """The variants without those that are the edit of an earlier one: a finder's best may be at the given place."""
    found: dict[str, Variant] = {}
    for variant in variants:
        found.setdefault(f"{variant.direction} {variant.choice.model_dump_json()}", variant)
    return list(found.values())
