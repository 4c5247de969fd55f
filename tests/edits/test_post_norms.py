"""Norms after a block, LayerNorms before it, and streams that pass through a norm."""

from __future__ import annotations

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.exactness import (
    ABLATE,
    BASIS,
    EXACT,
    LAYERS,
    ablation,
    baked_logits,
    compare,
    gap_without,
)
from helpers.tiny_models import load_tiny, logits, store_tiny
from safetensors.torch import save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import ConditionalMap, Intervention, Site, conjugate, removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.models.forward.block_inputs import capturing_inputs
from orthogonalize.models.hooks import intervened
from orthogonalize.models.stream import Stream
from orthogonalize.models.write_matrices import write_modules

pytestmark = pytest.mark.usefixtures("one_thread")


# Norms after the blocks.


def written(model, site: Site, intervention: Intervention | None = None) -> torch.Tensor:
    """What a block adds to the stream, norm included."""
    stream, taken = Stream.of(model), []
    (part,) = stream.parts(site)
    handle = stream.output(site, part).register_forward_hook(lambda _m, _i, output: taken.append(output))
    logits(model)
    handle.remove()
    return taken[0]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "glm4", "olmo2", "olmo3", "exaone4"])
def test_post_norm_write_loses_the_direction_exactly(name, bases, tmp_path):
    """Apart from that, only the length of the write changes."""
    base = bases(name)
    assert compare(base, ablation(), tmp_path / "edited", rescaled=True) <= EXACT
    edited = load_tiny(tmp_path / "edited")
    for site in (Site("attn", 0), Site("mlp", 2)):
        assert (written(edited, site) @ BASIS[0]).abs().max() < 1e-12
    # The first block reads the same input as in the hooked model, so only its own norm separates the two.
    mine = written(edited, Site("attn", 0))
    with intervened(base.model, ablation(), renormalise=True):
        ideal = ABLATE(written(base.model, Site("attn", 0)))
    ratio = (mine * ideal).sum(-1, keepdim=True) / ideal.pow(2).sum(-1, keepdim=True)
    assert ratio.min() > 0.3
    assert (mine - ratio * ideal).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "glm4", "olmo2", "olmo3", "exaone4"])
def test_conditional_map_that_keeps_the_scale_subtracts_what_it_says_behind_the_norm(name, bases):
    """Per token, `r^T c x / rms(y)` of the matrix's input x and output y, as the fit assumes; read at the first block,
    whose input is unedited."""
    model, stream = bases(name).model, Stream.of(bases(name).model)
    site = Site("attn", 0)
    ((matrix, module),) = write_modules(stream, site).items()
    generator = torch.Generator().manual_seed(5)
    c = torch.randn(1, module.module.weight.shape[1], generator=generator, dtype=torch.float64)
    edit = Intervention(conditional={matrix: ConditionalMap(BASIS[:1], c)})
    taken = []
    handle = module.module.register_forward_hook(lambda _m, args, output: taken.append((args[0], output)))
    before = written(model, site)
    handle.remove()
    ((x, y),) = taken
    epsilon = stream.architecture.epsilon(stream.config)
    wanted = before - (x / (y.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()) @ c.mT @ BASIS[:1]
    with intervened(model, edit, renormalise=True):
        kept = written(model, site)
    with intervened(model, edit, renormalise=False):
        rescaled = written(model, site)
    assert (kept - wanted).abs().max() < 1e-9
    assert (rescaled - wanted).abs().max() > 1e-3  # what weights do, which change the norm's scale


def test_tiny_norm_weight_does_not_crush_the_rest_of_the_write():
    torch.manual_seed(0)
    d = 1 + 0.2 * torch.randn(48, dtype=torch.float64)
    d[7] = 1e-5
    outputs = torch.randn(200, 48, dtype=torch.float64)

    def behind(o: torch.Tensor) -> torch.Tensor:
        return d * o / o.pow(2).mean(-1, keepdim=True).sqrt()

    ideal = ABLATE(behind(outputs))
    errors = {}
    for truncation in (0.0, 0.1):
        before = conjugate(ABLATE, d, truncation)
        got = behind(before(outputs))
        assert (got @ BASIS[0]).abs().max() < 1e-8
        errors[truncation] = ((got - ideal).norm() / ideal.norm()).item()
    assert errors[0.1] < 0.25 < errors[0.0]


@pytest.mark.parametrize("name", ["olmo2", "exaone4"])
def test_read_side_without_a_norm_only_rescales_the_logits(name, bases, tmp_path):
    base = bases(name)
    baked = baked_logits(base, ablation("from:0"), tmp_path / "edited")
    ratio = baked / base.hooked(ablation("from:0"), renormalise=True)
    assert ratio.min() > 0
    assert ratio.max() <= 1 + 1e-9
    assert (ratio.amax(-1) - ratio.amin(-1)).max() < 1e-6


# LayerNorm.


@pytest.mark.parametrize("name", ["gpt_neox", "olmo", "cohere"])
def test_layer_norms_still_read_an_uncentred_direction(name, bases):
    """And no longer read a centred one once it is removed."""
    base = bases(name)
    direction = torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    direction /= direction.norm()
    centred = direction - direction.mean()
    centred /= centred.norm()

    def read(removed: torch.Tensor) -> float:
        """The largest component along the direction in the normalised stream, before the norms' weights."""
        taken: list[torch.Tensor] = []
        whole = map_sites(parse_scope("all"), LAYERS, lambda _: removal(removed.unsqueeze(0)))
        with intervened(base.model, whole), capturing_inputs(base.model, lambda _l, h: taken.append(h)):
            logits(base.model)
        cores = [h - h.mean(-1, keepdim=True) for h in taken]
        return max(((core @ direction).abs() / core.norm(dim=-1)).max().item() for core in cores)

    assert read(centred) < 1e-12 < 1e-2 < read(direction)


def test_edit_centres_the_direction_of_a_layer_norm_model(tmp_path):
    source = store_tiny("gpt_neox", tmp_path / "base", torch.float32)
    tiny_tokenizer().save_pretrained(source)
    direction = torch.randn(48) + 0.5
    save_file({"direction": direction}, tmp_path / "direction.safetensors")
    recipe = edit(str(source), tmp_path / "edited", direction=tmp_path / "direction.safetensors", method="ablate")
    for affine in recipe.intervention().writes.values():
        assert abs(affine.v.sum().item()) < 1e-6
        assert affine.v.norm().item() == pytest.approx(1, abs=0.3)
        assert (affine.v.mT @ affine.u).item() == pytest.approx(1, abs=1e-6)
    again = edit(str(source), tmp_path / "again", recipe=tmp_path / "edited" / "orthogonalize.json")
    assert again.tensors == recipe.tensors


def test_reader_keeps_the_bias_of_its_layer_norm(bases, tmp_path):
    base = bases("phi")
    assert compare(base, ablation("from:1"), tmp_path / "edited", rescaled=True) <= EXACT
    assert gap_without(base.folder, r"\.bias$", ablation("from:1"), tmp_path / "without") > 1e-3


def test_uncentred_read_of_a_layer_norm_is_refused(bases):
    uneven = removal(torch.eye(48, dtype=torch.float64)[:1])
    with pytest.raises(OrthogonalizeError, match="must be centred"):
        bake(bases("olmo").checkpoint, Intervention(reads={Site("head"): uneven}))


# Streams that pass through a norm.


def test_stream_that_passes_through_a_norm_is_refused(tmp_path):
    source = store_tiny("opt", tmp_path / "base", do_layer_norm_before=False)
    with pytest.raises(OrthogonalizeError, match="do_layer_norm_before = False is not supported"):
        bake(open_checkpoint(source), ablation())
