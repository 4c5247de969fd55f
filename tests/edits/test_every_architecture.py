"""Baked weights equal hooks for every described family, on tiny random checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.exactness import ABLATE, BASIS, EXACT, LAYERS, compare, every_read, every_write, every_write_matrix
from helpers.expectations import (
    ACTADD,
    ACTADD_ATTENTION,
    BACKEND,
    EMBEDDING_REFUSED,
    LLAMA,
    NATIVE,
    NO_EMBEDDING,
    READ_REFUSED,
    SINGLE_PRECISION,
    VALUE,
)
from helpers.tiny_models import TINY, store_tiny
from safetensors.torch import save_file

from orthogonalize.commands.edit import edit
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import AffineMap, Intervention, Site, shift
from orthogonalize.edits.bake import bake
from orthogonalize.models.activations import mean_activations
from orthogonalize.models.hooks import layer_projected
from orthogonalize.selection.scoring import LocalScorer, first_token_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", TINY)
def test_every_write_of_every_family_equals_hooks(name, bases, tmp_path):
    """With a different map at every write site."""
    base = bases(name)
    intervention = every_write(embed=name not in NO_EMBEDDING)
    assert compare(base, intervention, tmp_path / "edited", rescaled=base.post_norm) <= EXACT


@pytest.mark.parametrize("name", TINY)
def test_every_conditional_map_of_every_family_equals_hooks(name, bases, tmp_path):
    """With a different map of every write matrix, and of every expert but one."""
    base = bases(name)
    intervention = every_write_matrix(base)
    assert compare(base, intervention, tmp_path / "edited", rescaled=base.post_norm) <= EXACT


@pytest.mark.parametrize("name", TINY)
def test_every_read_of_every_family_equals_hooks(name, bases, tmp_path):
    """With a different map at every read site."""
    base = bases(name)
    if name in NO_EMBEDDING | READ_REFUSED:
        with pytest.raises(
            OrthogonalizeError, match=r"vLLM always takes|LayerNorm with a bias|cannot be edited by what is read"
        ):
            bake(base.checkpoint, every_read())
        return
    allowed = 1e-6 if name in SINGLE_PRECISION else EXACT
    assert compare(base, every_read(), tmp_path / "edited", rescaled=True) <= allowed


def route(changes: dict) -> str:
    if changes.get("model_type") == "llama":
        return LLAMA
    return BACKEND if "['Transformers" in str(changes.get("architectures")) else NATIVE


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("site", [Site("embed"), Site("mlp", 1), Site("attn", 2)], ids=str)
def test_constant_has_an_exact_place_or_is_refused(site, name, bases, tmp_path):
    """The first exact way that a server honours, per family."""
    base = bases(name)
    intervention = Intervention({site: shift(2 * BASIS[0])})
    expected = {
        "embed": {n: NATIVE for n in TINY if n not in EMBEDDING_REFUSED},
        "mlp": ACTADD,
        "attn": ACTADD_ATTENTION,
    }
    expected = expected[site.kind].get(name)
    if expected is None:
        with pytest.raises(OrthogonalizeError, match=r"no bias|vLLM always takes|cannot be edited by the embedding"):
            bake(base.checkpoint, intervention)
        return
    assert compare(base, intervention, tmp_path / "edited") <= EXACT
    plan = bake(base.checkpoint, intervention)
    if site.kind != "embed":
        edited = {name.rpartition(".")[0].rpartition(".")[2] for name in plan.checkpoint.edits}
        assert (VALUE if edited == {"v_proj"} else route(plan.checkpoint.config_changes)) == expected


@pytest.mark.parametrize(
    "name",
    ["falcon_h1", "gemma2", "gemma3 multimodal", "gpt2", "opt", "mamba2", "qwen3_next", "llama4", "gpt_oss", "cohere"],
)
def test_local_scores_equal_full_runs_in_every_kind_of_family(name, bases):
    """Local scoring skips the blocks before the layer, whatever a family's blocks return."""
    model = bases(name).model
    ids = [[5, 9, 11, 20], [7, 8, 30, 31, 32]]
    batched = AffineMap(*(t.unsqueeze(0) for t in (ABLATE.u, ABLATE.v, ABLATE.s)))
    local = LocalScorer(model, ids).outputs(2, batched, projected=True).probabilities[0]
    with layer_projected(model, 2, ABLATE):
        whole = first_token_probabilities(model, ids)
    plain = first_token_probabilities(model, ids)
    rows = mean_activations(model, ids, 2)
    assert (local - whole).abs().max() < 1e-5
    assert (local - plain).abs().max() > 1e-4
    assert rows.shape == (2, LAYERS + 1, 48)


@pytest.mark.parametrize(
    "name", ["gemma2", "mixtral", "gemma3 multimodal", "gpt_neox", "qwen3_5 multimodal", "falcon_h1"]
)
def test_edit_and_verify_work_for_families_from_files(name, tmp_path):
    source = store_tiny(name, tmp_path / "base", torch.float32)
    tiny_tokenizer().save_pretrained(source)
    save_file({"direction": BASIS[0].float()}, tmp_path / "direction.safetensors")
    for scope in ("all", "from:2") if name not in READ_REFUSED else ("all",):
        out = tmp_path / scope
        edit(str(source), out, direction=tmp_path / "direction.safetensors", method="ablate", scope=scope)
        proof = verify(out).verification
        assert proof.passed, proof
        assert proof.hooks_gap < 1e-4
        rescaled = scope == "from:2" or name.startswith("gemma")
        assert (proof.renormalised_gap is not None) == rescaled
