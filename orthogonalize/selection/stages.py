"""The record of finished stages of an extraction and of their inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..core.errors import OrthogonalizeError
from ..core.files import check_text, fingerprint, write_atomically
from ..core.progress import note
from .behaviour import Found

Stage = Literal["prompts", "activations", "directions", "answers", "selection"]
STAGES: tuple[Stage, ...] = get_args(Stage)
BOOK = "stages.json"


class _Entry(BaseModel):
    fingerprint: str
    inputs: dict[str, Any]
    result: dict[str, Any]


_ENTRIES = TypeAdapter(dict[str, _Entry])


class StageBook:
    """The `stages.json` of a run folder: the inputs and the result of every finished stage.

    The inputs of a stage include the fingerprint of the stage before, so that a change affects all later stages. A
    damaged file counts as none.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / BOOK
        self.entries: dict[str, _Entry] = {}
        if self.file.is_file():
            check_text(self.file)
            try:
                self.entries = _ENTRIES.validate_json(self.file.read_bytes())
                if "prompts" in self.entries:
                    Found.model_validate(self.entries["prompts"].result)
            except ValidationError:
                note(f"{self.file} is damaged, so every stage is done again")
                self.entries = {}

    @property
    def found(self) -> Found:
        """What stage `prompts`, which is done, has found."""
        return Found.model_validate(self.entries["prompts"].result)

    def unchanged(self, stage: Stage, inputs: Mapping[str, Any]) -> bool:
        """Whether `stage` was done from these `inputs`."""
        entry = self.entries.get(stage)
        return entry is not None and entry.fingerprint == fingerprint(inputs)

    def changed_inputs(self, stage: Stage, inputs: Mapping[str, Any]) -> list[str]:
        """The names of the inputs that differ from those of a finished `stage`; none if it is not done."""
        entry = self.entries.get(stage)
        if entry is None:
            return []
        before = entry.inputs
        return [key for key in sorted(before.keys() | inputs.keys()) if before.get(key) != _as_json(inputs.get(key))]

    def to_run(
        self, inputs: Callable[[Stage], Mapping[str, Any]], only: Stage | None = None, force: bool = False
    ) -> list[Stage]:
        """The stages to run: the first that is not done from the present `inputs`, and all after it.

        Raises:
            OrthogonalizeError: a finished stage would be redone without `force`, or an earlier stage than `only` is not
                done.
        """
        folder = self.file.parent
        stale = [stage for stage in STAGES if not self.unchanged(stage, inputs(stage))]
        if only is not None:
            missing = [stage for stage in STAGES[: STAGES.index(only)] if stage in stale]
            if missing:
                raise OrthogonalizeError(
                    f"--stage {only} needs stage {missing[0]!r} of {folder}, done with the same inputs; "
                    "run that first, or omit --stage"
                )
            return [only] if only in stale or force else []
        if not stale:
            return list(STAGES) if force else []
        changed = self.changed_inputs(stale[0], inputs(stale[0]))
        if changed and not force:
            raise OrthogonalizeError(
                f"stage {stale[0]!r} of {folder} was done with a different {', '.join(changed)}; "
                "use --force to redo it and the stages after it, or choose another --out"
            )
        return list(STAGES[STAGES.index(stale[0]) :])

    def complete(self, stage: Stage, inputs: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record that `stage` is done; later stages are forgotten, since their inputs may have changed."""
        kept = STAGES[: STAGES.index(stage)]
        self.entries = {name: entry for name, entry in self.entries.items() if name in kept}
        self.entries[stage] = _Entry(fingerprint=fingerprint(inputs), inputs=_as_json(inputs), result=dict(result))
        stored = {name: entry.model_dump() for name, entry in self.entries.items()}
        write_atomically(self.file, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def _as_json(value: Any) -> Any:
    """`value` as read back from JSON, with tuples as lists."""
    return json.loads(json.dumps(value, ensure_ascii=False))
