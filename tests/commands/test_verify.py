"""What `verify` says of a checkpoint with a recipe: the leak along the recipe's own maps, not an estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import command
from helpers.llama import LAYERS, store, tiny_llama
from helpers.tiny_models import store_tiny
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands import _console
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.interventions import (
    ConditionalMap,
    Intervention,
    Site,
    WriteMatrix,
    block_sites,
    removal,
    shift,
)
from orthogonalize.edits.bake import bake
from orthogonalize.edits.leaks import tensor_leaks
from orthogonalize.edits.recipe import load_recipe

WIDE = 256


def unit(width: int, seed: int = 3) -> torch.Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def uneven_llama(folder: Path) -> Path:
    """A bfloat16 Llama whose embedding has rows of very different lengths, as real ones have."""
    model = tiny_llama(hidden_size=WIDE, intermediate_size=320, vocab_size=600)
    lengths = torch.randn(600, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(1.2).exp()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(lengths)
    return store(model, folder, torch.bfloat16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return uneven_llama(tmp_path_factory.mktemp("wide") / "base")


@pytest.fixture(scope="module")
def ablated(wide, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablated")
    save_file({"direction": unit(WIDE).float()}, folder / "direction.safetensors")
    edit(str(wide), folder / "edited", direction=folder / "direction.safetensors", method="ablate", scope="all")
    return folder / "edited"


def test_leaks_are_those_along_the_recipes_direction(ablated):
    found = verify(ablated, logits=False, record=False)
    assert len(found.leaks) == 1 + 2 * LAYERS
    tensors, stored = load_file(ablated / "model.safetensors"), unit(WIDE).float().double()
    direction = stored / stored.norm()
    base = load_file(Path(load_recipe(ablated).base.model) / "model.safetensors")
    for name, each in found.leaks.items():
        axis = -1 if "embed" in name else 0
        component = [t[name].double().movedim(axis, -1) @ direction for t in (base, tensors)]
        assert each.rank == 1
        assert each.leak == pytest.approx(float(component[1].norm() / component[0].norm()), rel=1e-4, abs=1e-9)
        assert each.left == pytest.approx(each.leak, rel=1e-4)
        assert each.leak < 1e-4, name
        assert each.strength == pytest.approx(1, abs=1e-4)
    assert found.projected().keys() == found.leaks.keys()
    most = max(each.left for each in found.leaks.values())
    assert found.verdict() == (
        "an orthogonalisation of rank 1: the recipe's edit (ablate, all), projected out of all 9 tensors "
        f"(at most {most:.1e} of it is left)"
    )


def test_json_holds_the_leak_of_every_tensor(ablated):
    status, said = command("verify", ablated, "--no-logits", "--no-record", "--json")
    assert status == 0, said
    assert json.loads(said)["verification"]["passed"]
    found = json.loads(said)["recipe"]
    assert found["edit"] == "ablate, all"
    assert set(found["tensors"]["model.embed_tokens.weight"]) == {"rank", "leak", "strength", "left"}


@pytest.mark.parametrize("width", [60, 100, 400])
def test_table_explains_its_columns_and_cuts_no_name(ablated, monkeypatch, width):
    found = verify(ablated, logits=False, record=False)
    monkeypatch.setattr(_console, "console", type(_console.console)(width=width))
    with _console.console.capture() as printed:
        _console.show_audit(found)
    text = printed.get()
    plain = "".join(text.split())
    assert "…" not in text.split("against the base")[0]
    for word in ("change:", "rank:", "leak:", "strength:"):
        assert word in plain
    if width > 60:
        assert all(name in text for name in found.changed)


def test_weights_that_were_changed_afterwards_leak(ablated, tmp_path):
    folder = tmp_path / "edited"
    folder.mkdir()
    for file in ablated.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    tensors[name] = load_file(Path(load_recipe(ablated).base.model) / "model.safetensors")[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = verify(folder, logits=False, record=False)
    assert not found.verification.passed
    assert found.leaks[name].leak == pytest.approx(1)
    assert found.leaks[name].strength == pytest.approx(0, abs=1e-6)
    assert found.largest_leak == found.leaks[name].leak
    assert name not in found.projected()
    assert found.verdict() == (
        "the recipe's edit (ablate, all), of rank 1: 9 tensors, of whose planned change at most 1.0e+00 is missing"
    )


def conditional() -> Intervention:
    generator = torch.Generator().manual_seed(2)
    r = torch.linalg.qr(torch.randn(48, 2, generator=generator, dtype=torch.float64))[0].mT
    c = 0.1 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    return Intervention(conditional={WriteMatrix(Site("attn", 1), "self_attn.o_proj"): ConditionalMap(r, c)})


BASIS = unit(48).unsqueeze(0)
CASES = {
    "mixtral, ablate": ("mixtral", Intervention({s: removal(BASIS) for s in [Site("embed"), *block_sites(range(2))]})),
    "gemma2, ablate 0.6": ("gemma2", Intervention({s: removal(BASIS, 0.6) for s in block_sites(range(2))})),
    "qwen2, reads": ("qwen2", Intervention(reads={s: removal(BASIS, 2.0) for s in [*block_sites([1]), Site("head")]})),
    "gpt2, actadd": ("gpt2", Intervention({Site("mlp", 0): shift(3 * BASIS[0])})),
    "gemma2, conditional": ("gemma2", conditional()),
    "embedding": ("qwen2", Intervention({Site("embed"): shift(3 * BASIS[0])})),
}


@pytest.mark.parametrize("case", CASES)
def test_leaks_equal_those_that_were_recorded_while_writing(case, tmp_path):
    family, intervention = CASES[case]
    plan = bake(open_checkpoint(store_tiny(family, tmp_path / "base", torch.bfloat16)), intervention)
    (tmp_path / "edited").mkdir()
    records = plan.write(tmp_path / "edited").records
    found = tensor_leaks(open_checkpoint(tmp_path / "edited"), plan.checkpoint)
    assert found.keys() == records.keys()
    for name, record in records.items():
        assert found[name].leak == pytest.approx(record.leak, rel=1e-3, abs=1e-7), name
    if case == "gemma2, conditional":  # takes out what its input says, not all of the component
        return
    strengths = [each.strength for each in found.values() if each.strength is not None]
    expected = {"mixtral, ablate": 1.0, "gemma2, ablate 0.6": 0.6, "qwen2, reads": 2.0}.get(case)
    if expected is None:
        assert not strengths
    else:
        assert strengths
        assert strengths == pytest.approx([expected] * len(strengths), abs=0.02)
