"""What `verify` says of a quantised checkpoint: how much of the edit is left, and what quantisation did beside it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.command_line import command
from helpers.compressed import decompressed, tensors_of
from helpers.llama import LAYERS, store, tiny_llama
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.quantizing import check
from orthogonalize.checkpoints.tensor_edit import TensorEdit
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.edits.recipe import load_recipe

WIDTH = 192
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
SCHEMES = ["fp8", "mxfp4", "nvfp4"]


def unit() -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)).double()
    return vector / vector.norm()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    store(tiny_llama(**SHAPE), folder / "base", torch.bfloat16)
    save_file({"direction": unit().float()}, folder / "direction.safetensors")
    for scheme in SCHEMES:
        quantized(folder, scheme, folder / scheme)
    return folder


def quantized(work: Path, scheme: str | None, out: Path, **options) -> Path:
    given = {"direction": work / "direction.safetensors", "method": "ablate", "scope": "all"}
    edit(work / "base", out, quantize=scheme, **(given | options))
    return out


@pytest.mark.parametrize(("rounding", "leaks"), [("cancelling", (0, 1e-4)), ("nearest", (5e-3, 0.2))])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_leak_and_error_are_those_of_what_the_library_reads(work, tmp_path, scheme, rounding, leaks):
    folder = quantized(work, scheme, tmp_path / "edited", rounding=rounding)
    quantized(work, None, tmp_path / "plain", rounding=rounding)
    found = verify(folder, record=False)
    assert found.verification.passed
    assert found.verification.hooks_gap < 1e-4
    assert found.verification.stored_gap > 0.1  # logits of quantised weights; rounding to bfloat16 moves them by 0.03
    base, plain, stored = (tensors_of(work / "base"), tensors_of(tmp_path / "plain"), decompressed(folder))
    names = [name for name in base if name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert found.quantization.errors.keys() == set(names)
    lost = sum(float((unit() @ stored[name].double()).square().sum()) for name in names)
    wanted = sum(float((unit() @ base[name].double()).square().sum()) for name in names)
    cost = found.verification.quantization
    assert leaks[0] <= cost.leak <= leaks[1]
    # The library's own numbers are rounded to bfloat16, which alone leaves half a percent.
    assert cost.leak == pytest.approx((lost / wanted) ** 0.5, abs=6e-3)
    error = sum(float((stored[name].double() - plain[name].double()).square().sum()) for name in names)
    norm = sum(float(plain[name].double().square().sum()) for name in names)
    assert cost.error == pytest.approx((error / norm) ** 0.5, rel=0.01)
    assert 0.9 < cost.against_plain < 1.2
    assert all(found.leaks[name].leak <= 2 * leaks[1] for name in names)
    assert len(found.changed) == 7 * LAYERS + 1


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_every_matrix_is_edited_and_decoded_once(work, monkeypatch, scheme):
    edits, decoded = Counter(), Counter()
    apply, dequantize = TensorEdit.apply, check.dequantize
    monkeypatch.setattr(TensorEdit, "apply", lambda self, *a: edits.update([self.name]) or apply(self, *a))
    monkeypatch.setattr(check, "dequantize", lambda source, name: decoded.update([name]) or dequantize(source, name))
    found = verify(work / scheme, logits=False, record=False)
    assert found.verification.passed
    assert edits.keys() == found.leaks.keys()
    assert decoded.keys() == found.changed.keys()
    assert {*edits.values(), *decoded.values()} == {1}


def test_it_is_said_in_the_table_and_kept_in_recipe_and_card(work, tmp_path):
    folder = shutil.copytree(work / "mxfp4", tmp_path / "edited")
    status, said = command("verify", folder)
    assert status == 0
    cost = load_recipe(folder).verification.quantization
    assert f"{cost.leak:.1e} of the edit's planned change, over all quantised matrices" in said
    assert f"{cost.error:.2%} of their norm" in said
    assert f"{cost.error / cost.against_plain:.2%}" in said
    assert "quantization_config: None -> compressed-tensors mxfp4-pack-quantized" in said
    assert "only quantised" in said
    card = (folder / "README.md").read_text()
    assert "28 matrices of attention and MLP to MXFP4" in card
    assert f"{cost.leak:.1e} of its planned change" in card
    assert "config_groups" not in card
    status, said = command("verify", folder, "--json", "--no-record", "--no-logits")
    assert json.loads(said)["quantization"]["leak"] == cost.leak


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_edit_that_drowns_in_quantisation_is_not_verified(work, tmp_path, scheme):
    folder = quantized(work, scheme, tmp_path / "edited", strength=0.002, rounding="nearest")
    status, said = command("verify", folder, "--no-logits", "--no-record")
    assert status == 1
    assert "NOT verified" in said
    found = verify(folder, logits=False)
    assert "## Not verified" in (folder / "README.md").read_text()
    assert found.verification.rebuilt
    assert not found.verification.unexpected_changes
    assert found.verification.quantization.leak > 1
    kept = quantized(work, scheme, tmp_path / "kept", strength=0.002)
    assert verify(kept, logits=False, record=False).verification.passed  # rounding that keeps it does keep it


@pytest.mark.parametrize(("name", "place"), [
    ("model.layers.1.mlp.down_proj.weight_packed", "rebuilt"),
    ("model.layers.1.mlp.up_proj.weight_scale", "rebuilt"),
    ("model.norm.weight", "unexpected"),
    ("model.layers.0.self_attn.o_proj.weight_packed", "lost"),
    ("model.extra.weight", "added"),
])  # fmt: skip
def test_what_was_changed_afterwards_is_found(work, tmp_path, name, place):
    folder = shutil.copytree(work / "nvfp4", tmp_path / "edited")
    tensors = load_file(folder / "model.safetensors")
    if place == "lost":
        del tensors[name]
    elif place == "added":
        tensors[name] = torch.ones(3)
    else:
        tensors[name].view(torch.uint8).flatten()[5] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = verify(folder, logits=place == "lost", record=False)
    assert not found.verification.passed
    assert found.verification.rebuilt == (place in ("unexpected", "added"))
    wrong = {"unexpected": [name], "added": [name], "lost": [name.removesuffix("_packed")]}
    assert found.verification.unexpected_changes == wrong.get(place, [])
    assert found.missing == ([name] if place == "lost" else [])
