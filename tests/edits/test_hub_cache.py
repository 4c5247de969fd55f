"""Editing from and to the Hub's cache, in huggingface_hub's layout, without a second copy of unchanged files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.command_line import command
from helpers.hub_server import Hub, Repository
from helpers.hub_server import command as on_hub
from helpers.llama import VOCABULARY, WIDTH, load, logits, store, tiny_llama
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from safetensors.torch import save_file

from orthogonalize.checkpoints import file_copy as copying
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.edits.hub_cache import CachedRepository, blob_name
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.hub_files import HUB_PATTERNS

TOKEN = "hf_loopbacktoken"
SCOPE = "layers:1"  # leaves some weight files entirely unchanged


class Cache(NamedTuple):
    """A cache made by huggingface_hub downloading some/model, and a direction to edit out."""

    folder: Path
    snapshot: Path
    direction: Path

    def of(self, name: str) -> Path:
        return CachedRepository(name).folder

    def files(self) -> dict[str, tuple[int, bytes | str]]:
        """Inode and content (for a link, its target) of everything except huggingface_hub's locks."""
        return {
            str(f.relative_to(self.folder)): (f.lstat().st_ino, os.readlink(f) if f.is_symlink() else f.read_bytes())
            for f in sorted(self.folder.rglob("*"))
            if (f.is_symlink() or f.is_file()) and ".locks" not in f.relative_to(self.folder).parts
        }


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    source = store(tiny_llama(tie_word_embeddings=True), tmp_path / "source", torch.bfloat16, shards=4)
    (source / "additional_chat_templates").mkdir()
    large = source / "additional_chat_templates" / "large.jinja"
    large.write_bytes(b" " * (10 * 2**20 + 1))  # stored outside git on the Hub
    files = {str(f.relative_to(source)): f.read_bytes() for f in source.rglob("*") if f.is_file()}
    folder = tmp_path / "home" / "hub"
    with Hub(TOKEN) as hub:
        hub.state.repositories["some/model"] = Repository(False, files)
        options = {
            "endpoint": hub.url,
            "cache_dir": folder,
            "token": TOKEN,
            "allow_patterns": [*HUB_PATTERNS, "*.safetensors"],
        }
        snapshot = Path(snapshot_download("some/model", **options))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    generator = torch.Generator().manual_seed(2)
    save_file({"direction": torch.randn(WIDTH, generator=generator)}, tmp_path / "d.safetensors")
    assert all(f.is_symlink() for f in snapshot.rglob("*") if f.is_file()), "the cache is no cache of links"
    return Cache(folder, snapshot, tmp_path / "d.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def new_blocks(folder: Path, before: set[int]) -> int:
    """Bytes on disk of the files in `folder` whose inodes are not in `before`."""
    found = {f.lstat().st_ino: f.lstat().st_blocks * 512 for f in folder.rglob("*") if f.is_file()}
    return sum(size for inode, size in found.items() if inode not in before)


def test_linked_edit_shares_the_blobs_of_unchanged_files(cache, tmp_path):
    before = cache.files()
    for name, link in (("linked", True), ("copied", False)):
        edit("some/model", tmp_path / name, direction=cache.direction, scope=SCOPE, link=link)
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")
    assert not any(f.is_symlink() for f in (tmp_path / "linked").rglob("*"))
    blobs = {f.stat().st_ino for f in cache.of("some/model").glob("blobs/*")}
    changed = {name for name, sha in load_recipe(tmp_path / "linked").weights.items()
               if load_recipe(tmp_path / "linked").base.weights[name] != sha}  # fmt: skip
    assert 0 < len(changed) < 4
    for name in contents(tmp_path / "linked"):
        shared = (tmp_path / "linked" / name).stat().st_ino in blobs
        assert shared == (name not in changed | {"README.md", "orthogonalize.json"}), name
        assert (tmp_path / "copied" / name).stat().st_ino not in blobs
    assert cache.files() == before


def test_file_is_copied_where_no_link_can_be_made(cache, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    edit("some/model", tmp_path / "linked", direction=cache.direction, scope=SCOPE, link=True)
    monkeypatch.setattr(copying.os, "link", refuse)
    edit("some/model", tmp_path / "copied", direction=cache.direction, scope=SCOPE, link=True)
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
    blobs = {f.stat().st_ino for f in cache.of("some/model").glob("blobs/*")}
    assert not blobs & {f.stat().st_ino for f in (tmp_path / "copied").rglob("*")}


def test_edit_into_the_cache_uses_disk_only_for_changes(cache, tmp_path):
    edit("some/model", tmp_path / "plain", direction=cache.direction, scope=SCOPE)
    before = {f.lstat().st_ino for f in cache.folder.rglob("*")}
    there = cache.files()
    recipe = edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    snapshot = CachedRepository("me/edited").snapshot()
    assert contents(snapshot) == contents(tmp_path / "plain")
    assert load_recipe(snapshot) == recipe
    changed = {name for name, sha in recipe.weights.items() if recipe.base.weights[name] != sha}
    written = [snapshot / name for name in changed | {"README.md", "orthogonalize.json"}]
    expected = sum(f.stat().st_blocks * 512 for f in written)
    blobs = cache.of("me/edited") / "blobs"
    assert new_blocks(blobs, before) == expected
    assert expected < 0.5 * sum(f.stat().st_size for f in blobs.iterdir())
    assert there.items() <= cache.files().items(), "what was in the cache is as it was"
    assert list((cache.folder / ".locks").glob(".*")) == []


def test_files_of_an_ordinary_folder_are_linked_only_on_request(cache, tmp_path):
    """Since they may be changed there."""
    source = tmp_path / "source"
    for name, options in (("me/copied", {}), ("me/linked", {"link": True})):
        edit(str(source), cache=name, direction=cache.direction, scope=SCOPE, **options)
        snapshot = CachedRepository(name).snapshot()
        same = {f.name for f in source.iterdir() if (snapshot / f.name).exists() and f.samefile(snapshot / f.name)}
        assert ("config.json" in same) == bool(options)
        assert bool(same) == bool(options)


def test_blobs_are_named_as_the_hub_names_them(cache):
    edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    base, edited = cache.of("some/model"), cache.of("me/edited")
    names = {f.name for f in edited.glob("blobs/*")}
    unchanged = {f.name for f in base.glob("blobs/*")} & names
    # the vocabulary (large), config, generation config, LICENSE, index and the unchanged weights
    assert len(unchanged) >= 6
    assert {len(name) for name in unchanged} == {40, 64}
    assert all(blob_name(f) == f.name for f in edited.glob("blobs/*") if len(f.name) == 40)
    [snapshot] = edited.glob("snapshots/*")
    assert (edited / "refs" / "main").read_text() == snapshot.name
    assert len(snapshot.name) == 40
    for file in (f for f in snapshot.rglob("*") if f.is_file()):
        assert not os.path.isabs(os.readlink(file))
        assert file.resolve().parent == (edited / "blobs").resolve()


def test_huggingface_hub_sees_a_valid_repository(cache):
    edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    found = scan_cache_dir(cache.folder)
    assert found.warnings == []
    repository = next(r for r in found.repos if r.repo_id == "me/edited")
    [revision] = repository.revisions
    assert revision.refs == {"main"}
    assert revision.nb_files == len(contents(CachedRepository("me/edited").snapshot()))
    base = contents(cache.snapshot)
    found.delete_revisions(revision.commit_hash).execute()
    assert not cache.of("me/edited").exists()
    assert contents(cache.snapshot) == base, "deleting the edited model takes nothing from its base"


def test_cached_edit_is_loaded_by_name_offline(cache, tmp_path):
    edit("some/model", tmp_path / "plain", direction=cache.direction)
    edit("some/model", cache="me/edited", direction=cache.direction)
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('me/edited', dtype=torch.float32).eval()\n"
        f"ids = torch.arange(3, {VOCABULARY})[None]\n"
        "with torch.inference_mode():\n    torch.save(model(input_ids=ids).logits, sys.argv[1])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(cache.folder.parent), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "logits.pt"], env=environment, check=True, timeout=120)
    with torch.inference_mode():
        expected = load(tmp_path / "plain")(input_ids=torch.arange(3, VOCABULARY)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected.float(), atol=1e-4)


def test_cached_edit_is_verified_and_edited_by_name(cache, tmp_path):
    edit("some/model", cache="me/edited", direction=cache.direction)
    status, said = command("verify", "me/edited")
    assert status == 0, said
    assert load_recipe(CachedRepository("me/edited").snapshot()).verification.passed
    assert scan_cache_dir(cache.folder).warnings == []
    recipe = edit("me/edited", cache="me/twice", direction=cache.direction, method="actadd", layer=2)
    assert recipe.base.model == "me/edited"
    assert verify("me/twice", logits=False).verification.rebuilt
    plain = contents(CachedRepository("me/edited").snapshot())
    status, said = command("edit", "some/model", "--cache", "me/edited", "--force", "--direction", cache.direction)
    assert status == 0, said
    assert "checkpoint: me/edited in the Hub's cache" in said
    again = contents(CachedRepository("me/edited").snapshot())
    assert all(again[name] == plain[name] for name in plain if name.endswith(".safetensors"))


def test_cached_edit_is_evaluated_by_name(cache, model, run, tmp_path):
    edit(str(model), cache="me/edited", run=run, pick=1)
    report = evaluate("me/edited", str(model), run, tmp_path / "report", suites=("behaviour",), engine="hf")
    assert report.checkpoint == "me/edited"
    assert report.recipe == load_recipe(CachedRepository("me/edited").snapshot()).fingerprint()


def test_cached_edit_is_pushed_by_name_with_the_same_hashes(cache, tmp_path, monkeypatch):
    edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub(TOKEN) as hub:
        done = on_hub(hub, "push", "me/edited", "me/edited", token=TOKEN, home=cache.folder.parent)
        assert done.returncode == 0, done.stderr
        options = {"endpoint": hub.url, "cache_dir": tmp_path / "other", "token": TOKEN}
        back = Path(snapshot_download("me/edited", **options))
    ours = CachedRepository("me/edited").snapshot()
    assert {*contents(back)} == {*contents(ours)}
    for name in contents(ours).keys() - {"README.md", "orthogonalize.json"}:
        assert (back / name).resolve().name == (ours / name).resolve().name
    assert json.loads((back / "orthogonalize.json").read_text())["base"]["model"] == "some/model"


def test_force_replaces_the_whole_repository(cache):
    edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    [first] = cache.of("me/edited").glob("snapshots/*")
    edit("some/model", cache="me/edited", direction=cache.direction, scope="layers:2", force=True)
    [second] = cache.of("me/edited").glob("snapshots/*")
    assert first.name != second.name
    linked = {f.resolve() for f in second.rglob("*") if f.is_file()}
    assert linked == {f.resolve() for f in cache.of("me/edited").glob("blobs/*")}
    assert scan_cache_dir(cache.folder).warnings == []


def test_adapter_can_be_written_to_the_cache(tmp_path, cache):
    untied = store(tiny_llama(), tmp_path / "untied", torch.float32)
    edit(str(untied), cache="me/adapter", direction=cache.direction, scope=SCOPE, format="lora")
    snapshot = CachedRepository("me/adapter").snapshot()
    assert {f.name for f in snapshot.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "orthogonalize.json", "README.md",
    }  # fmt: skip
    [weights] = [f for f in cache.of("me/adapter").glob("blobs/*") if len(f.name) == 64]
    assert blob_name(snapshot / "adapter_model.safetensors") == weights.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--cache", "some/model"],
            "some/model already exists in the Hub's cache; choose another name, or replace it with --force",
        ),
        (
            ["--cache", "some/model", "--force"],
            "has revisions that this command did not create, so --force does not replace it",
        ),
        (["--cache", "me/a--b"], "me/a--b is not a valid repository name"),
        (["--cache", "name"], "--cache name: give OWNER/NAME"),
        (["--cache", "me/x", "--out", "x"], "give either --out or --cache"),
        ([], "give either --out or --cache"),
        (["--cache", "me/x", "--shard", "1/2"], "give --out with --shard"),
    ],
)
def test_unusable_cache_name_is_a_one_line_error(cache, words, message):
    before = cache.files()
    status, said = command("edit", "some/model", *words, "--direction", cache.direction)
    assert status == 1
    assert message in said
    assert len(said.splitlines()) == 1
    assert cache.files() == before


def test_model_is_not_replaced_by_its_own_edit(cache):
    edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    before = cache.files()
    with pytest.raises(OrthogonalizeError, match="which this command reads"):
        edit("me/edited", cache="me/edited", direction=cache.direction, scope="layers:2", force=True)
    assert cache.files() == before


def test_killed_edit_leaves_the_cache_intact(cache):
    """And the next edit cleans up after it."""
    edit("some/model", cache="me/edited", direction=cache.direction, scope=SCOPE)
    before = cache.files()
    code = (
        "import sys, time\nfrom orthogonalize.checkpoints import weight_file\n"
        "from orthogonalize.commands.edit import edit\n"
        "real = weight_file.FileWriter._write\n"
        "def slow(*a):\n    real(*a); print('writing', flush=True); time.sleep(60)\n"
        "weight_file.FileWriter._write = slow\n"
        "edit('some/model', cache='me/edited', direction=sys.argv[1], scope='layers:2', force=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, cache.direction],
        stdout=subprocess.PIPE, env=environment | {"HF_HUB_CACHE": str(cache.folder)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert cache.files() == before
    assert scan_cache_dir(cache.folder).warnings == []
    assert len(list(cache.folder.glob(".locks/.models--me--edited.partial-*"))) == 1
    edit("some/model", cache="me/edited", direction=cache.direction, scope="layers:2", force=True)
    assert not list(cache.folder.glob(".locks/.*"))
    assert not torch.equal(
        logits(load(cache.snapshot)), logits(load(CachedRepository("me/edited").snapshot()))
    )  # fmt: skip
    assert open_checkpoint(CachedRepository("me/edited").snapshot()).fingerprint()
