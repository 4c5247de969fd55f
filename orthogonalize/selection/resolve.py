"""Resolve a run or a direction file, and what the user gave, to an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..architectures.schema import architecture_of
from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import OrthogonalizeError
from ..core.interventions import Intervention
from ..core.progress import track
from ..directions.activation_store import FILE as ACTIVATIONS
from ..directions.activation_store import Recording
from ..directions.direction_set import load_direction
from ..directions.finders.registry import FINDERS
from ..edits.build import finder_of, intervention_from_basis, intervention_from_directions
from ..edits.config import EditConfig
from ..edits.methods.registry import DEFAULT, METHODS
from ..edits.recipe import ProbeResult
from ..edits.scopes import written_stream
from .candidates import layer_ranking
from .probes import probe_choice
from .run_folder import Run


def choose(run: Run, **given: Any) -> EditConfig:
    """Complete what was `given` (fields of `EditConfig`; None is not given) from a run.

    With nothing but perhaps the method given, the best edit that the run tried is taken, if it tried
    that method. Otherwise position and layer are those of the best candidate, the scope is `all` (`one`
    for actadd) and the strength 1.

    Raises:
        OrthogonalizeError: the run has no candidate that fits.
    """
    named = {key: value for key, value in given.items() if value is not None}
    method = named.get("method")
    if set(named) <= {"method"}:
        tried = [t.choice for t in run.trials if method in (None, t.choice.method)]
        if tried:
            return tried[0]
    method = named.setdefault("method", DEFAULT)
    named.setdefault("scope", METHODS.find(method).default_scope)
    finder = finder_of(method, run.directions)
    fitting = [
        c
        for c in run.candidates
        if c.finder == finder and named.get("position") in (None, c.position) and named.get("layer") in (None, c.layer)
    ]
    if not fitting and ("position" not in named or ("layer" not in named and not named.get("per_layer"))):
        have = ", ".join(run.info.finders)
        raise OrthogonalizeError(
            f"the run has no {finder} candidate for {method} there (it has: {have}); "
            f"give --position and --layer, or extract again with --finders {','.join(FINDERS)}"
        )
    if fitting:
        named.setdefault("position", fitting[0].position)
        if not named.get("per_layer"):
            named.setdefault("layer", fitting[0].layer)
    return _choice(named)


def _choice(named: dict[str, Any]) -> EditConfig:
    """A choice, with settings that its method does not have refused rather than recorded."""
    method = METHODS.find(named["method"])
    for setting in named:
        takers = [each.name for each in METHODS.values() if setting in each.options]
        if takers and method.name not in takers:
            raise OrthogonalizeError(f"--{setting} belongs to {' and '.join(takers)}, not to {method.name}")
    try:
        return EditConfig(**named)
    except ValidationError as error:
        problem = error.errors()[0]
        raise OrthogonalizeError(f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}") from error


def _refuse_nothing(choice: EditConfig, intervention: Intervention) -> None:
    """An edit that would write a copy of the base is a mistake."""
    maps = (*intervention.writes.values(), *intervention.reads.values())
    if not any(m.u.any() or m.s.any() for m in maps):
        raise OrthogonalizeError(
            f"this edit changes nothing ({choice.describe()}): there is no direction, or its strength or length is 0"
        )


def _probes(folder: Path, run: Run, choice: EditConfig, intervention: Intervention) -> list[ProbeResult]:
    """What a fresh probe reads, before and after, from the streams that the edit's maps came from."""
    if METHODS[choice.method].adds or not (folder / ACTIVATIONS).is_file():
        return []
    maps = {written_stream(site): m for site, m in intervention.writes.items()}
    maps |= {run.directions.layer_count if site.kind == "head" else int(site.layer or 0): m
             for site, m in intervention.reads.items()}  # fmt: skip
    if not choice.per_layer:
        assert choice.layer is not None
        maps = {choice.layer: next(iter(maps.values()))}
    with track("probing the edit", 1) as advance:
        found = probe_choice(Recording(folder / ACTIVATIONS), run.directions, choice, maps)
        advance(1)
    return found


def check_fits(run: Run, source: Checkpoint) -> None:
    """Refuse a run whose directions are of a model of another shape than `source`."""
    architecture = architecture_of(source.config)
    width = architecture.width(source.config)
    if run.info.width != width:
        raise OrthogonalizeError(
            f"the run's directions have width {run.info.width} and the model's residual stream {width}; "
            "was it extracted from another model?"
        )
    if run.info.layer_count != architecture.layers(source.config):
        raise OrthogonalizeError(
            f"the run is of a model of {run.info.layer_count} layers and this one has "
            f"{architecture.layers(source.config)}; extract from this model"
        )


def _from_run(
    folder: Path, run: Run, source: Checkpoint, given: dict[str, Any]
) -> tuple[EditConfig, Intervention, dict[str, str], list[ProbeResult]]:
    check_fits(run, source)
    choice = choose(run, **given)
    ranking = layer_ranking(run.candidates, finder_of(choice.method, run.directions))
    intervention = intervention_from_directions(choice, run.directions, ranking)
    return choice, intervention, run.info.prompts, _probes(folder, run, choice, intervention)


def _from_file(file: Path, layer_count: int, given: dict[str, Any]) -> tuple[EditConfig, Intervention]:
    if given.get("per_layer"):
        raise OrthogonalizeError("--per-layer needs each layer's own direction; use --run")
    direction = load_direction(file)
    named = {key: value for key, value in given.items() if value is not None}
    method = named.setdefault("method", DEFAULT)
    named.setdefault("scope", METHODS.find(method).default_scope)
    named.setdefault("position", direction.position)
    named.setdefault("layer", direction.layer)
    choice = _choice(named)
    if choice.layer is not None and not 0 <= choice.layer <= layer_count:
        raise OrthogonalizeError(f"the model has no layer {choice.layer} (its layers are 0-{layer_count - 1})")
    return choice, intervention_from_basis(choice, direction.basis, direction.norm, layer_count)
