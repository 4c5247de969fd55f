"""Every decoder-only class of transformers is described by experiment, run by `make prove`.

The measurements go into docs/classes.json, from which the table in docs/architectures.md is made.
"""

from __future__ import annotations

import time

import pytest
from helpers.causal_classes import SETTINGS, decoder_only
from transformers import AutoConfig

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.edits.descriptions.proof import EXACT, prove
from orthogonalize.models.describe.draft import draft_with_twin
from orthogonalize.models.describe.twin import save_twin

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("one_thread")]
REACHED = 0.95  # of the classes, with `ablate` and `conditional` over scopes of blocks


def measured(model_type, folder):
    """What the experiments find of a class with its default settings."""
    started = time.monotonic()
    try:
        config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {})).get_text_config()
        for name in ("model", "twin"):
            (folder / name).mkdir()
        save_twin(config, folder / "model")
        drafted = draft_with_twin(open_checkpoint(folder / "model"), folder / "twin")
        proof = prove(drafted.architecture, folder / "twin")
    except Exception as error:  # a class that fails is a row of the table
        reason = f"{error}".partition("\n")[0].replace(f"{folder}/", "")
        return {"reason": reason, "seconds": time.monotonic() - started}
    refused = {kind: why.replace(f"{folder}/", "") for kind, why in proof.refused.items()}
    return {"gaps": proof.gaps, "refused": refused, "seconds": time.monotonic() - started}


def test_experiments_describe_most_classes(tmp_path, class_proof):
    found = {}
    for model_type in decoder_only():
        (tmp_path / model_type).mkdir()
        found[model_type] = measured(model_type, tmp_path / model_type)
    class_proof.update(found)
    exact = [
        n for n, of in found.items() if max(of.get("gaps", {}).get(k, 1) for k in ("blocks", "conditional")) <= EXACT
    ]
    assert len(exact) >= REACHED * len(found), sorted(found.keys() - set(exact))
