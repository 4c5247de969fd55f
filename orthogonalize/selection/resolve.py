"""Resolve a run, a direction file or a recipe, together with the user's settings, to an edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..architectures.schema import architecture_of
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..core.errors import OrthogonalizeError
from ..core.interventions import Intervention, centred
from ..core.progress import track
from ..directions.activation_store import FILE as ACTIVATIONS
from ..directions.activation_store import Recording
from ..directions.direction_set import load_direction
from ..edits.build import finder_of, intervention_from_basis
from ..edits.config import EditConfig
from ..edits.descriptions.automatic import learn
from ..edits.methods.registry import DEFAULT, METHODS
from ..edits.recipe import ProbeResult, Quantization, load_recipe
from ..edits.scopes import stream_after
from ..edits.settings import EditSettings
from ..models.resolve import find_model
from .builder import EditBuilder
from .probes import probe_choice
from .readers.open_fits import open_fits
from .run_folder import Run, load_run


@dataclass(frozen=True)
class ResolvedEdit:
    """An edit that is ready to be baked, and its origin.

    `taken_from` says in one line which settings come from options, from the run or file, and from defaults. `prompts`
    are fingerprints of the prompt sets, and `concept` is what the run calls the behaviour. `rounding` and
    `base_weights` (SHA-256 by file) come from a recipe, if there is one; so does `quantization`, if it has one.
    """

    choice: EditConfig
    intervention: Intervention
    kind: Literal["run", "file"]
    taken_from: str
    prompts: dict[str, str] = field(default_factory=dict)
    concept: str = ""
    probes: list[ProbeResult] = field(default_factory=list)
    run: Run | None = None
    rounding: str | None = None
    quantization: Quantization | None = None
    base_weights: dict[str, str] | None = None

    def check_not_empty(self) -> None:
        """Check that the edit changes something.

        Raises:
            OrthogonalizeError: every map is zero.
        """
        maps = (*self.intervention.writes.values(), *self.intervention.reads.values())
        fitted = any(m.c.any() for m in self.intervention.conditional.values())
        if not fitted and not any(m.u.any() or m.s.any() for m in maps):
            raise OrthogonalizeError(
                f"this edit changes nothing ({self.choice.describe()}): it has no direction, or its strength or length "
                "is 0"
            )


def pick_edit(run: Run, pick: int, given: dict[str, Any]) -> EditConfig:
    """The edit with number `pick`, from 1, of the run's shortlist.

    Raises:
        OrthogonalizeError: there is none, or fields of `EditConfig` are given, which it determines.
    """
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise OrthogonalizeError(f"--pick determines the whole edit; omit {options}")
    edits = run.shortlist
    if not 1 <= pick <= len(edits):
        have = f"the run has {len(edits)} edits to pick from" if edits else "the run tried no edits (extract --trials)"
        raise OrthogonalizeError(f"there is no edit {pick}: {have}")
    return edits[pick - 1].choice


def choose(run: Run, **given: Any) -> EditConfig:
    """Complete the `given` fields of `EditConfig` from a run; None means not given.

    If nothing is given, this is the best edit that the run tried, as a whole. Otherwise, or if it tried none, position
    and layer are those of the best candidate, and everything else has its default: scope `all` (`one` for actadd),
    strength 1.

    Raises:
        OrthogonalizeError: the run has no matching candidate, or nothing is given and it chose no edit.
    """
    named = {key: value for key, value in given.items() if value is not None}
    if not named and run.trials:
        if run.info.nothing_chosen is not None:
            raise OrthogonalizeError(
                f"extract chose no edit: {run.info.nothing_chosen}; choose one with --pick N or --method NAME, or "
                "extract again"
            )
        return run.trials[0].choice
    method = named.setdefault("method", DEFAULT)
    if METHODS.find(method).fitted:
        named.setdefault("scope", METHODS[method].scopes(run.info.layer_count)[0])
    named.setdefault("scope", METHODS[method].default_scope)
    if METHODS[method].fitted:  # to every layer's own direction, where the model is about to answer
        named.setdefault("position", run.directions.positions[-1])
        named["per_layer"] = True
        return _edit_config(named)
    run.directions.check_place(named.get("position"), named.get("layer"))
    finder = finder_of(method, run.directions, named.get("finder"))
    fitting = [
        c
        for c in run.candidates
        if c.finder == finder and named.get("position") in (None, c.position) and named.get("layer") in (None, c.layer)
    ]
    if not fitting and ("position" not in named or ("layer" not in named and not named.get("per_layer"))):
        have = ", ".join(run.info.finders)
        raise OrthogonalizeError(
            f"the run has no {finder} candidate for {method} at that place (its finders: {have}); "
            f"give --position and --layer, or extract again with --finders {','.join(dict.fromkeys(('dim', finder)))}"
        )
    if fitting:
        named.setdefault("position", fitting[0].position)
        if not named.get("per_layer"):
            named.setdefault("layer", fitting[0].layer)
    return _edit_config(named)


def _taken_from(choice: EditConfig, given: dict[str, Any], found: tuple[str, ...], source: str) -> str:
    """Which settings of `choice` are `given` as options, which of the `found` ones `source` has, and the defaults."""
    places = {"options": list(given), source: [n for n in found if n not in given], "defaults": []}
    named = {name for names in places.values() for name in names}
    places["defaults"] = [name for name in ("method", "scope", "strength") if name not in named]
    parts = []
    for place, names in places.items():
        values = {name.replace("_", "-"): getattr(choice, name) for name in names}
        words = [f"{name} {_shown(value)}" for name, value in values.items() if value is not None]
        if words:
            parts.append(f"{place}: {', '.join(words)}")
    return "; ".join(parts)


def _shown(value: Any) -> str:
    """The value of a field of `EditConfig`, of which only the strengths of sites are a tuple."""
    if isinstance(value, tuple):
        return ",".join(f"{site}={strength:g}" for site, strength in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _origin_in_run(run: Run, choice: EditConfig, given: dict[str, Any], pick: int | None) -> str:
    if pick is not None:
        return f"everything: edit {pick} of those that extract lists"
    if not given and run.trials:
        return "everything: the best edit that extract tried"
    finder = finder_of(choice.method, run.directions, choice.finder)
    text = _taken_from(choice, given, ("position", "layer"), f"the run's best {finder} direction")
    tried = [n for n, trial in enumerate(run.shortlist, 1) if trial.choice.method == choice.method]
    return f"{text} (--pick {tried[0]} is the best {choice.method} that extract lists)" if tried else text


def _edit_config(named: dict[str, Any]) -> EditConfig:
    """The `EditConfig` of these fields.

    Raises:
        OrthogonalizeError: a value is invalid, or the method does not have that setting.
    """
    method = METHODS.find(named["method"])
    for setting in named:
        takers = [each.name for each in METHODS.values() if setting in each.options]
        if takers and method.name not in takers:
            raise OrthogonalizeError(f"--{setting} belongs to {' and '.join(takers)}, not to {method.name}")
    try:
        return EditConfig(**named)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise OrthogonalizeError(f"--{option} {problem['input']}: {problem['msg']}") from error


def _probe_edit(folder: Path, run: Run, choice: EditConfig, intervention: Intervention) -> list[ProbeResult]:
    """Probe an edit in the streams that its directions come from."""
    method = METHODS[choice.method]
    if method.adds or method.fitted or not (folder / ACTIVATIONS).is_file():
        return []
    maps = {stream_after(site): m for site, m in intervention.writes.items()}
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
    """Check that the directions of `run` fit the shape of `source`.

    Raises:
        OrthogonalizeError: they do not.
    """
    architecture = architecture_of(source.config)
    width = architecture.width(source.config)
    if run.info.width != width:
        raise OrthogonalizeError(
            f"the run's directions have width {run.info.width}, but the model's residual stream has width {width}; "
            "was the run extracted from another model?"
        )
    if run.info.layer_count != architecture.layers(source.config):
        raise OrthogonalizeError(
            f"the run's model has {run.info.layer_count} layers, but this one has "
            f"{architecture.layers(source.config)}; was the run extracted from another model?"
        )


def _intervention(folder: Path, run: Run, source: Checkpoint, choice: EditConfig, device: str) -> Intervention:
    """The maps of `choice`; those of a fitted method are taken from the run, or fitted to `source` and stored there."""
    layer_norm = architecture_of(source.config).norms.kind == "layer"
    # Only fits depend on the weights, whose fingerprint takes as long as reading them.
    fits = open_fits(run, source, device) if METHODS[choice.method].fitted else None
    return EditBuilder(run.directions, run.candidates, layer_norm, fits)(choice)


def intervention_of(
    model: Path | str, run: Path | str, config: EditConfig | None = None, *, device: str = "auto"
) -> Intervention:
    """The maps that `edit` would write into `model`, for hooks (`intervened`) or `bake`.

    Args:
        model: a checkpoint folder, a Hub id or a .gguf file.
        run: a folder written by `extract`.
        config: the edit; None is the best that the run tried.
        device: where the model runs, if the edit is fitted to it.

    Raises:
        OrthogonalizeError: the run is from another model, or has no direction for it.
    """
    folder, source = Path(run), open_checkpoint(find_model(str(model)))
    learn(source)
    found = load_run(folder)
    check_fits(found, source)
    return _intervention(folder, found, source, config or choose(found), device)


def resolve_run(
    folder: Path, source: Checkpoint, given: dict[str, Any], pick: int | None = None, device: str = "auto"
) -> ResolvedEdit:
    """The edit of `source` by a run and the `given` fields of `EditConfig`, or the number `pick` of its shortlist.

    A fitted edit that the run does not have yet is fitted to `source` on `device`, and stored in the run.

    Raises:
        OrthogonalizeError: the run is from another model, or has no matching direction or edit.
    """
    run = load_run(folder)
    check_fits(run, source)
    choice = choose(run, **given) if pick is None else pick_edit(run, pick, given)
    intervention = _intervention(folder, run, source, choice, device)
    return ResolvedEdit(
        choice,
        intervention,
        "run",
        taken_from=_origin_in_run(run, choice, given, pick),
        prompts=run.info.prompts,
        concept=run.info.concept or "",
        probes=_probe_edit(folder, run, choice, intervention),
        run=run,
    )


def resolve_file(file: Path, source: Checkpoint, given: dict[str, Any]) -> ResolvedEdit:
    """The edit of `source` along a direction file.

    Raises:
        OrthogonalizeError: the file cannot be read, or the settings do not fit it.
    """
    if given.get("per_layer"):
        raise OrthogonalizeError("--per-layer needs the direction of each layer; use --run")
    if given.get("finder"):
        raise OrthogonalizeError("--finder chooses among the directions of a run; use --run")
    layer_count = architecture_of(source.config).layers(source.config)
    direction = load_direction(file)
    named = dict(given)
    method = named.setdefault("method", DEFAULT)
    named.setdefault("scope", METHODS.find(method).default_scope)
    named.setdefault("position", direction.position)
    named.setdefault("layer", direction.layer)
    choice = _edit_config(named)
    if choice.layer is not None and not 0 <= choice.layer <= layer_count:
        raise OrthogonalizeError(f"the model has no layer {choice.layer} (its layers are 0-{layer_count - 1})")
    intervention = intervention_from_basis(choice, direction.basis, direction.norm, layer_count)
    if architecture_of(source.config).norms.kind == "layer":  # otherwise the norms would bring the direction back
        intervention = centred(intervention)
    origin = _taken_from(choice, given, ("position", "layer"), file.name)
    return ResolvedEdit(choice, intervention, "file", taken_from=origin)


def resolve_recipe(path: Path, settings: EditSettings) -> ResolvedEdit:
    """The edit in a recipe.

    Raises:
        OrthogonalizeError: the recipe is missing or damaged, or `settings` has values that the recipe determines.
    """
    if settings.edit_fields or settings.rounding is not None or settings.description is not None:
        raise OrthogonalizeError("a recipe determines the whole edit; omit the other settings")
    recipe = load_recipe(path)
    if recipe.quantization is not None and settings.quantize not in (None, recipe.quantization.scheme):
        raise OrthogonalizeError(
            f"the recipe quantises by {recipe.quantization.scheme}; leave out --quantize, or give the recipe of the "
            "unquantised edit"
        )
    return ResolvedEdit(
        recipe.choice,
        recipe.intervention(),
        recipe.source.kind,
        taken_from="everything: the recipe",
        prompts=recipe.source.prompts,
        concept=recipe.source.concept,
        probes=recipe.probes,
        rounding=recipe.rounding,
        quantization=recipe.quantization,
        base_weights=recipe.base.weights,
    )
