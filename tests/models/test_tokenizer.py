"""A tokenizer does what its tokenizer.json says, whatever class its folder names; copies load right by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.llama import store, tiny_llama
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.models.tokenizer.faithful import PROBES, faithful_folder, mended_settings

DIGITS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(*, digits: bool = False, lower: bool = False) -> Tokenizer:
    """A small byte-level BPE; with `digits`, numbers are cut as Llama 3 does, not as GPT-2 does."""
    raw = Tokenizer(models.BPE())
    raw.decoder = decoders.ByteLevel()
    if lower:
        raw.normalizer = normalizers.Lowercase()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not digits)
    split = pre_tokenizers.Split(Regex(DIGITS), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, byte]) if digits else byte
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<unk>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(["hello world a list", "In 2024 12 345.678", "\n\n"] * 40, trainer)
    return raw


def put(folder: Path, raw: Tokenizer, name: str, model_type: str | None = None) -> Path:
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return folder


KINDS = {
    "spaces": (byte_level(), "LlamaTokenizerFast"),
    "digits": (byte_level(digits=True), "GPT2TokenizerFast"),
    "cases": (byte_level(lower=True), "GPT2Tokenizer"),
    "another pre-tokenizer": (byte_level(digits=True), "Qwen2Tokenizer"),
    "another decoder": (byte_level(), "GemmaTokenizerFast"),
    "cohere": (byte_level(digits=True), "CohereTokenizerFast"),
}


def ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_is_taken_as_it_is(base, kind):
    raw, name = KINDS[kind]
    put(base, raw, name)
    found = load_tokenizer(base)
    for text in (*PROBES, "A text of 20245 words, that is no probe:\n\n  e\u0301, 1e-5."):
        assert ids(found, text) == raw.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids(found, text)) == raw.decode(ids(found, text)), text
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("kind", ["spaces", "digits", "another pre-tokenizer"])
def test_the_copy_loads_right_by_itself_and_verifies(base, tmp_path, kind, monkeypatch):
    raw, name = KINDS[kind]
    put(base, raw, name)
    width = open_checkpoint(base).config["hidden_size"]
    save_file({"direction": torch.ones(width)}, tmp_path / "d.safetensors")
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.commands.edit.note", lambda *lines: said.extend(lines))
    recipe = edit(str(base), tmp_path / "edited", direction=tmp_path / "d.safetensors", scope="layers:0")
    assert recipe.tokenizer_class == load_recipe(tmp_path / "edited").tokenizer_class == "PreTrainedTokenizerFast"
    assert any("tokenizer.json" in line for line in said)
    copied = AutoTokenizer.from_pretrained(tmp_path / "edited")
    assert all(ids(copied, text) == raw.encode(text, add_special_tokens=False).ids for text in PROBES)
    proof = verify(tmp_path / "edited", logits=False).verification
    assert proof is not None
    assert proof.passed
    settings = tmp_path / "edited" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("</s>", "<s>"))
    proof = verify(tmp_path / "edited", logits=False, record=False).verification
    assert proof is not None
    assert proof.unexpected_changes == ["tokenizer_config.json"]


def test_a_class_that_reads_as_the_file_says_is_left_alone(base):
    put(base, byte_level(), "PreTrainedTokenizerFast")
    assert mended_settings(base) is None
    with faithful_folder(base) as folder:
        assert folder == base


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_servers_are_handed_a_folder_that_loads_right(base, model_type):
    """transformers overrules the class that a folder names for qwen2, but not where there is no model type."""
    raw = byte_level(digits=True, lower=True)
    put(base, raw, "LlamaTokenizerFast", model_type)
    with faithful_folder(base) as folder:
        assert folder != base
        served = AutoTokenizer.from_pretrained(folder)
        assert all(ids(served, text) == raw.encode(text, add_special_tokens=False).ids for text in PROBES)
    assert not folder.exists()


def test_a_copy_whose_class_transformers_overrules_is_said(tmp_path, monkeypatch):
    folder = put(store(tiny_llama(), tmp_path / "base"), byte_level(digits=True, lower=True), "Own", "qwen2")
    save_file({"direction": torch.ones(open_checkpoint(folder).config["hidden_size"])}, tmp_path / "d.safetensors")
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.models.tokenizer.faithful.note", lambda *lines: said.extend(lines))
    edit(str(folder), tmp_path / "edited", direction=tmp_path / "d.safetensors", scope="layers:0")
    assert any("overrules" in line and "PreTrainedTokenizerFast.from_pretrained" in line for line in said)
