"""Checkpoint folders: what is refused, what is copied, and that no partial result is ever visible."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.llama import LAYERS, store, tiny_llama
from safetensors.torch import load_file

from orthogonalize.checkpoints.checkpoint import INDEX, open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import removal
from orthogonalize.core.output_folders import EDITED, REPORT, RUN, check_free, check_space, complete_folder
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope, shift_sites


def some_edit(basis, scope="layers:1"):
    return map_sites(parse_scope(scope), LAYERS, lambda _: removal(basis))


@pytest.mark.parametrize("shards", [1, 3])
def test_only_the_tensors_named_by_the_edit_change(basis, tmp_path, shards):
    source = store(tiny_llama(), tmp_path / "base", torch.bfloat16, shards)
    (source / "extra").mkdir()
    (source / "extra" / "tokenizer.json").write_bytes(b"\x00\xff\r\n")
    edited = tmp_path / "edited"
    edited.mkdir()
    bake(open_checkpoint(source), some_edit(basis)).write(edited)
    before = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    after = {k: v for f in edited.glob("*.safetensors") for k, v in load_file(f).items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    assert after.keys() == before.keys()
    for name in ("config.json", "generation_config.json", "LICENSE", "extra/tokenizer.json"):
        assert (edited / name).read_bytes() == (source / name).read_bytes()
    if shards > 1:
        assert (edited / INDEX).read_bytes() == (source / INDEX).read_bytes()
    untouched = [f for f in source.glob("*.safetensors") if not changed & load_file(f).keys()]
    assert all((edited / f.name).read_bytes() == f.read_bytes() for f in untouched)


def test_added_tensors_are_indexed_and_counted_in_total_size(basis, tmp_path):
    source = store(tiny_llama(), tmp_path / "base", torch.float32, shards=3)
    edited = tmp_path / "edited"
    edited.mkdir()
    bake(open_checkpoint(source), shift_sites(parse_scope("one"), LAYERS, lambda _: basis[0], 2)).write(edited)
    index = json.loads((edited / INDEX).read_text())
    opened = open_checkpoint(edited)
    assert index["weight_map"].keys() == opened.tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.size for t in opened.tensors.values())


def test_unedited_weight_copies_and_the_base_card_are_left_out(base, basis, tmp_path):
    """Weights in other formats would still hold what was edited out."""
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "onnx/model.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"weights")
    edited = tmp_path / "edited"
    edited.mkdir()
    source = open_checkpoint(base)
    bake(source, some_edit(basis)).write(edited)
    assert {f.name for f in edited.rglob("*") if f.is_file()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "LICENSE",
    }
    assert len(source.left_out()) == 4


def damaged(base: Path, how: str) -> None:
    weights = base / "model.safetensors"
    match how:
        case "no config":
            (base / "config.json").unlink()
        case "no weights":
            weights.unlink()
        case "pickled only":
            weights.rename(base / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "config not JSON":
            (base / "config.json").write_text("{")
        case "unnamed weights":
            weights.rename(base / "weights.safetensors")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "no config.json"),
        ("no weights", "has no weights"),
        ("pickled only", "pickled weights only"),
        ("truncated", "not a valid safetensors file"),
        ("config not JSON", "cannot be read as JSON"),
        ("unnamed weights", "neither"),
    ],
)
def test_damaged_folder_is_refused_with_the_reason(base, how, message):
    damaged(base, how)
    with pytest.raises(OrthogonalizeError, match=message):
        open_checkpoint(base)


def test_index_that_disagrees_with_the_shards_is_refused(tmp_path):
    """A missing shard, a path outside the folder, and an index that lists other tensors than the files hold."""
    for number, (change, message) in enumerate(
        [
            (lambda f, i: (f / next(iter(i["weight_map"].values()))).unlink(), "lacks the shard"),
            (lambda f, i: i["weight_map"].update({"model.norm.weight": "../../secret.safetensors"}), "outside"),
            (lambda f, i: i["weight_map"].update({"nowhere": "model-00001-of-00002.safetensors"}), "disagree"),
            (lambda f, i: i["weight_map"].pop("model.norm.weight"), "disagree"),
            (lambda f, i: i.pop("weight_map"), "no weight_map"),
            (
                lambda f, i: i["weight_map"].update({"model.norm.weight": ["a", "list"]}),
                "a file name that is not a string",
            ),
            (lambda f, i: i["weight_map"].update({"model.norm.weight": 3}), "a file name that is not a string"),
        ]
    ):
        folder = store(tiny_llama(), tmp_path / f"base{number}", shards=2)
        index = json.loads((folder / INDEX).read_text())
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(OrthogonalizeError, match=message):
            open_checkpoint(folder)


def test_non_finite_or_integer_weights_are_refused(base, basis, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for number, (value, message) in enumerate(
        [(tensors[name].clone().fill_(float("nan")), "NaN"), (tensors[name].to(torch.int8), "stored as I8")]
    ):
        save_file(tensors | {name: value}, base / "model.safetensors")
        (tmp_path / f"out{number}").mkdir()
        with pytest.raises(OrthogonalizeError, match=message):
            bake(open_checkpoint(base), some_edit(basis)).write(tmp_path / f"out{number}")


def test_undescribed_architecture_and_wrong_width_are_refused(base, basis):
    with pytest.raises(OrthogonalizeError, match="width 7 and the model's residual stream 32"):
        bake(open_checkpoint(base), some_edit(torch.eye(7)[:1]))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(OrthogonalizeError, match="'unheard_of' is not supported"):
        bake(open_checkpoint(base), some_edit(basis))


def test_failed_write_leaves_nothing_behind(tmp_path):
    def half() -> None:
        with complete_folder(tmp_path / "out", RUN) as partial:
            (partial / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_and_keeps_the_old_output(tmp_path):
    with complete_folder(tmp_path / "out", RUN) as partial:
        (partial / "stages.json").write_text("old")
    with (
        pytest.raises(OrthogonalizeError, match="disk filled up"),
        complete_folder(tmp_path / "out", RUN, force=True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "out" / "stages.json").read_text() == "old"
    with pytest.raises(OrthogonalizeError, match="GB free"):
        check_space(tmp_path / "out", 10**18)


def test_edit_onto_a_really_full_disk_leaves_nothing_behind(basis, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        source = store(tiny_llama(), tmp_path / "base")
        plan = bake(open_checkpoint(source), some_edit(basis))
        with (
            pytest.raises(OrthogonalizeError, match="disk filled up"),
            complete_folder(disk / "out", EDITED) as partial,
        ):
            plan.write(partial)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_force_replaces_only_folders_that_the_tool_made(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    with complete_folder(mine, RUN) as partial:
        (partial / "stages.json").write_text("1")
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(OrthogonalizeError, match="exists"), complete_folder(mine, RUN):
        pass
    with (
        pytest.raises(OrthogonalizeError, match="was not created by this command"),
        complete_folder(other, RUN, force=True),
    ):
        pass
    with complete_folder(mine, RUN, force=True) as partial:
        (partial / "stages.json").write_text("2")
    assert (mine / "stages.json").read_text() == "2"
    assert (other / "thesis.txt").read_text() == "years of work"


@contextmanager
def writing(out: Path) -> Iterator[subprocess.Popen]:
    """A process that has begun to write `out`."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from orthogonalize.core.interrupts import handle_signals\n"
        "from orthogonalize.core.output_folders import RUN, complete_folder\n"
        f"with handle_signals(), complete_folder(Path({str(out)!r}), RUN) as p:\n"
        "    (p / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_killed_run_shows_no_result_and_the_next_cleans_up(tmp_path, how):
    with writing(tmp_path / "out") as process:
        process.send_signal(how)
        process.wait(timeout=30)
    assert not (tmp_path / "out").exists()
    assert how == signal.SIGKILL or not list(tmp_path.iterdir()), "what can be caught leaves nothing"
    with complete_folder(tmp_path / "out", RUN) as partial:
        (partial / "run.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_being_replaced_by_a_killed_run_is_restored(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    with complete_folder(tmp_path / "out", RUN) as partial:
        (partial / "stages.json").write_text("old")
    (tmp_path / "out").rename(tmp_path / f".out.previous-{dead.pid}")  # killed at this point
    with pytest.raises(OrthogonalizeError, match="exists"), complete_folder(tmp_path / "out", RUN):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / f".out.previous-{dead.pid}").mkdir()  # killed after the new one was in place
    with complete_folder(tmp_path / "out", RUN, force=True) as partial:
        (partial / "stages.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "stages.json").read_text() == "new"


def test_partial_folder_of_a_live_process_is_left_alone(tmp_path):
    """Whatever its process number, which is 1 for every container on a shared volume."""
    with writing(tmp_path / "out") as process:
        [living] = tmp_path.glob(".out.partial-*")
        said = rf"is being written by process {process.pid}; wait for it"
        with pytest.raises(OrthogonalizeError, match=said), complete_folder(tmp_path / "out", RUN):
            pass
        assert living.exists()


def test_force_spares_inputs_and_other_kinds_of_output(tmp_path):
    demo = tmp_path / "demo"
    (demo / "run").mkdir(parents=True)
    (demo / "report.json").write_text("{}")
    with pytest.raises(OrthogonalizeError, match="was not created by this command"):
        check_free(demo, REPORT, force=True)
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "orthogonalize.json").write_text("{}")
    check_free(edited, EDITED, force=True)
    with pytest.raises(OrthogonalizeError, match="which this command reads"):
        check_free(edited, EDITED, force=True, inputs=[edited])


def test_folder_that_loaders_would_read_differently_is_refused(tmp_path):
    """One that also holds model.safetensors beside shards, and one with an adapter that is not merged."""
    sharded = store(tiny_llama(), tmp_path / "sharded", shards=2)
    (sharded / "model.safetensors").write_bytes((sharded / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(OrthogonalizeError, match="has both"):
        open_checkpoint(sharded)
    adapted = store(tiny_llama(), tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(OrthogonalizeError, match="merge it"):
        open_checkpoint(adapted)
