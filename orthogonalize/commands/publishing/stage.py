"""The files that `push` publishes, put together in a folder of links: no local path is in what is written there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ...checkpoints.checkpoint import CARD, INDEX, RECIPE, open_checkpoint
from ...checkpoints.settings_files import read_json
from ...core.errors import OrthogonalizeError, shown
from ...core.files import write_atomically
from ...core.foreign import has
from ...core.progress import note
from ...edits.adapter import CONFIG, WEIGHTS, is_adapter
from ...edits.recipe import Recipe, Verification, load_recipe
from ...models.names import is_hub_id, public_name
from ...reports.model_card import CardContext, CardKind, write_card
from ...reports.schema import Report, load_report
from ...reports.style import screen_style
from .settings import PushSettings

PICTURE = "rates.png"
REPORTS = ("report.json", "report.html")


def stage_files(
    folder: Path, stage: Path, repository: str, settings: PushSettings, verification: Verification | None
) -> None:
    """Put what is to be published into the empty folder `stage`.

    The checkpoint's files are links, which the Hub's client follows; recipe, card and an adapter's configuration are
    written anew, with the base's public name instead of its path.

    Raises:
        OrthogonalizeError: the report is of another edit, or the recipe lists a file that is not there.
    """
    recipe = load_recipe(folder)
    report = _report_of(recipe, folder, settings)
    for name in [] if settings.recipe_only else listed(recipe, folder):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).symlink_to((folder / name).absolute())
    _publish_base(recipe, settings)
    recipe.verification = verification or recipe.verification
    recipe.save(stage)
    if is_adapter(folder):
        config = read_json(folder / CONFIG) | {"base_model_name_or_path": recipe.base.model}
        (stage / CONFIG).unlink(missing_ok=True)
        if not settings.recipe_only:
            write_atomically(stage / CONFIG, json.dumps(config, indent=2) + "\n")
    picture = None if report is None else _picture(report)
    if picture is not None:
        (stage / PICTURE).write_bytes(picture)
    kind: CardKind = "recipe" if settings.recipe_only else "adapter" if is_adapter(folder) else "checkpoint"
    context = CardContext(
        kind, repository, settings.title, settings.concept or None, None if picture is None else PICTURE
    )
    write_card(stage, recipe, base=folder, report=report, context=context)
    if settings.report is not None:
        _stage_report(Path(settings.report), stage)


def _picture(report: Report) -> bytes | None:
    """The figure of a report's rates as PNG; None without rates, or without what draws it."""
    if not has("matplotlib"):
        note("the card has no picture: matplotlib is not installed (`pip install 'orthogonalize[plots]'`)")
        return None
    from ...reports.rate_plot import as_png, rates_figure

    with screen_style():
        figure = rates_figure(report)
        return None if figure is None else as_png(figure)


def _report_of(recipe: Recipe, folder: Path, settings: PushSettings) -> Report | None:
    if settings.report is None:
        return None
    found = load_report(settings.report)
    if found.recipe not in (None, recipe.fingerprint()):
        raise OrthogonalizeError(
            f"{settings.report} reports on a different edit than {folder}; run eval on this checkpoint"
        )
    return found


def _stage_report(report: Path, stage: Path) -> None:
    place = report.parent if report.is_file() else report
    for name in REPORTS:
        if (place / name).is_file():
            shutil.copyfile(place / name, stage / name)


def _publish_base(recipe: Recipe, settings: PushSettings) -> None:
    """Name the base as others know it; the revision of a local folder means nothing to them."""
    if settings.base_model is not None and settings.base_model != recipe.base.model:
        recipe.base.revision = None
    recipe.base.model = settings.base_model or public_name(recipe.base.model)
    if not is_hub_id(recipe.base.model):
        recipe.base.revision = None


def listed(recipe: Recipe, folder: Path) -> list[str]:
    """The files that an edited checkpoint's recipe lists, or an adapter's two; those of an old recipe as `edit` does.

    Raises:
        OrthogonalizeError: one is missing, or is not in the folder.
    """
    opened = None if is_adapter(folder) else open_checkpoint(folder)
    if opened is None:
        names = [CONFIG, WEIGHTS]
    else:
        others = recipe.files or ["config.json", *([INDEX] if opened.indexed else []), *map(str, opened.side_files())]
        names = sorted({*opened.files, *others} - {RECIPE, CARD})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            raise OrthogonalizeError(f"{folder} has no file {shown(name)}, which its recipe lists; edit again")
        if opened is not None:
            opened.check_inside(Path(name))
    return names
