"""Copying unchanged files: shared blocks where the file system allows, else a copy by the kernel, else by bytes."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from helpers.llama import LAYERS, store, tiny_llama

from orthogonalize.checkpoints import file_copy as copying
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.interventions import removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Requests to the file system and the kernel, on a disk that cannot share blocks."""
    calls: list[str] = []
    kernel = os.copy_file_range

    def no_clone(_descriptor, request, _source):
        assert request == 0x40049409, "linux/fs.h: FICLONE = _IOW(0x94, 9, int)"
        calls.append("clone")
        raise OSError(95, "Operation not supported")

    def by_kernel(old, new, count):
        calls.append("kernel")
        return kernel(old, new, count)

    monkeypatch.setattr(copying, "ioctl", no_clone)
    monkeypatch.setattr(os, "copy_file_range", by_kernel)
    return calls


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    return tmp_path / "file"


def test_blocks_are_shared_where_the_file_system_can(file, tmp_path, asked, monkeypatch):
    def clone(new, request, old):
        asked.append("clone")
        os.write(new, os.pread(old, 4_000_000, 0))
        return 0

    monkeypatch.setattr(copying, "ioctl", clone)
    copying.copy_file(file, tmp_path / "copy")
    assert asked == ["clone"]
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_kernel_copies_where_blocks_cannot_be_shared(file, tmp_path, asked):
    copying.copy_file(file, tmp_path / "copy")
    assert asked[0] == "clone"
    assert set(asked[1:]) == {"kernel"}
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert not (tmp_path / "copy").samefile(file)


def test_bytes_are_copied_where_the_kernel_cannot(file, tmp_path, asked, monkeypatch):
    def across(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", across)
    digest = copying.copy_and_hash(file, tmp_path / "copy", link=False, advance=lambda _: None)
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_unedited_files_are_copied_and_linked_only_on_request(tmp_path, asked, basis):
    source = open_checkpoint(store(tiny_llama(), tmp_path / "base", torch.bfloat16, shards=4))
    plan = bake(source, map_sites(parse_scope("layers:0"), LAYERS, lambda _: removal(basis[:1])))
    kept = source.files.keys() - plan.checkpoint.changed_files
    assert kept
    assert plan.checkpoint.changed_files
    for name, link in (("copied", False), ("linked", True)):
        asked.clear()
        (tmp_path / name).mkdir()
        plan.write(tmp_path / name, link=link)
        for file in source.files:
            same = (tmp_path / name / file).samefile(source.path / file)
            assert same == (link and file in kept)
        assert (asked == []) == link
