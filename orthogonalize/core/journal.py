"""Resume journal: the finished steps of long work, appended to a file so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import OrthogonalizeError, ran_out_of_memory
from .files import fingerprint, parse_json, write_after
from .progress import note


class Journal:
    """Results of finished steps by name, one line of JSON each.

    Results are bound to what they depend on in one of two ways: with `inputs`, a file made from other inputs is
    discarded; without, every name must carry a fingerprint of all that its result depends on, so that only what
    has changed is computed again.

    A step may take steps of its own, called `name/...`; they are forgotten once it is done. Lines are only ever
    appended. Each has a checksum of itself and the package's version; one that was cut off, edited or written by
    another version is dropped with all that follow it, and the next one overwrites it.
    """

    def __init__(self, file: Path, inputs: Any = None, needed: bool = True) -> None:
        """`needed` says whether failing to write the file is an error; otherwise it is only reported."""
        self.file, self.needed = file, needed
        self.done: dict[str, Any] = {}
        self.inputs = None if inputs is None else fingerprint(inputs)
        self._head = b"" if inputs is None else _line({"inputs": self.inputs})
        self._end = 0  # bytes of the file that are intact
        self._unwritten: dict[str, Any] = {}
        self._read()

    @classmethod
    def beside(cls, out: Path, needed: bool = True) -> Journal:
        """The journal of the measurements that go into `out`: `.OUT.partial-measured` in the same folder."""
        return cls(out.absolute().parent / f".{out.name}.partial-measured", needed=needed)

    def _read(self) -> None:
        if self.file.is_symlink():  # never made by this class, and what it points to must not be written
            self.file.unlink()
        if not self.file.is_file():
            return
        try:
            content = self.file.read_bytes()
        except OSError:
            return
        if not content.startswith(self._head):
            self.file.unlink()  # at once: if this run is killed before its first step, the next must not find it
            note(f"{self.file} was made from something else, by another version, or is damaged, and is dropped")
            return
        self._end = len(self._head)
        for line in content[self._end :].split(b"\n")[:-1]:
            entry = _entry(line)
            if entry is None:
                break
            self.done[entry[0]] = entry[1]
            self._end += len(line) + 1
        if self._end < len(content):
            note(
                f"{self.file} was cut off, edited or made by another version: what follows {self._end} bytes is dropped"
            )
        self.done = {name: result for name, result in self.done.items() if not self._is_replaced(name)}

    def _is_replaced(self, name: str) -> bool:
        """Whether a step is part of another that is done."""
        return any(name[: slash.start()] in self.done for slash in re.finditer("/", name))

    @property
    def on_disk(self) -> bool:
        """Whether the file holds any step."""
        return self._end > len(self._head)

    def announce_resume(self, steps: Iterable[str]) -> None:
        """Tell the user how many of `steps` the journal holds, whole or in part."""
        wanted = list(steps)
        begun = [w for w in wanted if any(done == w or done.startswith(f"{w}/") for done in self.done)]
        if begun:
            note(f"resuming from {self.file.name}: {len(begun)} of {len(wanted)} steps are done or under way")
        elif self.done:
            note(f"{self.file.name} was made with different settings, data or weights; ignoring it")

    def __contains__(self, name: str) -> bool:
        return name in self.done

    def __getitem__(self, name: str) -> Any:
        return self.done[name]

    def has(self, *names: str) -> bool:
        """Whether all these steps are done."""
        return all(name in self.done for name in names)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of step `name`: as stored, or made by `work` (plain JSON values) and stored."""
        if name not in self.done:
            self.put({name: work()}, replaces=name)
        return self.done[name]

    def put(self, results: Mapping[str, Any], replaces: str | None = None) -> None:
        """Store the results of steps, and forget the steps that `replaces` took.

        Raises:
            OrthogonalizeError: the file cannot be written, and is needed.
        """
        stored = json.loads(json.dumps(results))  # later changes to `results` must not reach what is stored
        if replaces is not None:
            self.done = {name: of for name, of in self.done.items() if not name.startswith(f"{replaces}/")}
        self.done |= stored
        self._unwritten |= stored
        try:
            self._append()
        except OSError as error:
            self._cut()
            failure = f"{self.file} cannot be written: {error.strerror}"
            if self.needed:
                raise OrthogonalizeError(f"{failure}; make room") from error
            note(f"{failure}, so an interrupted run could not resume")

    def _append(self) -> None:
        if not self.file.is_file():  # first step, or the file was removed
            self._end, self._unwritten = 0, dict(self.done)
        lines = b"".join(
            _line({"step": name, "result": value, "check": _check(name, value)})
            for name, value in self._unwritten.items()
        )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        data = lines if self._end else self._head + lines
        write_after(self.file, self._end, data)
        self._end += len(data)
        self._unwritten.clear()

    def _cut(self) -> None:
        """Remove what a failed write left behind the intact lines."""
        with suppress(OSError):
            if self._end:
                write_after(self.file, self._end, b"")
            else:
                self.file.unlink()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Work in this context: an error that the user can fix says that finished steps were kept."""
        try:
            yield
        except (OrthogonalizeError, MemoryError, RuntimeError) as error:
            reason = str(error) if isinstance(error, OrthogonalizeError) else ran_out_of_memory(error)
            if reason is None:
                raise  # a bug, not for the user to fix
            advice = "; finished measurements were kept: re-run the same command to resume" if self.on_disk else ""
            raise OrthogonalizeError(reason + advice) from error

    def close(self) -> None:
        """Forget all steps and remove the file: the results are published, or not to be trusted."""
        self.done.clear()
        self._unwritten.clear()
        self._end = 0
        with suppress(OSError) if not self.needed else nullcontext():
            self.file.unlink(missing_ok=True)


def _check(name: str, result: Any) -> str:
    """A checksum of a step and of this package's version."""
    return hashlib.sha256(json.dumps([version("orthogonalize"), name, result]).encode()).hexdigest()[:16]


def _entry(line: bytes) -> tuple[str, Any] | None:
    """The name and the result of a step as they were written; None if they are not."""
    try:
        entry = parse_json(line)
        name, result, check = entry["step"], entry["result"], entry["check"]
    except (ValueError, KeyError, TypeError):
        return None
    return (name, result) if isinstance(name, str) and check == _check(name, result) else None


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
