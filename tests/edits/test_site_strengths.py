"""Strengths of single write sites: what they mean, as hooks and in weights, in recipes and adapters."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.command_line import command
from helpers.exactness import EXACT, Base, compare, every_write, every_write_matrix, gap
from helpers.llama import LAYERS, WIDTH, load, logits, store, tiny_llama
from helpers.tiny_models import DoublePrecision
from safetensors.torch import load_file, save_file

from orthogonalize import edit, verify
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import AffineMap, Intervention, Site, block_sites, removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.build import intervention_from_basis
from orthogonalize.edits.config import EditConfig
from orthogonalize.models.hooks import intervened
from orthogonalize.selection.resolve import choose, intervention_of
from orthogonalize.selection.run_folder import load_run

pytestmark = pytest.mark.usefixtures("one_thread")
GIVEN = {"attn.1": 0.5, "mlp.1": 1.25, "mlp.2": 0.0, "attn.2": 1.0}
# Transposed, fused, parallel, one matrix an expert, fused experts, several writes in a block, norms after blocks.
FAMILIES = ["gpt2", "phi3", "gpt_neox", "mixtral", "gpt_oss", "falcon_h1", "qwen3_next", "gemma2", "olmo2"]


def ablation(basis: torch.Tensor, **fields) -> Intervention:
    choice = EditConfig(method="ablate", position=-1, layer=2, **fields)
    return intervention_from_basis(choice, basis[:1], 1.0, LAYERS)


def uneven(intervention: Intervention) -> Intervention:
    """Another strength at every site, and none at one."""
    sites = [*intervention.writes, *dict.fromkeys(matrix.site for matrix in intervention.conditional)]
    strengths = {site: 0.3 + 0.11 * number for number, site in enumerate(sites)}
    return intervention.scaled(strengths | {sites[2]: 0.0})


def test_strengths_are_kept_in_the_order_of_the_sites():
    choice = EditConfig(method="ablate", site_strengths={"mlp.10": 0.5, "attn.10": 1.5, "embed": 0.0, "mlp.2": 1.0})
    assert choice.site_strengths == (("embed", 0.0), ("attn.10", 1.5), ("mlp.10", 0.5))
    assert EditConfig.model_validate_json(choice.model_dump_json()) == choice
    assert hash(choice) != hash(choice.model_copy(update={"site_strengths": ()}))
    assert choice.describe() == "ablate, all, times 0 to 1.5 at 3 sites"
    assert EditConfig(method="ablate", site_strengths={"embed": 0.5}).describe() == "ablate, all, times 0.5 at 1 site"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"head": 0.5}, "'head' is not a write site"),
        ({"attn": 0.5}, "'attn' is not a write site"),
        ({"mlp.x": 0.5}, "'mlp.x' is not a write site"),
        ((("mlp.1", 0.5), ("mlp.1", 0.6)), "a site is named twice"),
        ({"mlp.1": float("nan")}, "finite number"),
    ],
)
def test_strengths_of_what_is_no_write_site_are_refused(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        EditConfig(method="ablate", site_strengths=given)


def test_a_strength_scales_the_map_of_its_site_alone(basis):
    plain, scaled = ablation(basis, scope="layers:1-2"), ablation(basis, scope="layers:1-2", site_strengths=GIVEN)
    assert scaled.writes.keys() == plain.writes.keys() - {Site("mlp", 2)}
    for site, affine in scaled.writes.items():
        assert affine.u.equal(GIVEN[str(site)] * plain.writes[site].u)
        assert affine.v.equal(plain.writes[site].v)


def test_a_scaled_constant_is_the_constant_scaled():
    affine = AffineMap(torch.ones(3, 1), torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))
    scaled = Intervention({Site("mlp", 0): affine}).scaled({Site("mlp", 0): 0.5}).writes[Site("mlp", 0)]
    assert scaled.s.tolist() == [0.5, 1.0, 1.5]


def test_strengths_scale_what_is_taken_out_conditionally(run, model):
    """A fit that the run has is scaled, not made again."""
    found = load_run(run)
    plain = intervention_of(model, run, choose(found, method="conditional")).conditional
    fits = set((run / "fits").iterdir())
    given = choose(found, method="conditional", site_strengths={"attn.3": 0.0, "mlp.3": 0.5})
    scaled = intervention_of(model, run, given).conditional
    assert set((run / "fits").iterdir()) == fits
    assert {str(matrix.site) for matrix in plain.keys() - scaled.keys()} == {"attn.3"}
    for matrix, each in scaled.items():
        assert each.r.equal(plain[matrix].r)
        assert each.c.equal((0.5 if str(matrix.site) == "mlp.3" else 1.0) * plain[matrix].c)


def test_a_weight_loses_that_share_of_its_component(basis, tmp_path):
    """Against the formula of the method, with the same direction at every site."""
    source = store(tiny_llama(), tmp_path / "base")
    intervention = ablation(basis, scope="layers:1-2", strength=0.8, site_strengths=GIVEN)
    (tmp_path / "edited").mkdir()
    bake(open_checkpoint(source), intervention).write(tmp_path / "edited")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "edited"))
    r = basis[0]
    for name, weight in before.items():
        found = re.fullmatch(r"model\.layers\.([12])\.(self_attn|mlp)\.(o|down)_proj\.weight", name)
        share = 0.8 * GIVEN[f"{found[2].removeprefix('self_')}.{found[1]}"] if found else 0.0
        assert torch.allclose(after[name], weight - share * torch.outer(r, r @ weight) if share else weight, atol=1e-12)
    model = load(source)
    with intervened(model, intervention):
        hooked = logits(model)
    assert gap(hooked, logits(load(tmp_path / "edited"))) <= EXACT
    assert gap(hooked, logits(model)) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_equal_weights_with_a_strength_for_every_write_site(name, bases, tmp_path):
    base = bases(name)
    assert compare(base, uneven(every_write()), tmp_path / "edited", rescaled=base.post_norm) <= EXACT


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_equal_weights_with_strengths_of_conditional_maps(name, bases, tmp_path):
    base = bases(name)
    assert compare(base, uneven(every_write_matrix(base)), tmp_path / "edited", rescaled=base.post_norm) <= EXACT


@torch.inference_mode()
def rows_of(base: Base, intervention: Intervention, ids: torch.Tensor, **others) -> torch.Tensor:
    with DoublePrecision(), intervened(base.model, intervention, renormalise=False, **others):
        return base.model(input_ids=ids, use_cache=False).logits.double()


@pytest.mark.parametrize("name", ["opt", *FAMILIES])
def test_every_row_of_a_batch_has_its_own_strengths(name, bases):
    """A batch of rows, each with other strengths, against one row at a time with a scaled intervention."""
    base, shift = bases(name), torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    writes = Intervention({site: replace(affine, s=shift) for site, affine in every_write().writes.items()})
    strengths = torch.rand(3, len(writes.writes), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(2))
    by_site = dict(zip(writes.writes, strengths.unbind(1), strict=True))
    together = rows_of(base, writes, ids, strengths=by_site)
    for row in range(3):
        alone = writes.scaled({site: each[row].item() for site, each in by_site.items()})
        assert gap(together[row], rows_of(base, alone, ids[row : row + 1])[0]) <= EXACT
    assert gap(together, rows_of(base, writes, ids)) > 1e-2


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"scope": "layers:1"}, r"names mlp\.2, but ablate over layers:1 does not"),
        ({"scope": "from:1"}, "over from:1 does not change"),
    ],
)
def test_strength_where_the_edit_changes_nothing_is_refused(basis, fields, complaint):
    with pytest.raises(OrthogonalizeError, match=complaint):
        ablation(basis, **fields, site_strengths={"mlp.2": 0.5})


def test_edit_that_restores_a_mean_takes_no_strengths_of_sites(run, model, tmp_path):
    words = ("--method", "ablate", "--to", "harmless-mean", "--site-strengths", "mlp.1=0.5")
    status, said = command("edit", model, "--run", run, *words, "--out", tmp_path / "edited")
    assert (status, said) == (
        1,
        "error: ablate restores a mean by what all its sites remove, so single sites cannot have strengths; "
        "use --strength, or another method",
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("mlp.1", "--site-strengths 'mlp.1' is not of the form SITE=X, with a number X"),
        ("mlp.1=x", "--site-strengths 'mlp.1=x' is not of the form SITE=X, with a number X"),
        ("mlp.1=0,mlp.1=1", "--site-strengths: mlp.1 is given twice"),
        ("up.1=0", "--site-strengths {'up.1': 0.0}: Value error, 'up.1' is not a write site, such as embed, attn.3"),
    ],
)
def test_unusable_strengths_are_one_line(run, model, tmp_path, words, complaint):
    status, said = command("edit", model, "--run", run, "--site-strengths", words, "--out", tmp_path / "edited")
    assert status == 1
    assert said.startswith(f"error: {complaint}")


@pytest.fixture
def direction(tmp_path):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    save_file({"direction": vector}, tmp_path / "direction.safetensors")
    return tmp_path / "direction.safetensors"


def test_recipe_rebuilds_strengths_of_sites_bit_for_bit(direction, tmp_path):
    source = store(tiny_llama(), tmp_path / "base", torch.bfloat16)
    tiny_tokenizer().save_pretrained(source)
    words = ("--scope", "layers:1-2", "--site-strengths", "attn.1=0.5,mlp.1=1.25,mlp.2=0")
    status, said = command("edit", source, "--direction", direction, *words, "--out", tmp_path / "edited")
    assert status == 0, said
    assert "times 0 to 1.25 at 3 sites" in said
    recipe = edit(source, tmp_path / "again", recipe=tmp_path / "edited")
    assert recipe.choice.site_strengths == (("attn.1", 0.5), ("mlp.1", 1.25), ("mlp.2", 0.0))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("edited", "again")]
    assert files[0] == files[1]
    proof = verify(tmp_path / "edited", source).verification
    assert proof.passed, proof
    changed = {change.name for change in recipe.tensors}
    assert changed == {f"model.layers.{name}.weight" for name in
                       ("1.self_attn.o_proj", "1.mlp.down_proj", "2.self_attn.o_proj")}  # fmt: skip


def test_adapter_has_the_strengths_of_sites(direction, tmp_path):
    from peft import PeftModel

    source = store(tiny_llama(), tmp_path / "base", torch.float32)
    given = {"direction": direction, "method": "ablate", "scope": "layers:1-2", "site_strengths": GIVEN}
    edit(source, tmp_path / "edited", **given)
    edit(source, tmp_path / "adapter", format="lora", **given)
    baked = logits(load(tmp_path / "edited"))
    adapted = logits(PeftModel.from_pretrained(load(source), tmp_path / "adapter").eval())
    assert gap(adapted, baked) <= 1e-4 < 1e-2 < gap(baked, logits(load(source)))


def test_weakened_edit_of_everything_is_still_exact(tmp_path, basis):
    """The embedding has a strength of its own, and the head stays as it is."""
    source = store(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    sites = {str(site): 0.9 - 0.1 * number for number, site in enumerate([Site("embed"), *block_sites(range(LAYERS))])}
    intervention = ablation(basis, site_strengths=sites)
    assert intervention.writes[Site("embed")].u.equal(0.9 * removal(basis[:1]).u)
    (tmp_path / "edited").mkdir()
    bake(open_checkpoint(source), intervention).write(tmp_path / "edited")
    model = load(source)
    with intervened(model, intervention):
        hooked = logits(model)
    assert gap(hooked, logits(load(tmp_path / "edited"))) <= EXACT
