"""What an extraction starts from: the model, the contrast, and what its edits are to preserve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..data.contrast import is_sensitive, read_contrast
from ..data.prompts import Prompt, Side, Source, check_contrast, load_prompts
from ..models.resolve import commit_of, find_model
from .settings import Settings


@dataclass(frozen=True)
class RunSource:
    """The model and the prompts that a run is made from.

    Attributes:
        name, revision: of the model, as given or found.
        folder, checkpoint: where it lies.
        prompts: both sides of the contrast, and the target where there is one.
        sensitive: the sides that are.
        preserved: prompts on which outputs should not move, by their source.
        sensitive_preserved: the sources of these that are sensitive.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    revision: str | None
    prompts: Mapping[Side, list[Prompt]]
    sensitive: list[Side]
    preserved: Mapping[str, list[Prompt]]
    sensitive_preserved: list[str]


def read_source(
    model: str,
    settings: Settings,
    *,
    concept: str | None,
    positive: Source | None,
    negative: Source | None,
    column: str | None,
    hub_split: str,
    data: Path | str | None,
    revision: str | None,
) -> RunSource:
    """Find the model and read all prompts (see `commands.extract.extract`).

    Raises:
        OrthogonalizeError: the model or a prompt set is missing or cannot be used.
    """
    sides = read_contrast(concept, positive, negative, column, hub_split, None if data is None else Path(data))
    prompts: dict[Side, list[Prompt]] = {"positive": sides[0], "negative": sides[1]}
    if settings.target is not None:
        prompts["target"] = load_prompts(settings.target, "target", column, hub_split)
        check_contrast(**prompts)
    sensitive = sides[2]
    if settings.target is not None and is_sensitive(settings.target):
        sensitive = [*sensitive, "target"]
    preserved = {name: load_prompts(name, split=hub_split) for name in settings.preserve}
    folder = find_model(model, revision)
    return RunSource(
        str(model),
        folder,
        open_checkpoint(folder),
        commit_of(folder) or revision,
        prompts,
        list(prompts) if settings.sensitive else sensitive,
        preserved,
        [name for name in preserved if settings.sensitive or is_sensitive(name)],
    )
