"""Whole runs of families whose blocks share keys and values, pass on several streams, or run only beside an image."""

from __future__ import annotations

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.tiny_models import store_tiny

from orthogonalize import Settings, edit, extract, verify

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("one_thread")]
VERBS = {"positive": "bake fry roast boil", "negative": "paint wash fold mend"}
THINGS = {"positive": "cake pie soup", "negative": "wall car shirt"}
SETTINGS = Settings(
    train=8, val=4, test=4, trials=6, finders=("dim",), scored=3, filtered=False, device="cpu",
    behaviour_tokens=("How",), scoring=("local", "global"),
)  # fmt: skip


def prompts(side):
    words = [(verb, thing) for verb in VERBS[side].split() for thing in THINGS[side].split()]
    return [f"How do I {verb} a {thing} {when}?" for verb, thing in words for when in ("today", "now")]


@pytest.mark.parametrize("name", ["gemma4", "gemma3n", "mllama multimodal"])
def test_directions_are_found_and_edited_out(name, tmp_path):
    """By removal and by a conditional edit of every block; also of one that did not run."""
    base = store_tiny(name, tmp_path / "base", torch.float32)
    tiny_tokenizer().save_pretrained(base)
    run = extract(base, tmp_path / "run", settings=SETTINGS, **{side: prompts(side) for side in VERBS})
    assert {trial.choice.method for trial in run.trials} >= {"conditional", "ablate"}
    for method in ("conditional", "ablate"):
        out = tmp_path / method
        edit(base, out, run=tmp_path / "run", method=method, scope="layers:0-3")
        proof = verify(out, base).verification
        assert proof.passed
        assert proof.hooks_gap < 1e-3
