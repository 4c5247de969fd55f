"""Resolve a run, a direction file or a recipe, with what the user gave, to an edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..architectures.schema import architecture_of
from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import OrthogonalizeError
from ..core.interventions import Intervention, centred
from ..core.progress import track
from ..directions.activation_store import FILE as ACTIVATIONS
from ..directions.activation_store import Recording
from ..directions.direction_set import load_direction
from ..directions.finders.registry import FINDERS
from ..edits.build import finder_of, intervention_from_basis, intervention_from_directions
from ..edits.config import EditConfig
from ..edits.methods.registry import DEFAULT, METHODS
from ..edits.recipe import ProbeResult, load_recipe
from ..edits.scopes import written_stream
from ..edits.settings import EditSettings
from .candidates import layer_ranking
from .probes import probe_choice
from .run_folder import Run, load_run


@dataclass(frozen=True)
class ResolvedEdit:
    """An edit ready to be baked, and where it came from.

    `prompts` are fingerprints of the prompt sets; `rounding` and `base_weights` (SHA-256 by file) are a recipe's.
    """

    choice: EditConfig
    intervention: Intervention
    kind: Literal["run", "file"]
    prompts: dict[str, str] = field(default_factory=dict)
    probes: list[ProbeResult] = field(default_factory=list)
    run: Run | None = None
    rounding: str | None = None
    base_weights: dict[str, str] | None = None

    def refuse_nothing(self) -> None:
        """Refuse an edit that would write a copy of the base.

        Raises:
            OrthogonalizeError: every map is zero.
        """
        maps = (*self.intervention.writes.values(), *self.intervention.reads.values())
        if not any(m.u.any() or m.s.any() for m in maps):
            raise OrthogonalizeError(
                f"this edit changes nothing ({self.choice.describe()}): there is no direction, or its strength or "
                "length is 0"
            )


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
    return _config(named)


def _config(named: dict[str, Any]) -> EditConfig:
    """The `EditConfig` of these fields; settings that its method does not have are refused, not silently recorded."""
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


def resolve_run(folder: Path, source: Checkpoint, given: dict[str, Any]) -> ResolvedEdit:
    """The edit of `source` that a run and the fields of `EditConfig` that are `given` mean.

    Raises:
        OrthogonalizeError: the run is of another model, or has nothing that fits.
    """
    run = load_run(folder)
    check_fits(run, source)
    choice = choose(run, **given)
    ranking = layer_ranking(run.candidates, finder_of(choice.method, run.directions))
    intervention = intervention_from_directions(choice, run.directions, ranking)
    return ResolvedEdit(
        choice,
        _as_written(intervention, source),
        "run",
        prompts=run.info.prompts,
        probes=_probes(folder, run, choice, intervention),
        run=run,
    )


def resolve_file(file: Path, source: Checkpoint, given: dict[str, Any]) -> ResolvedEdit:
    """The edit of `source` along a direction file.

    Raises:
        OrthogonalizeError: the file cannot be read, or the settings do not fit it.
    """
    if given.get("per_layer"):
        raise OrthogonalizeError("--per-layer needs each layer's own direction; use --run")
    layer_count = architecture_of(source.config).layers(source.config)
    direction = load_direction(file)
    named = dict(given)
    method = named.setdefault("method", DEFAULT)
    named.setdefault("scope", METHODS.find(method).default_scope)
    named.setdefault("position", direction.position)
    named.setdefault("layer", direction.layer)
    choice = _config(named)
    if choice.layer is not None and not 0 <= choice.layer <= layer_count:
        raise OrthogonalizeError(f"the model has no layer {choice.layer} (its layers are 0-{layer_count - 1})")
    intervention = intervention_from_basis(choice, direction.basis, direction.norm, layer_count)
    return ResolvedEdit(choice, _as_written(intervention, source), "file")


def resolve_recipe(path: Path, settings: EditSettings) -> ResolvedEdit:
    """The edit that a recipe stores.

    Raises:
        OrthogonalizeError: the recipe is missing or damaged, or `settings` say something else.
    """
    if settings.chosen or settings.rounding is not None:
        raise OrthogonalizeError("a recipe already says everything; give no other settings with --recipe")
    recipe = load_recipe(path)
    return ResolvedEdit(
        recipe.choice,
        recipe.intervention(),
        recipe.source.kind,
        prompts=recipe.source.prompts,
        probes=recipe.probes,
        rounding=recipe.rounding,
        base_weights=recipe.base.weights,
    )


def _as_written(intervention: Intervention, source: Checkpoint) -> Intervention:
    """Centred for LayerNorm models, where what the norms subtract would bring the direction back."""
    return centred(intervention) if architecture_of(source.config).norms.kind == "layer" else intervention
