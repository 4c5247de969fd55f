"""Theorems about the affine maps, and what each scope means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import (
    AffineMap,
    ConditionalMap,
    Intervention,
    Site,
    WriteMatrix,
    block_sites,
    orthonormal,
    removal,
    shift,
)
from orthogonalize.edits.scopes import layers_in_scope, map_sites, parse_scope, removal_sites, shift_sites

sizes = st.tuples(st.integers(2, 12), st.integers(1, 5), st.integers(0, 10_000))


def random_basis(size):
    d, k, seed = size
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(min(k, d - 1), d, generator=generator, dtype=torch.float64))


@settings(deadline=None)
@given(sizes)
def test_gram_schmidt_is_orthonormal_and_keeps_the_order(size):
    """The first n rows span what the first n vectors span."""
    d, k, seed = size
    vectors = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = orthonormal(vectors)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-12)
    assert len(basis) == min(k, d)
    for count in range(1, len(basis) + 1):  # the first n span what the first n vectors span
        rest = vectors[:count] - vectors[:count] @ basis[:count].T @ basis[:count]
        assert rest.abs().max() < 1e-10


def test_gram_schmidt_drops_dependent_and_zero_vectors():
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    assert torch.equal(orthonormal(torch.stack([a, 2 * a, 0 * a, a + b])), torch.stack([a, b]))
    assert orthonormal(torch.zeros(2, 4)).shape == (0, 4)


@settings(deadline=None)
@given(sizes)
def test_removal_is_a_projection_and_strength_two_a_mirror(size):
    basis = random_basis(size)
    h = torch.randn(7, basis.shape[1], dtype=torch.float64)
    once = removal(basis)(h)
    assert (once @ basis.T).abs().max() < 1e-12
    assert torch.allclose(removal(basis)(once), once, atol=1e-12)
    mirrored = removal(basis, 2.0)(h)
    assert torch.allclose(removal(basis, 2.0)(mirrored), h, atol=1e-12)
    assert torch.allclose(mirrored.norm(dim=-1), h.norm(dim=-1))
    assert torch.allclose((h + mirrored) / 2, once, atol=1e-12)


def test_batched_maps_act_on_each_row_separately():
    bases = torch.stack([random_basis((6, 2, s)) for s in range(3)])
    h = torch.randn(3, 5, 6, dtype=torch.float64)
    together = removal(bases, 0.7)(h)
    for i in range(3):
        assert torch.allclose(together[i], removal(bases[i], 0.7)(h[i]), atol=1e-14)
    shifts = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(shift(shifts)(h), h + shifts[:, None])


def test_map_with_mismatched_shapes_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        AffineMap(torch.zeros(4, 1), torch.zeros(4, 2), torch.zeros(4))


@pytest.mark.parametrize(
    "text", ["all", "one", "top:50%", "top:12.5%", "layers:3,5-9", "layers:0", "upto:12", "from:0"]
)
def test_scope_prints_as_it_was_written(text):
    assert str(parse_scope(text)) == text


@pytest.mark.parametrize(
    "text", ["", "every", "layers:", "layers:3-", "layers:5-3", "layers:1,5-3", "top:0%", "top:101%", "upto:-1"]
)
def test_malformed_scope_is_refused(text):
    with pytest.raises(OrthogonalizeError, match="scope"):
        parse_scope(text)


def test_scopes_name_the_documented_sites():
    assert removal_sites(parse_scope("all"), [0, 1]) == [Site("embed"), *block_sites([0, 1])]
    assert layers_in_scope(parse_scope("upto:2"), 4, None, None) == [0, 1]
    assert layers_in_scope(parse_scope("one"), 4, 2, None) == [2]
    assert layers_in_scope(parse_scope("top:50%"), 4, None, [3, 1, 2, 0]) == [1, 3]
    assert layers_in_scope(parse_scope("top:1%"), 4, None, [3, 1, 2, 0]) == [3]
    reads = map_sites(parse_scope("from:3"), 4, lambda _: removal(torch.eye(4)[:1])).reads
    assert list(map(str, reads)) == ["attn.3", "mlp.3", "head"]
    shifted = shift_sites(parse_scope("layers:0,2"), 4, lambda _: torch.ones(4)).writes
    assert list(map(str, shifted)) == ["embed", "mlp.1"]
    assert list(map(str, shift_sites(parse_scope("one"), 4, lambda _: torch.ones(4), 4).writes)) == ["mlp.3"]


def test_site_uses_the_direction_of_the_stream_it_writes_into():
    streams: list[int] = []

    def remember(stream):
        streams.append(stream)

    map_sites(parse_scope("all"), 2, remember)
    assert streams == [0, 1, 1, 2, 2]


def test_scope_that_does_not_apply_is_refused():
    with pytest.raises(OrthogonalizeError, match="no layer 4"):
        layers_in_scope(parse_scope("layers:4"), 4, None, None)
    with pytest.raises(OrthogonalizeError, match="--layer"):
        layers_in_scope(parse_scope("one"), 4, None, None)
    with pytest.raises(OrthogonalizeError, match="no layer 9"):
        layers_in_scope(parse_scope("one"), 4, 9, None)
    with pytest.raises(OrthogonalizeError, match="stored scores"):
        layers_in_scope(parse_scope("top:10%"), 4, None, None)
    with pytest.raises(OrthogonalizeError, match="actadd cannot use scope 'upto'"):
        shift_sites(parse_scope("upto:2"), 4, lambda _: torch.ones(4))


def test_an_intervention_spares_the_layers_below_its_first_site():
    mapped = removal(torch.eye(4)[:1])
    fitted = {WriteMatrix(Site("attn", 2), "o_proj"): ConditionalMap(torch.eye(4)[:1], torch.ones(1, 3))}
    for edit in (Intervention({Site("attn", 2): mapped}), Intervention(reads={Site("mlp", 2): mapped}),
                 Intervention(conditional=fitted)):  # fmt: skip
        assert edit.spares(2)
        assert not edit.spares(3)
    assert not Intervention({Site("embed"): mapped, Site("mlp", 3): mapped}).spares(1)
    assert Intervention(reads={Site("head"): mapped}).spares(99)


def test_the_parts_of_an_intervention_at_each_block_make_it_up():
    one = removal(torch.eye(4)[:1])
    own = ConditionalMap(torch.eye(4)[:1], torch.ones(1, 3))
    whole = Intervention(
        {Site("embed"): one, Site("attn", 0): one, Site("mlp", 2): one},
        {Site("attn", 2): one, Site("head"): one},
        {WriteMatrix(Site("mlp", 1), "mlp.down_proj"): own},
    )
    parts = [whole.at(layer, 3) for layer in range(4)]
    assert [part and (len(part.writes), len(part.reads), len(part.conditional)) for part in parts] == [
        (2, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 0)
    ]  # fmt: skip
    assert Intervention({Site("mlp", 2): one}).at(1, 3) is None
