"""Configurations and tokenizers from anybody: limits hold before a library reads them; a refusal is one line."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.chat import store_chatting
from helpers.command_line import command
from helpers.llama import WIDTH
from helpers.memory_use import memory_growth
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import LONGEST, OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, removal
from orthogonalize.data.chat import ChatFormat
from orthogonalize.edits.bake import bake
from orthogonalize.models.loading import check_complete, load_model, load_tokenizer


@pytest.fixture(scope="module")
def chatting(tmp_path_factory) -> Path:
    return store_chatting(tmp_path_factory.mktemp("settings") / "base")


def changed(source: Path, target: Path, name: str, content: object) -> Path:
    """A copy of a model folder in which one file has other settings, or another text."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = target / name
    if isinstance(content, dict):
        known = json.loads(file.read_text()) if file.exists() else {}
        content = json.dumps(known | content)
    file.write_text(str(content))
    return target


def refusal(folder: Path, use) -> str:
    """The one line with which `use` refuses the folder."""
    began = time.monotonic()
    with pytest.raises(OrthogonalizeError) as error:
        use(folder)
    said = str(error.value)
    assert said.isprintable(), said
    assert len(said) <= LONGEST
    assert time.monotonic() - began < 30
    return said


CONFIGS = {
    "model_type is a list": ({"model_type": ["llama"]}, "model_type"),
    "model_type is a table": ({"text_config": {"model_type": {}}}, "model_type"),
    "model_type of 10 MB": ({"model_type": "x" * 10_000_000}, "model_type"),
    "model_type with escapes": ({"model_type": "\x1b[31mllama\n"}, "x1b"),
    "ten million layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    "ten million labels": ({"num_labels": 10**7}, "num_labels"),
    "experts": ({"num_local_experts": 10**9}, "num_local_experts"),
    "positions": ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
    "positions of an inner model": ({"text_config": {"n_positions": 10**9}}, "n_positions"),
    "positions by a factor": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 1e9, "original_max_position_embeddings": 4096}},
        "times 4096",
    ),
    "positions by a factor, in all": (
        {
            "rope_scaling": {"type": "linear", "factor": 1e6, "original_max_position_embeddings": 1},
            "max_position_embeddings": 4096,
        },
        "times 4096",
    ),
    "positions by no number": (
        {
            "rope_parameters": {
                "a": {"rope_type": "yarn", "factor": float("nan"), "original_max_position_embeddings": 4}
            }
        },
        "times 4",
    ),
    "huge number": ({"whatever": 10**40}, "whatever"),
    "architectures": ({"architectures": {"a": 1}}, "architectures"),
    "architectures of 10 MB": ({"architectures": ["x" * 10_000_000]}, "architectures"),
    "attention from the Hub": ({"attn_implementation": "evil/kernel"}, "names code"),
    "attention from the Hub, inside": ({"text_config": {"_attn_implementation": "evil/kernel:v1"}}, "names code"),
    "attention by part": ({"_attn_implementation": {"text_config": "evil/kernel"}}, "names code"),
    "experts from the Hub": ({"_experts_implementation": "evil/kernel"}, "names code"),
    "kernels from the Hub": ({"kernel_config": {"RMSNorm": "evil/kernel:Norm"}}, "names code"),
    "parallel plan": ({"base_model_tp_plan": {"layers.*.mlp": "evil/kernel:Split"}}, "names code"),
    "another model": ({"speculators_config": {"verifier": {"name_or_path": "evil/model"}}}, "another model"),
    "plugin of vLLM": ({"io_processor_plugin": "evil"}, "names a plugin"),
    "surrogates": ({"a": "\ud800"}, "Unicode"),
    "a list": ("[]", "not a JSON object"),
    "nested": ("[" * 100_000 + "]" * 100_000, "JSON"),
    "nested a little": ('{"a":' * 100 + "1" + "}" * 100, "deep"),
    "large": ('{"a": "' + "x" * 17_000_000 + '"}', "bytes"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "JSON"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configuration_is_refused_before_a_library_reads_it(name, file, chatting, tmp_path):
    content, named = CONFIGS[name]
    assert named in refusal(changed(chatting, tmp_path / "base", file, content), open_checkpoint)


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 10_485_760, "rope_scaling": {
            "rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192}},
        {"max_position_embeddings": 131_072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"max_position_embeddings": 163_840, "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
    ],
    ids=["Llama 4", "Gemma 3", "DeepSeek V3"],
)  # fmt: skip
def test_the_longest_contexts_of_released_models_are_read(config, chatting, tmp_path):
    assert open_checkpoint(changed(chatting, tmp_path / "base", "config.json", config)).config


@pytest.mark.parametrize("use", [check_complete, lambda folder: load_model(folder, "cpu")], ids=["eval", "hf"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "text_config"])
def test_more_layers_than_tensors_are_not_built(key, use, chatting, tmp_path):
    change = {"text_config": {"num_hidden_layers": 9999}} if key == "text_config" else {key: 9999}
    assert "= 9999, but" in refusal(changed(chatting, tmp_path / "base", "config.json", change), use)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    "change", [{"intermediate_size": 2**24}, {"intermediate_size": 2**40}, {"vocab_size": 2**26}], ids=str
)
def test_missing_tensors_of_any_size_take_no_memory(change, quantised, chatting, tmp_path):
    base = changed(chatting, tmp_path / "base", "config.json", change)
    if quantised:
        base = changed(base, tmp_path / "quantised", "config.json", {"quantization_config": {"quant_method": "fp8"}})
    tensors = load_file(base / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "mlp" not in n and "embed" not in n}, base / "model.safetensors")
    with memory_growth() as growth:
        assert "is incomplete" in refusal(base, lambda folder: load_model(folder, "cpu"))
    assert growth.bytes < 2**30


@pytest.mark.parametrize("layers", [0, -1])
def test_a_model_without_layers_is_refused(layers, chatting, tmp_path):
    torch.save(torch.ones(WIDTH), tmp_path / "direction.pt")
    base = changed(chatting, tmp_path / "base", "config.json", {"num_hidden_layers": layers})
    said = refusal(base, lambda folder: edit(str(folder), tmp_path / "out", direction=tmp_path / "direction.pt"))
    assert "num_hidden_layers" in said


TOKENIZERS = {
    "a list": ("tokenizer.json", "[]"),
    "nested": ("tokenizer.json", "[" * 100_000),
    "nested a little": ("tokenizer_config.json", '{"a":' * 100 + "1" + "}" * 100),
    "huge id": ("tokenizer.json", {"added_tokens": [{"id": 10**12, "content": "x"}]}),
    "negative id": ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}),
    "id that is a text": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}),
    "added ids": ("added_tokens.json", {"x": 10**15}),
    "special tokens that are objects": ("tokenizer_config.json", {"bos_token": {"a": {"b": 1}}}),
    "special tokens that are numbers": ("tokenizer_config.json", {"eos_token": 5}),
    "no model": ("tokenizer.json", {"model": None}),
    "class of another kind": ("tokenizer_config.json", {"tokenizer_class": 7}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizer_is_one_line(name, chatting, tmp_path):
    refusal(changed(chatting, tmp_path / "base", *TOKENIZERS[name]), load_tokenizer)


MANY = {
    "a large vocabulary": ("tokenizer.json", {"model": {"vocab": {f"{i}": i for i in range(41)}}}),
    "a vocabulary that is a list": ("tokenizer.json", {"model": {"vocab": [["a", 0.5]] * 41}}),
    "many merges": ("tokenizer.json", {"model": {"merges": ["a b"] * 41}}),
    "many added tokens": ("tokenizer.json", {"added_tokens": [{"id": i, "content": f"<{i}>"} for i in range(11)]}),
    "many added ids": ("added_tokens.json", {f"<{i}>": i for i in range(11)}),
    "a long decoder": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {f"{i}": {"content": "x"} for i in range(11)}},
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_more_tokens_than_any_model_has_are_refused(name, chatting, tmp_path, monkeypatch):
    """A million take 20 seconds and 600 MB, three million minutes; smaller limits are tested in the same way."""
    monkeypatch.setattr("orthogonalize.checkpoints.settings_files.MOST_TOKENS", 40)
    monkeypatch.setattr("orthogonalize.checkpoints.settings_files.MOST_ADDED", 10)
    assert "are read" in refusal(changed(chatting, tmp_path / "base", *MANY[name]), load_tokenizer)


def test_tokenizer_that_fails_on_a_prompt_is_one_line(chatting, tmp_path):
    """This one has no token for unknown words, which only a prompt with one shows."""
    known = json.loads((chatting / "tokenizer.json").read_text())["model"]
    model = {"model": {**known, "unk_token": "<none>"}}
    base = changed(chatting, tmp_path / "base", "tokenizer.json", model)

    def encode(folder: Path) -> None:
        ChatFormat(load_tokenizer(folder)).encode("unheard-of")

    assert "unk" in refusal(base, encode).lower()


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": [1]},
        {"hidden_act": "no_such"},
        {"num_attention_heads": 0},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": []},
        {"layer_types": 3},
        {"vocab_size": "many"},
    ],
    ids=str,
)
def test_odd_configuration_is_one_line(config, chatting, tmp_path):
    refusal(changed(chatting, tmp_path / "base", "config.json", config), lambda folder: load_model(folder, "cpu"))


def test_error_on_the_terminal_is_one_visible_line(chatting, tmp_path):
    base = changed(chatting, tmp_path / "ba\x1b[31mse", "config.json", {"model_type": "of\u202eanother"})
    status, said = command("verify", base, "--base", base)
    assert status == 1
    assert said.isprintable()
    assert len(said) <= len("error: ") + LONGEST


def test_implementations_are_not_chosen_by_files_nor_written(chatting, tmp_path):
    """A name of transformers' own is dropped; the model runs as without it."""
    named = {
        "_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2",
        "_experts_implementation": "grouped_mm", "use_kernels": True, "kernel_config": {"RMSNorm": "fast"},
        "tp_plan": {"layers.*": "rowwise"}, "base_model_tp_plan": {"layers.*": "rowwise"},
    }  # fmt: skip
    base = changed(chatting, tmp_path / "base", "config.json", named)
    check_complete(base)
    plain, model = load_model(chatting, "cpu"), load_model(base, "cpu")
    assert model.config._attn_implementation == plain.config._attn_implementation
    torch.save(torch.ones(WIDTH), tmp_path / "direction.pt")
    edit(str(base), tmp_path / "out", direction=tmp_path / "direction.pt", scope="layers:0")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not named.keys() & written.keys()
    assert verify(tmp_path / "out", str(base)).verification.passed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["model_type", "architectures", "num_hidden_layers", "hidden_size", "text_config", "quantization_config",
     "attn_implementation", "kernel_config", "num_labels", "auto_map", "tie_word_embeddings"]
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(content=JSON | st.dictionaries(KEYS, JSON, min_size=1, max_size=4))
def test_nothing_but_its_own_error_leaves_the_reader(content, chatting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    changed(chatting, folder, "config.json", content if isinstance(content, dict) else json.dumps(content))
    with suppress(OrthogonalizeError):
        checkpoint = open_checkpoint(folder)
        bake(checkpoint, Intervention({Site("mlp", 0): removal(torch.eye(WIDTH, dtype=torch.float64)[:1])}))
