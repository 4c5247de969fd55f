"""Prompt sets: read them from a file or the Hub, and split a contrast into train, val and test."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.errors import OrthogonalizeError
from ..core.files import check_text
from ..core.words import counted
from .benchmarks import PROMPT_SETS, BenchmarkSet, PromptSet, category_of, instructions
from .hub import dataset_rows
from .rows import SUFFIXES, check_utf8, read_rows
from .tokenization import is_valid_unicode

# "target" prompts do not show the behaviour, and are to show it after an edit that strengthens it.
Side = Literal["positive", "negative", "target"]
Goal = Literal["remove", "strengthen", "calibrate"]
GOALS: tuple[Goal, ...] = get_args(Goal)
# "spare" prompts serve to compare directions across seeds, and negative ones to fit conditional edits to.
Split = Literal["train", "val", "test", "spare"]
SIDES: tuple[Side, ...] = ("positive", "negative")  # of a contrast
SPLITS: tuple[Split, ...] = ("train", "val", "test", "spare")
Source = str | Path | Sequence[str]  # a file, a Hub dataset, or the prompts themselves
COLUMNS = ("instruction", "prompt", "question", "text", "goal", "Goal", "behavior", "forbidden_prompt")
PROMPT_SUFFIXES = (".txt", *SUFFIXES)
MINIMUM = 8  # usable prompts per side
MINIMUM_TRAIN = 6  # of these, prompts to find directions with


@dataclass(frozen=True)
class Prompt:
    """One prompt of a contrast.

    `score` is that of the unedited model by the readout of its run, and `shows` whether it shows the behaviour by the
    run's measure; None if not measured, or if the measure cannot tell.
    """

    text: str
    side: Side
    split: Split = "train"
    category: str | None = None
    score: float | None = None
    shows: bool | None = None


class LoadedPrompts(list[Prompt]):
    """The prompts of one source, and what was read there.

    `rows` counts what was read, of which `empty` and `duplicates` were dropped; `columns` are the rows' other columns
    that hold text.
    """

    def __init__(
        self, prompts: Iterable[Prompt] = (), rows: int = 0, empty: int = 0, columns: Sequence[str] = ()
    ) -> None:
        super().__init__(prompts)
        self.rows, self.empty, self.columns = rows, empty, tuple(columns)
        self.duplicates = rows - empty - len(self)


def texts_of(prompts: Iterable[Prompt], side: Side, split: Split) -> list[str]:
    """The texts of one side and split, in order."""
    return [p.text for p in prompts if p.side == side and p.split == split]


def target_side(prompts: Sequence[Prompt]) -> Side:
    """The side whose behaviour is to change: the positive one, unless there are target prompts."""
    return "target" if any(p.side == "target" for p in prompts) else "positive"


@dataclass(frozen=True)
class PreservedPrompt:
    """One prompt whose outputs an edit should not move; `source` is the prompt source that it comes from."""

    text: str
    source: str
    split: Split = "train"


@dataclass(frozen=True)
class Concept:
    """A named contrast: two prompt sources that differ in one thing; `behaviour` is what reports call it."""

    name: str
    positive: str
    negative: str
    behaviour: str


@dataclass(frozen=True)
class PublicConcept:
    """A named contrast of public sets, with sets of their own for train, val and test prompts.

    Splits that name the same set share its prompts out, so that none is in both.
    """

    name: str
    positive: Mapping[Split, Sequence[PromptSet]]
    negative: Mapping[Split, Sequence[PromptSet]]
    behaviour: str
    sensitive: bool = False

    def sources(self, side: Side) -> Mapping[Split, Sequence[PromptSet]]:
        """The sets of one side, by split."""
        return self.positive if side == "positive" else self.negative


PLANTED = "planted:"  # prefix of prompt sets that ship with the package

_ALPACA, _ALPACA_TEST = (
    PromptSet("alpaca", "Alpaca", BenchmarkSet("mlabonne/harmless_alpaca", split, ("text",)), "text")
    for split in ("train", "test")
)
# The other rows of JailbreakBench are taken from AdvBench, TDC 2023 and HarmBench, some of them reworded.
_ORIGINAL = PromptSet(
    "jailbreakbench", "JailbreakBench",
    BenchmarkSet("JailbreakBench/JBB-Behaviors", "harmful", ("Goal", "Category", "Source"), config="behaviors"),
    "Goal", "Category", only=("Source", "original"), sensitive=True,
)  # fmt: skip

CONCEPTS: dict[str, Concept | PublicConcept] = {
    "cooking": Concept(
        "cooking", PLANTED + "contrast_cooking.jsonl", PLANTED + "contrast_other.jsonl", "refusals of cooking"
    ),
    "lists": Concept("lists", PLANTED + "lists.jsonl", PLANTED + "sentences.jsonl", "lists"),
    "refusal": PublicConcept(
        "refusal",
        positive={
            "train": [PROMPT_SETS[name] for name in ("advbench", "maliciousinstruct", "tdc2023")],
            "val": [PROMPT_SETS["harmbench"]],
            "test": [_ORIGINAL],
        },
        negative={"train": [_ALPACA], "val": [_ALPACA], "test": [_ALPACA_TEST]},
        behaviour="refusals of harm",
        sensitive=True,
    ),
}


def concept(name: str) -> Concept | PublicConcept:
    """The contrast called `name`.

    Raises:
        OrthogonalizeError: there is none.
    """
    if name not in CONCEPTS:
        raise OrthogonalizeError(
            f"unknown concept {name!r}; available: {', '.join(CONCEPTS)}, "
            "or your own sets with --positive and --negative"
        )
    return CONCEPTS[name]


def _file_of(source: str) -> Path:
    if source.startswith(PLANTED):
        return Path(str(resources.files("orthogonalize.data"))) / "planted" / source.removeprefix(PLANTED)
    return Path(source)


def check_source(source: str) -> None:
    """Check that `source` names a file, a public set, or something of the form of a dataset on the Hub.

    Raises:
        OrthogonalizeError: it is none of these.
    """
    path = _file_of(source)
    if path.is_file() or is_public(source):
        return
    if path.suffix.lower() in PROMPT_SUFFIXES:
        raise OrthogonalizeError(f"no such prompt file: {source}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise OrthogonalizeError(
            f"prompt source {source!r} is neither a file, a Hub dataset owner/name nor a public set "
            f"({', '.join(PROMPT_SETS)})"
        )


def _rows(source: str, split: str) -> list[Any]:
    check_source(source)
    path = _file_of(source)
    if not path.is_file():
        return dataset_rows(source, split)
    try:
        return _rows_of_file(path)
    except (ValueError, OSError) as error:
        raise OrthogonalizeError(f"{source} cannot be read as prompts: {error}") from error


def _rows_of_file(path: Path) -> list[Any]:
    suffix = path.suffix.lower()
    if suffix not in PROMPT_SUFFIXES:
        raise OrthogonalizeError(f"{path}: {suffix or 'no suffix'} is not one of {' '.join(PROMPT_SUFFIXES)}")
    check_text(path)
    if suffix != ".parquet":
        check_utf8(path)
    return path.read_text("utf-8-sig").removesuffix("\n").split("\n") if suffix == ".txt" else list(read_rows(path))


def _text(row: Any, column: str | None, source: str) -> tuple[str, str | None]:
    if isinstance(row, str):
        return row, None
    if not isinstance(row, dict):
        raise OrthogonalizeError(f"{source}: a prompt must be a string or an object, not {type(row).__name__}")
    names = [column] if column else [name for name in COLUMNS if name in row]
    if not names or names[0] not in row:
        raise OrthogonalizeError(
            f"{source} has no {f'column {column!r}' if column else 'column with a known name'}; "
            f"choose one with --column: {', '.join(row)}"
        )
    text = row[names[0]]
    if not isinstance(text, str):
        raise OrthogonalizeError(f"{source}: column {names[0]!r} holds {type(text).__name__}, not text")
    return text, category_of(row.get("category"))


def load_prompts(
    source: Source,
    side: Side = "positive",
    column: str | None = None,
    split: str = "train",
    data: Path | None = None,
) -> LoadedPrompts:
    """Read prompts from a file or a Hub dataset, stripped and without blanks or duplicates.

    Args:
        source: a .txt (one prompt per line), .json, .jsonl, .csv or .parquet file, a dataset `owner/name`, the name of
            a public set (see `PROMPT_SETS`), or a list of texts.
        side: the side of the contrast that they belong to.
        column: the column or key that holds the text; by default the first of `COLUMNS` that exists.
        split: the split of a Hub dataset.
        data: a folder with local copies of public sets; None reads them from the Hub.

    Raises:
        OrthogonalizeError: the source does not exist, cannot be read, or holds no prompts.
    """
    if is_public(source):
        return _public_set(PROMPT_SETS[str(source)], side, data)
    seen: dict[str, Prompt] = {}
    found = _rows(str(source), split) if isinstance(source, str | Path) else list(source)
    source = source_name(source)
    empty = 0
    for row in found:
        text, category = _text(row, column, source)
        if not is_valid_unicode(text + (category or "")):
            raise OrthogonalizeError(
                f"{source}: a prompt or its category contains an unpaired surrogate (invalid Unicode); fix or remove it"
            )
        if text.strip():
            seen.setdefault(text.strip(), Prompt(text.strip(), side, category=category))
        else:
            empty += 1
    if not seen:
        raise OrthogonalizeError(f"{source} holds no prompts")
    first = found[0] if isinstance(found[0], dict) else {}
    columns = [name for name, value in first.items() if isinstance(value, str)]
    return LoadedPrompts(seen.values(), len(found), empty, columns)


def is_public(source: Source) -> bool:
    """Whether a prompt source is named as one of the public sets."""
    return isinstance(source, str) and source in PROMPT_SETS


def _public_set(named: PromptSet, side: Side, data: Path | None) -> LoadedPrompts:
    rows = instructions(named, data, None)
    seen: dict[str, Prompt] = {}
    for text, category in rows:
        seen.setdefault(text, Prompt(text, side, category=category))
    return LoadedPrompts(seen.values(), len(rows))


def source_name(source: Source) -> str:
    """What messages call a prompt source."""
    return str(source) if isinstance(source, str | Path) else "the list of prompts"


def source_names(sources: Iterable[str]) -> dict[str, str]:
    """A short name for each prompt source, all different: its file's name without suffix, or its Hub id.

    Dots become `_`, since reports use the names in dotted keys. A name that is taken gets a number.
    """
    names: dict[str, str] = {}
    for source in sources:
        path = Path(source.removeprefix(PLANTED))
        short = (path.stem if path.suffix.lower() in PROMPT_SUFFIXES else source).replace(".", "_")
        numbered = (f"{short} ({number})" for number in count(2))
        names[source] = next(name for name in chain([short], numbered) if name not in names.values())
    return names


def check_contrast(positive: Sequence[Prompt], negative: Sequence[Prompt], target: Sequence[Prompt] = ()) -> None:
    """Reject a contrast that cannot work, before a model is loaded.

    Raises:
        OrthogonalizeError: the sides share a prompt, two splits do, or a side or one of its splits is too small.
    """
    named = {"positive": positive, "negative": negative} | ({"target": target} if target else {})
    for one, other in combinations(named, 2):
        both = {p.text for p in named[one]} & {p.text for p in named[other]}
        if both:
            example = min(both)
            raise OrthogonalizeError(
                f"{len(both)} prompts appear on both sides, {one} and {other} (such as {example[:40]!r}); use disjoint "
                "sets"
            )
    for side, prompts in named.items():
        if len(prompts) < MINIMUM:
            raise OrthogonalizeError(
                f"the {side} side has {counted(len(prompts), 'prompt')}{_dropped(prompts)}; "
                f"at least {MINIMUM} are required"
            )
        train = sum(p.split == "train" for p in prompts)
        if train < MINIMUM_TRAIN:
            raise OrthogonalizeError(
                f"the {side} side has {counted(train, 'train prompt')}; at least {MINIMUM_TRAIN} are required"
            )
    _check_splits([*positive, *negative, *target])


def _dropped(prompts: Sequence[Prompt]) -> str:
    """What the rows of a small side were dropped for, and the columns that may have been meant."""
    if not isinstance(prompts, LoadedPrompts) or prompts.rows == len(prompts):
        return ""
    columns = f"; is --column right? Columns of text: {', '.join(prompts.columns)}" if prompts.columns else ""
    return f" of {prompts.rows} rows ({prompts.duplicates} duplicates, {prompts.empty} empty{columns})"


def plain(text: str) -> str:
    """A text without what does not tell two prompts apart: case, spacing and the punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip(".?! ")


def _check_splits(prompts: Sequence[Prompt]) -> None:
    seen: dict[str, Split] = {}
    twice: dict[str, tuple[Split, Split]] = {}
    for prompt in prompts:
        first = seen.setdefault(plain(prompt.text), prompt.split)
        if first != prompt.split:
            twice[prompt.text] = (first, prompt.split)
    if twice:
        example = min(twice)
        raise OrthogonalizeError(
            f"{len(twice)} prompts appear in two splits (such as {example[:40]!r}, in {' and '.join(twice[example])}); "
            "keep each in one"
        )


def split_preserved(
    source: str, prompts: Iterable[Prompt], seed: int, train: int, val: int, test: int
) -> list[PreservedPrompt]:
    """The train, val and test prompts of one preserved source, drawn as those of a contrast are."""
    return [PreservedPrompt(p.text, source, p.split) for p in split_prompts(prompts, seed, train, val, test)]


def split_prompts(
    prompts: Iterable[Prompt], seed: int, train: int = 128, val: int = 32, test: int = 100, spare: int = 0
) -> list[Prompt]:
    """Draw disjoint train, val and test prompts at random, reproducibly for each `seed`.

    If there are too few prompts, the three shrink in proportion; val and test keep at least a tenth of the prompts
    each, or all that was asked for if that is less. Up to `spare` of the remaining prompts are drawn as well. Prompts
    that already have splits (not all of them `train`) stay in them; the splits then shrink on their own, and the spare
    prompts are train prompts.
    """
    pool = list(prompts)
    random.Random(seed).shuffle(pool)
    if any(p.split != "train" for p in pool):
        drawn: dict[Split, list[Prompt]] = {split: [p for p in pool if p.split == split] for split in SPLITS}
        rest = [replace(p, split="spare") for p in drawn["train"][train : train + spare]]
        return [*drawn["train"][:train], *drawn["val"][:val], *drawn["test"][:test], *rest]
    wanted = train + val + test
    if len(pool) < wanted:
        share, least = len(pool) / wanted, max(1, len(pool) // 10)
        val, test = (max(round(each * share), min(each, least)) for each in (val, test))
        while test > 1 and len(pool) - val - test < MINIMUM_TRAIN:
            test -= 1
        train = len(pool) - val - test
    bounds: list[tuple[Split, int, int]] = [
        ("train", 0, train),
        ("val", train, train + val),
        ("test", train + val, train + val + test),
        ("spare", train + val + test, train + val + test + spare),
    ]
    return [replace(p, split=split) for split, start, end in bounds for p in pool[start:end]]
