"""`edit`: from directions to an edited checkpoint on disk."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ..architectures.schema import architecture_of
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES
from ..checkpoints.writer import Written
from ..core.errors import OrthogonalizeError
from ..core.interventions import centred
from ..core.output_folders import EDITED, OutputFolder, check_space, complete_folder
from ..core.progress import note, track
from ..edits.bake import bake
from ..edits.hub_cache import CachedRepository
from ..edits.lora import write_adapter
from ..edits.recipe import Base, ProbeResult, Recipe, Source, TensorChange, load_recipe, store_maps
from ..edits.sharding import Share, assemble, missing_shares, remove_shares, share_bytes, write_share
from ..models.resolve import commit_of, find_model, is_hub_id
from ..reports.model_card import write_card
from ..selection.resolve import _from_file, _from_run, _refuse_nothing
from ..selection.run_folder import Run, load_run


def _place(out: Path | str | None, cache: str | None) -> OutputFolder | CachedRepository:
    if out is not None and cache is None:
        return OutputFolder(Path(out), EDITED)
    if cache is not None and out is None:
        return CachedRepository(cache)
    raise OrthogonalizeError("give either --out or --cache")


def edit(
    model: str,
    out: Path | str | None = None,
    *,
    cache: str | None = None,
    run: Path | str | None = None,
    direction: Path | str | None = None,
    recipe: Path | str | None = None,
    method: str | None = None,
    scope: str | None = None,
    strength: float | None = None,
    per_layer: bool | None = None,
    position: int | None = None,
    layer: int | None = None,
    rank: int | str | None = None,
    orthogonal: bool | None = None,
    alpha: float | None = None,
    coefficient: float | None = None,
    revision: str | None = None,
    rounding: str | None = None,
    workers: int = 1,
    link: bool = False,
    shard: str | None = None,
    format: Literal["checkpoint", "lora"] = "checkpoint",
    force: bool = False,
) -> Recipe:
    """Write a copy of `model` with a direction edited out of, or into, its weights.

    It goes to the folder `out`, or into the Hub's cache under the name `cache` (`owner/name`), where libraries
    find it by that name; what does not change of a model of the Hub is then a hard link to its own files.
    Exactly one of `run` (a folder made by `extract`), `direction` (a file) and `recipe` (a former
    edit, rebuilt bit for bit) says what to edit. The other arguments are those of `EditConfig`; what is
    not given comes from the run (see `choose`). `rounding` names a rounding scheme (default `cancelling`, which
    keeps the edit in the stored weights; see `checkpoints.rounding.registry`); `workers` is how many files are
    written at a time; with `link`, files in which nothing changes become hard links to the source's. The `format`
    `lora` writes the same edit as a PEFT adapter instead, where it changes linear layers only. With `shard` (`i/n`)
    only a share of the files is written (see `sharding`), and `out` appears with the last one.

    Returns:
        The recipe, which is also written into the checkpoint as orthogonalize.json.

    Raises:
        OrthogonalizeError: anything that cannot be done exactly; nothing is written then.
    """
    if rounding is not None:
        ROUNDING_SCHEMES.find(rounding)
    place = _place(out, cache)
    share = Share.parse(shard) if shard else None
    if share is not None and cache is not None:
        raise OrthogonalizeError("shares are written beside a folder; give --out with --shard")
    place.check_free(force, [Path(p) for p in (model, run, direction, recipe) if p is not None])
    if sum(source is not None for source in (run, direction, recipe)) != 1:
        raise OrthogonalizeError("give exactly one of --run, --direction and --recipe")
    folder = find_model(model, revision)
    place.check_free(force, [folder])
    link = link or (cache is not None and commit_of(folder) is not None)  # blobs are never changed in place
    source = open_checkpoint(folder)
    architecture = architecture_of(source.config)
    given: dict[str, Any] = {
        "method": method, "scope": scope, "strength": strength, "per_layer": per_layer, "position": position,
        "layer": layer, "rank": rank, "orthogonal": orthogonal, "alpha": alpha, "coefficient": coefficient,
    }  # fmt: skip
    prompts: dict[str, str] = {}
    probes: list[ProbeResult] = []
    former: Recipe | None = None
    found: Run | None = None
    if recipe is not None:
        if any(value is not None for value in (*given.values(), rounding)):
            raise OrthogonalizeError("a recipe already says everything; give no other settings with --recipe")
        former = load_recipe(Path(recipe))
        choice, intervention, prompts = former.choice, former.intervention(), former.source.prompts
        probes = former.probes
    elif run is not None:
        found = load_run(Path(run))
        choice, intervention, prompts, probes = _from_run(Path(run), found, source, given)
    else:
        choice, intervention = _from_file(Path(str(direction)), architecture.layers(source.config), given)
    if former is None and architecture.norms.kind == "layer":
        intervention = centred(intervention)  # else what the norms subtract brings the direction back
    _refuse_nothing(choice, intervention)
    plan = bake(source, intervention)
    changes = plan.checkpoint
    changes.rounding = former.rounding if former else rounding or DEFAULT_ROUNDING
    if format == "checkpoint":
        needed = changes.changed_bytes if link else changes.output_bytes
        check_space(place.folder, int(1.01 * (needed if share is None else share_bytes(changes, share, link))))
    if former is not None and source.files.keys() != former.base.weights.keys():
        raise OrthogonalizeError(f"{model} is not the base that the recipe was made from (its files differ)")
    note(f"editing: {choice.describe()}")
    maps, arrays, digest = store_maps(intervention)
    written = Recipe(
        version=version("orthogonalize"),
        base=Base(
            model=model if is_hub_id(model) else str(Path(model).resolve()),
            revision=commit_of(folder) or revision,
            architecture=architecture.family,
            weights={},
        ),
        choice=choice,
        source=Source(
            kind=former.source.kind if former else "file" if direction is not None else "run",
            fingerprint=digest,
            prompts=prompts,
        ),
        maps=maps,
        arrays=arrays,
        rounding=changes.rounding,
        added=sorted(changes.additions),
        config_changes=changes.config_changes,
        left_out=[str(name) for name in source.left_out()],
        probes=probes,
    )
    if format == "lora":
        with place.complete(force) as partial:
            write_adapter(plan, partial, written.base.model)
            written.base.weights = source.fingerprint()
            written.save(partial)
        return written
    expected = former.base.weights if former else None
    if share is not None:
        return _write_share(
            changes, place.folder, share, written, force=force, workers=workers, link=link, expected=expected
        )
    with place.complete(force) as partial:
        done = _write(changes, partial, workers, link, expected)
        written.base.weights, written.weights = done.source, done.result
        written.tensors = [TensorChange(**asdict(done.records[name])) for name in sorted(done.records)]
        written.save(partial)
        write_card(partial, written, source.path)
    if found is not None and found.info.weights != written.base.weights:
        note("note: the run was extracted from other weights than these (a relative of this model?)")
    return written


def _write(plan: CheckpointPlan, folder: Path, workers: int, link: bool, expected: dict[str, str] | None) -> Written:
    with track("writing the checkpoint", plan.output_bytes, "bytes") as advance:
        return plan.write(folder, advance, workers=workers, link=link, expected=expected)


def _write_share(plan: CheckpointPlan, out: Path, share: Share, recipe: Recipe, *, force: bool, **how: Any) -> Recipe:
    """Write one share, and the checkpoint where that was the last."""
    with track(f"writing share {share.number} of {share.of}", share_bytes(plan, share, link=False), "bytes") as advance:
        write_share(plan, out, share, recipe, force=force, progress=advance, **how)
    waiting = missing_shares(share, out)
    if waiting:
        note(f"{out} will be complete with {', '.join(folder.name for folder in waiting)}")
        return recipe
    with complete_folder(out, EDITED, force) as partial:
        whole = assemble(plan, share, out, partial, how["link"])
        whole.save(partial)
        write_card(partial, whole, plan.source.path)
    remove_shares(share, out)
    return whole
