"""Write a quantised checkpoint, a tensor or two in memory at a time for each file that is being written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...core.files import file_hash
from ...core.progress import Progress
from ..checkpoint import INDEX
from ..safetensors_file import TensorFile, header_bytes, stored_bytes
from ..settings_files import read_json
from ..weight_file import StoppedError
from ..writer import Written, check_read, in_parallel, workers_for, write_other_files
from .plan import QuantizedPlan


class QuantizedWriter:
    """Writes the checkpoint of `plan` into the empty folder `target`; `written` is what it has written so far."""

    def __init__(self, plan: QuantizedPlan, target: Path, progress: Progress | None = None) -> None:
        self.plan, self.target, self.progress = plan, target, progress
        self.written = Written({}, {}, {})
        self.weight_map: dict[str, str] = {}
        self.size = 0
        self.stop, self.lock = threading.Event(), threading.Lock()

    def run(self, *, workers: int = 1, link: bool = False, expected: Mapping[str, str] | None = None) -> Written:
        """Write every file (see `writer.write_weights`); only those beside the weights are linked with `link`."""
        plan, source = self.plan.plan, self.plan.plan.source

        def write(name: str) -> None:
            with source.files[name].on_disk(self.target, self._check_going_on) as file:
                self.written.source[name] = file_hash(file.path)
                check_read(source, name, self.written.source[name], expected)
                self._write_file(file, name)
                changed = self.plan.weights | plan.edits.keys()
                self.written.not_finite.extend(file.not_finite(sorted(file.tensors.keys() - changed)))

        in_parallel(write, sorted(source.files), workers_for(source, workers), self.stop)
        index = self._index(source.path / INDEX) if source.indexed else None
        write_other_files(source, self.target, plan.additions, plan.config_changes, plan.texts, link=link, index=index)
        return self.written

    def _check_going_on(self) -> None:
        if self.stop.is_set():
            raise StoppedError

    def _write_file(self, file: TensorFile, name: str) -> None:
        target, digest = self.target / name, hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        infos = self.plan.infos(file, name)
        waiting = list(infos)
        with target.open("xb") as out:

            def put(data: bytes | memoryview) -> None:
                out.write(data)
                digest.update(data)

            put(header_bytes(infos, file.metadata))
            for each in self.plan.names(file, name):
                self._check_going_on()
                tensors = self._stored(each, file)
                while waiting and waiting[0].name in tensors:
                    info = waiting.pop(0)
                    data = stored_bytes(tensors[info.name])
                    if tuple(tensors[info.name].shape) != info.shape or len(data) != info.size:
                        raise AssertionError(f"{info.name} has another shape or format than its header says")
                    put(data)
                    self._advance(info.size)
            if waiting:
                raise AssertionError(f"{waiting[0].name} is in the header and was not written")
            out.flush()
            os.fsync(out.fileno())
        with self.lock:
            self.written.result[name] = digest.hexdigest()
            self.weight_map.update(dict.fromkeys((info.name for info in infos), name))
            self.size += sum(info.size for info in infos)

    def _stored(self, name: str, file: TensorFile) -> dict[str, torch.Tensor]:
        """What replaces a tensor; the record of its edit is kept."""
        made = self.plan.stored(name, file)
        if (record := made.record()) is not None:
            self.written.records[name] = record
        return made.stored

    def _advance(self, count: int) -> None:
        if self.progress is not None:
            with self.lock:
                self.progress(count)

    def _index(self, old: Path) -> dict[str, Any]:
        metadata = read_json(old).get("metadata")
        kept = metadata if isinstance(metadata, dict) else {}
        return {"metadata": {**kept, "total_size": self.size}, "weight_map": dict(sorted(self.weight_map.items()))}
