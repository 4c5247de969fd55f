"""Tensors of remote files that are read in few requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthogonalize.checkpoints.checkpoint import Checkpoint
from orthogonalize.checkpoints.safetensors_file import open_tensor_file
from orthogonalize.models.streaming import ahead


class Remote:
    """A file on this disk that is read as if it were elsewhere; it notes what is asked for."""

    def __init__(self, path: Path) -> None:
        self.content, self.asked = path.read_bytes(), []

    size = property(lambda self: len(self.content))
    sha256 = ""

    def read_into(self, start: int, view: memoryview) -> None:
        self.asked.append((start, len(view)))
        view[:] = self.content[start : start + len(view)]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{n}": torch.randn(n + 2, 5, generator=generator) for n in range(8)}


@pytest.fixture
def opened(tensors, tmp_path):
    """A checkpoint of one remote file, and the file."""
    save_file(tensors, tmp_path / "model.safetensors")
    remote = Remote(tmp_path / "model.safetensors")
    file = replace(open_tensor_file(tmp_path / "model.safetensors"), remote=remote)
    return ahead.reading_ahead(Checkpoint(tmp_path, {}, {"model.safetensors": file}, False)), remote


def test_tensors_side_by_side_come_in_one_request(opened, tensors):
    checkpoint, remote = opened
    ahead.announce(checkpoint, ["t4", "t2", "t3", "t6"])
    for name in ("t3", "t6", "t2", "t4"):
        assert torch.equal(checkpoint.read(name), tensors[name])
    size = {name: each.numel() * 4 for name, each in tensors.items()}
    assert [count for _, count in remote.asked] == [size["t2"] + size["t3"] + size["t4"], size["t6"]]


def test_what_was_read_is_forgotten_and_comes_again(opened, tensors):
    checkpoint, remote = opened
    ahead.announce(checkpoint, ["t1", "t2"])
    for name in ("t1", "t2", "t2", "t7"):
        assert torch.equal(checkpoint.read(name), tensors[name])
    assert [count for _, count in remote.asked] == [4 * 5 * (3 + 4), 4 * 5 * 4, 4 * 5 * 9]


def test_threads_share_a_request(opened, tensors):
    checkpoint, remote = opened
    ahead.announce(checkpoint, tensors)
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(tensors, pool.map(checkpoint.read, tensors), strict=True))
    assert all(torch.equal(found[name], each) for name, each in tensors.items())
    assert len(remote.asked) == 1


def test_a_request_is_only_so_large(opened, tensors, monkeypatch):
    monkeypatch.setattr(ahead, "SPAN", 4 * 5 * 9)
    checkpoint, remote = opened
    ahead.announce(checkpoint, ["t0", "t1", "t2", "t3"])  # of 2, 3, 4 and 5 rows
    for name in ("t0", "t1", "t2", "t3"):
        assert torch.equal(checkpoint.read(name), tensors[name])
    assert [count // 20 for _, count in remote.asked] == [9, 5]
