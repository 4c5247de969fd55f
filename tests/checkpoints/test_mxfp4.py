"""Experts in MXFP4 are edited where they are, and keep the edit as far as four bits allow.

transformers dequantises what is stored, as the independent reference; the edit of the same numbers in bfloat16 is what
it should be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.mxfp4 import mxfp4_base, quantised
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.mxfp4 import BLOCKS, SCALES, dequantize_experts, pack, packed_tensors, unpack
from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import EXPERTS, ConditionalMap, Intervention, Site, WriteMatrix, removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope

WIDTH, LAYERS = 96, 4


def dequantised(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return convert_moe_packed_tensors(tensors[name + BLOCKS], tensors[name + SCALES], dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return mxfp4_base(tmp_path_factory.mktemp("mxfp4") / "base")


def direction() -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return vector / vector.norm()


def test_blocks_are_read_as_transformers_reads_them(base):
    source, tensors = open_checkpoint(base), load_file(base / "model.safetensors")
    names = packed_tensors(source.tensors)
    assert len(names) == 2 * LAYERS
    for name, info in names.items():
        reference = dequantised(tensors, name)
        assert info.shape == reference.shape
        assert torch.equal(dequantize_experts(source, name), reference.double())
        assert torch.equal(pack(unpack(tensors[name + BLOCKS])), tensors[name + BLOCKS])


def test_an_edit_that_changes_nothing_gives_the_same_bytes(base):
    """Blocks are encoded by the rule that they were encoded by."""
    zero = map_sites(parse_scope("layers:1-2"), LAYERS, lambda _: removal(direction()[None], 0.0))
    plan = bake(open_checkpoint(base), zero).checkpoint
    before = load_file(base / "model.safetensors")
    packed = [name for name in plan.changes.names if name.endswith((BLOCKS, SCALES))]
    assert len(packed) == 4
    for name in packed:
        assert torch.equal(plan.edited(name), before[name]), name


@pytest.mark.parametrize(("rounding", "leak"), [("cancelling", 1e-3), ("nearest", 1.0)])
def test_the_edit_survives_four_bits(base, tmp_path, rounding, leak):
    plan = bake(
        open_checkpoint(base), map_sites(parse_scope("layers:1-2"), LAYERS, lambda _: removal(direction()[None]))
    )
    plan.checkpoint.rounding = rounding
    (tmp_path / "edited").mkdir()
    written = plan.write(tmp_path / "edited")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "edited"))
    names = {f"model.layers.{layer}.mlp.experts.down_proj" for layer in (1, 2)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name + BLOCKS for name in names} <= changed
    assert {name for name in changed if "gate_up" in name} == set()
    for name in names:
        old, new = dequantised(before, name).double(), dequantised(after, name).double()
        exact = old - (old @ direction())[..., None] * direction()
        left = float((new @ direction()).norm() / (old @ direction()).norm())
        assert left <= leak
        assert left == pytest.approx(written.records[name].leak, rel=1e-2, abs=1e-6)
        nearest = dequantised(dict(zip((name + BLOCKS, name + SCALES), quantised(exact), strict=True)), name).double()
        assert (new - exact).norm() <= 2.5 * (nearest - exact).norm()


def test_what_is_stored_computes_as_the_bfloat16_edit_does(base, tmp_path):
    """Logits of the edited model, dequantised by transformers, against the same edit of dequantised weights."""
    save_file({"direction": direction()}, tmp_path / "d.safetensors")
    edit(str(base), tmp_path / "edited", direction=tmp_path / "d.safetensors", scope="layers:1-2")
    plain, ids = {}, torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    for name, folder in (("base", base), ("edited", tmp_path / "edited")):
        plain[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        for layer in reference.model.layers[1:3]:
            for weight, axis in ((layer.self_attn.o_proj.weight, 0), (layer.mlp.experts.down_proj, 2)):
                taken = torch.tensordot(weight.double(), direction(), ([axis], [0]))
                weight -= (
                    taken.unsqueeze(axis) * direction().view([-1 if i == axis else 1 for i in range(weight.dim())])
                ).float()
            for bias in (layer.self_attn.o_proj.bias, layer.mlp.experts.down_proj_bias):
                bias -= ((bias.double() @ direction())[..., None] * direction()).float()
        logits = {name: model(ids).logits for name, model in (*plain.items(), ("reference", reference))}
    wanted = (logits["reference"] - logits["base"]).norm()
    assert wanted > 0
    assert (logits["edited"] - logits["reference"]).norm() < 0.7 * wanted


def test_recipe_rebuilds_the_stored_bytes_and_verifies(base, tmp_path):
    save_file({"direction": direction()}, tmp_path / "d.safetensors")
    recipe = edit(str(base), tmp_path / "edited", direction=tmp_path / "d.safetensors", scope="layers:1-2")
    assert max(each.leak for each in recipe.tensors if each.leak is not None) <= 1e-3
    found = verify(tmp_path / "edited")
    assert found.verification is not None
    assert found.verification.rebuilt
    assert found.verification.unexpected_changes == []
    assert found.verification.passed
    assert found.leaks["model.layers.1.mlp.experts.down_proj"].leak == pytest.approx(
        next(t.leak for t in recipe.tensors if t.name == "model.layers.1.mlp.experts.down_proj"), rel=1e-2, abs=1e-6
    )


def test_conditional_edit_of_four_bits_keeps_its_components(base, tmp_path):
    """`W - R^T C` of every expert: what is taken out does not depend on the weight, so it is compared along R."""
    experts, inner = 4, WIDTH
    c = 0.3 * torch.randn(experts, 1, inner, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = WriteMatrix(Site("mlp", 1), EXPERTS)
    plan = bake(open_checkpoint(base), Intervention(conditional={matrix: ConditionalMap(direction()[None], c)}))
    (tmp_path / "edited").mkdir()
    written = plan.write(tmp_path / "edited")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "edited"))
    name = "model.layers.1.mlp.experts.down_proj"
    old, new = (dequantised(tensors, name).double() @ direction() for tensors in (before, after))
    assert (new - (old - c[:, 0])).norm() <= 1e-3 * c.norm()
    assert written.records[name].leak <= 1e-3


def test_an_adapter_of_four_bits_is_refused_in_one_line(base, tmp_path):
    save_file({"direction": direction()}, tmp_path / "d.safetensors")
    with pytest.raises(
        OrthogonalizeError, match=r"^an adapter cannot hold edits of MXFP4 experts.*omit --format lora$"
    ):
        edit(str(base), tmp_path / "a", direction=tmp_path / "d.safetensors", scope="layers:1-2", format="lora")
    assert not (tmp_path / "a").exists()
