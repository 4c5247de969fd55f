"""`push`: upload an edited checkpoint or adapter to the Hub, private by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import CARD, RECIPE, open_checkpoint, walk
from ..core.errors import OrthogonalizeError
from ..core.files import check_regular_files, is_inside
from ..core.progress import note
from ..core.temporary_folders import temporary_folder
from ..edits.adapter import WEIGHTS, is_adapter
from ..edits.hub_cache import edited_folder
from ..edits.recipe import Verification, load_recipe
from ..reports.model_card import declared_licence
from .publishing.settings import PushSettings
from .publishing.stage import stage_files
from .publishing.upload import check_token, upload
from .verify import verify


def push(checkpoint: Path | str, repository: str, settings: PushSettings | None = None, **changes: Any) -> str:
    """Upload an edited checkpoint or adapter with its recipe, card and, if given, report; return its address.

    Before anything is sent, the weights are compared with the recipe's checksums and, if that was not done yet,
    verified (see `verify`). An interrupted upload resumes when `push` is called again: files that the Hub has are not
    sent again, and nothing is visible there before the one commit at the end. The token is huggingface_hub's
    (`HF_TOKEN`, or `hf auth login`); it is never printed.

    Args:
        checkpoint: a folder made by `edit`, or the name under which it wrote into the Hub's cache.
        repository: `owner/name`.
        settings: everything else.
        changes: fields of `PushSettings`, such as `public=True`; they take precedence over `settings`.

    Returns:
        The address; with `dry_run`, the files and their sizes in bytes, one per line.

    Raises:
        OrthogonalizeError: `checkpoint` is not an edited checkpoint or not what its recipe says, there is no token, or
            the Hub refuses.
    """
    from huggingface_hub import get_token

    settings = replace(settings or PushSettings(), **changes)
    folder = edited_folder(checkpoint)
    _check_folder(folder)
    settings.check(repository)
    token = get_token()
    if token is None and not settings.dry_run:
        raise OrthogonalizeError("no Hub token: set HF_TOKEN, or log in with `hf auth login`")
    with temporary_folder() as stage:  # before anything that takes long
        stage_files(folder, stage, repository, settings, load_recipe(folder).verification)
        if settings.dry_run:
            return "\n".join(f"{(stage / name).stat().st_size:>14,}  {name}" for name in sorted(map(str, walk(stage))))
    check_token(str(token), repository)
    verification = _verified(folder, settings)
    with temporary_folder() as stage:
        stage_files(folder, stage, repository, settings, verification)
        if declared_licence(stage / CARD) is None:
            note(f"{folder / CARD} names no licence: say there what the base's licence allows")
        note(f"uploading {folder} to {repository} ({'public' if settings.public else 'private'})")
        return upload(str(token), stage, repository, settings)


def _check_folder(folder: Path) -> None:
    """Reject a folder that `edit` did not make, or that links to elsewhere.

    Raises:
        OrthogonalizeError: the message names it.
    """
    if is_adapter(folder):
        check_regular_files(folder)
        for file in folder.rglob("*"):
            if not is_inside(file, folder.resolve()):
                raise OrthogonalizeError(f"{file} is a link that leads out of its folder; remove it")
        if not (folder / WEIGHTS).is_file():
            raise OrthogonalizeError(f"{folder} has no file {WEIGHTS}; edit again")
    else:
        opened = open_checkpoint(folder)
        for file in folder.rglob("*"):
            opened.check_inside(file.relative_to(folder))
    if not (folder / RECIPE).is_file():
        raise OrthogonalizeError(f"{folder} has no recipe; push only uploads output of `orthogonalize edit`")


def _verified(folder: Path, settings: PushSettings) -> Verification | None:
    """The verification of a checkpoint whose weights are the recipe's; it is verified now if it was not yet.

    Raises:
        OrthogonalizeError: it is not what its recipe says, or its base cannot be had.
    """
    recipe = load_recipe(folder)
    if not settings.verify:
        return recipe.verification
    if recipe.weights and open_checkpoint(folder).fingerprint() != recipe.weights:
        raise OrthogonalizeError(f"{folder}: the weights are not those of its recipe; edit again")
    found = recipe.verification
    if found is None:
        note("not verified yet: comparing with the base (--no-verify skips this)")
        try:
            found = verify(folder, listed_only=True).verification
        except OrthogonalizeError as error:
            raise OrthogonalizeError(
                f"{folder} cannot be verified: {error}; --no-verify uploads it as it is"
            ) from error
    if found is None or not found.passed:
        raise OrthogonalizeError(
            f"{folder} is NOT what its recipe gives (see `orthogonalize verify {folder}`); edit again, or --no-verify"
        )
    return found
