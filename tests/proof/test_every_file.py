"""The automatic way, for every family that a file describes: it must find what the file says. Run by `make prove`."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import TINY, store_tiny

from orthogonalize.architectures.schema import architecture_of
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.interventions import Site
from orthogonalize.edits.descriptions.proof import EXACT, prove
from orthogonalize.models.describe.draft import draft_with_twin
from orthogonalize.models.sites import Sites

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("one_thread")]


def answer(architecture, checkpoint):
    """What a description says about a checkpoint: every tensor that writes or reads, its axis, and the norms."""
    sites = Sites(architecture, checkpoint.config, checkpoint.tensors)
    found = {"embed": {(name, e.axis) for e, name in sites.embedded() if not e.image}, "head": sites.head}
    for layer in range(architecture.layers(checkpoint.config)):
        for kind in ("attn", "mlp"):
            if not architecture.parts(kind):
                continue
            for part in sites.parts(Site(kind, layer)):
                reads = {(read.name, read.axis) for read in sites.reads(part, layer)} if part.reads else set()
                found[f"{part.module}, {layer}"] = {
                    "writes": {(write.name, write.axis) for write in sites.writes(part, layer)},
                    "reads": reads if "reads" not in architecture.refused else set(),
                    "norm": sites.norm(part, layer) if reads else None,
                    "post_norms": sites.post_norms(part, layer),
                }
    return found


@pytest.mark.parametrize("name", TINY)
def test_the_automatic_way_finds_what_the_file_says(name, tmp_path):
    source = open_checkpoint(store_tiny(name, tmp_path / "model", torch.float32, tie_word_embeddings=False))
    (tmp_path / "twin").mkdir()
    drafted = draft_with_twin(source, tmp_path / "twin").architecture
    assert answer(drafted, source) == answer(architecture_of(source.config), source)
    proof = prove(drafted, tmp_path / "twin")
    assert max(proof.gaps[kind] for kind in ("blocks", "conditional")) <= EXACT
