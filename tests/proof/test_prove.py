"""The full matrix, run by `make prove`: every family x method x scope against hooks, and every family in vLLM.

The measurements go into docs/proof.json, from which the table in docs/architectures.md is made.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.exactness import (
    BASIS,
    EXACT,
    LAYERS,
    Base,
    baked_logits,
    centred_basis,
    every_write_matrix,
    gap,
    oblique,
    relative,
)
from helpers.expectations import (
    ACTADD,
    ACTADD_ATTENTION,
    EMBEDDING_REFUSED,
    NO_EMBEDDING,
    READ_REFUSED,
    VALUE,
)
from helpers.serving import BFLOAT16_ONLY, FAR, serve
from helpers.tiny_models import TINY

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import AffineMap, Intervention, removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.scopes import layers_in_scope, map_sites, parse_scope, shift_sites

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("one_thread")]
RANKING = [2, 0, 3, 1]
METHODS = {
    "ablate": lambda basis: removal(basis[:1]),
    "ablate, strength 0.6": lambda basis: removal(basis[:1], 0.6),
    "nullspace": removal,
    "reflect": lambda basis: removal(basis, 2.0),
    "oblique": lambda _: oblique(1),
}
SCOPES = ["all", "one", "top:50%", "layers:0,2-3", "upto:3", "from:0", "from:2", "from:4"]
SHIFTS = ["layers:0", "one", "top:50%", "from:2"]
# How far an edit that is exact up to a positive scale may be from hooks without one (relative, over all logits):
# the tiny norms are rough (1 + 0.3 noise), real ones are smoother. Measured: 0.02-0.3.
RESCALED = 0.6


def edits(base: Base) -> dict[str, Intervention]:
    """Every method x scope, with one direction for all layers and with one per layer."""
    result = {}
    for scope in SCOPES:
        for method, make in METHODS.items():
            shared = make(BASIS)
            result[f"{method}, {scope}"] = map_sites(parse_scope(scope), LAYERS, lambda _, m=shared: m, 2, RANKING)
        if not scope.startswith("from"):  # a scope that leace does not have
            result[f"leace, {scope}"] = map_sites(parse_scope(scope), LAYERS, eraser, 2, RANKING)
        own = [removal(centred_basis(2, 50 + stream)) for stream in range(LAYERS + 1)]
        result[f"per layer, {scope}"] = map_sites(parse_scope(scope), LAYERS, own.__getitem__, 2, RANKING)
    for rank in (1, 3):
        everywhere = every_write_matrix(base, rank).conditional
        for scope in SCOPES:
            layers = layers_in_scope(parse_scope(scope), LAYERS, 2, RANKING)
            maps = {matrix: each for matrix, each in everywhere.items() if matrix.site.layer in layers}
            if maps:
                result[f"conditional of rank {rank}, {scope}"] = Intervention(conditional=maps)
    return result


def eraser(stream: int) -> AffineMap:
    """LEACE's map for a stream: an oblique removal that restores the mean."""
    affine, mean = oblique(200 + stream), 4 * centred_basis(1, 300 + stream)[0]
    return replace(affine, s=affine.u @ (affine.v.T @ mean))


def refused(name: str, intervention: Intervention) -> bool:
    kinds = {site.kind for site in intervention.reads} | {site.kind for site in intervention.writes}
    if intervention.reads:
        return name in READ_REFUSED | NO_EMBEDDING
    shifted = any(affine.shifts for affine in intervention.writes.values())
    # A value bias passes through the attention's output projection, from which the edit removes what it would add.
    without = name not in ACTADD or ACTADD[name] == VALUE
    if shifted and (without or ("embed" in kinds and name in EMBEDDING_REFUSED)):
        return True
    return name in NO_EMBEDDING and "embed" in kinds


@pytest.mark.parametrize("name", TINY)
def test_every_method_and_scope_of_every_family_equals_hooks(name, bases, tmp_path, proof):
    base: Base = bases(name)
    exact, rescaled, count = 0.0, {"write": 0.0, "read": 0.0}, 0
    for number, (what, intervention) in enumerate(edits(base).items()):
        if refused(name, intervention):
            with pytest.raises(OrthogonalizeError):
                bake(base.checkpoint, intervention)
            continue
        baked = baked_logits(base, intervention, tmp_path / str(number))
        exact = max(exact, gap(base.hooked(intervention), baked))
        assert exact <= EXACT, what
        ideal = base.hooked(intervention, renormalise=True)
        if intervention.reads or base.post_norm:
            side = "read" if intervention.reads else "write"
            rescaled[side] = max(rescaled[side], relative(baked, ideal, base.plain))
            assert rescaled[side] <= RESCALED, what
        else:
            assert gap(ideal, baked) <= EXACT, what
        count += 1
    for number, scope in enumerate(SHIFTS):
        intervention = shift_sites(parse_scope(scope), LAYERS, lambda _: 2 * BASIS[0], 2, RANKING)
        embedded = any(site.kind == "embed" for site in intervention.writes)
        if (name not in ACTADD and scope != "layers:0") or (embedded and name in EMBEDDING_REFUSED):
            with pytest.raises(OrthogonalizeError):
                bake(base.checkpoint, intervention)
            continue
        exact = max(exact, gap(base.hooked(intervention), baked_logits(base, intervention, tmp_path / f"s{number}")))
        assert exact <= EXACT, scope
        count += 1
    proof(
        name, edits=count, exact=exact, rescaled_write=rescaled["write"], rescaled_read=rescaled["read"],
        constant=ACTADD.get(name, "refused"), constant_attention=ACTADD_ATTENTION.get(name, "refused"),
        reads="refused" if name in READ_REFUSED | NO_EMBEDDING else "yes",
    )  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_vllm_reads_every_tensor_and_scores_as_transformers(name, tmp_path, proof):
    pytest.importorskip("vllm")
    if "multimodal" in name or name.startswith("qwen3_5"):
        pytest.importorskip("torchvision")  # vLLM imports it for every multimodal class
    (result,) = serve([name], tmp_path)
    proof(name, served=result)
    assert "error" not in result
    assert result["uninitialised"] == []
    assert result["dropped"] == []
    assert result["moved"] >= 10 * FAR
    assert name in BFLOAT16_ONLY or result["gap_float32"] <= FAR
    assert result["gap_bfloat16"] <= FAR
