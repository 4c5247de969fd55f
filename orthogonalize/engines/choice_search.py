"""Which of a question's choices is the likeliest, with as few tokens scored as exactness allows.

A choice is never likelier than its beginning. So the likeliest is found by walks. A walk sets out from the end of a
beginning that is known, takes at every step the likeliest token that goes on to a choice, learns of the tokens that
it leaves aside, and ends where it has become less likely than a choice known to its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Tree = dict[int, "Tree"]


def tree_of(continuations: Iterable[Sequence[int]]) -> Tree:
    """The tokens that may come first, each with the tree of those that may come after it."""
    root: Tree = {}
    for continuation in continuations:
        node = root
        for token in continuation:
            node = node.setdefault(token, {})
    return root


def tokens_of(tree: Tree) -> list[int]:
    """Every token in `tree` once, those that may come first before those behind them."""
    found: dict[int, None] = {}
    level = [tree]
    while level:
        found.update(dict.fromkeys(token for node in level for token in node))
        level = [child for node in level for child in node.values()]
    return list(found)


@dataclass(frozen=True)
class Branch:
    """What may be followed behind `start`, and how unlikely (in nats) it may become before it is given up."""

    start: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    floor: float


class ChoiceSearch:
    """The choices of one question, and what is known of them.

    `known` holds, for a beginning, the log-probability in nats of its last token after those before it.
    """

    def __init__(self, choices: Iterable[Sequence[int]]) -> None:
        self.choices = [tuple(choice) for choice in choices]
        self.known: dict[tuple[int, ...], float] = {}

    def _beginning(self, choice: tuple[int, ...]) -> tuple[float, int]:
        """The log-probability of the first tokens of `choice`, as far as known, and how many they are."""
        total = 0.0
        for end in range(1, len(choice) + 1):
            found = self.known.get(choice[:end])
            if found is None:
                return total, end - 1
            total += found
        return total, len(choice)

    def bounds(self) -> list[float]:
        """What no choice is likelier than; exact for the likeliest as soon as no walk is left."""
        return [self._beginning(choice)[0] for choice in self.choices]

    def walks(self) -> list[Branch]:
        """The walks behind beginnings that could still become the likeliest choice, the likeliest beginning first.

        Each is for all choices that go on from its start. None is left when the likeliest is known to its end.
        """
        begun = [(*self._beginning(choice), choice) for choice in self.choices]
        best = max((total for total, known, choice in begun if known == len(choice)), default=-math.inf)
        open_: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        totals: dict[tuple[int, ...], float] = {}
        for total, known, choice in begun:
            if known < len(choice) and not total < best:
                open_.setdefault(choice[:known], []).append(choice[known:])
                totals[choice[:known]] = total
        return [
            Branch(start, tuple(dict.fromkeys(open_[start])), best - totals[start])
            for start in sorted(open_, key=totals.__getitem__, reverse=True)
        ]

    def learn(self, walk: Branch, steps: Iterable[tuple[int, Mapping[int, float]]]) -> None:
        """Enter what a walk found: the token of every step, and the log-probabilities of tokens that it might be."""
        node, path = tree_of(walk.continuations), walk.start
        for token, found in steps:
            self.known |= {(*path, child): found[child] for child in node if child in found}
            if token not in node:
                return
            node, path = node[token], (*path, token)
