"""Public benchmark sets, by Hub id or as a local copy in the same schema. None of their texts ship here."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import OrthogonalizeError
from ..core.progress import note
from ..core.registry import Registry
from .tokenization import is_valid_unicode

T = TypeVar("T")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.zst")


@dataclass(frozen=True)
class BenchmarkSet:
    """A dataset on the Hub: `repository`, its configuration and split, and the columns that are read."""

    repository: str
    split: str
    columns: tuple[str, ...]
    config: str | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.repository, self.config, self.split) if part)


@dataclass(frozen=True)
class PromptSet:
    """A public set of instructions: its `--suite` name, its title in reports, where it is and which rows count.

    `column` holds the instructions, `category` their categories; `only` is (column, lower-case value) of the rows that
    are kept. With `sensitive`, reports fold prompts and answers and can leave them out; `over_refusal` marks prompts
    that only look unsafe.
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
        OrthogonalizeError: there is none; the message says where it is looked for.
    """
    folder = data / source.repository
    homes = [folder / source.config, folder] if source.config else [folder]
    homes = [place for home in homes for place in (home, home / "data")]
    for home in homes:
        for suffix in SUFFIXES:
            if (home / f"{source.split}{suffix}").is_file():
                return home / f"{source.split}{suffix}"
        shards = sorted(home.glob(f"{source.split}-*.parquet"))
        if shards:
            return shards[0]
    raise OrthogonalizeError(
        f"no local copy of {source}: {homes[0] / source.split}.jsonl is not there "
        f"({', '.join(s for s in SUFFIXES)}); put one there, or leave out --data to read it from the Hub"
    )


def _lines(file: Path) -> Iterator[Any]:
    if file.name.endswith(".zst"):
        import zstandard

        with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            yield from (json.loads(line) for line in io.TextIOWrapper(stream, "utf-8") if line.strip())
    else:
        with file.open(encoding="utf-8-sig") as text:
            yield from (json.loads(line) for line in text if line.strip())


def _file_rows(file: Path) -> Iterator[Any]:
    match file.suffix:
        case ".jsonl" | ".zst":
            return _lines(file)
        case ".json":
            rows = json.loads(file.read_text("utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError("it is not a list")
            return iter(rows)
        case ".csv":
            from pyarrow import csv

            options = csv.ParseOptions(newlines_in_values=True)
            return iter(csv.read_csv(file, parse_options=options).to_pylist())
        case _:
            from pyarrow import parquet

            return (row for shard in _shards(file) for row in parquet.read_table(shard).to_pylist())


def _shards(file: Path) -> list[Path]:
    """All parts of a split, of which `file` is one; none may be missing where their names count them."""
    split = file.name.partition("-")[0]
    counted = re.fullmatch(rf"{re.escape(split)}-\d+-of-(\d+)\.parquet", file.name)
    if counted is None:
        return sorted(file.parent.glob(f"{split}-*.parquet")) or [file]
    digits = len(counted[1])
    names = [f"{split}-{number:0{digits}}-of-{counted[1]}.parquet" for number in range(int(counted[1]))]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is not there")
    return [file.parent / name for name in names]


def _hub_rows(source: BenchmarkSet) -> Iterator[Any]:
    from datasets import load_dataset

    return iter(load_dataset(source.repository, source.config, split=source.split, streaming=True))


def rows(source: BenchmarkSet, data: Path | None, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a set, from `data` where that is given, else from the Hub.

    Raises:
        OrthogonalizeError: it is not there, gated, empty, cut short, or in another schema.
    """
    where = str(source) if data is None else str(local_file(source, data))
    try:
        found = _hub_rows(source) if data is None else _file_rows(local_file(source, data))
        taken = list(itertools.islice(found, limit))
    except OrthogonalizeError:
        raise
    except Exception as error:  # every library here raises classes of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "gated" in reason.lower():
            raise OrthogonalizeError(
                f"{source.repository} is gated: accept its terms on the Hub and log in (hf auth login)"
            ) from error
        advice = "fetch it again" if data else "check the network, or name a local copy with --data"
        raise OrthogonalizeError(f"{where} cannot be read: {reason}; {advice}") from error
    if not taken:
        raise OrthogonalizeError(f"{where} is empty; fetch it again")
    for number, row in enumerate(taken):
        missing = [c for c in source.columns if not isinstance(row, dict) or c not in row]
        if missing:
            raise OrthogonalizeError(f"{where}: row {number + 1} has no {missing[0]!r}; it is not {source}")
        if not all(is_valid_unicode(value) for value in row.values() if isinstance(value, str)):
            raise OrthogonalizeError(f"{where}: row {number + 1} has half a character; mend or remove it")
    return taken


@contextmanager
def as_documented(source: BenchmarkSet) -> Iterator[None]:
    """Read rows of `source` in here: a value of another kind than the set's own is one clear error."""
    try:
        yield
    except OrthogonalizeError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OrthogonalizeError(
            f"a row of {source} is not as that set's own are ({reason}); lists and numbers need .jsonl or .parquet"
        ) from error


def instructions(source: PromptSet, data: Path | None, limit: int | None) -> list[tuple[str, str | None]]:
    """(prompt, category) of a prompt set; `limit` of them are spread over all.

    Raises:
        OrthogonalizeError: as `rows`, or no row counts.
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
        note(f"{source.source}: {blank} rows without a prompt are left out")
    return evenly(found, limit)


def category_of(value: Any) -> str | None:
    """A category as text; None where there is none."""
    return str(value).strip() or None if isinstance(value, str | int | float) else None


def evenly(found: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of the rows, spread over all of them: sets are sorted by subject or kind."""
    if limit is None or limit >= len(found):
        return list(found)
    return [found[i * len(found) // limit] for i in range(limit)]
