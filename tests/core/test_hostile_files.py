"""Links and special files in folders from others: nothing outside is overwritten, copied or shown; nothing hangs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from helpers.llama import WIDTH, store, tiny_llama

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.judge import judge
from orthogonalize.commands.push import push
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.files import partial_file, write_atomically
from orthogonalize.core.journal import Journal
from orthogonalize.core.output_folders import RUN, check_run_folder
from orthogonalize.edits.adapter import adapter_config
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.evals.measures.measured_prompts import read_phrases
from orthogonalize.models.resolve import find_model
from orthogonalize.reports.run_plots import plot_run


@pytest.fixture
def base(tmp_path) -> Path:
    return store(tiny_llama(), tmp_path / "base", torch.bfloat16)


@pytest.fixture
def direction(tmp_path) -> Path:
    torch.save(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), tmp_path / "direction.pt")
    return tmp_path / "direction.pt"


@pytest.fixture
def secret(tmp_path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.txt").write_text("secret")
    return tmp_path / "elsewhere" / "secret.txt"


def test_a_link_at_the_partial_name_of_a_recipe_is_not_followed(base, direction, secret, tmp_path):
    edit(str(base), tmp_path / "edited", direction=direction, scope="layers:0")
    partial_file(tmp_path / "edited" / "orthogonalize.json").symlink_to(secret)
    load_recipe(tmp_path / "edited").save(tmp_path / "edited")
    verify(tmp_path / "edited", str(base), logits=False)
    assert secret.read_text() == "secret"
    edit(str(tmp_path / "edited"), tmp_path / "again", direction=direction, scope="layers:1")
    assert not list((tmp_path / "again").glob(".*"))


def test_a_link_at_the_final_name_is_replaced(secret, tmp_path):
    (tmp_path / "file.json").symlink_to(secret)
    write_atomically(tmp_path / "file.json", "new")
    assert secret.read_text() == "secret"
    assert (tmp_path / "file.json").read_text() == "new"
    assert not (tmp_path / "file.json").is_symlink()


def test_partial_files_of_killed_processes_are_removed_and_those_of_live_ones_kept(tmp_path):
    process = os.fork()
    if process == 0:
        from orthogonalize.core.files import new_partial_file

        with new_partial_file(tmp_path / "file.json"):
            (tmp_path / "ready").touch()
            import time

            time.sleep(60)
    try:
        while not (tmp_path / "ready").exists():
            pass
        [living] = tmp_path.glob(".file.json.*.partial")
        (tmp_path / ".file.json.0123456789abcdef.partial").write_text("half")
        write_atomically(tmp_path / "file.json", "whole")
        assert list(tmp_path.glob(".*")) == [living]
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
    write_atomically(tmp_path / "file.json", "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_journal_that_is_a_link_is_dropped(secret, tmp_path):
    (tmp_path / ".journal").symlink_to(secret)
    journal = Journal(tmp_path / ".journal", inputs="ours")
    journal.put({"step": 1})
    assert secret.read_text() == "secret"
    assert Journal(tmp_path / ".journal", inputs="ours").done == {"step": 1}


def test_private_files_stay_behind_and_are_named(base, direction, secret, tmp_path, monkeypatch):
    (base / "notes.txt").symlink_to(secret)
    (base / "NOTICE.txt").write_text("mine")
    (base / "COPYING").symlink_to("NOTICE.txt")
    for name in (".env", "wandb/run.log", ".ssh/id_rsa", "trainer_state.json", "optimizer.pt", "runs/events.out.x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("secret")
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.commands.edit.note", said.append)
    edit(str(base), tmp_path / "out", direction=direction, scope="layers:0")
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in written if b"secret" in file.read_bytes()]
    assert (tmp_path / "out" / "COPYING").read_text() == "mine"
    assert any("notes.txt" in line and ".env" in line and "links out of the folder" in line for line in said)
    recipe = load_recipe(tmp_path / "out")
    listed = {*recipe.weights, *recipe.files, "README.md", "orthogonalize.json"}
    assert {str(file.relative_to(tmp_path / "out")) for file in written} == listed


def test_links_into_the_blobs_of_the_hub_cache_are_followed(base, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    blobs.mkdir()
    (blobs / "1").write_text("text")
    (snapshot / "merges.txt").symlink_to("../../blobs/1")
    assert Path("merges.txt") in open_checkpoint(snapshot).side_files()
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert Path("merges.txt") in open_checkpoint(snapshot).private_files()


@pytest.mark.parametrize("folder", [False, True])
def test_push_refuses_what_leads_out_of_the_folder(folder, base, direction, secret, tmp_path):
    edit(str(base), tmp_path / "edited", direction=direction, scope="layers:0")
    (tmp_path / "edited" / "more").symlink_to(secret.parent if folder else secret)
    with pytest.raises(OrthogonalizeError, match="leads out"):
        push(tmp_path / "edited", "me/edited")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "more/notes.txt"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_not_a_regular_file_is_refused(kind, name, base, tmp_path, monkeypatch):
    file = base / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(file.parent)  # the address of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(file.name)
    with pytest.raises(OrthogonalizeError, match=f"{file.name} is not a regular file"):
        open_checkpoint(base)


@pytest.mark.parametrize("kind", ["folder", "dangling", "loop"])
def test_weights_that_cannot_be_read_are_named(kind, base):
    file = base / "model.safetensors"
    file.unlink()
    file.mkdir() if kind == "folder" else file.symlink_to("nowhere" if kind == "dangling" else file.name)
    with pytest.raises(OrthogonalizeError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(base)


READS = {
    "model.gguf": find_model,
    "answers.json": judge,
    "phrases.txt": read_phrases,
    "adapter/adapter_model.safetensors": lambda file: adapter_config(file.parent),
    "run/prompts.jsonl": lambda file: check_run_folder(file.parent, RUN),
}


@pytest.mark.parametrize("name", READS)
def test_a_pipe_is_not_waited_for(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    (file.parent / RUN.mark).write_text("{}")
    (file.parent / "adapter_config.json").write_text("{}")
    if name.startswith("run"):
        (file.parent / "adapter_config.json").unlink()
    os.mkfifo(file)
    with pytest.raises(OrthogonalizeError, match=r"not a regular file|no such file"):
        READS[name](file)


def test_a_base_that_is_a_pipe_is_not_waited_for(base, direction, tmp_path):
    edit(str(base), tmp_path / "edited", direction=direction, scope="layers:0")
    recipe = load_recipe(tmp_path / "edited")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "folder" / "config.json")
    for name in ("pipe", "folder"):
        recipe.base.model = str(tmp_path / name)
        recipe.save(tmp_path / "edited")
        with pytest.raises(OrthogonalizeError):
            verify(tmp_path / "edited")


def test_plots_are_not_written_through_a_link(secret, tmp_path):
    (tmp_path / "run").mkdir()
    (secret.parent / "mine.png").write_text("mine")
    (tmp_path / "run" / "plots").symlink_to(secret.parent)
    with pytest.raises(OrthogonalizeError, match="symbolic link"):
        plot_run(None, tmp_path / "run")
    assert (secret.parent / "mine.png").exists()
