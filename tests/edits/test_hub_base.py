"""Editing a model on the Hub without downloading it whole, by range requests; the disk that it takes is measured."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.command_line import command
from helpers.disk_use import peak_disk_use
from helpers.hub_server import Hub, Repository, use_hub
from helpers.llama import WIDTH, store, tiny_llama
from rich.console import Console
from safetensors.torch import save_file

from orthogonalize.checkpoints import safetensors_file
from orthogonalize.commands.edit import edit
from orthogonalize.core import progress
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.hub_cache import CachedRepository
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models import hub_files, resolve

TOKEN = "hf_loopbacktoken"
SHARDS = 6
SIDE_FILES = 2**17  # bytes: more than all files but weights take on the disk, in the cache and in the result


@dataclass(frozen=True)
class Base:
    """The model some/model on a loopback Hub, the same in a folder, and the direction to edit out of it."""

    hub: Hub
    folder: Path
    direction: Path
    root: Path

    @property
    def repository(self) -> Repository:
        return self.hub.state.repositories["some/model"]

    @property
    def shards(self) -> dict[str, int]:
        return {f.name: f.stat().st_size for f in sorted(self.folder.glob("*.safetensors"))}

    def sent(self, name: str) -> list[tuple[int, int]]:
        """The parts of a file that were sent: first byte, and number of bytes."""
        return [(first, size) for file, first, size in self.hub.state.sent if file == name]

    def edit(self, model: Path | str, out: Path | None, **settings):
        return edit(model, out, direction=self.direction, layer=2, **settings)


@pytest.fixture
def base(tmp_path, monkeypatch):
    folder = store(tiny_llama(intermediate_size=4096), tmp_path / "base", torch.bfloat16, shards=SHARDS)
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    save_file({"direction": direction}, tmp_path / "direction.safetensors")
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    with Hub(TOKEN) as hub:
        hub.state.repositories["some/model"] = Repository(False, files)
        use_hub(hub, tmp_path / "disk" / "hub", monkeypatch)
        monkeypatch.setattr(hub_files, "WAIT", 0.0)
        (tmp_path / "disk").mkdir()
        yield Base(hub, folder, tmp_path / "direction.safetensors", tmp_path / "disk")


def contents(folder: Path) -> dict[str, bytes]:
    names = (f for f in folder.rglob("*") if f.is_file() and f.name not in ("orthogonalize.json", "README.md"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in names}


@pytest.mark.parametrize("scope", ["all", "layers:1"])
@pytest.mark.parametrize("where", ["out", "cache"])
def test_a_base_on_the_hub_is_edited_without_being_downloaded_whole(base, tmp_path, where, scope):
    base.edit(base.folder, tmp_path / "expected", scope=scope)
    place = {"cache": "me/edited"} if where == "cache" else {}
    with peak_disk_use(base.root) as peak:
        base.hub.state.before_file = lambda *_: peak.look()
        base.edit("some/model", None if place else base.root / "edited", scope=scope, download=False, **place)
    found = CachedRepository("me/edited").snapshot() if place else base.root / "edited"
    assert contents(found) == contents(tmp_path / "expected")
    expected, recipe = load_recipe(tmp_path / "expected"), load_recipe(found)
    assert recipe.base.weights == expected.base.weights
    assert recipe.tensors == expected.tensors
    assert not list(CachedRepository("some/model").folder.rglob("*.safetensors"))
    result = sum(f.stat().st_size for f in (tmp_path / "expected").iterdir())
    assert peak.bytes < result + 2 * max(base.shards.values()) + SIDE_FILES
    assert all(sum(size for _, size in base.sent(name)) < 1.5 * size for name, size in base.shards.items())


def test_a_base_on_the_hub_is_quantised_without_being_downloaded_whole(base, tmp_path):
    """Matrices that share a scale are in different files, of which only one is here."""
    base.edit(base.folder, tmp_path / "expected", scope="all", quantize="nvfp4")
    base.edit("some/model", base.root / "edited", scope="all", quantize="nvfp4", download=False)
    assert contents(base.root / "edited") == contents(tmp_path / "expected")
    assert not list(CachedRepository("some/model").folder.rglob("*.safetensors"))


def test_a_downloaded_base_takes_more_disk(base):
    """Otherwise the bound of the test above would say nothing."""
    with peak_disk_use(base.root) as peak:
        base.hub.state.before_file = lambda *_: peak.look()
        base.edit("some/model", base.root / "edited", download=True)
    result = sum(f.stat().st_size for f in (base.root / "edited").iterdir())
    assert peak.bytes > result + 4 * min(base.shards.values())


def test_a_share_asks_for_the_headers_of_the_other_files_only(base, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "FIRST", 64)  # headers are longer, so their rest is asked for, too
    base.edit(base.folder, tmp_path / "expected")
    with peak_disk_use(base.root) as peak:
        base.hub.state.before_file = lambda *_: peak.look()
        base.edit("some/model", base.root / "edited", shard="1/3")
    own = list(base.shards)[::3]
    headers = {name: int.from_bytes((base.folder / name).read_bytes()[:8], "little") + 8 for name in base.shards}
    for name, size in base.shards.items():
        received = sum(count for _, count in base.sent(name))
        assert received == headers[name] + (size if name in own else 0), name
    assert peak.bytes < sum(base.shards[name] for name in own) + 2 * max(base.shards.values()) + SIDE_FILES
    for share in ("2/3", "3/3"):
        base.edit("some/model", base.root / "edited", shard=share)
    assert contents(base.root / "edited") == contents(tmp_path / "expected")


def test_shares_of_different_revisions_are_refused(base):
    base.edit("some/model", base.root / "edited", shard="1/2")
    base.repository.commit = "1" * 40
    with pytest.raises(OrthogonalizeError, match="shares of different revisions of some/model"):
        base.edit("some/model", base.root / "edited", shard="2/2")
    assert not (base.root / "edited").exists()


def test_a_connection_that_is_cut_is_resumed_where_it_was(base, tmp_path):
    base.edit(base.folder, tmp_path / "expected")
    cuts = {name: [100, None, 50_000, 0, 70_000] for name in base.shards}  # bytes after which each request is cut
    base.hub.state.before_file = lambda name, _: cuts[name].pop(0) if cuts.get(name) else None
    base.edit("some/model", base.root / "edited", download=False)
    assert contents(base.root / "edited") == contents(tmp_path / "expected")
    first = safetensors_file.FIRST
    for name, size in base.shards.items():
        header, rest, *parts = base.sent(name)
        assert [header, rest] == [(0, 100), (100, first - 100)]
        assert parts == [(0, 50_000), (50_000, 0), (50_000, 70_000), (120_000, size - 120_000)]


def test_a_connection_that_brings_nothing_is_given_up(base):
    base.hub.state.before_file = lambda name, _: 0 if name == list(base.shards)[2] else None
    with pytest.raises(OrthogonalizeError, match=r"model-00003-of-00006.safetensors of some/model at 000000000000"):
        base.edit("some/model", base.root / "edited", download=False)
    assert not list(base.root.rglob("*.download-*"))


@pytest.mark.parametrize("how", ["a new commit", "other content under the same commit"])
def test_a_base_that_changes_in_the_middle_is_refused(base, how):
    served = []

    def changing(name: str, first: int) -> None:
        if name.endswith(".safetensors"):
            served.append(name)
        if len(served) == SHARDS + 2:  # after the headers
            base.repository.files |= {other: b"x" * base.shards[other] for other in list(base.shards)[2:]}
            base.repository.commit = "1" * 40 if how == "a new commit" else base.repository.commit

    base.hub.state.before_file = changing
    gone = r"model-0000\d-of-00006.safetensors of some/model is no longer on the Hub as it was at 000000000000"
    with pytest.raises(OrthogonalizeError, match=gone):
        base.edit("some/model", base.root / "edited", download=False)
    assert [f.name for f in base.root.iterdir()] == ["hub"]


def test_bytes_that_are_damaged_on_the_way_are_noticed(base):
    name = list(base.shards)[3]

    class Flipping(bytes):
        """Sends another last byte than the one that its hash was made of."""

        def __getitem__(self, part):
            found = super().__getitem__(part)
            return found[:-1] + b"\x00" if len(found) > 2**18 else found

    base.repository.files[name] = Flipping(base.repository.files[name][:-1] + b"\x01")
    with pytest.raises(OrthogonalizeError, match=f"{name} of .* was damaged on its way"):
        base.edit("some/model", base.root / "edited", download=False)


def test_further_weights_are_fetched_and_second_copies_are_not(base, tmp_path):
    save_file({"adapter": torch.ones(3)}, tmp_path / "mtp.safetensors")
    base.repository.files["mtp.safetensors"] = (tmp_path / "mtp.safetensors").read_bytes()
    first = next(iter(base.shards))
    base.repository.files["original/copy.safetensors"] = base.repository.files[first]
    base.edit("some/model", base.root / "edited", download=False)
    assert (base.root / "edited" / "mtp.safetensors").read_bytes() == base.repository.files["mtp.safetensors"]
    assert not (base.root / "edited" / "original").exists()


def test_files_that_are_here_already_are_not_fetched_again(base, tmp_path):
    base.edit("some/model", tmp_path / "downloaded", download=True)
    base.hub.state.sent.clear()
    base.edit("some/model", tmp_path / "edited", download=False)
    assert not [name for name, _, _ in base.hub.state.sent if name.endswith(".safetensors")]


def test_a_base_for_which_the_disk_has_no_room_is_read_where_it_is(base, monkeypatch):
    usage, notes = resolve.shutil.disk_usage(base.root), []
    little = sum(base.shards.values()) - 1
    monkeypatch.setattr(resolve, "shutil", type("shutil", (), {"disk_usage": lambda _: usage._replace(free=little)}))
    monkeypatch.setattr(resolve, "note", notes.append)
    base.edit("some/model", base.root / "edited")
    assert not list(CachedRepository("some/model").folder.rglob("*.safetensors"))
    assert notes[0].startswith("some/model is read from the Hub piece by piece")


def test_the_command_line_takes_the_option(base):
    words = ("--direction", base.direction, "--layer", "2", "--out", base.root / "edited", "--no-download")
    status, output = command("edit", "some/model", *words)
    assert status == 0, output
    assert not list(CachedRepository("some/model").folder.rglob("*.safetensors"))


def test_a_download_says_how_far_it_is(base, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, width=200))
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(hub_files, "LOOK", 0.01)
    waits = iter([0.2, 0.6, 1.0, *[1.4] * 100])  # they are asked for at once, and come one after the other

    def in_turn(name: str, _first: int) -> None:
        if name.endswith(".safetensors"):
            time.sleep(next(waits))

    base.hub.state.before_file = in_turn
    progress.show()
    try:
        folder = hub_files.download_model("some/model", None)
    finally:
        progress.show(False)
    assert all((folder / name).stat().st_size == size for name, size in base.shards.items())
    total = round(sum(base.shards.values()) / 1e6)
    so_far = {int(done) for done in re.findall(rf"downloading the model: (\d+) of {total} MB", written.getvalue())}
    assert {0} < so_far, "it grows between the first file and the last"
    assert f"downloading the model: {total} MB in " in written.getvalue()
