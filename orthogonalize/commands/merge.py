"""`merge`: a LoRA adapter and its base, as one checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.checkpoint import RECIPE, open_checkpoint
from ..core.errors import OrthogonalizeError
from ..core.files import file_hash, fingerprint
from ..core.output_folders import EDITED, check_free, complete_folder
from ..core.progress import note, track
from ..edits.adapter import CONFIG, WEIGHTS, adapter_config, is_adapter, merge_plan
from ..edits.hub_cache import edited_folder
from ..edits.recipe import load_recipe
from ..models.names import check_adapter_name
from ..models.resolve import cached, find_model, folder_state
from .edit import edit


def merge(adapter: Path | str, out: Path | str, *, base: Path | str | None = None, force: bool = False) -> Path:
    """Write the adapter merged into its base to `out`; returns `out`.

    An adapter that `edit` wrote has a recipe: the result is the checkpoint that `edit` makes of it, bit for bit, with
    recipe and card. Of any other, it is `W + (alpha / r) B A`, rounded once.

    Args:
        adapter: a folder in PEFT's format.
        base: the model that it adapts; by default the one that it names.

    Raises:
        OrthogonalizeError: the adapter or its base cannot be used, or do not fit each other.
    """
    adapter, out = Path(adapter), Path(out)
    check_adapter_name(str(adapter))
    if (adapter / RECIPE).is_file():
        model = str(base or load_recipe(adapter).base.model)
        edit(model, out, recipe=adapter / RECIPE, force=force)
        return out
    check_free(out, EDITED, force, [adapter])
    plan = merge_plan(adapter, open_checkpoint(find_model(_base_of(adapter, base))))
    with (
        complete_folder(out, EDITED, force) as partial,
        track("writing the checkpoint", plan.output_bytes, "bytes") as advance,
    ):
        plan.write(partial, advance)
    return out


def _base_of(adapter: Path, base: Path | str | None) -> str:
    named = base or adapter_config(adapter).get("base_model_name_or_path")
    if not named:
        raise OrthogonalizeError(f"{adapter} does not name its base; give --base")
    return str(named)


def checkpoint_of(checkpoint: Path | str, base: Path | str | None = None) -> Path:
    """The folder of an edited checkpoint; an adapter is merged into its base first, in the cache of converted models.

    Raises:
        OrthogonalizeError: as `merge`.
    """
    folder = edited_folder(checkpoint)
    if not is_adapter(folder):
        return folder
    recipe = load_recipe(folder) if (folder / RECIPE).is_file() else None
    named = str(base or (recipe.base.model if recipe else _base_of(folder, None)))
    state = fingerprint([*map(file_hash, (folder / CONFIG, folder / WEIGHTS)), folder_state(find_model(named))])
    merged = cached(f"merged-{state[:16]}", lambda out: merge(folder, out, base=named))
    note(f"{folder} is an adapter; merged into its base in {merged}")
    return merged
