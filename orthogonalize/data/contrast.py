"""Read both sides of a contrast: a named concept, or two prompt sources."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import OrthogonalizeError
from ..core.progress import note
from .benchmarks import PROMPT_SETS, PromptSet, instructions
from .prompts import (
    CONCEPTS,
    Concept,
    Prompt,
    PublicConcept,
    Side,
    Source,
    Split,
    check_contrast,
    concept,
    load_prompts,
    plain,
)

KEEPING: tuple[Split, ...] = ("test", "val", "train")  # a prompt of several splits stays in the first of these


def _public_prompts(named: PublicConcept, side: Side, data: Path | None) -> list[Prompt]:
    """The prompts of one side, each in one split only: a train prompt that val or test also has is left out."""
    sources = named.sources(side)
    read: dict[PromptSet, list[tuple[str, str | None]]] = {}
    seen: set[str] = set()
    found: dict[Split, list[Prompt]] = {split: [] for split in KEEPING}
    for split in KEEPING:
        left_out = 0
        for each in sources[split]:
            sharing = [other for other in sources if each in sources[other]]
            rows = read[each] = read.get(each) or instructions(each, data, None)
            own: set[str] = set()
            for text, category in rows[sharing.index(split) :: len(sharing)]:
                if plain(text) in seen:
                    left_out += 1
                elif plain(text) not in own:
                    own.add(plain(text))
                    found[split].append(Prompt(text, side, split, category))
            seen |= own
        if left_out:
            note(f"{named.name}, {side} side: {left_out} {split} prompts are left out, which other sets have as well")
    return [prompt for split in reversed(KEEPING) for prompt in found[split]]


def is_sensitive(source: Source) -> bool:
    """Whether a prompt source is one of the known sets whose answers can be harmful."""
    sensitive = {name: each.source.repository for name, each in PROMPT_SETS.items() if each.sensitive}
    return isinstance(source, str) and (source in sensitive or source in sensitive.values())


def read_contrast(
    concept_name: str | None,
    positive: Source | None,
    negative: Source | None,
    column: str | None = None,
    hub_split: str = "train",
    data: Path | None = None,
) -> tuple[list[Prompt], list[Prompt], list[Side]]:
    """Both sides of a contrast, and which of them are sensitive.

    A concept that is given with sources only names them. `data` is a folder with local copies of public sets; None
    reads them from the Hub.

    Raises:
        OrthogonalizeError: neither a concept nor both sources are given, or they cannot be used.
    """
    if concept_name and column is not None and not (positive or negative):
        raise OrthogonalizeError("--column belongs to --positive and --negative; a named concept knows its own")
    if concept_name in CONCEPTS and (positive or negative):
        raise OrthogonalizeError(
            f"--concept {concept_name} has prompts of its own; leave out --positive and --negative, or choose another "
            "name for yours"
        )
    named = concept(concept_name) if concept_name and not (positive or negative) else None
    sensitive: list[Side] = []
    if isinstance(named, PublicConcept):
        sides = (_public_prompts(named, "positive", data), _public_prompts(named, "negative", data))
        sensitive = ["positive"] if named.sensitive else []
    elif isinstance(named, Concept):
        sides = load_prompts(named.positive, "positive"), load_prompts(named.negative, "negative")
    elif positive and negative:
        sides = (
            load_prompts(positive, "positive", column, hub_split, data),
            load_prompts(negative, "negative", column, hub_split, data),
        )
        named_by_side: dict[Side, Source] = {"positive": positive, "negative": negative}
        sensitive = [side for side, source in named_by_side.items() if is_sensitive(source)]
    else:
        raise OrthogonalizeError("give a named --concept, or both --positive and --negative")
    check_contrast(*sides)
    return *sides, sensitive
