"""`push`: upload an edited checkpoint to the Hub, private by default."""

from __future__ import annotations

import json
import re
import shutil
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import CARD, INDEX, RECIPE, open_checkpoint, walk
from ..checkpoints.settings_files import read_json
from ..core.errors import OrthogonalizeError, first_line, shown
from ..core.files import check_regular_files, is_inside
from ..core.progress import note
from ..core.temporary_folders import temporary_folder
from ..edits.adapter import CONFIG, is_adapter
from ..edits.adapter import WEIGHTS as FACTORS
from ..edits.hub_cache import edited_folder
from ..edits.recipe import Recipe, load_recipe
from ..models.names import HUB_ID, public_name
from ..reports.model_card import write_card
from ..reports.schema import load_report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PUBLISHED = (RECIPE, CARD, "report.json", "report.html")  # beside the files that a recipe lists
# What loaders could take for the model's weights, by its ending; on the Hub only.
WEIGHTS = tuple(
    f"*{ending}"
    for ending in (
        *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".ckpt", ".h5", ".ot"),
        *(".msgpack", ".gguf", ".GGUF", ".onnx", ".onnx_data", ".tflite", ".npz", ".pkl", ".distcp", ".nemo"),
    )
)


def _stage(folder: Path, report: Path | None, stage: Path) -> None:
    """Put what is to be published into `stage`: the recipe's files, and a recipe, card and report without local paths.

    The files are links; the Hub's client follows them.
    """
    recipe = load_recipe(folder)
    found = load_report(report) if report is not None else None
    if report is not None and report.is_file():
        report = report.parent
    if found is not None and found.recipe not in (None, recipe.fingerprint()):
        raise OrthogonalizeError(f"{report} reports on a different edit than {folder}; run eval on this checkpoint")
    for name in _listed(recipe, folder):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).symlink_to((folder / name).absolute())
    recipe.base.model = public_name(recipe.base.model)
    if is_adapter(folder):  # its base is named there as well
        named = read_json(folder / CONFIG) | {"base_model_name_or_path": recipe.base.model}
        (stage / CONFIG).unlink()
        (stage / CONFIG).write_text(json.dumps(named, indent=2) + "\n", "utf-8")
    recipe.save(stage)
    write_card(stage, recipe, base=folder, report=found)
    for name in ("report.json", "report.html"):
        if report is not None and (report / name).is_file():
            shutil.copyfile(report / name, stage / name)


def _listed(recipe: Recipe, folder: Path) -> list[str]:
    """The files of an edited checkpoint that its recipe lists; those of an old recipe by the rules of `edit`.

    Of an adapter, they are its configuration and its factors.

    Raises:
        OrthogonalizeError: one is missing, or is not in the folder.
    """
    if is_adapter(folder):
        return [CONFIG, FACTORS]
    opened = open_checkpoint(folder)
    others = recipe.files or ["config.json", *([INDEX] if opened.indexed else []), *map(str, opened.side_files())]
    names = sorted({*opened.files, *others} - {RECIPE, CARD})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            raise OrthogonalizeError(f"{folder} has no file {shown(name)}, which its recipe lists; edit again")
        opened.check_inside(Path(name))
    return names


def push(checkpoint: Path | str, repository: str, *, public: bool = False, report: Path | str | None = None) -> str:
    """Upload an edited checkpoint with its recipe, card and, if given, report; return its address.

    The token is huggingface_hub's (`HF_TOKEN`, or `hf auth login`); it is never printed.

    Args:
        checkpoint: a folder made by `edit`, which may be an adapter, or the name under which it wrote into the Hub's
            cache.
        repository: `owner/name`.
        public: make the repository public. Otherwise it is created private, and an existing public repository is
            refused.
        report: a folder written by `eval`, which is included in the card and uploaded.

    Raises:
        OrthogonalizeError: `checkpoint` is not an edited checkpoint, there is no token, or the Hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    folder = edited_folder(checkpoint)
    _check_links(folder)
    if not (folder / RECIPE).is_file():
        raise OrthogonalizeError(f"{folder} has no recipe; push only uploads output of `orthogonalize edit`")
    if not re.fullmatch(HUB_ID, repository):
        raise OrthogonalizeError(f"repository {repository!r} is not of the form owner/name")
    token = get_token()
    if token is None:
        raise OrthogonalizeError("no Hub token: set HF_TOKEN, or log in with `hf auth login`")
    with temporary_folder() as stage:
        _stage(folder, None if report is None else Path(report), stage)
        try:
            url = _upload(HfApi(token=token), folder, stage, repository, public)
        except OrthogonalizeError:
            raise
        except Exception as error:  # whatever the network and its libraries raise
            raise OrthogonalizeError(f"uploading to {repository} failed: {first_line(error)}") from error
    return url


def _check_links(folder: Path) -> None:
    """Reject a folder with a link that leads out of it, which would upload what lies there."""
    if not is_adapter(folder):
        opened = open_checkpoint(folder)
        for file in folder.rglob("*"):
            opened.check_inside(file.relative_to(folder))
        return
    check_regular_files(folder)
    for file in folder.rglob("*"):
        if not is_inside(file, folder.resolve()):
            raise OrthogonalizeError(f"{file} is a link that leads out of its folder; remove it")
    if not (folder / FACTORS).is_file():
        raise OrthogonalizeError(f"{folder} has no file {FACTORS}; edit again")


def _upload(api: HfApi, folder: Path, stage: Path, repository: str, public: bool) -> str:
    url = api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
    private = bool(api.model_info(repository).private)
    if not public and not private:
        raise OrthogonalizeError(f"{repository} exists and is public; give --public, or choose another name")
    if public and private:
        api.update_repo_settings(repository, private=False)
    note(f"uploading {folder} to {repository} ({'public' if public else 'private'})")
    known = {*_listed(load_recipe(folder), folder), *PUBLISHED}
    api.upload_folder(  # in one commit, so that no weights are on the Hub without their recipe
        repo_id=repository,
        folder_path=stage,
        ignore_patterns=[escape(str(name)) for name in walk(stage) if str(name) not in known],
        delete_patterns=list(WEIGHTS),  # loaders would take what an earlier upload left beside these
        commit_message="Upload an edited checkpoint with its recipe and card",
    )
    return str(url)
