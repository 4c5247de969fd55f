"""A recording that was interrupted: what is in its file is believed only if it is what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.llama import store, tiny_llama

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.files import partial_file
from orthogonalize.directions.activation_store import FILE, record_streamed, record_with
from orthogonalize.models.streaming.lanes import StreamedModel
from orthogonalize.models.streaming.weights import PartialModel

SETS = {"positive": [[1, 5], [2, 6], [3, 7]], "negative": [[4, 8]]}
LAYERS, WIDTH = 3, 4


class KilledError(Exception):
    """Stands for SIGKILL."""


def values(ids):
    """Activations [prompts, positions, layers, d] that tell prompts, positions, layers and coordinates apart."""
    prompt = torch.tensor(ids, dtype=torch.float32)[:, :, None, None]
    return prompt + torch.arange(LAYERS)[:, None] / 10 + torch.arange(WIDTH) / 100


def recorded(folder: Path, asked: list[list[int]], until: int = 99):
    """Record the sets, one prompt at a time, noting which are read; killed after `until` of them."""

    def capture(ids, positions):
        for number, prompt in enumerate(ids):
            if len(asked) == until:
                raise KilledError
            asked.append(prompt)
            yield [number], values([prompt])

    return record_with(capture, (torch.float32, WIDTH), SETS, 2, LAYERS, folder, "inputs")


@pytest.fixture
def killed(tmp_path) -> Path:
    """The partial file of a recording that was killed after three of its four prompts."""
    with pytest.raises(KilledError):
        recorded(tmp_path, [], until=3)
    return partial_file(tmp_path / FILE)


def complete(folder: Path) -> list[list[int]]:
    """Finish the recording, which must be right; returns the prompts that were read for it."""
    asked: list[list[int]] = []
    recording = recorded(folder, asked)
    for name, ids in SETS.items():
        for layer in range(LAYERS):
            assert torch.equal(recording.read(name, layer), values(ids)[:, :, layer])
    assert [entry.name for entry in folder.iterdir()] == [FILE]
    return asked


def test_an_interrupted_recording_reads_only_what_it_lacks(killed, tmp_path):
    assert complete(tmp_path) == [[4, 8]]


def test_what_was_changed_in_the_partial_file_is_read_again(killed, tmp_path):
    content = bytearray(killed.read_bytes())
    place = content.index(values(SETS["positive"][1:2])[0, 1, 2].numpy().tobytes())
    content[place + 2] ^= 1
    killed.write_bytes(bytes(content))
    assert complete(tmp_path) == [[2, 6], [4, 8]]


@pytest.mark.parametrize("part", [0, 0.3, 0.6, 0.9])
def test_a_partial_file_that_was_cut_off_is_completed(part, killed, tmp_path):
    killed.write_bytes(killed.read_bytes()[: int(part * killed.stat().st_size)])
    complete(tmp_path)


@pytest.mark.parametrize("damage", ["activations", "streams", "layer"])
def test_a_streamed_recording_begins_anew_after_damage(damage, tmp_path, monkeypatch):
    folder = store(tiny_llama(), tmp_path / "model", torch.float32)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / FILE
    sets = {"positive": [[5, 6, 7], [8, 9, 10]]}

    def record():
        model = StreamedModel(PartialModel(open_checkpoint(folder), "cpu", torch.float32))
        return record_streamed(model, sets, 2, file, "inputs")

    expected = record().file.read_bytes()
    file.unlink()
    monkeypatch.setattr("orthogonalize.models.streaming.state.WRITTEN", 1e9)
    monkeypatch.setattr("orthogonalize.models.streaming.passes.check", killed_at(3))
    with pytest.raises(KilledError):
        record()
    monkeypatch.undo()
    [state] = file.parent.glob(f".{FILE}.streams.partial")
    if damage == "activations":
        content = partial_file(file).read_bytes()
        partial_file(file).write_bytes(content[:-1] if len(content) % 2 else content[: len(content) // 4])
    elif damage == "streams":
        state.write_bytes(state.read_bytes()[:-1] + b"\x7f")
    else:
        state.write_bytes(state.read_bytes().replace(b'"layer":"3"', b'"layer":"2"'))
    assert record().file.read_bytes() == expected


def killed_at(count: int):
    calls = iter(range(count))

    def check() -> None:
        if next(calls, None) is None:
            raise KilledError

    return check
