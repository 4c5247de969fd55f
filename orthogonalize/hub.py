"""`push`: an edited checkpoint to the Hub, private unless asked otherwise."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .card import write_card
from .checkpoint import RECIPE, open_checkpoint
from .errors import OrthogonalizeError
from .models import HUB_ID, first_line, public_name
from .progress import note
from .recipe import load_recipe
from .report import load_report


def _prepare(folder: Path, report: Path | None) -> None:
    """Bring card, recipe and report in `folder` to what is uploaded: no path of this machine in any."""
    found = load_report(report) if report is not None else None
    recipe = load_recipe(folder)
    recipe.base.model = public_name(recipe.base.model)
    recipe.save(folder)
    write_card(folder, recipe, report=found)
    for name in ("report.json", "report.html"):
        if report is not None and (report / name).is_file():
            shutil.copyfile(report / name, folder / name)


def push(checkpoint: Path | str, repository: str, *, public: bool = False, report: Path | str | None = None) -> str:
    """Upload an edited checkpoint with its recipe, card and, if given, report; return its address.

    The token is huggingface_hub's (`HF_TOKEN`, or `hf auth login`); it is never printed.

    Args:
        checkpoint: a folder made by `edit`.
        repository: `owner/name`.
        public: make the repository public. Otherwise it is created private, and one that exists and
            is public is refused.
        report: a folder made by `eval`, for the card and to upload beside it.

    Raises:
        OrthogonalizeError: not an edited checkpoint, no token, or the Hub refused.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(checkpoint)
    open_checkpoint(folder)
    if not (folder / RECIPE).is_file():
        raise OrthogonalizeError(f"{folder} has no recipe; push only uploads what `orthogonalize edit` made")
    if not re.fullmatch(HUB_ID, repository):
        raise OrthogonalizeError(f"repository {repository!r} is not of the form owner/name")
    token = get_token()
    if token is None:
        raise OrthogonalizeError("no Hub token: set HF_TOKEN, or log in with `hf auth login`")
    _prepare(folder, None if report is None else Path(report))
    api = HfApi(token=token)
    try:
        url = api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        private = bool(api.model_info(repository).private)
        if not public and not private:
            raise OrthogonalizeError(f"{repository} exists and is public; give --public, or choose another name")
        if public and private:
            api.update_repo_settings(repository, private=False)
        note(f"uploading {folder} to {repository} ({'public' if public else 'private'})")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an edited checkpoint")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OrthogonalizeError(f"the Hub did not take {repository}: {first_line(error)}") from error
    return str(url)
