"""Strengths of single sites: gradients, Fisher information, the step, and the search that tries them."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import scipy
import torch
from helpers.command_line import SMALL, command
from helpers.exactness import every_write
from helpers.llama import LAYERS, load
from helpers.scoring import directions_of, some_ids
from helpers.tiny_models import DoublePrecision

from orthogonalize.commands.extract import extract
from orthogonalize.core.interventions import Intervention
from orthogonalize.core.journal import Journal
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.models.generation import generate
from orthogonalize.models.hooks import intervened
from orthogonalize.models.logprobs import exact_kl
from orthogonalize.selection.builder import EditBuilder
from orthogonalize.selection.candidates import Candidate
from orthogonalize.selection.readouts import FirstToken, behaviour_score, log_odds
from orthogonalize.selection.run_folder import load_run, save_selection
from orthogonalize.selection.search import strengths as module
from orthogonalize.selection.search import trials
from orthogonalize.selection.search.drift import AnsweredPrompts
from orthogonalize.selection.search.space import SearchSpace
from orthogonalize.selection.search.strengths import (
    GAUSS,
    LARGEST,
    RIDGE,
    STEPS,
    STRIDE,
    StrengthGradients,
    StrengthSteps,
    least_strengths,
)
from orthogonalize.selection.search.trials import EditSearch

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = [5, 9]


def upper(base, basis) -> tuple[object, Intervention]:
    """A tiny Llama, and removals of different ranks and strengths in its upper half."""
    from orthogonalize.core.interventions import removal

    maps = {3: removal(basis, 0.7), 4: removal(basis[:1])}
    return load(base), map_sites(parse_scope("layers:2-3"), LAYERS, maps.get)


def scaled(intervention: Intervention, strengths) -> Intervention:
    return intervention.scaled(dict(zip(intervention.writes, map(float, strengths), strict=True)))


# gradients


def test_log_odds_are_the_behaviour_score():
    logits = 60 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = log_odds(logits, TOKENS)
    assert torch.allclose(found, behaviour_score(logits.softmax(-1), TOKENS), atol=1e-6)
    assert found.min() < -18 < 18 < found.max(), "the clamp is not tested"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "falcon_h1", "opt"])
def test_gradient_of_the_behaviour_is_that_of_finite_differences(name, base, basis, bases):
    """Of scores from transformers alone, one prompt and one change of one strength at a time."""
    model, edit = upper(base, basis) if name == "llama" else (bases(name).model, every_write())
    ids, at = some_ids(5, 1), 0.4 + 0.1 * np.arange(len(edit.writes))
    wide = nullcontext if name == "llama" else DoublePrecision

    @torch.inference_mode()
    def score(strengths) -> float:
        with wide(), intervened(model, scaled(edit, strengths), renormalise=False):
            logits = torch.stack([model(torch.tensor([row])).logits[0, -1].double() for row in ids])
        return behaviour_score(logits.softmax(-1), TOKENS).mean().item()

    gradients = StrengthGradients(model, edit.writes)
    with wide():
        first, again = (gradients.behaviour(ids, TOKENS, at.tolist()) for _ in range(2))
    assert first[0] == pytest.approx(score(at), abs=1e-9)
    steps = 1e-5 * np.eye(len(at))
    expected = [(score(at + step) - score(at - step)) / 2e-5 for step in steps]
    assert first[1] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert np.abs(first[1]).min() > 1e-6, "a strength has no effect, so nothing was compared"
    assert again[1] == pytest.approx(first[1], abs=1e-12), "from the stream that was kept"


def test_weights_can_be_trained_as_before(base, basis):
    model, edit = upper(base, basis)
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    StrengthGradients(model, edit.writes).behaviour(some_ids(3, 1), TOKENS, [1.0] * 4)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


# Fisher information


@torch.inference_mode()
def explicit_fisher(model, edit: Intervention, prompts, answers, at) -> np.ndarray:
    """`sum_y p(y) g_y g_y^T` at every place of every answer, with g from finite differences of log-probabilities."""

    def logprobs(strengths, row, places) -> np.ndarray:
        with intervened(model, scaled(edit, strengths), renormalise=False):
            return model(torch.tensor([row])).logits[0, places].double().log_softmax(-1).numpy()

    total, count, h = np.zeros((len(at), len(at))), 0, 1e-5
    for prompt, answer in zip(prompts, answers, strict=True):
        row, places = [*prompt, *answer], list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        p = np.exp(logprobs(at, row, places))
        moved = [(logprobs(at + s, row, places) - logprobs(at - s, row, places)) / (2 * h) for s in h * np.eye(len(at))]
        g = np.stack(moved, -1)  # [places, vocabulary, sites]
        total += np.einsum("ty,tyi,tyj->ij", p, g, g)
        count += len(places)
    return total / count


@pytest.mark.parametrize("at", [0.0, GAUSS, 1.0])
def test_fisher_information_is_that_of_explicit_gradients_of_every_token(at, base, basis, monkeypatch):
    """With unit vectors for the noise, each of the right length and once, the mean over draws is the expectation."""
    model, edit = upper(base, basis)
    prompts, answers = some_ids(2, 3), [[7, 8], [20]]
    count = 3 * model.config.vocab_size
    draws = iter(range(count))

    def unit(shape, **others) -> torch.Tensor:
        assert shape.numel() == count
        noise = torch.zeros(count, dtype=others["dtype"])
        noise[next(draws)] = count**0.5
        return noise.reshape(shape)

    monkeypatch.setattr(module.torch, "randn", unit)
    strengths = [at] * len(edit.writes)
    found = StrengthGradients(model, edit.writes).fisher(prompts, answers, strengths, draws=count)
    expected = explicit_fisher(model, edit, prompts, answers, np.array(strengths))
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.linalg.eigvalsh(expected)[0] > 0


def test_drawn_noise_estimates_it(base, basis):
    model, edit = upper(base, basis)
    prompts, answers = some_ids(4, 3), some_ids(4, 4)
    strengths = [0.0] * len(edit.writes)
    found = StrengthGradients(model, edit.writes).fisher(prompts, answers, strengths, draws=150)
    expected = explicit_fisher(model, edit, prompts, answers, np.array(strengths))
    assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected)


def test_information_at_a_third_gives_the_kl_where_logits_are_linear():
    """And closer than the information at the base."""
    generator = torch.Generator().manual_seed(0)
    base, along = (torch.randn(50, 30, generator=generator, dtype=torch.float64) for _ in range(2))

    def information(t: float) -> torch.Tensor:
        p = (base + t * along).softmax(-1)
        return (p * along**2).sum(-1) - (p * along).sum(-1) ** 2

    kl = exact_kl(base.log_softmax(-1), (base + along).log_softmax(-1))
    third, none = ((information(t) / 2 - kl).abs().mean() / kl.mean() for t in (GAUSS, 0.0))
    assert third < 0.03 < 0.1 < none


# the step


def problem(seed: int, sites: int = 7) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(sites, sites))
    return root @ root.T + 0.1 * np.eye(sites), generator.normal(size=sites)


@pytest.mark.parametrize("least", [0.3, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("seed", range(8))
def test_step_is_that_of_a_general_minimiser(seed, least):
    fisher, gradient = problem(seed)
    low, high = np.full(7, 0.0), np.full(7, 1.5)
    low[2], high[3] = 0.4, 0.8
    found = least_strengths(fisher, gradient, least, low, high)
    assert ((low - 1e-12 <= found) & (found <= high + 1e-12)).all()
    reachable = np.maximum(gradient * low, gradient * high).sum()
    assert gradient @ found >= min(least, reachable) - 1e-8
    if reachable > least:
        reference = scipy.optimize.minimize(
            lambda s: s @ fisher @ s, (low + high) / 2, jac=lambda s: 2 * fisher @ s, method="SLSQP",
            bounds=list(zip(low, high, strict=True)), options={"ftol": 1e-12, "maxiter": 1000},
            constraints={"type": "ineq", "fun": lambda s: gradient @ s - least, "jac": lambda s: gradient},
        )  # fmt: skip
        assert gradient @ reference.x >= least - 1e-8
        assert found @ fisher @ found == pytest.approx(reference.fun, rel=1e-6)
        assert found == pytest.approx(reference.x, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_step_is_the_projection_of_the_origin_on_what_keeps_the_behaviour(seed):
    """In the metric of F: with F = 1 the usual one. The origin is the base model, which costs nothing."""
    fisher, gradient = problem(seed)
    far = np.full(7, 1e3)
    plain = least_strengths(np.eye(7), gradient, 2.0, -far, far)
    assert plain == pytest.approx(2.0 * gradient / (gradient @ gradient), abs=1e-8)
    whitened = least_strengths(fisher, gradient, 2.0, -far, far)
    natural = np.linalg.solve(fisher, gradient)
    assert whitened == pytest.approx(2.0 * natural / (gradient @ natural), abs=1e-6)
    assert least_strengths(fisher, gradient, -1.0, -far, far) == pytest.approx(np.zeros(7), abs=1e-12)


class Linear:
    """Gradients of an imagined model whose behaviour is linear in the strengths."""

    def __init__(self, fisher, slope) -> None:
        self.information, self.slope, self.sites, self.asked = fisher, slope, tuple(range(len(slope))), []

    def behaviour(self, _ids, _tokens, strengths):
        return 4.0 + float(self.slope @ np.array(strengths)), self.slope

    def fisher(self, prompts, _answers, strengths):
        self.asked.append(strengths)
        return self.information * prompts


@pytest.mark.parametrize("shows", [False, True])
def test_steps_keep_a_linear_behaviour_and_lower_the_kl(shows):
    """Towards and away from the behaviour, and with sets of prompts that weigh the same."""
    fisher, slope = problem(3, 4)
    slope = np.abs(slope) * (1 if shows else -1)
    model = Linear(fisher, slope)
    kept = 4.0 + slope.sum()
    steps = StrengthSteps(model, [], TOKENS, [(1, None), (3, None)], shows, kept)
    strengths = [1.0] * 4
    for _ in range(3):
        before, strengths = strengths, steps.after(strengths)
        assert max(abs(a - b) for a, b in zip(before, strengths, strict=True)) <= STRIDE + 0.005
    assert model.asked == [[GAUSS] * 4] * 2, "each set is read once"
    ridge = RIDGE * 2 * np.trace(fisher) / 4 * np.eye(4)
    best = least_strengths(2 * fisher + ridge, np.abs(slope), abs(slope.sum()), np.zeros(4), np.full(4, LARGEST))
    assert strengths == pytest.approx(best.tolist(), abs=0.0051)
    assert abs(4.0 + slope @ np.array(strengths) - kept) < 0.01 * np.abs(slope).sum()


# the search


@pytest.fixture
def tiny(base):
    model, positive, negative = load(base), some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    ranked = [Candidate("dim", -1, layer, LAYERS, -layer, 1.0, 0.01) for layer in (2, 1)]
    where, build = SearchSpace(directions, ranked), EditBuilder(directions, ranked, False)

    def searched(known=None, budget: int = 9, steps: int = 3):
        own = AnsweredPrompts(model, negative, generate(model, negative, 5, []))
        search = EditSearch(model, build, FirstToken(tuple(TOKENS)), positive, own, known=known)
        return search.search(budget, where.starts(), where.neighbours, where.largest_step, steps)

    return searched


def test_search_spends_some_trials_on_strengths_of_sites(tiny):
    found = tiny()
    uneven = [t for t in found if t.choice.site_strengths]
    assert (len(found), len(uneven)) == (9, 3)
    assert {t.choice.method for t in uneven} == {"ablate"}
    assert all(0 <= strength <= LARGEST for t in uneven for _, strength in t.choice.site_strengths)
    assert not any(t.choice.site_strengths for t in tiny(steps=0))
    plain = {t.choice.model_copy(update={"site_strengths": ()}) for t in uneven}
    (start,) = [t for t in found if t.choice in plain]
    assert min(t.kl for t in uneven) < start.kl, "every step made it worse"


def test_killed_search_resumes_to_the_same_strengths(tiny, tmp_path, monkeypatch):
    whole = tiny(Journal(tmp_path / "journal", "inputs"))
    lines = (tmp_path / "journal").read_text().splitlines(keepends=True)
    steps = [n for n, line in enumerate(lines) if '"strengths:' in line]
    assert len(steps) == 3
    for n in (steps[0], steps[1] + 1, steps[2] + 1):  # before the first step, and between a step and its trial
        (tmp_path / "cut").write_text("".join(lines[:n]))
        assert tiny(Journal(tmp_path / "cut", "inputs")) == whole
    monkeypatch.setattr(StrengthGradients, "fisher", None)  # with all steps known, nothing is differentiated again
    monkeypatch.setattr(StrengthGradients, "behaviour", None)
    assert tiny(Journal(tmp_path / "journal", "inputs")) == whole


def test_edit_out_of_reach_of_the_best_is_not_refined(tiny, monkeypatch):
    """Its trials go to the neighbours of the best edit instead."""
    monkeypatch.setattr(trials, "REACH", 0.9)
    found = tiny()
    assert len(found) == 9
    assert found == tiny(steps=0)


def test_search_goes_on_without_the_memory_for_gradients(tiny, monkeypatch):
    def exhausted(*_args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(StrengthGradients, "fisher", exhausted)
    found = tiny()
    assert len(found) == 9
    assert not any(t.choice.site_strengths for t in found)


def test_neighbours_of_uneven_strengths_have_the_same_sites():
    where = SearchSpace(None, [])
    choice = EditConfig(method="ablate", scope="layers:1-2", position=-1, layer=2, site_strengths={"mlp.1": 0.5})
    near = where.neighbours(choice, 1)
    assert {c.strength for c in near} == {0.8, 0.9, 1.1, 1.2}
    assert {c.model_copy(update={"strength": 1.0}) for c in near} == {choice}


@pytest.mark.parametrize(("count", "uneven"), [(15, 0), (16, STEPS)])
def test_extract_refines_strengths_if_it_has_trials_for_it(count, uneven, model, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "REACH", float("inf"))
    settings = dataclasses.replace(SMALL, trials=count, finders=("dim",))
    extract(str(model), tmp_path / "run", **sources, settings=settings)
    run = load_run(tmp_path / "run")
    found = [t for t in run.trials if t.choice.site_strengths]
    assert len(run.trials) <= count
    assert 0 < len(found) <= uneven if uneven else not found
    if found:
        save_selection(run.candidates, found, run.probes, tmp_path / "run")
        status, said = command("edit", model, "--run", tmp_path / "run", "--pick", "1", "--out", tmp_path / "edited")
        assert status == 0, said
        assert load_recipe(tmp_path / "edited").choice == found[0].choice
        status, said = command("verify", tmp_path / "edited", "--base", model)
        assert status == 0, said
