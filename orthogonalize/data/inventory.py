"""What was read of each prompt source, what was dropped and how the rest was split, as one table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..core.errors import OrthogonalizeError, shown
from .prompts import MINIMUM, LoadedPrompts, Prompt, Side, Split
from .refusals import LEAST_TOKENS

Name = TypeVar("Name", bound=str)  # of a side, or of a preserved set
DRAWN: tuple[Split, ...] = ("train", "val", "test")


def drop_too_long(
    sides: Mapping[Name, Sequence[Prompt]],
    encode: Callable[[str], Sequence[int]],
    context: int | None,
    files: Collection[str] = (),
) -> dict[Name, list[Prompt]]:
    """The prompts of each side that leave room for an answer in the model's `context`, in tokens; None keeps all.

    Only texts that could be too long are encoded: a text has at most one token per byte, besides its template.

    Args:
        files: the sides that are read from a file of the user's own. Who wrote it can shorten a prompt, so one that is
            too long is named; public sets are taken as they are, without it.

    Raises:
        OrthogonalizeError: too few are left, or a prompt of `files` is too long.
    """
    if context is None:
        return {side: list(prompts) for side, prompts in sides.items()}
    limit = max(context - LEAST_TOKENS, context // 2)
    template = len(encode("a"))
    fitting: dict[Name, list[Prompt]] = {}
    for side, prompts in sides.items():
        kept = []
        for p in prompts:
            length = len(p.text.encode()) + template
            length = len(encode(p.text)) if length > limit else length
            if length <= limit:
                kept.append(p)
            elif side in files:
                raise OrthogonalizeError(
                    f"the {side} prompt {shown(p.text, 40)!r} has {length} tokens, and the model's context of "
                    f"{context} leaves {limit} beside an answer; shorten it or leave it out"
                )
        if len(kept) < MINIMUM <= len(prompts):
            raise OrthogonalizeError(
                f"{len(prompts) - len(kept)} of {len(prompts)} {side} prompts are longer than {limit} tokens, which is "
                f"all that the model's context of {context} leaves beside an answer; use shorter ones"
            )
        fitting[side] = kept
    return fitting


@dataclass(frozen=True)
class PromptCounts:
    """Rows of one source, and what became of them.

    `drawn` are the prompts by split, `wanted` how many were asked for, and `filtered` how many of the drawn ones were
    left out because the model does not behave on them as their side says.
    """

    name: str
    rows: int
    empty: int
    duplicates: int
    too_long: int
    drawn: Mapping[Split, int]
    wanted: Mapping[str, int]
    filtered: int
    unused: int

    @property
    def short(self) -> bool:
        """Whether there were fewer prompts than asked for."""
        return any(self.drawn[split] < self.wanted.get(split, 0) for split in DRAWN)

    def cells(self) -> list[str]:
        """The cells of its row."""
        splits = [
            str(self.drawn[split]) + (f" of {self.wanted[split]}" if self.drawn[split] < self.wanted[split] else "")
            for split in DRAWN
        ]
        dropped = (self.empty, self.duplicates, self.too_long)
        return [self.name, str(self.rows), *map(str, dropped), *splits, str(self.filtered), str(self.unused)]


def inventory(
    read: Mapping[Side, Sequence[Prompt]],
    fitting: Mapping[Side, Sequence[Prompt]],
    drawn: Sequence[Prompt],
    kept: Sequence[Prompt],
    wanted: Mapping[str, int],
) -> str:
    """The table of a contrast.

    Args:
        read: the prompts of both sources, and `fitting` those that are not too long for the model.
        drawn: the prompts that were drawn, and `kept` those on which the model behaves as their side says.
        wanted: how many prompts per side and split were asked for.
    """
    counts = []
    for side in read:
        found, splits = read[side], [p.split for p in drawn if p.side == side]
        whole = found if isinstance(found, LoadedPrompts) else LoadedPrompts(found, len(found))
        by_split = {split: splits.count(split) for split in DRAWN}
        counts.append(
            PromptCounts(
                name=side,
                rows=whole.rows,
                empty=whole.empty,
                duplicates=whole.duplicates,
                too_long=len(found) - len(fitting[side]),
                drawn=by_split,
                wanted=wanted,
                filtered=len(splits) - sum(p.side == side for p in kept),
                unused=len(fitting[side]) - len(splits),
            )
        )
    return inventory_table(counts)


COLUMNS = ("prompts", "read", "empty", "duplicate", "too long", *DRAWN, "filtered", "unused")


def inventory_table(counts: Sequence[PromptCounts]) -> str:
    """The table as text, with what its splits mean where there were too few prompts."""
    rows = [list(COLUMNS), *(each.cells() for each in counts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(each.short for each in counts):
        lines.append("fewer prompts than asked for: train, val and test shrink in proportion (--train, --val, --test)")
    return "\n".join(lines)
