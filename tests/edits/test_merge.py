"""Adapters merged into checkpoints: as PEFT merges them, and bit for bit as `edit` bakes its own."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.command_line import UNTRIED, command
from helpers.llama import WIDTH, store, tiny_llama
from safetensors.torch import load_file, save_file

from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.commands.merge import merge
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError


@pytest.fixture
def base(tmp_path):
    return store(tiny_llama(), tmp_path / "base", torch.float32)


def peft_adapter(base, folder, **settings):
    """An adapter with random factors, written by PEFT itself; returns the weights that PEFT merges."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **settings})
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}], ids=str
)
def test_a_merge_is_what_peft_merges(base, tmp_path, settings):
    expected = peft_adapter(base, tmp_path / "adapter", **settings)
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    plain, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {name for name in plain if "q_proj" in name or "down_proj" in name}
    for name in plain:
        assert torch.allclose(merged[name], expected[name], atol=1e-6), name


def test_an_adapter_of_edit_becomes_the_checkpoint_that_edit_bakes(base, tmp_path):
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "d.safetensors")
    given = {"direction": tmp_path / "d.safetensors", "scope": "layers:1-2", "layer": 1}
    edit(str(base), tmp_path / "baked", **given)
    edit(str(base), tmp_path / "adapter", format="lora", **given)
    status, said = command("merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert status == 0, said
    baked, merged = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("baked", "merged"))
    assert merged == baked
    assert (tmp_path / "merged" / "orthogonalize.json").is_file()


def test_verify_and_eval_take_an_adapter(chat_model, tmp_path, monkeypatch, sources):
    monkeypatch.setenv("ORTHOGONALIZE_CACHE", str(tmp_path / "cache"))
    extract(str(chat_model), tmp_path / "run", **sources, settings=UNTRIED)
    chosen = {"method": "ablate", "scope": "layers:1-2"}
    edit(str(chat_model), tmp_path / "adapter", run=tmp_path / "run", format="lora", **chosen)
    edit(str(chat_model), tmp_path / "baked", run=tmp_path / "run", **chosen)
    proof = verify(tmp_path / "adapter").verification
    assert proof is not None
    assert proof.passed
    reports = [
        evaluate(tmp_path / name, str(chat_model), tmp_path / "run", tmp_path / f"report-{name}", suites=["kl"],
                 engine="hf", max_new_tokens=4)
        for name in ("adapter", "baked")
    ]  # fmt: skip
    assert reports[0].checkpoint == "adapter"
    assert reports[0].edited == reports[1].edited
    assert len(list((tmp_path / "cache").glob("merged-*"))) == 1, "merged once"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_dora": True}, "use_dora = True, which no weights of W"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        *(
            (odd, "is not the configuration of a LoRA adapter")
            for odd in (
                {"r": None},
                {"r": float("inf")},
                {"lora_alpha": float("nan")},
                {"alpha_pattern": [1]},
                {"alpha_pattern": {"q_proj": "x"}},
                {"alpha_pattern": {"q_proj": 10**400}},
            )
        ),
    ],
)
def test_what_is_more_than_two_factors_is_refused(base, tmp_path, change, complaint):
    peft_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(OrthogonalizeError, match=complaint):
        merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(0, WIDTH), torch.zeros(WIDTH, 0)),
        (torch.ones(2, WIDTH, dtype=torch.int8), torch.ones(WIDTH, 2, dtype=torch.int8)),
        (torch.ones(2, WIDTH, dtype=torch.complex64), torch.ones(WIDTH, 2, dtype=torch.complex64)),
    ],
    ids=["of rank 0", "of integers", "of complex numbers"],
)
def test_odd_factors_are_refused(a, b, base, tmp_path):
    peft_adapter(base, tmp_path / "adapter")
    factors = {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": a}
    factors |= {name.replace("lora_A", "lora_B"): b for name in factors}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(OrthogonalizeError, match="factor"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=base)


def test_an_adapter_nested_without_end_is_refused(base, tmp_path):
    peft_adapter(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(OrthogonalizeError, match="is not the configuration of a LoRA adapter"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=base)


def test_factors_for_another_model_are_refused(base, tmp_path):
    peft_adapter(base, tmp_path / "adapter")
    wide = store(tiny_llama(hidden_size=64), tmp_path / "wide", torch.float32)
    with pytest.raises(OrthogonalizeError, match="is the adapter for another model"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=wide)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "z_proj"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(OrthogonalizeError, match="z_proj, which is not in"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=base)


def test_a_folder_that_is_no_adapter_is_said_so(base, tmp_path):
    status, said = command("merge", base, "--out", tmp_path / "merged")
    assert (status, said) == (1, f"error: {base} is not an adapter folder (it has no adapter_config.json)")
