"""Fit conditional maps to a running model: read the inputs of its write matrices, and solve for each of them.

By default, layers are fitted in groups of three, in order, and the target is read behind the edits of earlier groups:
what they have removed already is not removed again. What should not move is read in the unedited model, once.

To remove a behaviour, what the target writes is brought to what harmless prompts write on average. To strengthen it, it
is brought to what prompts that show the behaviour write at the same place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from ...core.errors import OrthogonalizeError
from ...core.files import check_text, write_atomically
from ...core.interrupts import check
from ...core.interventions import ConditionalMap, Site, WriteMatrix, block_sites, orthonormal
from ...core.progress import track
from ...directions.conditional import Weights
from ...directions.direction_set import Directions
from ...models.stream import Stream
from ...models.write_matrices import write_modules
from ...models.write_reading import TokenSet, WriteReader
from ..build import no_direction
from ..config import EditConfig
from ..scopes import layers_in_scope, parse_scope, stream_after
from .kept import KeptReader
from .regression import EXAMPLES, FIRST, FURTHER, HARMLESS, TARGET, Regression

GROUP = 3  # layers that are read together
PRESERVED = "preserved: "
ANSWER_START = 8  # tokens of an answer that are its start: they decide whether it shows the behaviour


@dataclass(frozen=True)
class AnsweredTokens:
    """Prompts and the model's own answers to them, as one sequence of token ids each; and the prompts' lengths."""

    ids: Sequence[Sequence[int]]
    prompts: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.prompts):
            raise ValueError(f"{len(self.ids)} sequences with the lengths of {len(self.prompts)} prompts")
        for row, length in zip(self.ids, self.prompts, strict=True):
            if not 0 < length <= len(row) or min(row) < 0:
                raise ValueError(f"a sequence of {len(row)} tokens whose prompt has {length}, or a negative token")

    def whole(self) -> TokenSet:
        """All tokens."""
        return TokenSet(self.ids, [0] * len(self.ids))

    def first(self, template: int) -> TokenSet:
        """The last `template` tokens of the prompts, and the first ones of the answers."""
        return TokenSet(self.ids, [n - template for n in self.prompts], [n + ANSWER_START for n in self.prompts])

    def places(self, template: int) -> dict[int, TokenSet]:
        """The tokens of `first`, by their place: -1 is the last one of the prompt, 0 the first one of the answer."""
        return {
            place: TokenSet(
                self.ids,
                [min(n + place, len(row)) for n, row in zip(self.prompts, self.ids, strict=True)],
                [n + place + 1 for n in self.prompts],
            )
            for place in range(-template, ANSWER_START)
        }

    def answered_as(self, other: AnsweredTokens) -> AnsweredTokens:
        """The same prompts with the answers to `other`, in turn."""
        answers = [row[n:] for row, n in zip(other.ids, other.prompts, strict=True)]
        prompts = [list(row[:n]) for row, n in zip(self.ids, self.prompts, strict=True)]
        rows = [[*prompt, *answers[i % len(answers)]] for i, prompt in enumerate(prompts)]
        return AnsweredTokens(rows, self.prompts)


@dataclass(frozen=True)
class FitTokens:
    """The tokens that a conditional edit is fitted to.

    Attributes:
        template: the number of template tokens between a prompt's text and the answer.
        target: prompts whose behaviour is to change, of which the last template positions and the first tokens of the
            answers count.
        harmless: prompts that do not show the behaviour, of which all tokens count.
        preserved: further prompts whose outputs should not move, by name; likewise.
        further: more harmless prompts, of which only first tokens count. They are cheap to read, and what an edit does
            to first tokens is what few prompts say least about.
        examples: prompts that show the behaviour, if the target should show it too; what they write is what the target
            is to write. The target is then read with their answers.
    """

    template: int
    target: AnsweredTokens
    harmless: AnsweredTokens
    preserved: Mapping[str, AnsweredTokens] = field(default_factory=dict)
    examples: AnsweredTokens | None = None
    further: AnsweredTokens | None = None

    @property
    def kept(self) -> dict[str, tuple[TokenSet, bool, bool]]:
        """By name, the sets of tokens whose outputs should not move besides the harmless ones.

        Each with whether it is of a preserved source, and whether it is of first tokens.
        """
        sets = {FIRST: (self.harmless.first(self.template), False, True)}
        for name, each in self.preserved.items():
            sets[f"{PRESERVED}{name}"] = (each.whole(), True, False)
            sets[f"{PRESERVED}{name}, first"] = (each.first(self.template), True, True)
        return sets

    @property
    def sets(self) -> dict[str, TokenSet]:
        """All sets by name."""
        return {**self.changed, **self.unchanged}

    @property
    def unchanged(self) -> dict[str, TokenSet]:
        """The sets whose outputs should not move."""
        kept = {name: tokens for name, (tokens, _, _) in self.kept.items()}
        more = {FURTHER: self.further.first(self.template)} if self.further is not None else {}
        return {HARMLESS: self.harmless.whole(), **kept, **more}

    def shares(self, weights: Weights) -> dict[str, float]:
        """The weight of each set of `kept` in the regression."""
        return {
            name: (weights.preserve if preserved else 1.0) * (weights.first if first else 1.0)
            for name, (_, preserved, first) in self.kept.items()
        }

    @property
    def changed(self) -> dict[str, TokenSet]:
        """The target's tokens; behind those of the examples, if there are any, both by place (`target@-1`)."""
        if self.examples is None:
            return {TARGET: self.target.first(self.template)}
        both = {EXAMPLES: self.examples, TARGET: self.target.answered_as(self.examples)}
        return {
            f"{name}@{place}": tokens
            for name, each in both.items()
            for place, tokens in each.places(self.template).items()
        }

    def save(self, file: Path) -> None:
        """Write the token ids as JSON."""
        write_atomically(file, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, file: Path) -> FitTokens:
        """Read what `save` wrote.

        Raises:
            OrthogonalizeError: the file is missing or damaged.
        """
        check_text(file)
        try:
            return _FIT_TOKENS.validate_json(file.read_bytes())
        except OSError:
            raise OrthogonalizeError(
                f"{file.parent} lacks the model's own answers, which a conditional edit is fitted to; run extract again"
            ) from None
        except ValidationError as error:
            raise OrthogonalizeError(f"{file} is damaged; run extract again with --force") from error


_FIT_TOKENS = TypeAdapter(FitTokens)


@dataclass(frozen=True)
class ConditionalFit:
    """Fitted maps, and how many experts were left alone because they saw too few tokens."""

    maps: dict[WriteMatrix, ConditionalMap]
    left_alone: int = 0


def fit_conditional(
    model: Any,
    tokens: FitTokens,
    basis_at: Callable[[int], torch.Tensor | None],
    sites: Sequence[Site],
    weights: Weights,
    *,
    sequential: bool = True,
    reader: WriteReader | None = None,
    kept: KeptReader | None = None,
) -> ConditionalFit:
    """Fit the conditional map of every matrix that writes at `sites`.

    Args:
        model: a transformers model; its dtype and device are those of the reading.
        basis_at: the orthonormal directions [k, d] of the stream at the input of a block (the number of layers: the
            head); None leaves the sites that write to that stream as they are.
        sites: attention and MLP sites of blocks.
        weights: the weights of the regression.
        sequential: whether to read the target group by group, behind the edits of earlier layers, instead of all at
            once.
        reader: one of `tokens.changed` that has come at most to the first of the sites' layers, unedited.
        kept: reads `tokens.unchanged`; fits that share it read them once.

    Raises:
        OrthogonalizeError: a set is empty, or a system cannot be solved.
    """
    stream = Stream.of(model)
    reader = reader or WriteReader(model, tokens.changed)
    kept = kept or KeptReader(model, tokens.unchanged)
    shares = tokens.shares(weights)
    groups = site_groups(sites, sequential)
    modules = [
        [
            (module, basis)
            for site in group
            if (basis := basis_at(stream_after(site))) is not None
            for module in write_modules(stream, site).values()
        ]
        for group in groups
    ]
    fitted, left_alone = {}, 0
    previous: dict[WriteMatrix, ConditionalMap] = {}
    with track("fitting a conditional edit", len(sites), "write sites") as advance:
        for number, group in enumerate(modules):
            if group:
                ahead = [module for later in modules[number + 1 :] for module, _ in later]
                inputs = kept.read([module for module, _ in group], ahead, shares)
                regressions = [Regression(module, basis, stream, inputs[module.matrix]) for module, basis in group]
                previous, alone = _fit_group(reader, regressions, previous, weights)
                del inputs, regressions  # whose sums are not to be there beside those of the next group
                left_alone += alone
                fitted.update(previous)
            advance(len(groups[number]))
    return finished_fit(fitted, left_alone)


def _fit_group(
    reader: WriteReader,
    regressions: Sequence[Regression],
    previous: Mapping[WriteMatrix, ConditionalMap],
    weights: Weights,
) -> tuple[dict[WriteMatrix, ConditionalMap], int]:
    """The maps of a group, whose target is read behind the `previous` ones; and how many experts are left alone."""
    by_matrix = {each.matrix: each for each in regressions}
    reader.read(list(by_matrix), lambda name, matrix, *rest: by_matrix[matrix].take(name, *rest), previous)
    maps, left_alone = {}, 0
    for each in regressions:
        found, alone = each.solve(weights)
        left_alone += alone
        if found is not None:
            maps[each.matrix] = found
        check()
    return maps, left_alone


def finished_fit(maps: Mapping[WriteMatrix, ConditionalMap], left_alone: int) -> ConditionalFit:
    """The fit with these maps.

    Raises:
        OrthogonalizeError: there are none.
    """
    if not maps:
        why = (
            "every expert saw too few tokens; extract with more prompts (--train)"
            if left_alone
            else ("no layer of the scope has a direction")
        )
        raise OrthogonalizeError(f"there is nothing to fit: {why}")
    return ConditionalFit(dict(maps), left_alone)


def sites_to_fit(choice: EditConfig, layer_count: int, ranking: Sequence[int] | None) -> list[Site]:
    """The attention and MLP sites of a conditional edit; `from:l` and `upto:l` are the blocks from l on, or before."""
    layers = layers_in_scope(parse_scope(choice.scope), layer_count, choice.layer, ranking)
    return [site for site in block_sites(layers) if choice.components in (site.kind, "both")]


def spans_of(choice: EditConfig, directions: Directions) -> Callable[[int], torch.Tensor | None]:
    """What a conditional edit takes out of each stream (see `EditConfig.span`): orthonormal rows [k, d], or None.

    Raises:
        OrthogonalizeError: the run has no such directions.
    """
    position = choice.position
    assert position is not None
    if choice.span == "inlp" and not directions.subspaces:
        raise no_direction("inlp", position, choice.layer or 0)

    def span_at(layer: int) -> torch.Tensor | None:
        own = directions.difference_basis(position, layer)
        if own is None or choice.span == "direction":
            return own
        rank = choice.rank if isinstance(choice.rank, int) else None
        if choice.span == "inlp":
            return directions.basis("inlp", position, layer, rank)
        found = [directions.difference_basis(each, layer) for each in directions.positions]
        return orthonormal(torch.cat([rows for rows in found if rows is not None]))[:rank]

    return span_at


def weights_of(choice: EditConfig) -> Weights:
    """The weights of the regression that `choice` gives."""
    return Weights(choice.target_weight, choice.preserve_weight, choice.first_weight, choice.ridge)


def site_groups(sites: Sequence[Site], sequential: bool) -> list[list[Site]]:
    """`sites` in the groups that are read together, in order."""
    if not sequential:
        return [list(sites)]
    layers = sorted({int(site.layer or 0) for site in sites})
    return [
        [site for site in sites if int(site.layer or 0) in layers[start : start + GROUP]]
        for start in range(0, len(layers), GROUP)
    ]
