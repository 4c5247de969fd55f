"""Files are complete or as they were, fingerprints keep their values, and a journal is bound to its inputs."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from orthogonalize.core.files import fingerprint, write_atomically
from orthogonalize.core.journal import Journal
from orthogonalize.core.output_folders import FolderKind


def test_fingerprints_stored_in_stages_json_keep_their_values():
    stored = hashlib.sha256('{"a": ["ü", 1.5], "b": null}'.encode()).hexdigest()
    assert fingerprint({"b": None, "a": ("ü", 1.5)}) == stored
    assert fingerprint(["\ud83d", Path("x")])  # what JSON or UTF-8 cannot hold has a fingerprint as well


@pytest.mark.parametrize("content", ["new\n", b"new\n"])
def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch, content):
    file = tmp_path / "file.json"
    write_atomically(file, content)
    assert file.read_bytes() == b"new\n"
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full_disk(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "newer\n")
    assert file.read_bytes() == b"new\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_journal_of_other_inputs_is_removed_at_once(tmp_path):
    file = tmp_path / "journal"
    first = Journal(file, {"seed": 1})
    first.put({"a:0": 1, "a:1": 1})
    assert Journal(file, {"seed": 1}).done == {"a:0": 1, "a:1": 1}
    assert not Journal(file, {"seed": 2}).done
    assert not Journal(file, {"seed": 1}).done  # the run between was killed before its first step


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folder_of_a_killed_measurement_is_still_recognized(tmp_path):
    """The journal that a killed `demo` leaves in its folder must not keep the next one out."""
    kind = FolderKind("run", frozenset({"run", ".report"}))
    (tmp_path / "run").mkdir()
    Journal.beside(tmp_path / ".report").put({"a": 1})
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("-measured")]
    assert kind.matches(tmp_path)
    (tmp_path / "mine.txt").write_text("")
    assert not kind.matches(tmp_path)
