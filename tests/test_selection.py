"""Scores against the plain way of computing them, and ranking."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VOCABULARY, load
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonalize.activations import mean_activations
from orthogonalize.directions import Directions
from orthogonalize.errors import OrthogonalizeError
from orthogonalize.generation import generate
from orthogonalize.hooks import input_shifted, layer_projected
from orthogonalize.interventions import removal, shift
from orthogonalize.refusals import refused
from orthogonalize.scores import (
    behaviour_score,
    completion_loss,
    divergence,
    first_token_probabilities,
    learn_behaviour_tokens,
)
from orthogonalize.selection import Candidate, layer_ranking, rank, score_candidates
from orthogonalize.trials import share_left


def some_ids(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def plain_probabilities(model, ids) -> torch.Tensor:
    """One prompt at a time, through the library alone."""
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([row])).logits[0, -1].float().softmax(-1) for row in ids])


def test_batched_first_token_probabilities_equal_one_prompt_at_a_time(base):
    model, ids = load(base), some_ids(9, 0)
    assert torch.allclose(first_token_probabilities(model, ids), plain_probabilities(model, ids), atol=1e-6)


def test_candidate_scores_equal_the_plain_loop(base):
    """The scorer starts at the edited layer, many positions in a batch; the loop does neither."""
    model, tokens = load(base), [5, 9]
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    diffs = mean_activations(model, positive, 2) - mean_activations(model, negative, 2)
    directions = Directions((-2, -1), diffs)
    scored = score_candidates(model, positive, negative, directions, ["dim"], tokens, prune=0.25)
    assert {(c.position, c.layer) for c in scored} == {(p, layer) for p in (-2, -1) for layer in range(3)}
    plain = plain_probabilities(model, negative)
    for c in scored:
        basis, diff = directions.basis("dim", c.position, c.layer), directions.mean_diff(c.position, c.layer)
        with layer_projected(model, c.layer, removal(basis)):
            bypass = behaviour_score(plain_probabilities(model, positive), tokens).mean().item()
            kept = plain_probabilities(model, negative)
        with input_shifted(model, c.layer, shift(diff)):
            induce = behaviour_score(plain_probabilities(model, negative), tokens).mean().item()
        assert c.bypass == pytest.approx(bypass, abs=1e-4)
        assert c.induce == pytest.approx(induce, abs=1e-4)
        assert c.kl == pytest.approx(divergence(plain, kept).mean().item(), abs=1e-4)
    again = plain_probabilities(model, negative)
    assert torch.equal(again, plain), "scoring must leave the model as it was"


def test_completion_loss_equals_the_library_loss(base):
    model = load(base)
    prompts, answers = some_ids(5, 3), some_ids(5, 4)
    total = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            total += model(torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
    assert completion_loss(model, prompts, answers) == pytest.approx(total / sum(map(len, answers)), abs=1e-5)


def test_greedy_answers_equal_a_loop_without_batch_padding_or_cache(base):
    model, ids = load(base), some_ids(6, 5)
    stop = 7
    found = generate(model, ids, 8, [stop], batch=4)
    for prompt, answer in zip(ids, found, strict=True):
        expected: list[int] = []
        for _ in range(8):
            with torch.inference_mode():
                token = model(torch.tensor([prompt + expected])).logits[0, -1].argmax().item()
            if token == stop:
                break
            expected.append(token)
        assert answer == expected


def test_the_behaviour_score_is_the_log_odds():
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    scores = behaviour_score(probabilities, [0, 1])
    assert scores[0].item() == pytest.approx(math.log(0.3 / 0.7), abs=1e-6)
    assert scores[1] < -18
    assert scores[2] > 18


def test_behaviour_tokens_are_those_that_tell_the_sides_apart():
    positive, negative = torch.full((4, 10), 0.02), torch.full((4, 10), 0.1)
    positive[:, 3], positive[:, 6] = 0.6, 0.24
    assert learn_behaviour_tokens(positive, negative) == [3, 6]
    with pytest.raises(OrthogonalizeError, match="--behaviour-tokens"):
        learn_behaviour_tokens(negative, negative)


def candidate(layer: int, bypass: float, kl: float = 0.01, induce: float = 1.0) -> Candidate:
    return Candidate("dim", -1, layer, bypass, induce, kl)


def test_ranking_filters_then_sorts_and_says_what_failed():
    given = [candidate(3, -1), candidate(4, -5, kl=0.2), candidate(5, -3), candidate(6, -9, induce=-0.1),
             candidate(8, -9), candidate(2, float("nan"))]  # fmt: skip
    ranked = rank(given, layer_count=10)
    assert [c.layer for c in ranked if not c.failed] == [5, 3]
    assert [c.rank for c in ranked] == [0, 1, None, None, None, None]
    reasons = {c.layer: c.failed for c in ranked if c.failed}
    assert reasons[4] == ("kl 0.2 > 0.1",)
    assert reasons[6] == ("induce -0.1 < 0",)
    assert reasons[8] == ("late layer",)
    assert "not a number" in reasons[2]
    assert layer_ranking(ranked, "dim")[:2] == [5, 3]


def test_where_nothing_passes_the_least_wrong_comes_first_and_looser_filters_let_it_pass():
    given = [candidate(3, -9, kl=6.0), candidate(4, -2, kl=0.12), candidate(5, 1, kl=0.11)]
    assert [c.layer for c in rank(given, 10)] == [4, 3, 5]
    assert [c.layer for c in rank(given, 10, kl=1.0) if not c.failed] == [4, 5]


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30))
def test_the_share_left_is_never_less_than_observed(scores):
    found = share_left(torch.tensor(scores, dtype=torch.float64))
    assert sum(s > 0 for s in scores) / len(scores) <= found <= 1


def test_a_few_scores_just_under_zero_do_not_count_as_removed():
    assert share_left(torch.tensor([-0.5, -3.0, -1.0, -2.0])) > 0.01
    assert share_left(torch.tensor([-9.0, -8.0, -7.0, -8.5])) < 1e-6


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but no.", True),
        ("Well, I\u2019m sorry.", True),
        ("AS AN AI, hm", True),
        ("Sure! I can do that.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_their_wording(answer, expected):
    assert refused(answer) is expected
