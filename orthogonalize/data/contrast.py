"""Read both sides of a contrast: a named concept, or two prompt sources."""

from __future__ import annotations

from ..core.errors import OrthogonalizeError
from .benchmarks import PROMPT_SETS
from .prompts import Prompt, Side, check_contrast, concept, load_prompts


def read_contrast(
    concept_name: str | None,
    positive: str | None,
    negative: str | None,
    column: str | None = None,
    hub_split: str = "train",
) -> tuple[list[Prompt], list[Prompt], list[Side]]:
    """Both sides of a contrast, and which of them are sensitive.

    Raises:
        OrthogonalizeError: neither a concept nor both sources are given, or they cannot be used.
    """
    if concept_name and column is not None:
        raise OrthogonalizeError("--column belongs to --positive and --negative; a named concept knows its own")
    if concept_name and not (positive or negative):
        named = concept(concept_name)
        sides = (
            load_prompts(named.positive, "positive", named.positive_column, named.hub_split),
            load_prompts(named.negative, "negative", named.negative_column, named.hub_split),
        )
        sensitive: list[Side] = ["positive"] if named.sensitive else []
    elif positive and negative and not concept_name:
        sides = (
            load_prompts(positive, "positive", column, hub_split),
            load_prompts(negative, "negative", column, hub_split),
        )
        known = {each.source.repository for each in PROMPT_SETS.values() if each.sensitive}
        named_by_side: dict[Side, str] = {"positive": positive, "negative": negative}
        sensitive = [side for side, source in named_by_side.items() if source in known]
    else:
        raise OrthogonalizeError("give either --concept, or both --positive and --negative")
    check_contrast(*sides)
    return *sides, sensitive
