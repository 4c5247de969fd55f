"""What an extraction starts from: the model, the contrast, and what its edits are to preserve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..core.errors import OrthogonalizeError
from ..core.words import counted
from ..data.contrast import is_sensitive, read_contrast
from ..data.prompts import (
    CONCEPTS,
    Prompt,
    PublicConcept,
    Side,
    Source,
    check_contrast,
    is_public,
    load_prompts,
    plain,
    source_name,
    source_names,
)
from ..edits.descriptions.automatic import learn
from ..engines.base import ONE_DEVICE
from ..models.resolve import commit_of, find_checkpoint
from .settings import Settings


@dataclass(frozen=True)
class RunSource:
    """The model and the prompts that a run is made from.

    Attributes:
        concept: what the behaviour is called.
        sources: where the prompts come from, by side, and `preserve` for all preserved sets.
        name, revision: of the model, as given or found.
        folder, checkpoint: where it lies.
        prompts: both sides of the contrast, and the target where there is one.
        sensitive: the sides that are.
        preserved: prompts on which outputs should not move, by their source.
        sensitive_preserved: the sources of these that are sensitive.
        files: the sides, and the preserved sources, that are read from a file of the user's own.
    """

    concept: str | None
    sources: Mapping[str, str]
    name: str
    folder: Path
    checkpoint: Checkpoint
    revision: str | None
    prompts: Mapping[Side, list[Prompt]]
    sensitive: list[Side]
    preserved: Mapping[str, list[Prompt]]
    sensitive_preserved: list[str]
    files: frozenset[str] = frozenset()

    def texts(self) -> list[list[str]]:
        """The texts of every set of prompts."""
        return [[p.text for p in prompts] for prompts in (*self.prompts.values(), *self.preserved.values())]


def read_source(
    model: str,
    settings: Settings,
    *,
    concept_name: str | None,
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
    sources = [positive, negative, settings.target, *settings.preserve]
    local = _local_copies(data, any(is_public(each) for each in sources if each), concept_name)
    sides = read_contrast(concept_name, positive, negative, column, hub_split, local)
    prompts: dict[Side, list[Prompt]] = {"positive": sides[0], "negative": sides[1]}
    if settings.target is not None:
        prompts["target"] = load_prompts(settings.target, "target", column, hub_split, local)
        check_contrast(**prompts)
    sensitive = sides[2]
    if settings.target is not None and is_sensitive(settings.target):
        sensitive = [*sensitive, "target"]
    preserved = {name: load_prompts(name, split=hub_split, data=local) for name in settings.preserve}
    _check_preserved(preserved, prompts)
    # Other engines load it from the disk.
    whole = settings.engine not in ("auto", "stream") or settings.engine_options != ONE_DEVICE
    checkpoint = find_checkpoint(model, revision, True if whole else settings.download)
    folder = checkpoint.path
    learn(checkpoint, settings.description)
    given: dict[str, Source | None] = {"positive": positive, "negative": negative, "target": settings.target}
    named = {side: source_name(each) for side, each in given.items() if each}
    return RunSource(
        _behaviour_name(concept_name, positive),
        ({"concept": concept_name} if concept_name and not positive else {})
        | named
        | ({"preserve": ", ".join(settings.preserve)} if settings.preserve else {}),
        str(model),
        folder,
        checkpoint,
        commit_of(folder) or revision,
        prompts,
        list(prompts) if settings.sensitive else sensitive,
        preserved,
        [name for name in preserved if settings.sensitive or is_sensitive(name)],
        frozenset(side for side, each in given.items() if _is_file(each)) | {n for n in preserved if _is_file(n)},
    )


def _is_file(source: Source | None) -> bool:
    return isinstance(source, str | Path) and not is_public(source) and Path(source).is_file()


def _behaviour_name(concept_name: str | None, positive: Source | None) -> str | None:
    """What reports call the behaviour: by the named concept, by the given name, or by the positive source's."""
    if concept_name is not None:
        return CONCEPTS[concept_name].behaviour if concept_name in CONCEPTS else concept_name
    return next(iter(source_names([str(positive)]).values())) if isinstance(positive, str | Path) else None


def _local_copies(data: Path | str | None, used: bool, concept_name: str | None) -> Path | None:
    """The folder `data`, if it is one and is used.

    Raises:
        OrthogonalizeError: it is not.
    """
    if data is None:
        return None
    if not used and not isinstance(CONCEPTS.get(concept_name or ""), PublicConcept):
        raise OrthogonalizeError("--data holds local copies of public sets; name some, or a --concept that reads some")
    if not Path(data).is_dir():
        raise OrthogonalizeError(f"no such folder: {data} (--data)")
    return Path(data)


def _check_preserved(preserved: Mapping[str, list[Prompt]], prompts: Mapping[Side, list[Prompt]]) -> None:
    """Check that nothing is both to be changed and to be preserved.

    Raises:
        OrthogonalizeError: a prompt is.
    """
    changed = {plain(p.text) for p in prompts.get("target", prompts["positive"])}
    for name, each in preserved.items():
        both = [p.text for p in each if plain(p.text) in changed]
        if both:
            raise OrthogonalizeError(
                f"{counted(len(both), 'prompt')} of {name} (such as {both[0][:40]!r}) are to be preserved, and among "
                "those whose behaviour is to change; keep each in one set"
            )
