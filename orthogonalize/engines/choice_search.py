"""Branch and bound for multiple choice: the likeliest choice, exactly, with as few scored tokens as possible.

A choice is never likelier than its prefix. A branch starts at the end of a scored prefix, follows at every step the
likeliest token that continues to a choice, records the log-probabilities of the tokens it passes over, and is cut off
once it is less likely than a fully scored choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Tree = dict[int, "Tree"]


def tree_of(continuations: Iterable[Sequence[int]]) -> Tree:
    """The prefix tree of `continuations`: each first token with the tree of what may follow it."""
    root: Tree = {}
    for continuation in continuations:
        node = root
        for token in continuation:
            node = node.setdefault(token, {})
    return root


def tokens_of(tree: Tree) -> list[int]:
    """Every token in `tree` once, in breadth-first order."""
    found: dict[int, None] = {}
    level = [tree]
    while level:
        found.update(dict.fromkeys(token for node in level for token in node))
        level = [child for node in level for child in node.values()]
    return list(found)


@dataclass(frozen=True)
class Branch:
    """The continuations to follow after `start`, cut off below `floor` (log-probability in nats after `start`)."""

    start: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    floor: float


class ChoiceSearch:
    """The search over the choices of one question.

    `known` holds, by prefix, the log-probability in nats of its last token given the tokens before.
    """

    def __init__(self, choices: Iterable[Sequence[int]]) -> None:
        self.choices = [tuple(choice) for choice in choices]
        self.known: dict[tuple[int, ...], float] = {}

    def _known_prefix(self, choice: tuple[int, ...]) -> tuple[float, int]:
        """The log-probability of the longest scored prefix of `choice`, and its length in tokens."""
        total = 0.0
        for end in range(1, len(choice) + 1):
            found = self.known.get(choice[:end])
            if found is None:
                return total, end - 1
            total += found
        return total, len(choice)

    def bounds(self) -> list[float]:
        """An upper bound on every choice's log-probability; exact for the likeliest once no branch is left."""
        return [self._known_prefix(choice)[0] for choice in self.choices]

    def branches(self) -> list[Branch]:
        """The branches that could still contain the likeliest choice, likeliest prefix first.

        Each covers all choices that continue from its start. None is left once the likeliest choice is scored.
        """
        prefixes = [(*self._known_prefix(choice), choice) for choice in self.choices]
        best = max((total for total, known, choice in prefixes if known == len(choice)), default=-math.inf)
        open_: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        totals: dict[tuple[int, ...], float] = {}
        for total, known, choice in prefixes:
            if known < len(choice) and not total < best:
                open_.setdefault(choice[:known], []).append(choice[known:])
                totals[choice[:known]] = total
        return [
            Branch(start, tuple(dict.fromkeys(open_[start])), best - totals[start])
            for start in sorted(open_, key=totals.__getitem__, reverse=True)
        ]

    def learn(self, branch: Branch, steps: Iterable[tuple[int, Mapping[int, float]]]) -> None:
        """Record what a branch found: the token taken at every step, and the log-probabilities of its candidates."""
        node, path = tree_of(branch.continuations), branch.start
        for token, found in steps:
            self.known |= {(*path, child): found[child] for child in node if child in found}
            if token not in node:
                return
            node, path = node[token], (*path, token)
