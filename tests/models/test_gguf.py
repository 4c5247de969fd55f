"""A .gguf file as the model: the edit applies to the dequantised weights."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers.command_line import command
from helpers.llama import LAYERS, VOCABULARY, WIDTH, load, logits, store, tiny_llama
from helpers.memory_use import memory_growth
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.output_folders import EDITED, complete_folder
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.models.resolve import cached, find_model

DTYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16, Type.Q8_0: torch.bfloat16}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def halves_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in GGUF's order: the two rows that are rotated together are adjacent."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(model, file: Path, kind: Type, leave_out: str = "", architecture: str = "llama") -> dict:
    """Write `model` with matrices of `kind`; returns the tensors that the file holds, dequantised to float32."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "w", "v", "wv", *(f"x{i}" for i in range(config.vocab_size - 6))])
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_token_merges(["w v"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        here = Type.F32 if tensor.dim() == 1 else kind
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = tensor.float()
        data = gguf.quantize((halves_together(values, heads) if heads else values).contiguous().numpy(), here)
        writer.add_tensor(gguf_name(name), data, raw_dtype=here)
        plain = np.ascontiguousarray(gguf.quantize(values.contiguous().numpy(), here))
        stored[name] = torch.from_numpy(np.array(gguf.dequantize(plain, here))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture
def direction(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "converted"))
    generator = torch.Generator().manual_seed(3)
    save_file({"direction": torch.randn(WIDTH, generator=generator)}, tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def small(**overrides):
    """A tiny Llama whose rows fill GGUF's blocks of 32 numbers."""
    return tiny_llama(intermediate_size=64, **overrides)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", DTYPES, ids=lambda kind: kind.name)
def test_edited_gguf_equals_the_edited_dequantized_model(direction, tmp_path, kind, tied):
    model = small(tie_word_embeddings=tied)
    held = write_gguf(model, tmp_path / "model.gguf", kind)
    edit(str(tmp_path / "model.gguf"), tmp_path / "edited", direction=direction, scope="all")
    model.load_state_dict({"lm_head.weight": held["model.embed_tokens.weight"], **held})
    plain = store(model, tmp_path / "plain", DTYPES[kind])
    edit(str(plain), tmp_path / "expected", direction=direction, scope="all")
    assert {t.dtype for t in tensors(tmp_path / "edited").values()} == {DTYPES[kind]}
    found, expected = tensors(tmp_path / "edited"), tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    given, wanted, before = (logits(load(tmp_path / name)) for name in ("edited", "expected", "plain"))
    assert (given - wanted).abs().max() < 1e-5, "GGUF holds the norm's epsilon in float32"
    assert (given - before).abs().max() > 1e-2


def test_edited_gguf_keeps_the_tokenizer_and_verifies(direction, tmp_path):
    write_gguf(small(), tmp_path / "model.gguf", Type.Q8_0)
    edit(str(tmp_path / "model.gguf"), tmp_path / "edited", direction=direction)
    assert load_recipe(tmp_path / "edited").base.model == str(tmp_path / "model.gguf")
    assert verify(tmp_path / "edited").verification.passed
    tokenizer = load_tokenizer(tmp_path / "edited")
    assert tokenizer.convert_ids_to_tokens([1, 5]) == ["<s>", "wv"]
    assert tokenizer.encode("wv", add_special_tokens=False) == [5]
    assert "messages" in tokenizer.chat_template
    config = open_checkpoint(tmp_path / "edited").config
    assert (config["num_hidden_layers"], config["vocab_size"]) == (LAYERS, VOCABULARY)


def test_damaged_gguf_is_a_one_line_error_and_leaves_nothing(direction, tmp_path):
    write_gguf(small(), tmp_path / "whole.gguf", Type.F16)
    whole = (tmp_path / "whole.gguf").read_bytes()
    broken = {
        "empty": b"",
        "words": b"this is no model at all, only words",
        "magic alone": whole[:4],
        "header cut": whole[:200],
        "names cut": whole[:2000],
        "weights cut": whole[: len(whole) // 2],
        "end cut": whole[:-100],
        "count too large": whole[:8] + b"\xff" * 8 + whole[16:],
    }
    for number, (how, data) in enumerate(broken.items()):
        (tmp_path / f"{number}.gguf").write_bytes(data)
        status, said = command("edit", tmp_path / f"{number}.gguf", "--direction", direction, "--out", tmp_path / "out")
        assert status == 1, how
        assert f"{number}.gguf cannot be read as GGUF" in said, how
        assert len(said.splitlines()) == 1, how
    assert not (tmp_path / "out").exists()
    assert all(f.suffix == ".lock" for f in (tmp_path / "converted").glob("*"))


def test_unreadable_gguf_architecture_is_named(direction, tmp_path):
    write_gguf(small(), tmp_path / "model.gguf", Type.F16, architecture="unheardof")
    with pytest.raises(OrthogonalizeError, match=r"model\.gguf cannot be read as GGUF.*unheardof"):
        find_model(str(tmp_path / "model.gguf"))


def test_gguf_with_a_missing_tensor_is_refused(direction, tmp_path):
    """transformers would initialise it at random."""
    name = "model.layers.2.mlp.down_proj.weight"
    write_gguf(small(), tmp_path / "model.gguf", Type.F16, leave_out=name)
    with pytest.raises(OrthogonalizeError, match=rf"model\.gguf lacks {name}"):
        find_model(str(tmp_path / "model.gguf"))
    assert all(f.suffix == ".lock" for f in (tmp_path / "converted").glob("*"))


def test_the_file_that_was_named_is_read_and_no_namesake(direction, tmp_path, monkeypatch):
    """transformers takes a file of that name in the present folder, if there is one."""
    for place, seed in (("here", 0), ("there", 1)):
        (tmp_path / place).mkdir()
        write_gguf(tiny_llama(seed), tmp_path / place / "m.gguf", Type.F32)
    monkeypatch.chdir(tmp_path / "here")
    edit("../there/m.gguf", tmp_path / "edited", direction=direction, scope="layers:0")
    wanted = tiny_llama(1).float().state_dict()
    found = load_file(tmp_path / "edited" / "model.safetensors")
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], wanted["model.layers.1.mlp.up_proj.weight"])


def test_a_conversion_is_found_by_its_content(tmp_path):
    """Not by the name, size and time of the file."""
    file = tmp_path / "m.gguf"
    found = []
    for seed in (0, 1):
        write_gguf(small(seed=seed), file, Type.F32)
        os.utime(file, ns=(1, 1))
        found.append((file.stat().st_size, find_model(str(file))))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
    write_gguf(small(seed=0), file, Type.F32)
    assert find_model(str(file)) == found[0][1]


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("add_block_count", 10**6), ("add_embedding_length", 2**30), ("add_feed_forward_length", 2**40),
        ("add_head_count", 2**30), ("add_vocab_size", 2**31), ("add_context_length", 2**31),
    ],
)  # fmt: skip
def test_a_header_that_describes_a_larger_model_is_refused(method, value, tmp_path, monkeypatch):
    real = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda writer, _: real(writer, value if value < 2**32 else 2**32 - 8))
    write_gguf(small(), tmp_path / "model.gguf", Type.F32)
    with memory_growth() as growth, pytest.raises(OrthogonalizeError):
        find_model(str(tmp_path / "model.gguf"))
    assert growth.bytes < 2**30


def test_concurrent_conversions_wait_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []
    begun = threading.Event()

    def slow(out: Path) -> None:
        begun.set()
        time.sleep(0.3)
        with complete_folder(out, EDITED) as folder:
            (folder / "config.json").write_text("{}")
        made.append(out)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cached, "model", slow)
        assert begun.wait(10)
        second = pool.submit(cached, "model", slow)
        assert first.result(10) == second.result(10) == tmp_path / "cache" / "model"
    assert len(made) == 1
