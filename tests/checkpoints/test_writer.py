"""Writing a checkpoint in one pass: same bytes however the work is cut, valid checksums, nothing lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers.llama import LAYERS, WIDTH, store, tiny_llama
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints import chunks, direct_io, weight_file, writer
from orthogonalize.checkpoints.checkpoint import INDEX, open_checkpoint
from orthogonalize.cli import main
from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import ConditionalMap, Intervention, block_sites, removal
from orthogonalize.core.output_folders import CONFIG
from orthogonalize.edits.bake import bake
from orthogonalize.edits.plan import EditPlan
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.edits.scopes import map_sites, parse_scope


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def sha256(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture
def source(tmp_path) -> Path:
    return store(tiny_llama(tie_word_embeddings=True), tmp_path / "base", torch.bfloat16, shards=4)


@pytest.fixture
def direction(tmp_path) -> Path:
    save_file({"direction": torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))}, tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def written(source: Path, out: Path, basis, scope: str = "all", **options):
    out.mkdir()
    plan = bake(open_checkpoint(source), map_sites(parse_scope(scope), LAYERS, lambda _: removal(basis[:1])))
    return plan, plan.write(out, **options)


def test_bytes_of_a_conditional_edit_do_not_depend_on_pieces(source, basis, tmp_path, monkeypatch):
    """Matrices that are cut by rows and by columns take out the components of their own vectors."""

    def conditional(out: Path) -> dict[str, bytes]:
        out.mkdir()
        bake(open_checkpoint(source), Intervention(conditional=maps)).write(out)
        return weights(out)

    maps = {}
    for number, site in enumerate(block_sites(range(LAYERS))):
        for matrix, (_, stored) in EditPlan.of(open_checkpoint(source)).sites.write_matrices(site).items():
            inputs = open_checkpoint(source).tensors[stored[0].name].shape[1]
            c = torch.randn(2, inputs, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            maps[matrix] = ConditionalMap(basis[:2], c)
    whole = conditional(tmp_path / "whole")
    monkeypatch.setattr(chunks, "CHUNK", 1024)
    monkeypatch.setattr(chunks, "WHOLE", 2048)
    monkeypatch.setattr(chunks, "RUN", 16)
    assert conditional(tmp_path / "cut") == whole
    assert whole != weights(source)


@pytest.mark.parametrize("scope", ["all", "layers:1", "from:0"])
def test_bytes_do_not_depend_on_pieces_or_workers(source, basis, tmp_path, monkeypatch, scope):
    plan, whole = written(source, tmp_path / "whole", basis, scope)
    monkeypatch.setattr(chunks, "CHUNK", 1024)
    monkeypatch.setattr(chunks, "WHOLE", 2048)  # so every matrix is cut, and some across their columns
    monkeypatch.setattr(chunks, "RUN", 16)
    monkeypatch.setattr(weight_file, "CALL", 100)
    monkeypatch.setattr(weight_file, "FLUSH", 1)
    parts = [
        chunk
        for file in plan.source.files.values()
        for job in writer._jobs(plan.source, file, plan.checkpoint.changes, {})
        for chunk in chunks.split_job(job)
    ]
    assert len(parts) > 1.5 * len(plan.source.tensors)
    assert any(chunk.columns for chunk in parts) or scope == "from:0"
    for number, workers in enumerate((1, 3)):
        _, again = written(source, tmp_path / f"cut{number}", basis, scope, workers=workers)
        assert weights(tmp_path / f"cut{number}") == weights(tmp_path / "whole")
        assert (again.source, again.result) == (whole.source, whole.result)
        for name, record in whole.records.items():
            assert again.records[name].leak == pytest.approx(record.leak, rel=1e-6)
    for name in plan.checkpoint.edits:
        stored = open_checkpoint(tmp_path / "whole").read(name)
        assert torch.equal(stored, plan.checkpoint.edited(name))


def test_recipe_holds_the_checksums_of_source_and_result(source, direction, tmp_path):
    edit(str(source), tmp_path / "edited", direction=direction, scope="layers:1")
    recipe = load_recipe(tmp_path / "edited")
    assert recipe.base.weights == sha256(weights(source)) == open_checkpoint(source).fingerprint()
    assert recipe.weights == sha256(weights(tmp_path / "edited"))
    assert any(recipe.weights[name] == digest for name, digest in recipe.base.weights.items())
    assert recipe.rounding == "cancelling"
    assert all(record.leak < 0.01 for record in recipe.tensors)


def test_recipe_keeps_the_choice_of_rounding(source, direction, tmp_path):
    for rounding in ("nearest", "cancelling"):
        out = tmp_path / rounding
        words = ["--quiet", "edit", source, "--direction", direction, "--scope", "all", "--rounding", rounding]
        result = CliRunner().invoke(main, [*map(str, words), "--out", str(out)])
        assert result.exit_code == 0, result.output
        edit(str(source), tmp_path / f"{rounding}-again", recipe=out / "orthogonalize.json")
        assert weights(tmp_path / f"{rounding}-again") == weights(out)
    leaks = {r: max(t.leak for t in load_recipe(tmp_path / r).tensors) for r in ("nearest", "cancelling")}
    assert leaks["cancelling"] < 0.1 * leaks["nearest"]


def test_unedited_files_are_linked_only_on_request(source, basis, tmp_path):
    plan, _ = written(source, tmp_path / "copied", basis, "layers:1")
    written(source, tmp_path / "linked", basis, "layers:1", link=True)
    edited = {name for name, file in plan.source.files.items() if plan.checkpoint.edits.keys() & file.tensors.keys()}
    assert 0 < len(edited) < len(plan.source.files)
    for name in plan.source.files:
        same = (tmp_path / "linked" / name).stat().st_ino == (source / name).stat().st_ino
        assert same == (name not in edited)
        assert (tmp_path / "copied" / name).stat().st_ino != (source / name).stat().st_ino
    assert weights(tmp_path / "linked") == weights(tmp_path / "copied")


def test_links_of_the_hub_cache_are_followed(source, basis, tmp_path):
    """A snapshot in the Hub's cache is a folder of links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    written(snapshot, tmp_path / "edited", basis, "layers:1", link=True)
    assert not any(f.is_symlink() for f in (tmp_path / "edited").iterdir())
    assert {f.stat().st_nlink for f in blobs.glob("*.safetensors")} == {1, 2}
    written(source, tmp_path / "plain", basis, "layers:1")
    assert weights(tmp_path / "edited") == weights(tmp_path / "plain")


@pytest.mark.parametrize("inner", [48, 500])
def test_direct_io_writes_the_same_bytes(basis, tmp_path, monkeypatch, inner):
    source = store(tiny_llama(intermediate_size=inner), tmp_path / "base", torch.bfloat16, shards=2)
    _, through = written(source, tmp_path / "through", basis)
    used = []
    real = direct_io.DirectStream.tail
    monkeypatch.setattr(direct_io.DirectStream, "tail", lambda self: used.append(self.done) or real(self))
    monkeypatch.setattr(weight_file, "DIRECT", 0)
    monkeypatch.setattr(chunks, "CHUNK", 2**14)
    monkeypatch.setattr(chunks, "WHOLE", 2**15)
    monkeypatch.setattr(direct_io, "REQUEST", 4096)
    _, past = written(source, tmp_path / "past", basis)
    if not used:
        pytest.skip("this file system cannot be written past its cache")
    assert max(used) > 4096
    assert weights(tmp_path / "past") == weights(tmp_path / "through")
    assert past.result == through.result == sha256(weights(tmp_path / "past"))


def test_header_of_a_file_without_additions_is_unchanged(basis, tmp_path):
    source = store(tiny_llama(), tmp_path / "base", torch.float32, shards=2)
    written(source, tmp_path / "edited", basis)
    for name, file in open_checkpoint(source).files.items():
        assert weights(tmp_path / "edited")[name][: file.data_start] == weights(source)[name][: file.data_start]


def test_damaged_shard_stops_the_edit_before_any_write(source, direction, tmp_path):
    last = max(source.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-7])
    with pytest.raises(OrthogonalizeError, match="not a valid safetensors file"):
        edit(str(source), tmp_path / "out", direction=direction)
    assert not list(tmp_path.glob("*out*"))


def test_recipe_applied_to_another_base_leaves_nothing(source, direction, tmp_path):
    edit(str(source), tmp_path / "edited", direction=direction, scope="layers:1")
    other = store(tiny_llama(seed=5, tie_word_embeddings=True), tmp_path / "other", torch.bfloat16, shards=4)
    with pytest.raises(OrthogonalizeError, match="not the base of the recipe"):
        edit(str(other), tmp_path / "out", recipe=tmp_path / "edited" / "orthogonalize.json")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("where", ["_read", "_edit", "_write"])
def test_failure_in_any_stage_of_the_pipeline_stops_all(source, direction, tmp_path, monkeypatch, where):
    real, calls = getattr(weight_file.FileWriter, where), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(chunks, "CHUNK", 512)
    monkeypatch.setattr(weight_file.FileWriter, where, failing)
    before = weights(source)
    with pytest.raises(OrthogonalizeError, match="disk filled up"):
        edit(str(source), tmp_path / "out", direction=direction, scope="all", workers=3)
    assert not list(tmp_path.glob("*out*"))
    assert weights(source) == before


def test_nan_weights_are_named_and_nothing_is_written(source, direction, tmp_path):
    name = "model.layers.2.mlp.down_proj.weight"
    file = next(f for f in source.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OrthogonalizeError, match=r"layers\.2\.mlp\.down_proj\.weight holds NaN"):
        edit(str(source), tmp_path / "out", direction=direction, scope="all")
    assert not list(tmp_path.glob("*out*"))


def test_tensor_in_two_shards_is_refused(source):
    first, second = sorted(source.glob("*.safetensors"))[:2]
    extra = next(iter(load_file(first).items()))
    save_file(load_file(second) | {extra[0]: extra[1]}, second, metadata={"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    for target in (first, second):
        index["weight_map"][extra[0]] = target.name
        (source / INDEX).write_text(json.dumps(index))
        with pytest.raises(OrthogonalizeError, match="more than one shard"):
            open_checkpoint(source)


def test_read_only_disk_is_a_one_line_error(source, direction, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a read-only disk is not permitted here")
    try:
        words = ["--quiet", "edit", source, "--direction", direction, "--out", disk / "out"]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 1
        assert "Read-only file system" in result.output
        assert result.output.startswith("error: ")
        assert result.output.strip().count("\n") == 0
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("shard", [None, "2/2"])
def test_edit_killed_while_writing_is_cleaned_up_by_the_next(source, direction, tmp_path, shard):
    edit(str(source), tmp_path / "whole", direction=direction, scope="all")
    if shard:
        edit(str(source), tmp_path / "out", direction=direction, scope="all", shard="1/2")
    code = (
        "import sys, time\nfrom orthogonalize.checkpoints import weight_file\n"
        "from orthogonalize.commands.edit import edit\n"
        "real = weight_file.FileWriter._write\n"
        "def slow(*a):\n    real(*a); print('writing', flush=True); time.sleep(60)\n"
        "weight_file.FileWriter._write = slow\n"
        f"edit(sys.argv[1], sys.argv[2], direction=sys.argv[3], scope='all', shard={shard!r})\n"
    )
    words = [sys.executable, "-c", code, str(source), str(tmp_path / "out"), str(direction)]
    before = {f.name for f in tmp_path.iterdir()}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    left = sorted({f.name for f in tmp_path.iterdir()} - before)
    hidden = r"(\.out\S*\.lock )?\.out\S*\.partial-[0-9a-f]+"
    assert re.fullmatch(hidden, " ".join(left)), "what is half written is seen under no other name"
    edit(str(source), tmp_path / "out", direction=direction, scope="all", shard=shard)
    assert {f.name for f in tmp_path.iterdir()} == before - {"out.share-1-of-2"} | {"out"}
    assert load_recipe(tmp_path / "out").weights == sha256(weights(tmp_path / "out"))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_shards_written_separately_give_the_same_checkpoint(source, direction, tmp_path):
    edit(str(source), tmp_path / "whole", direction=direction, scope="all")
    apart = tmp_path / "apart"
    for shard in ("2/3", "1/3"):
        edit(str(source), apart, direction=direction, scope="all", shard=shard)
        assert not apart.exists()
    assert sorted(f.name for f in tmp_path.glob("apart*")) == ["apart.share-1-of-3", "apart.share-2-of-3"]
    words = ["--quiet", "edit", source, "--direction", direction, "--scope", "all", "--out", apart]
    result = CliRunner().invoke(main, [str(word) for word in [*words, "--shard", "3/3"]])
    assert result.exit_code == 0, result.output
    assert [f.name for f in tmp_path.glob("apart*")] == ["apart"]
    assert weights(apart) == weights(tmp_path / "whole")
    added = {f.name for f in apart.iterdir()} - {f.name for f in (tmp_path / "whole").iterdir()}
    assert added == {CONFIG}, "the command also saves its options"
    assert load_recipe(apart) == load_recipe(tmp_path / "whole")


def test_shard_needs_disk_space_only_for_itself(source, direction, tmp_path, monkeypatch):
    most = max(file.stat().st_size for file in source.glob("*.safetensors"))
    usage = SimpleNamespace(free=int(1.5 * most))
    monkeypatch.setattr("orthogonalize.core.output_folders.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OrthogonalizeError, match="make room"):
        edit(str(source), tmp_path / "out", direction=direction, scope="layers:1")
    for number in (1, 2, 3, 4):
        edit(str(source), tmp_path / "out", direction=direction, scope="layers:1", shard=f"{number}/4")
    assert (tmp_path / "out").is_dir()
    usage.free = most // 8
    with pytest.raises(OrthogonalizeError, match="make room"):
        edit(str(source), tmp_path / "other", direction=direction, scope="layers:1", shard="1/4")


def test_shards_of_two_edits_are_not_mixed(source, direction, tmp_path):
    edit(str(source), tmp_path / "out", direction=direction, scope="all", shard="1/2")
    with pytest.raises(OrthogonalizeError, match="are shares of different edits"):
        edit(str(source), tmp_path / "out", direction=direction, scope="layers:1", shard="2/2")
    assert not (tmp_path / "out").exists()
    edit(str(source), tmp_path / "out", direction=direction, scope="all", shard="2/2", force=True)
    assert (tmp_path / "out").is_dir()
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(OrthogonalizeError, match="give i/n"):
            edit(str(source), tmp_path / "other", direction=direction, shard=wrong)
