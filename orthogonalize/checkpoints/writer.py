"""Write an edited checkpoint: each weight file in one pass, everything else unchanged where possible."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.progress import Progress
from .checkpoint import INDEX, Addition, Checkpoint
from .chunks import Job
from .file_copy import copy_and_hash, copy_file
from .mxfp4 import PackedEdit
from .rounding.base import Scales
from .rounding.registry import DEFAULT_ROUNDING
from .safetensors_file import DTYPES, TensorFile, TensorInfo, stored_bytes
from .settings_files import read_json, with_changes
from .tensor_edit import TensorEdit, TensorRecord
from .weight_file import FileWriter, StoppedError

DOWNLOADS = 2  # remote files on the disk at a time: one is written while the next one comes


@dataclass(frozen=True)
class Written:
    """SHA-256 of each weight file as read and as written, and the record of each edited tensor.

    `not_finite` are the tensors with NaN or infinite values, which were copied.
    """

    source: dict[str, str]
    result: dict[str, str]
    records: dict[str, TensorRecord]
    not_finite: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Changes:
    """Changes to the tensors of a checkpoint, by name, and how to round.

    `scales` are those of edited FP8 tensors; `replaced` are tensors with entirely new values, and `packed` the edits of
    weights in MXFP4 by the names of both stored tensors.
    """

    edits: Mapping[str, TensorEdit]
    additions: Mapping[str, Addition]
    scales: Mapping[str, Scales] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rounding: str = DEFAULT_ROUNDING
    packed: Mapping[str, PackedEdit] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""
        return {*self.edits, *self.replaced, *self.packed}


def _jobs(source: Checkpoint, file: TensorFile, changes: Changes, additions: Mapping[str, Addition]) -> list[Job]:
    """The tensors of the new file: the old ones in their order, then `additions`."""
    jobs = [
        Job(info, file.data_start + info.start, True) for info in sorted(file.tensors.values(), key=lambda t: t.start)
    ]
    end = max((info.end for info in file.tensors.values()), default=0)
    for name, addition in additions.items():
        info = TensorInfo(name, addition.dtype, addition.shape, end, end + addition.size)
        jobs.append(Job(info, _addition_bytes(source, file, name, addition), False))
        end += addition.size
    for job in jobs:
        job.edit = changes.edits.get(job.info.name)
        if job.edit is not None:
            job.kernel = job.edit.kernel(DTYPES[job.info.dtype], changes.rounding)
            job.scales = changes.scales.get(job.info.name)
        if job.info.name in changes.replaced:
            job.replaced = stored_bytes(changes.replaced[job.info.name])
    return jobs


def _replace_packed(jobs: Sequence[Job], changes: Changes, record: Callable[[TensorRecord], None]) -> None:
    """Put the edited blocks and scales of weights in MXFP4 into the jobs of a file, and record their edits."""
    by_name = {job.info.name: job for job in jobs if job.info.name in changes.packed}
    edits = {edit.edit.name: edit for edit in (changes.packed[name] for name in by_name)}
    for edit in edits.values():
        values, entry = edit.result()
        for name, tensor in values.items():
            if name in by_name:
                by_name[name].replaced = stored_bytes(tensor)
        record(entry)


def _addition_bytes(source: Checkpoint, file: TensorFile, name: str, addition: Addition) -> int | memoryview:
    """The bytes of an addition: an offset in this file if it copies one of its tensors, else in memory."""
    if addition.copy_of is not None and addition.copy_of in file.tensors:
        return file.data_start + file.tensors[addition.copy_of].start
    tensor = addition.make()
    if tensor.shape != addition.shape or tensor.dtype != DTYPES[addition.dtype]:
        raise AssertionError(f"the addition {name} has another shape or dtype than it declared")
    return stored_bytes(tensor)


def write_weights(
    source: Checkpoint,
    target: Path,
    changes: Changes,
    progress: Progress | None = None,
    *,
    names: Sequence[str] | None = None,
    workers: int = 1,
    link: bool = False,
    expected: Mapping[str, str] | None = None,
) -> Written:
    """Write the weight files of `source`, edited, into the empty folder `target`.

    Args:
        names: the files to write; None: all.
        workers: how many files are written at a time; at least two if they are remote.
        link: make unedited files hard links to the source's instead of copies.
        expected: the SHA-256 by file that the source must have.

    Raises:
        OrthogonalizeError: a tensor cannot be edited, or the source is not the expected one.
    """
    home = source.file_for(changes.additions)
    lock, stop = threading.Lock(), threading.Event()
    written = Written({}, {}, {})

    def check_going_on() -> None:
        if stop.is_set():
            raise StoppedError

    def advance(count: int) -> None:
        check_going_on()
        if progress:
            with lock:
                progress(count)

    def record(entry: TensorRecord) -> None:
        written.records[entry.name] = entry

    def write_one(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        remote = source.files[name].remote
        here = dict(changes.additions) if name == home else {}
        with source.files[name].on_disk(target, check_going_on) as file:
            if here or file.renamed or changes.names & file.tensors.keys():
                jobs = _jobs(source, file, changes, here)
                _replace_packed(jobs, changes, record)
                hashes = FileWriter(file, target / name, jobs, pool).run(advance, stop, record)
            else:  # nobody else has what was downloaded, so it need not be copied
                hashes = (copy_and_hash(file.path, target / name, link or remote is not None, advance),) * 2
            written.not_finite.extend(file.not_finite(sorted(file.tensors.keys() - changes.names)))
        written.source[name], written.result[name] = hashes
        check_read(source, name, hashes[0], expected)

    names = [name for name in sorted(source.files) if names is None or name in names]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        in_parallel(write_one, names, workers_for(source, workers), stop)
    return written


def check_read(source: Checkpoint, name: str, sha256: str, expected: Mapping[str, str] | None) -> None:
    """Check the SHA-256 of what was read of the weight file `name`.

    Raises:
        OrthogonalizeError: it is not what its server says, or not what is `expected` of the source.
    """
    remote = source.files[name].remote
    if remote is not None and remote.sha256 != sha256:
        raise OrthogonalizeError(f"{name} of {source.path} was damaged on its way; start again")
    if expected is not None and expected.get(name) != sha256:
        raise OrthogonalizeError(f"{source.path} is not the base of the recipe: {name} differs")


def workers_for(source: Checkpoint, workers: int) -> int:
    """How many files are written at a time: at least two if they are remote."""
    return max(workers, DOWNLOADS) if source.remote_sizes else workers


def in_parallel(write: Callable[[str], None], names: Sequence[str], workers: int, stop: threading.Event) -> None:
    """Call `write` on every name, on `workers` at a time; once one fails, or on Ctrl-C, `stop` tells the others."""

    def guarded(name: str) -> None:
        try:
            write(name)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as files:
        futures = [files.submit(guarded, name) for name in names]
        try:
            _wait(futures)
        finally:
            stop.set()
            for future in futures:
                future.cancel()


def _wait(futures: Sequence[Future[None]]) -> None:
    """Wait for all; raise the original failure rather than a `StoppedError` that it caused."""
    stopped: BaseException | None = None
    for future in futures:
        try:
            future.result()
        except StoppedError as error:
            stopped = error
    if stopped is not None:
        raise stopped


def _index(source: Checkpoint, additions: Mapping[str, Addition]) -> dict[str, Any] | None:
    """The index of the edited checkpoint; None if it has none, or the source's own."""
    if not source.indexed or not (additions or source.renamed):
        return None
    index: dict[str, Any] = read_json(source.path / INDEX)
    if source.renamed:
        index["weight_map"] = {tensor: name for name, file in source.files.items() for tensor in file.tensors}
    index["weight_map"].update(dict.fromkeys(additions, source.file_for(additions)))
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += sum(addition.size for addition in additions.values())
    return index


def write_other_files(
    source: Checkpoint,
    target: Path,
    additions: Mapping[str, Addition],
    config_changes: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    link: bool = False,
    index: Mapping[str, Any] | None = None,
) -> None:
    """Write everything but the weights: index, configuration and side files, some of them with new `texts` by name.

    Files that do not change are copied, or hard-linked with `link`. `index` is that of the weights where it does not
    follow from the source's and `additions`.
    """
    index = index or _index(source, additions)
    if index is not None:
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=False) + "\n", "utf-8")
    elif source.indexed:
        copy_file(source.path / INDEX, target / INDEX, link)
    if config_changes:
        text = json.dumps(with_changes(source.config, config_changes), indent=2, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", "utf-8")
    else:
        copy_file(source.path / "config.json", target / "config.json", link)
    for name, text in texts.items():
        (target / name).write_text(text, "utf-8")
    for side in source.side_files():
        if str(side) in texts:
            continue
        (target / side).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.path / side, target / side, link)
