"""Public benchmark sets, read from the Hub or from a local copy in the same schema. None of their texts ship here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import OrthogonalizeError, first_line
from ..core.progress import note
from ..core.registry import Registry
from .hub import offline_if_unreachable
from .rows import SUFFIXES, read_split
from .tokenization import is_valid_unicode

T = TypeVar("T")
COPY_SUFFIXES = (*SUFFIXES, ".jsonl.zst")


@dataclass(frozen=True)
class BenchmarkSet:
    """A dataset on the Hub: its repository, configuration and split, and the columns that are read."""

    repository: str
    split: str
    columns: tuple[str, ...]
    config: str | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.repository, self.config, self.split) if part)


@dataclass(frozen=True)
class PromptSet:
    """A public set of instructions.

    Attributes:
        name: the word for `--suite`.
        title: what reports call it.
        source: where it is.
        column: holds the prompt.
        category: the column that holds its category, if any.
        only: (column, value in lower case) of the rows that are used, if not all.
        sensitive: whether answers to these prompts can be harmful; reports fold them and can leave them out.
        over_refusal: whether the prompts are harmless but look harmful.
    """

    name: str
    title: str
    source: BenchmarkSet
    column: str
    category: str | None = None
    only: tuple[str, str] | None = None
    sensitive: bool = False
    over_refusal: bool = False

    @property
    def summary(self) -> str:
        """One line for help and documentation."""
        return f"{'over-refusal' if self.over_refusal else 'refusals'} on {self.title}"


PROMPT_SETS: Registry[PromptSet] = Registry("prompt set", [
    # XSTest's unsafe half is left out.
    PromptSet(
        "xstest", "XSTest (safe, look unsafe)",
        BenchmarkSet("Paul/XSTest", "train", ("prompt", "type", "label")),
        "prompt", "type", only=("label", "safe"), over_refusal=True,
    ),
    PromptSet(
        "orbench", "OR-Bench (safe, look unsafe)",
        BenchmarkSet("bench-llm/or-bench", "train", ("prompt", "category"), config="or-bench-hard-1k"),
        "prompt", "category", over_refusal=True,
    ),
    PromptSet(
        "jailbreakbench", "JailbreakBench",
        BenchmarkSet("JailbreakBench/JBB-Behaviors", "harmful", ("Goal", "Category"), config="behaviors"),
        "Goal", "Category", sensitive=True,
    ),
    PromptSet(
        "advbench", "AdvBench", BenchmarkSet("walledai/AdvBench", "train", ("prompt",)), "prompt", sensitive=True
    ),
    PromptSet(
        "harmbench", "HarmBench",
        BenchmarkSet("walledai/HarmBench", "train", ("prompt", "category"), config="standard"),
        "prompt", "category", sensitive=True,
    ),
    PromptSet(
        "maliciousinstruct", "MaliciousInstruct",
        BenchmarkSet("walledai/MaliciousInstruct", "train", ("prompt",)), "prompt", sensitive=True,
    ),
    PromptSet(
        "strongreject", "StrongREJECT",
        BenchmarkSet("walledai/StrongREJECT", "train", ("prompt", "category")), "prompt", "category", sensitive=True,
    ),
    PromptSet(
        "tdc2023", "TDC 2023", BenchmarkSet("walledai/TDC23-RedTeaming", "train", ("prompt",)), "prompt", sensitive=True
    ),
])  # fmt: skip

PILE = BenchmarkSet("monology/pile-uncopyrighted", "test", ("text",))
ALPACA = BenchmarkSet("tatsu-lab/alpaca", "train", ("instruction", "input", "output"))
MMLU = BenchmarkSet("cais/mmlu", "test", ("question", "subject", "choices", "answer"), config="all")
MMLU_SHOTS = BenchmarkSet("cais/mmlu", "dev", ("question", "subject", "choices", "answer"), config="all")
ARC = BenchmarkSet("allenai/ai2_arc", "test", ("question", "choices", "answerKey"), config="ARC-Challenge")
ARC_SHOTS = BenchmarkSet("allenai/ai2_arc", "train", ("question", "choices", "answerKey"), config="ARC-Challenge")
TRUTHFULQA = BenchmarkSet(
    "truthfulqa/truthful_qa", "validation", ("question", "mc1_targets"), config="multiple_choice"
)  # fmt: skip


def local_file(source: BenchmarkSet, data: Path) -> Path:
    """The file of `source` below `data`: DATA/OWNER/NAME/[CONFIG/][data/]SPLIT.SUFFIX, or SPLIT-*.parquet.

    Raises:
        OrthogonalizeError: there is none; the message names the expected path.
    """
    folder = data / source.repository
    homes = [folder / source.config, folder] if source.config else [folder]
    homes = [place for home in homes for place in (home, home / "data")]
    for home in homes:
        for suffix in COPY_SUFFIXES:
            if (home / f"{source.split}{suffix}").is_file():
                return home / f"{source.split}{suffix}"
        shards = sorted(home.glob(f"{source.split}-*.parquet"))
        if shards:
            return shards[0]
    raise OrthogonalizeError(
        f"no local copy of {source}: {homes[0] / source.split}.jsonl (or {', '.join(COPY_SUFFIXES[1:])}) does not "
        "exist; put one there, or omit --data to read the set from the Hub"
    )


def _hub_rows(source: BenchmarkSet) -> Iterator[Any]:
    from datasets import load_dataset

    return iter(load_dataset(source.repository, source.config, split=source.split, streaming=True))


def rows(source: BenchmarkSet, data: Path | None, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a set, from the folder `data` if given, else from the Hub.

    Raises:
        OrthogonalizeError: the set is missing, gated, empty, truncated, or in another schema.
    """
    where = str(source) if data is None else str(local_file(source, data))
    try:
        if data is None:
            with offline_if_unreachable():
                taken = list(itertools.islice(_hub_rows(source), limit))
        else:
            taken = list(itertools.islice(read_split(local_file(source, data)), limit))
    except OrthogonalizeError:
        raise
    except Exception as error:  # each of these libraries raises its own classes
        reason = first_line(error)
        if "gated" in reason.lower():
            raise OrthogonalizeError(
                f"{source.repository} is gated: accept its terms on the Hub and log in (hf auth login)"
            ) from error
        advice = "download it again" if data else "check the network, or pass a local copy with --data"
        raise OrthogonalizeError(f"{where} cannot be read: {reason}; {advice}") from error
    if not taken:
        raise OrthogonalizeError(f"{where} is empty; download it again")
    for number, row in enumerate(taken):
        missing = [c for c in source.columns if not isinstance(row, dict) or c not in row]
        if missing:
            raise OrthogonalizeError(f"{where}: row {number + 1} has no {missing[0]!r}, so this is not {source}")
        if not all(is_valid_unicode(value) for value in row.values() if isinstance(value, str)):
            raise OrthogonalizeError(
                f"{where}: row {number + 1} contains an unpaired surrogate (invalid Unicode); fix or remove it"
            )
    return taken


@contextmanager
def as_documented(source: BenchmarkSet) -> Iterator[None]:
    """Report a value that does not have the type documented for `source` as one clear error."""
    try:
        yield
    except OrthogonalizeError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise OrthogonalizeError(
            f"a row does not match the schema of {source} ({first_line(error)}); "
            "lists and numbers need .jsonl or .parquet"
        ) from error


def instructions(source: PromptSet, data: Path | None, limit: int | None) -> list[tuple[str, str | None]]:
    """(prompt, category) of each row of a prompt set, or of `limit` rows spread evenly over it.

    Raises:
        OrthogonalizeError: see `rows`; or no row has a usable prompt.
    """
    found: list[tuple[str, str | None]] = []
    blank = 0
    for row in rows(source.source, data):
        if source.only and str(row[source.only[0]]).strip().lower() != source.only[1]:
            continue
        text = row[source.column]
        if isinstance(text, str) and text.strip():
            found.append((text.strip(), category_of(row.get(source.category)) if source.category else None))
        else:
            blank += 1
    if not found:
        raise OrthogonalizeError(f"{source.source} has no usable prompts; is it the right file?")
    if blank:
        note(f"{source.source}: {blank} rows without a prompt were skipped")
    return evenly(found, limit)


def category_of(value: Any) -> str | None:
    """A category as text; None if there is none."""
    return str(value).strip() or None if isinstance(value, str | int | float) else None


def evenly(found: Sequence[T], limit: int | None) -> list[T]:
    """`limit` rows, spread evenly over all, since sets are sorted by subject or kind."""
    if limit is None or limit >= len(found):
        return list(found)
    return [found[i * len(found) // limit] for i in range(limit)]
