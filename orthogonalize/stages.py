"""Stages of an extraction: which are done, from which inputs, and how far the one under way has come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import OrthogonalizeError
from .interruption import check

Stage = Literal["prompts", "activations", "directions", "selection"]
STAGES: tuple[Stage, ...] = get_args(Stage)
BOOK = "stages.json"


def fingerprint(inputs: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write `text` so that `file` is either as it was or complete."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, file)


class StageBook:
    """`stages.json` of a run folder: for every stage that is done its inputs and what it recorded.

    A stage's inputs include the fingerprint of the stage before, so a change runs on to all later ones.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / BOOK
        self.entries: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            try:
                self.entries = dict(json.loads(self.file.read_text("utf-8")))
            except ValueError as error:
                raise OrthogonalizeError(f"{self.file} is damaged; --force extracts again") from error

    def result(self, stage: Stage) -> dict[str, Any]:
        """What a stage that is done recorded.

        Raises:
            OrthogonalizeError: it is not done.
        """
        if stage not in self.entries:
            raise OrthogonalizeError(f"{self.file.parent} lacks stage {stage!r}; run extract with --stage {stage}")
        return dict(self.entries[stage]["result"])

    def unchanged(self, stage: Stage, inputs: Mapping[str, Any]) -> bool:
        """Whether `stage` was done from these `inputs`."""
        entry = self.entries.get(stage)
        return entry is not None and entry["fingerprint"] == fingerprint(inputs)

    def changed_inputs(self, stage: Stage, inputs: Mapping[str, Any]) -> list[str]:
        """The names of inputs that differ from those a finished `stage` had; none where it is not done."""
        entry = self.entries.get(stage)
        if entry is None:
            return []
        before = entry["inputs"]
        return [key for key in sorted(before.keys() | inputs.keys()) if before.get(key) != _plain(inputs.get(key))]

    def complete(self, stage: Stage, inputs: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record that `stage` is done; later stages were done from something else, and are forgotten."""
        kept = STAGES[: STAGES.index(stage)]
        self.entries = {name: entry for name, entry in self.entries.items() if name in kept}
        self.entries[stage] = {"fingerprint": fingerprint(inputs), "inputs": _plain(inputs), "result": dict(result)}
        write_whole(self.file, json.dumps(self.entries, indent=1, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON (tuples as lists)."""
    return json.loads(json.dumps(value, ensure_ascii=False))


class Journal:
    """Results of the stage under way, a JSON line each, so that a killed run goes on where it was.

    Lines of a former stage with other inputs, and a last line that was cut, are dropped.
    """

    def __init__(self, file: Path, inputs: Any) -> None:
        self.file = file
        head = json.dumps({"inputs": fingerprint(inputs)})
        self.found: dict[str, Any] = {}
        lines = file.read_text("utf-8").split("\n") if file.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:-1]:
                self.found.update(json.loads(line))
            text = "\n".join(lines[:-1]) + "\n"
        else:
            text = head + "\n"
        self.resumed = bool(self.found)
        write_whole(file, text)

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def put(self, results: Mapping[str, Any]) -> None:
        """Keep results by key."""
        self.found.update(results)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(results, ensure_ascii=False) + "\n")
        check()

    def close(self) -> None:
        """Forget all: the stage is done."""
        self.file.unlink(missing_ok=True)
