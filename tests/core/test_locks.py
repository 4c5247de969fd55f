"""Locks: two processes never write one place, a killed one's lock is taken over, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orthogonalize.commands.demo import demo
from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.commands.sweep import sweep
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.locks import InUseError, locked
from orthogonalize.core.output_folders import EDITED, RUN, _rename, complete_folder
from orthogonalize.edits.hub_cache import CachedRepository

HOLDS = (
    "import sys, time; from pathlib import Path; from orthogonalize.core.locks import locked\n"
    "with locked(Path(sys.argv[1]), Path(sys.argv[2])):\n    print('held', flush=True); time.sleep(60)\n"
)


@pytest.fixture
def other(tmp_path):
    """Starts a process that holds the lock of a path."""
    started = []

    def hold(place: Path, folder: Path | None = None) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLDS, str(place), str(folder or place.parent)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait(timeout=30)


def test_a_place_that_another_process_writes_is_refused_until_it_is_killed(other, tmp_path):
    process = other(tmp_path / "out")
    with pytest.raises(InUseError, match=f"process {process.pid}; wait for it"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "another"):
        pass
    process.kill()
    process.wait(timeout=30)
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_without_a_process_is_taken_over(tmp_path):
    (tmp_path / ".out.lock").write_text("1 another-host")
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_lock(other, tmp_path):
    process = other(tmp_path / "out")
    threading.Timer(0.5, process.kill).start()
    with locked(tmp_path / "out", wait=True):
        assert (tmp_path / ".out.lock").read_text().startswith(f"{os.getpid()} ")


def test_threads_of_one_process_exclude_each_other(tmp_path):
    found = []

    def second() -> None:
        try:
            with locked(tmp_path / "out"):
                found.append("locked")
        except InUseError:
            found.append("refused")

    with locked(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert found == ["refused"]


def test_a_link_is_not_a_lock(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / ".out.lock").symlink_to("target")
    with pytest.raises(OrthogonalizeError, match="symbolic link"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "target").read_text() == "mine"


def test_parents_that_were_made_for_the_lock_are_removed(tmp_path):
    with locked(tmp_path / "a" / "b" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


COMMANDS = {
    "extract": lambda out: extract("some/model", out, concept="refusal"),
    "edit": lambda out: edit("some/model", out, run="run"),
    "evaluate": lambda out: evaluate("edited", "base", "run", out),
    "sweep": lambda out: sweep("base", "run", out),
    "demo": lambda out: demo(out),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_a_place_locks_it_first(name, other, tmp_path):
    process = other(tmp_path / "out")
    with pytest.raises(InUseError, match=str(process.pid)):
        COMMANDS[name](tmp_path / "out")


def test_the_hub_cache_is_locked(other, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    process = other(tmp_path / "models--me--edited", tmp_path / ".locks")
    with pytest.raises(InUseError, match=str(process.pid)):
        edit("some/model", cache="me/edited", run="run")
    assert CachedRepository("me/edited").folder == tmp_path / "models--me--edited"


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def write() -> None:
        with complete_folder(out, RUN) as partial:
            (partial / "stages.json").write_text("ours")
            out.mkdir()
            (out / "thesis.txt").write_text("theirs")

    with pytest.raises(OrthogonalizeError, match="already exists"):
        write()
    assert (out / "thesis.txt").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_that_appears_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    """After the last look at what is there."""
    out = tmp_path / "out"

    def write() -> None:
        with complete_folder(out, RUN) as partial:
            (partial / "stages.json").write_text("ours")
            monkeypatch.setattr("orthogonalize.core.output_folders._rename", late)

    def late(*arguments: object) -> bool:
        (out / "theirs").mkdir(parents=True)
        return _rename(*arguments)

    with pytest.raises(OrthogonalizeError, match="appeared"):
        write()
    assert [p.name for p in out.iterdir()] == ["theirs"]


@pytest.mark.parametrize("can", [True, False])
def test_replacing_keeps_one_output_at_every_moment(tmp_path, monkeypatch, can):
    out, missing = tmp_path / "out", threading.Event()
    for text in ("1", "2"):
        with complete_folder(out, EDITED, force=True) as partial:
            (partial / "orthogonalize.json").write_text(text)
    if not can:
        monkeypatch.setattr("orthogonalize.core.output_folders._rename", lambda *_: False)
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if not os.path.exists(out / "orthogonalize.json"):
                missing.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    for text in range(30):
        with complete_folder(out, EDITED, force=True) as partial:
            (partial / "orthogonalize.json").write_text(str(text))
    stop.set()
    watcher.join()
    assert (out / "orthogonalize.json").read_text() == "29"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (can and missing.is_set())
