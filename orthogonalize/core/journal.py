"""A journal: every finished step of a long measurement as a line of JSON, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from .errors import OrthogonalizeError, ran_out_of_memory
from .files import fingerprint, write_atomically
from .interrupts import check
from .progress import note


def fingerprint_of(*parts: Any) -> str:
    """SHA-256 of what a measurement depends on, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Steps done, in `.OUT.partial-measured` beside the folder `out`.

    A step's name has a fingerprint of all that its result depends on, so what has changed since is asked anew and
    the rest is not. A last line that was cut off is ignored.
    """

    def __init__(self, out: Path, needed: bool = True) -> None:
        self.needed = needed  # whether work goes on only if it can be kept
        self.file = out.absolute().parent / f".{out.name}.partial-measured"
        self.done = self._read()
        self.on_disk = bool(self.done)

    def _read(self) -> dict[str, Any]:
        try:
            lines = self.file.read_text("utf-8").split("\n")
        except (OSError, ValueError):
            return {}
        done: dict[str, Any] = {}
        for line in lines[:-1]:
            try:
                step = json.loads(line)
                done[step["step"]] = step["result"]
            except (ValueError, KeyError, TypeError):
                break
        return done

    def announce_resume(self, steps: Iterable[str]) -> None:
        """Say how many of `steps` are taken up from before, begun ones too."""
        wanted = list(steps)
        begun = [w for w in wanted if any(done == w or done.startswith(f"{w}/") for done in self.done)]
        if begun:
            note(f"going on from {self.file.name}: {len(begun)} of {len(wanted)} steps are done or begun")
        elif self.done:
            note(f"{self.file.name} is of other settings, data or weights; what it keeps is not taken up")

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of step `name`: as it was stored, or made by `work` (plain JSON values) and stored.

        Steps that `work` itself takes are called `name/...`; they are forgotten when the whole is done.
        """
        if name not in self.done:
            self.put({name: work()}, instead=name)
        return self.done[name]

    def put(self, results: Mapping[str, Any], instead: str) -> None:
        """Store the results of steps, and forget those of the steps that `instead` took."""
        self.done = {done: of for done, of in self.done.items() if not done.startswith(f"{instead}/")}
        self.done |= json.loads(json.dumps(results))  # what is changed later must not change what is stored
        # Rewritten whole: a line that a killed run cut off would spoil what is appended to it.
        partial = self.file.with_name(self.file.name + "-writing")
        lines = [json.dumps({"step": step, "result": value}) for step, value in self.done.items()]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("\n".join(lines) + "\n", "utf-8")
            partial.replace(self.file)
            self.on_disk = True
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            what = f"{self.file} cannot be written: {error.strerror}"
            if self.needed:
                raise OrthogonalizeError(f"{what}; make room") from error
            note(f"{what}, so nothing is kept should this be cut off")

    def has(self, *names: str) -> bool:
        """Whether all these steps are done."""
        return all(name in self.done for name in names)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Measure in here: what fails says that the steps before it are not lost."""
        try:
            yield
        except (OrthogonalizeError, MemoryError, RuntimeError) as error:
            what = str(error) if isinstance(error, OrthogonalizeError) else ran_out_of_memory(error)
            if what is None:
                raise  # no error that a user can mend
            kept = "; what was measured is kept, so the same command goes on from here" if self.on_disk else ""
            raise OrthogonalizeError(what + kept) from error

    def close(self) -> None:
        """Forget the steps, and remove their file: all is published, or none of it can be trusted."""
        self.done.clear()
        self.on_disk = False
        with suppress(OSError) if not self.needed else nullcontext():
            self.file.unlink(missing_ok=True)


class StageJournal:
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
        write_atomically(file, text)

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
