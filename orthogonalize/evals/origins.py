"""Whether a checkpoint, a base and a run belong together, by the SHA-256 of their weights."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.checkpoint import RECIPE, Checkpoint, open_checkpoint
from ..core.errors import OrthogonalizeError
from ..core.progress import note
from ..edits.recipe import load_recipe
from ..models.names import public_name
from ..selection.run_folder import RunInfo

OPTION = "--allow-other-base"
OTHER_RUN = "the run is of another model"


def _same_weights(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether two checkpoints have the same weight files, byte for byte; stops at the first difference."""
    if one.files.keys() != two.files.keys():
        return False
    pairs = [(file.path, two.files[name].path) for name, file in one.files.items()]
    if any(a.stat().st_size != b.stat().st_size for a, b in pairs):
        return False
    for a, b in pairs:
        with a.open("rb") as left, b.open("rb") as right:
            while chunk := left.read(2**22):
                if chunk != right.read(2**22):
                    return False
    return True


def mismatches(base: Path, name: str, run: RunInfo, checkpoint: Path | None = None) -> list[str]:
    """What does not belong together, one clause each; none if all does.

    Args:
        base, name: the folder of the unedited model, and the name that it was called by.
        run: the run whose prompts are used.
        checkpoint: the folder of the edited one; its recipe, if it has one, says what it was made from.
    """
    source, base_name = open_checkpoint(base), public_name(name)
    weights, found = source.fingerprint(), []
    if checkpoint is not None:
        if _same_weights(open_checkpoint(checkpoint), source):
            found.append(f"the checkpoint has the weights of the base ({base_name}) itself, so nothing was edited")
        if (checkpoint / RECIPE).is_file():
            made_from = load_recipe(checkpoint).base
            if made_from.weights != weights:
                found.append(
                    f"the base ({base_name}) is not the base of the recipe ({public_name(made_from.model)}): "
                    "its weights differ"
                )
    if run.weights != weights:
        found.append(f"{OTHER_RUN} ({public_name(run.model)}) than {base_name}: their weights differ")
    return found


def check_origins(found: list[str], allowed: bool, recipe: bool = True) -> None:
    """Refuse what does not belong together, or say it.

    A checkpoint without a `recipe` does not say what it was made from. A run of another model than the base, whose
    prompts are then all that is used of it, is only said.

    Raises:
        OrthogonalizeError: something does not, and it is not `allowed`.
    """
    refused = [each for each in found if recipe or not each.startswith(OTHER_RUN)]
    if refused and not allowed:
        raise OrthogonalizeError(f"{'; '.join(refused)}; {OPTION} measures it all the same, and says so")
    for each in found:
        note(f"{each} ({OPTION})" if each in refused else each)
