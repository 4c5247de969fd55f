"""A copy of a model has what is known to belong to one; second copies of the weights and private files stay behind."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.hub_server import Hub, Repository
from helpers.llama import LAYERS, store, tiny_llama
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import Checkpoint, open_checkpoint
from orthogonalize.checkpoints.settings_files import context_length
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.models.loading import choose_dtype
from orthogonalize.models.resolve import find_model

BELONG = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer.model.v3"),
    *("qwen.tiktoken", "tekken.json", "preprocessor_config.json", "video_preprocessor_config.json", "LICENSE-2.0.txt"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling_own.py", "Notice", "USE_POLICY.md"),
    *("llama-3-license.pdf", "figures/results.png", "Licence", "a/tokenizer.json", "hf_quant_config.json"),
)
STAY = (
    *("rust_model.ot", "64.tflite", "model-Q4_K_M.GGUF", "weights.npz", "model.safetensors.bak", "a.distcp", "x.zst"),
    *("fp16/model.safetensors", "original/consolidated.00.pth", "model.safetensors.part", "notes.docx", "train.csv"),
    *("license.safetensors", "license.gguf", "tokenizer.model.bak", "unshown.png", "all.7z"),
    *("model.bin.index.json", "chat.log.jsonl", "deepspeed_config.json", "results.png.npz"),
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


def test_only_what_is_known_to_belong_to_a_model_is_copied(base):
    write(base, *BELONG, *STAY)
    (base / "README.md").write_text("![results](figures/results.png) and results.png.npz")
    source = open_checkpoint(base)
    known = {str(name) for name in source.side_files()}
    assert known == {*BELONG, "generation_config.json", "LICENSE"}
    assert {str(name) for name in source.left_out()} == {*STAY}


def test_second_copies_of_weights_are_left_out_under_any_name(base):
    """Layers that predict further tokens may lie in a file of their own; it is no copy, unless it repeats a weight."""
    weights = load_file(base / "model.safetensors")
    save_file({"mtp.layers.0.weight": torch.ones(3)}, base / "mtp.safetensors")
    save_file({"mtp.embed": weights["model.embed_tokens.weight"].clone()}, base / "mtp-embedding.safetensors")
    save_file({name.replace("model.", ""): tensor for name, tensor in weights.items()}, base / "mlx.safetensors")
    source = open_checkpoint(base)
    assert Path("mtp.safetensors") in source.side_files()
    assert [str(name) for name in source.left_out()] == ["mlx.safetensors", "mtp-embedding.safetensors"]


def test_what_is_left_behind_is_named_and_recorded(base, tmp_path, monkeypatch):
    write(base, "rust_model.ot", "notes.docx")
    save_file({"direction": torch.ones(open_checkpoint(base).config["hidden_size"])}, tmp_path / "d.safetensors")
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.commands.edit.note", said.append)
    recipe = edit(str(base), tmp_path / "edited", direction=tmp_path / "d.safetensors", scope="layers:0")
    assert recipe.left_out == ["notes.docx", "rust_model.ot"]
    assert any("rust_model.ot" in line and "notes.docx" in line for line in said)


@pytest.fixture
def in_subfolder(tmp_path) -> Path:
    """A sharded checkpoint, one of whose shards lies in a folder of its own."""
    folder = store(tiny_llama(), tmp_path / "nested", shards=2)
    (folder / "weights").mkdir()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    moved = max(index["weight_map"].values())
    (folder / moved).rename(folder / "weights" / moved)
    index["weight_map"] = {k: f"weights/{v}" if v == moved else v for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shard", [None, "1/1"])
def test_shards_in_a_subfolder_are_edited_and_verified(in_subfolder, tmp_path, shard):
    source = open_checkpoint(in_subfolder)
    save_file({"direction": torch.ones(source.config["hidden_size"])}, tmp_path / "d.safetensors")
    edit(str(in_subfolder), tmp_path / "edited", direction=tmp_path / "d.safetensors", shard=shard)
    edited = open_checkpoint(tmp_path / "edited")
    assert edited.files.keys() == source.files.keys()
    proof = verify(tmp_path / "edited", logits=False).verification
    assert proof is not None
    assert proof.passed
    assert edited.left_out() == []


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a/../../b", ".", "", "a//b", "./a", "a\0b"])
def test_an_index_that_names_anything_else_is_refused(in_subfolder, name):
    file = in_subfolder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(OrthogonalizeError, match="outside its folder"):
        open_checkpoint(in_subfolder)


def test_only_files_that_the_index_names_are_downloaded(in_subfolder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(in_subfolder, *BELONG, *STAY, "consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
    files = {str(f.relative_to(in_subfolder)): f.read_bytes() for f in in_subfolder.rglob("*") if f.is_file()}
    with Hub("token") as hub:
        hub.state.repositories["some/model"] = Repository(False, files)
        options = {"endpoint": hub.url, "cache_dir": tmp_path / "hub", "token": "token"}
        monkeypatch.setattr("huggingface_hub.snapshot_download", partial(snapshot_download, **options))
        folder = find_model("some/model")
    fetched = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    weights = {f for f in fetched if f.endswith(".safetensors")}
    assert weights == set(open_checkpoint(in_subfolder).files)
    assert {"tokenizer.json", "LICENSE", "chat_template.jinja"} <= fetched
    assert not fetched & {"rust_model.ot", "pytorch_model.bin", "weights.npz", "train.csv"}


@pytest.mark.parametrize(
    ("config", "stored", "expected"),
    [
        ({"dtype": "float16"}, torch.bfloat16, torch.float16),
        ({"torch_dtype": "torch.bfloat16"}, torch.float32, torch.bfloat16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.float32, torch.bfloat16),
        ({"thinker_config": {"text_config": {"torch_dtype": "float16"}}}, torch.float32, torch.float16),
        ({"dtype": None, "llm_config": {"dtype": "bfloat16"}}, torch.float32, torch.bfloat16),
        ({"dtype": "auto"}, torch.float16, torch.float16),
        ({}, torch.bfloat16, torch.bfloat16),
        ({}, torch.float32, torch.float32),
    ],
)
def test_the_dtype_to_run_in_is_that_of_the_text_model_else_of_the_embedding(tmp_path, config, stored, expected):
    folder = store(tiny_llama(), tmp_path / "base", stored)
    opened = open_checkpoint(folder)
    plain = {k: v for k, v in opened.config.items() if k not in ("dtype", "torch_dtype")}
    described = Checkpoint(folder, plain | config, opened.files, opened.indexed)
    assert choose_dtype(torch.device("cuda"), described.dtype) == expected


def test_the_context_is_found_one_level_down():
    assert context_length({"max_position_embeddings": 8}) == 8
    assert context_length({"text_config": {"max_position_embeddings": 7}, "vision_config": {"n_ctx": 3}}) == 7
    assert context_length({"thinker_config": {"text_config": {"n_positions": 6}}}) == 6
    assert context_length({"max_position_embeddings": None, "seq_length": 5}) == 5
    assert context_length({"max_position_embeddings": True}) is None


def test_a_shard_moved_to_a_subfolder_leaves_the_edit_as_it_is(in_subfolder, tmp_path):
    """The same bytes as for the same shards side by side."""
    flat = store(tiny_llama(), tmp_path / "flat", shards=2)
    sites = map_sites(
        parse_scope("all"),
        LAYERS,
        lambda _: removal(torch.eye(open_checkpoint(flat).config["hidden_size"])[:1].double()),
    )
    plans = [bake(open_checkpoint(folder), sites).checkpoint for folder in (flat, in_subfolder)]
    assert plans[0].edits.keys() == plans[1].edits.keys()
    for name in plans[0].edits:
        assert torch.equal(plans[0].edited(name), plans[1].edited(name)), name
