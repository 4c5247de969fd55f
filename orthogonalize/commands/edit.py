"""`edit`: from directions to an edited checkpoint on disk."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..architectures.schema import architecture_of, remembered
from ..checkpoints.checkpoint import INDEX, Checkpoint, open_checkpoint
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.quantization import check_quantization
from ..checkpoints.quantizing.library import Quantizer
from ..checkpoints.quantizing.plan import QuantizedPlan
from ..checkpoints.quantizing.writer import QuantizedWriter
from ..checkpoints.rounding.registry import DEFAULT_ROUNDING
from ..checkpoints.writer import DOWNLOADS, Written
from ..core.errors import OrthogonalizeError, shown
from ..core.locks import InUseError
from ..core.output_folders import EDITED, OutputFolder, check_space, complete_folder
from ..core.progress import note, track
from ..edits.bake import bake
from ..edits.descriptions.automatic import learn, learn_from
from ..edits.hub_cache import CachedRepository, edited_folder
from ..edits.lora import write_adapter
from ..edits.plan import EditPlan
from ..edits.quantize import quantization_of, quantized_plan
from ..edits.recipe import Base, Quantization, Recipe, Source, TensorChange, load_recipe, store_maps
from ..edits.settings import EditSettings
from ..edits.sharding import Share, assemble, missing_shares, remove_shares, share_bytes, write_share
from ..engines.experiment.ask import ask_server
from ..models.names import is_hub_id
from ..models.resolve import commit_of, find_checkpoint, find_recipe
from ..models.tokenizer.faithful import PLAIN_CLASS, check_written, mended_settings
from ..models.tokenizer.faithful import SETTINGS as TOKENIZER_SETTINGS
from ..reports.model_card import CardContext, write_card
from ..reports.runtimes import blocks_alone, runtimes, summary
from ..selection.resolve import ResolvedEdit, resolve_file, resolve_recipe, resolve_run


def _place(out: Path | str | None, cache: str | None) -> OutputFolder | CachedRepository:
    if out is not None and cache is None:
        return OutputFolder(Path(out), EDITED)
    if cache is not None and out is None:
        return CachedRepository(cache)
    raise OrthogonalizeError("give either --out or --cache")


def edit(
    model: Path | str,
    out: Path | str | None = None,
    *,
    cache: str | None = None,
    run: Path | str | None = None,
    direction: Path | str | None = None,
    recipe: Path | str | None = None,
    settings: EditSettings | None = None,
    **changes: Any,
) -> Recipe:
    """Write a copy of `model` with a direction edited out of, or into, its weights.

    Give exactly one of `run`, `direction` and `recipe`.

    Args:
        model: a checkpoint folder, a Hub id or a .gguf file.
        out: the folder to create; it appears only when complete.
        cache: write into the Hub's cache under this name (`owner/name`) instead, where libraries find it by that
            name. Unchanged files of a model from the Hub are then hard links to the cached ones.
        run: a folder written by `extract`. It completes `settings` (see `resolve.choose`).
        direction: a file with a direction or a basis (see `load_direction`).
        recipe: the recipe of an earlier edit, to rebuild it bit for bit: a file, a checkpoint folder or a repository on
            the Hub (`owner/name`).
        settings: everything else.
        changes: fields of `EditSettings`, such as `method="ablate"`; they take precedence over `settings`.

    Returns:
        The recipe, which is also written into the checkpoint as orthogonalize.json.

    Raises:
        OrthogonalizeError: the edit cannot be made exactly; nothing is written.
    """
    model, settings = str(model), (settings or EditSettings()).with_changes(**changes)
    place = _place(out, cache)
    recipe = None if recipe is None else find_recipe(str(recipe))
    share = Share.parse(settings.shard) if settings.shard else None
    if share is not None and settings.format == "lora":
        raise OrthogonalizeError("an adapter is one small file; leave out --shard with --format lora")
    if share is not None and cache is not None:
        raise OrthogonalizeError("give --out with --shard: shares are written beside that folder")
    if settings.quantize is not None:
        _check_quantizable(settings, f"--quantize {settings.quantize}")
        Quantizer.of(settings.quantize)  # which says if its library is missing, before any work is done
    with nullcontext() if share is not None else place.locked():
        place.check_free(settings.force, [Path(p) for p in (model, run, direction, recipe) if p is not None])
        if sum(source is not None for source in (run, direction, recipe)) != 1:
            raise OrthogonalizeError("give exactly one of --run, --direction and --recipe")
        if settings.pick is not None and run is None:
            raise OrthogonalizeError("--pick chooses among the edits that a run tried; give --run")
        # A share reads only its own files, so the others are never fetched.
        download = False if share is not None and settings.download is None else settings.download
        source = find_checkpoint(model, settings.revision, download)
        folder = source.path
        place.check_free(settings.force, [folder])
        check_quantization(source)
        if recipe is not None:
            resolved = resolve_recipe(recipe, settings)
            learn_from(load_recipe(recipe), source)
        else:
            learn(source, settings.description)
            if run is not None:
                resolved = resolve_run(Path(run), source, settings.edit_fields, settings.pick, settings.device)
            else:
                resolved = resolve_file(Path(str(direction)), source, settings.edit_fields)
        resolved.check_not_empty()
        plan = bake(source, resolved.intervention, ask_server)
        planned = plan.checkpoint
        planned.rounding = resolved.rounding or settings.rounding or DEFAULT_ROUNDING
        quantized = _quantized(plan, settings, resolved.quantization)
        # Blobs in the Hub's cache are never changed in place.
        link = settings.link or (cache is not None and commit_of(folder) is not None)
        if settings.format == "checkpoint":
            needed = planned.changed_bytes if link and not source.remote_sizes else planned.output_bytes
            needed = needed if share is None else share_bytes(planned, share, link)
            needed = needed if quantized is None else quantized.output_bytes
            check_space(place.folder, int(1.01 * needed) + sum(source.remote_sizes[: max(DOWNLOADS, settings.workers)]))
        if resolved.base_weights is not None and source.files.keys() != resolved.base_weights.keys():
            raise OrthogonalizeError(f"{model} is not the base of the recipe (its files differ)")
        note(f"editing: {resolved.choice.describe()}")
        note(f"taken from {resolved.taken_from}")
        _note_left_behind(source)
        mended = mended_settings(folder) if settings.format == "checkpoint" else None
        if mended is not None:
            planned.texts[TOKENIZER_SETTINGS] = mended.text()
            note(f"tokenizer: {mended.instead_of}, so {PLAIN_CLASS} is written in its place")
        written = _recipe_of(model, commit_of(folder) or settings.revision, source, resolved, planned)
        if quantized is not None:
            written.quantization = quantization_of(quantized)
            note(f"quantising {len(quantized.weights)} matrices by {written.quantization.scheme}")
        how = _HowToWrite(settings.force, settings.workers, link, resolved.base_weights)
        if settings.format == "lora":
            if planned.packed.keys() & planned.edits.keys():
                raise OrthogonalizeError(f"an adapter cannot hold edits of MXFP4 experts ({model}); omit --format lora")
            weights = source.fingerprint()
            if resolved.base_weights not in (None, weights):
                raise OrthogonalizeError(f"{model} is not the base of the recipe (its weights differ)")
            with place.complete(settings.force) as partial:
                write_adapter(plan, partial, written.base.model)
                written.base.weights = weights
                written.save(partial)
                write_card(partial, written, source.path, context=CardContext("adapter"))
            _note_relative(resolved, written)
            return written
        if share is not None:
            return _write_share(planned, place.folder, share, written, how)
        with place.complete(settings.force) as partial:
            done = _write(planned, quantized, partial, how)
            written.base.weights, written.weights = done.source, done.result
            written.tensors = [TensorChange(**asdict(done.records[name])) for name in sorted(done.records)]
            written.save(partial)
            write_card(partial, written, source.path)
            if mended is not None:
                check_written(partial)
        _note_relative(resolved, written)
        return written


def readers(recipe: Recipe, checkpoint: Path | str) -> list[str]:
    """Which runtimes read an edited checkpoint, and which edit more of them would read, as lines for the user."""
    config = open_checkpoint(edited_folder(checkpoint)).config
    scheme = recipe.quantization.scheme if recipe.quantization else None
    lines = [summary(runtimes(config, recipe.added, scheme))]
    scope = blocks_alone(config, recipe.added) if scheme is None else None
    if scope is not None:
        lines.append(
            f"--scope {scope} adds no head, so that they read it: another edit, without the embedding; measure it"
        )
    return lines


def _note_left_behind(source: Checkpoint) -> None:
    """Name what is not copied: what may be nobody else's business, and what may hold the weights a second time."""
    for names, why in (
        (source.private_files(), "hidden files, training logs or links out of the folder"),
        (source.left_out(), "copies of the weights, or not known to belong to a model"),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            note(f"not copied, being {why}: {', '.join(shown(name, 60) for name in names[:8])}{more}")


def _note_relative(resolved: ResolvedEdit, written: Recipe) -> None:
    """Say so where the run was extracted from other weights than were edited."""
    if resolved.run is not None and resolved.run.info.weights != written.base.weights:
        note("the run was extracted from different weights (of a related model?)")


def _recipe_of(
    model: str, revision: str | None, source: Checkpoint, resolved: ResolvedEdit, changes: CheckpointPlan
) -> Recipe:
    """The recipe before the checkpoint is written, without checksums and measurements."""
    stored = store_maps(resolved.intervention)
    return Recipe(
        version=version("orthogonalize"),
        base=Base(
            model=model if is_hub_id(model) else str(Path(model).resolve()),
            revision=revision,
            architecture=architecture_of(source.config).family,
            weights={},
        ),
        choice=resolved.choice,
        source=Source(
            kind=resolved.kind, fingerprint=stored.fingerprint, prompts=resolved.prompts, concept=resolved.concept
        ),
        maps=stored.maps,
        arrays=stored.arrays,
        conditional=stored.conditional,
        rounding=changes.rounding,
        files=sorted(
            {"config.json", *([INDEX] if source.indexed else []), *map(str, source.side_files()), *changes.texts}
        ),
        added=sorted(changes.additions),
        config_changes=changes.config_changes,
        left_out=[str(name) for name in source.left_out()],
        tokenizer_class=PLAIN_CLASS if TOKENIZER_SETTINGS in changes.texts else None,
        probes=resolved.probes,
        description=remembered(source.config),
    )


def _quantized(plan: EditPlan, settings: EditSettings, own: Quantization | None) -> QuantizedPlan | None:
    """The plan of the quantised result; None if neither the settings nor the recipe (its `own`) quantise it.

    Raises:
        OrthogonalizeError: it cannot be quantised.
    """
    scheme = own.scheme if own is not None else settings.quantize
    if scheme is None:
        return None
    if own is not None:  # what the settings ask for was checked at first
        _check_quantizable(settings, "the recipe")
    return quantized_plan(plan, scheme, None if own is None else own.version)


def _check_quantizable(settings: EditSettings, by: str) -> None:
    """Refuse what cannot be quantised, as is asked for `by` an option or a recipe."""
    if settings.format == "lora":
        raise OrthogonalizeError(f"{by} quantises, but an adapter is added to the base as it is; omit --format lora")
    if settings.shard is not None:
        raise OrthogonalizeError(f"{by} quantises the whole checkpoint; omit --shard")


@dataclass(frozen=True)
class _HowToWrite:
    """How to write a checkpoint; `expected` are the checksums of the source's weight files in a recipe."""

    force: bool
    workers: int
    link: bool
    expected: dict[str, str] | None


def _write(plan: CheckpointPlan, quantized: QuantizedPlan | None, folder: Path, how: _HowToWrite) -> Written:
    size = plan.output_bytes if quantized is None else quantized.output_bytes
    with track("writing the checkpoint", size, "bytes") as advance:
        if quantized is None:
            done = plan.write(folder, advance, workers=how.workers, link=how.link, expected=how.expected)
        else:
            writer = QuantizedWriter(quantized, folder, advance)
            done = writer.run(workers=how.workers, link=how.link, expected=how.expected)
    if done.not_finite:
        names = ", ".join(shown(name, 100) for name in sorted(done.not_finite)[:3])
        more = f" and {len(done.not_finite) - 3} more" if len(done.not_finite) > 3 else ""
        note(f"the base holds NaN or infinite values where the edit leaves it as it is: {names}{more}")
    return done


def _write_share(plan: CheckpointPlan, out: Path, share: Share, recipe: Recipe, how: _HowToWrite) -> Recipe:
    """Write one share, and assemble the checkpoint if it was the last."""
    with track(f"writing share {share.number} of {share.of}", share_bytes(plan, share, link=False), "bytes") as advance:
        write_share(
            plan,
            out,
            share,
            recipe,
            force=how.force,
            progress=advance,
            workers=how.workers,
            link=how.link,
            expected=how.expected,
        )
    waiting = missing_shares(share, out)
    if waiting:
        note(f"{out} will be complete with {', '.join(folder.name for folder in waiting)}")
        return recipe
    try:
        with complete_folder(out, EDITED, how.force) as partial:
            whole = assemble(plan, share, out, partial, how.link)
            whole.save(partial)
            write_card(partial, whole, plan.source.path)
    except InUseError:  # by a process whose share was completed at the same moment
        note(f"{out} is being assembled by another process")
        return recipe
    remove_shares(share, out)
    return whole
