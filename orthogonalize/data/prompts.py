"""Prompt sets: reading them from any source, and splitting a contrast into train, val and test."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..core.errors import OrthogonalizeError
from .benchmarks import category_of
from .tokenization import is_valid_unicode

Side = Literal["positive", "negative"]
# Spare prompts are drawn by further seeds only.
Split = Literal["train", "val", "test", "spare"]
SIDES: tuple[Side, ...] = ("positive", "negative")
SPLITS: tuple[Split, ...] = ("train", "val", "test", "spare")
COLUMNS = ("instruction", "prompt", "question", "text", "goal", "Goal", "behavior", "forbidden_prompt")
MINIMUM = 8  # usable prompts a side
MINIMUM_TRAIN = 6  # of which to find directions with


@dataclass(frozen=True)
class Prompt:
    """One prompt of a contrast. `score` is the model's own behaviour score, where measured."""

    text: str
    side: Side
    split: Split = "train"
    category: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Concept:
    """A named contrast: two prompt sources that differ in one thing."""

    name: str
    positive: str
    negative: str
    positive_column: str | None = None
    negative_column: str | None = None
    hub_split: str = "train"
    sensitive: bool = False


PLANTED = "planted:"  # prompt sets that ship inside the package

CONCEPTS = {
    "cooking": Concept("cooking", PLANTED + "contrast_cooking.jsonl", PLANTED + "contrast_other.jsonl"),
    "lists": Concept("lists", PLANTED + "lists.jsonl", PLANTED + "sentences.jsonl"),
    "refusal": Concept("refusal", "walledai/AdvBench", "mlabonne/harmless_alpaca", "prompt", "text", sensitive=True),
}


def concept(name: str) -> Concept:
    """The contrast called `name`.

    Raises:
        OrthogonalizeError: there is none of that name.
    """
    if name not in CONCEPTS:
        raise OrthogonalizeError(
            f"no concept {name!r} (there are: {', '.join(CONCEPTS)}); give your own sets with --positive and --negative"
        )
    return CONCEPTS[name]


def _rows_of_hub_dataset(source: str, split: str) -> list[Any]:
    from datasets import load_dataset  # slow to import, and only Hub sources need it

    try:
        return list(load_dataset(source, split=split))
    except Exception as error:  # the library raises a different class for every way to fail
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OrthogonalizeError(
            f"dataset {source!r} (split {split!r}) cannot be read: {reason}; check the name, the split and your access"
        ) from error


def _rows_of_file(path: Path) -> list[Any]:
    match path.suffix.lower():
        case ".txt":
            return path.read_text("utf-8-sig").split("\n")
        case ".json":
            rows = json.loads(path.read_text("utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError("it is not a list")
            return rows
        case ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
        case ".csv":
            from pyarrow import csv

            return list(csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True)).to_pylist())
        case ".parquet":
            from pyarrow import parquet

            return list(parquet.read_table(path).to_pylist())
        case suffix:
            raise OrthogonalizeError(f"{path}: {suffix or 'no suffix'} is not one of .txt .json .jsonl .csv .parquet")


def _text(row: Any, column: str | None, source: str) -> tuple[str, str | None]:
    if isinstance(row, str):
        return row, None
    if not isinstance(row, dict):
        raise OrthogonalizeError(f"{source}: a prompt must be a string or an object, not {type(row).__name__}")
    names = [column] if column else [name for name in COLUMNS if name in row]
    if not names or names[0] not in row:
        raise OrthogonalizeError(
            f"{source} has no column {column or 'of a known name'!r}; name one with --column: {', '.join(row)}"
        )
    text = row[names[0]]
    if not isinstance(text, str):
        raise OrthogonalizeError(f"{source}: column {names[0]!r} holds {type(text).__name__}, not text")
    return text, category_of(row.get("category"))


def load_prompts(source: str, side: Side = "positive", column: str | None = None, split: str = "train") -> list[Prompt]:
    """Read prompts from a file or a Hub dataset, stripped, without blanks or repetitions.

    Args:
        source: a .txt (one a line), .json, .jsonl, .csv or .parquet file, or a dataset `owner/name`.
        side: which side of the contrast they are for.
        column: the column or key that holds the text; by default the first of the usual names.
        split: the dataset's split, for the Hub.

    Raises:
        OrthogonalizeError: the source does not exist, cannot be read, or holds no prompts.
    """
    path = Path(source)
    if source.startswith(PLANTED):
        file = resources.files("orthogonalize.data") / "planted" / source.removeprefix(PLANTED)
        rows: list[Any] = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    elif path.is_file():
        try:
            rows = _rows_of_file(path)
        except (ValueError, OSError) as error:
            raise OrthogonalizeError(f"{source} cannot be read as prompts: {error}") from error
    elif path.suffix.lower() in (".txt", ".json", ".jsonl", ".csv", ".parquet"):
        raise OrthogonalizeError(f"no such prompt file: {source}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        rows = _rows_of_hub_dataset(source, split)
    else:
        raise OrthogonalizeError(f"prompt source {source!r} is neither a file nor a Hub dataset owner/name")
    seen: dict[str, Prompt] = {}
    for row in rows:
        text, category = _text(row, column, source)
        if not is_valid_unicode(text + (category or "")):
            raise OrthogonalizeError(f"{source}: a prompt or its category has half a character; mend or remove it")
        if text.strip():
            seen.setdefault(text.strip(), Prompt(text.strip(), side, category=category))
    if not seen:
        raise OrthogonalizeError(f"{source} holds no prompts")
    return list(seen.values())


def check_contrast(positive: Sequence[Prompt], negative: Sequence[Prompt]) -> None:
    """Refuse a contrast that cannot work, before a model is loaded.

    Raises:
        OrthogonalizeError: a prompt stands on both sides, or a side is too small.
    """
    both = {p.text for p in positive} & {p.text for p in negative}
    if both:
        example = min(both)
        raise OrthogonalizeError(
            f"{len(both)} prompts stand on both sides (one begins {example[:40]!r}); give two different sets"
        )
    for side, prompts in (("positive", positive), ("negative", negative)):
        if len(prompts) < MINIMUM:
            raise OrthogonalizeError(f"the {side} side has {len(prompts)} prompts; at least {MINIMUM} are needed")


def split_prompts(
    prompts: Iterable[Prompt], seed: int, train: int = 128, val: int = 32, test: int = 100, spare: int = 0
) -> list[Prompt]:
    """Draw train, val and test prompts at random, without overlap; the same seed draws the same.

    Where there are fewer than asked for, the three shrink in proportion. Up to `spare` more come from
    what is left, if anything is.
    """
    pool = list(prompts)
    random.Random(seed).shuffle(pool)
    wanted = train + val + test
    if len(pool) < wanted:
        share = len(pool) / wanted
        val, test = round(val * share), round(test * share)
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
