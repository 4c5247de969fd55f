"""Another concept end to end, without planted behaviour: answering with a list, in the plain embedded model.

There are no refusals here, so nothing may assume them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.commands.verify import verify
from orthogonalize.core.interventions import removal
from orthogonalize.data.chat import ChatFormat
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.models.demo_model import base_model
from orthogonalize.models.hooks import intervened
from orthogonalize.models.loading import load_model, load_tokenizer
from orthogonalize.selection.readouts import behaviour_score
from orthogonalize.selection.run_folder import Run
from orthogonalize.selection.scoring import first_token_probabilities
from orthogonalize.selection.settings import Settings

FIGURES = True  # of runs, at which a test looks
# Middle layers at the last two tokens: a concept is usually found there, and all places would take ten times as long.
SETTINGS = Settings(train=40, val=12, test=20, scored=2, trials=0, positions=(-2, -1), layers=(10, 14, 18, 22))


@pytest.fixture(scope="module")
def base() -> Path:
    return base_model()


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lists") / "run"
    extract(str(base), out, concept="lists", settings=SETTINGS)
    return out


@pytest.fixture(scope="module")
def run(folder) -> Run:
    from orthogonalize.selection.run_folder import load_run

    return load_run(folder)


def mean_score(model, run: Run, side: str) -> float:
    """Mean log-odds that the answer to a held-out prompt begins as a list."""
    chat = ChatFormat(load_tokenizer(base_model()))
    ids = chat.encode_all(run.texts(side, "test"))
    return behaviour_score(first_token_probabilities(model, ids), run.info.behaviour_tokens).mean().item()


def test_list_tokens_are_learnt_and_most_prompts_show_them(run):
    assert "1" in run.info.behaviour_words
    assert run.info.filtered["positive"]["train"] >= 32
    assert run.info.filtered["negative"]["train"] >= 36


def test_every_method_finds_the_list_direction(run):
    for method in ("dim", "inlp", "leace"):
        mine = [c for c in run.candidates if c.finder == method]
        assert min(c.bypass for c in mine) < run.info.base_score["positive"] - 1, method
        assert max(c.induce for c in mine if c.induce is not None) > run.info.base_score["negative"] + 3, method
        found = [p for p in run.probes if p.method == method]
        assert found[0].before > 0.9, "the two kinds of prompt can be told apart before any edit"
        assert found[-1].after < found[-1].before, "and less so after it"


def test_baked_edit_makes_lists_rarer_than_a_random_direction(base, folder, run, tmp_path):
    edit(str(base), tmp_path / "edited", run=folder, method="ablate", scope="all", position=-1, layer=18)
    proof = verify(tmp_path / "edited").verification
    assert proof.passed
    plain, edited = load_model(base, dtype=torch.float32), load_model(tmp_path / "edited", dtype=torch.float32)
    before = {side: mean_score(plain, run, side) for side in ("positive", "negative")}
    assert before["positive"] > 0 > before["negative"]
    assert mean_score(edited, run, "positive") < before["positive"] - 1
    assert mean_score(edited, run, "negative") < 0
    noise = torch.nn.functional.normalize(torch.randn(1, run.info.width, generator=torch.Generator().manual_seed(0)))
    control = map_sites(parse_scope("all"), run.info.layer_count, lambda _: removal(noise.double()))
    with intervened(plain, control):
        assert mean_score(plain, run, "positive") > before["positive"] - 1


def test_real_run_has_every_plot(folder):
    assert {f.stem for f in (folder / "plots").iterdir()} == {
        "candidates-dim", "candidates-inlp", "candidates-leace", "cosines", "inlp-accuracy", "probes",
        "projections-dim", "projections-inlp",
    }  # fmt: skip
