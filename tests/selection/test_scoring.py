"""Candidate scores against a plain computation, and ranking."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import scipy
import torch
from helpers.llama import LAYERS, WIDTH, load
from helpers.scoring import directions_of, plain_probabilities, some_ids

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import AffineMap, shift
from orthogonalize.core.journal import Journal
from orthogonalize.data.refusals import refused
from orthogonalize.models.generation import generate
from orthogonalize.models.hooks import input_shifted, layer_projected, map_input, map_output
from orthogonalize.models.logprobs import smoothed_kl
from orthogonalize.selection.candidates import (
    MAX_KL,
    UNSCORED,
    Candidate,
    explain_fallback,
    failed_filters,
    first_pruned_layer,
    layer_ranking,
    rank,
    rank_correlation,
)
from orthogonalize.selection.readers import resident_scores
from orthogonalize.selection.readers.direction_scoring import Places
from orthogonalize.selection.readers.estimates import ScoreGradients
from orthogonalize.selection.readers.resident_scores import ESTIMATED, SCREENED, score_candidates
from orthogonalize.selection.readouts import FirstToken, NearerSide, behaviour_score, learn_behaviour_tokens
from orthogonalize.selection.run_folder import save_selection
from orthogonalize.selection.scoring import (
    first_token_probabilities,
    read_outputs,
)


def test_batched_first_token_probabilities_equal_single_prompts(base):
    model, ids = load(base), some_ids(9, 0)
    assert torch.allclose(first_token_probabilities(model, ids), plain_probabilities(model, ids), atol=1e-6)


def plain_scores(model, positive, negative, directions, candidate, tokens) -> dict[str, float]:
    """One candidate's scores from hooks and transformers alone, nothing shared or batched."""
    method, position, layer = candidate.finder, candidate.position, candidate.layer
    affine, diff = directions.removal(method, position, layer), directions.mean_diff(position, layer)
    plain = plain_probabilities(model, negative)
    with layer_projected(model, layer, affine):
        bypass = behaviour_score(plain_probabilities(model, positive), tokens).mean().item()
        kept = plain_probabilities(model, negative)
    induced = []
    first = directions.basis(method, position, layer)[0]
    for multiplier in (0.5, 1.0, 2.0):
        with input_shifted(model, layer, shift(multiplier * diff.norm() * first)):
            induced.append(behaviour_score(plain_probabilities(model, negative), tokens).mean().item())
    everywhere = [map_input(model.model.layers[0], affine)]
    for block in model.model.layers:
        everywhere += [map_output(m, affine.unshifted) for m in (block.self_attn, block.mlp)]
    global_bypass = behaviour_score(plain_probabilities(model, positive), tokens).mean().item()
    global_kl = smoothed_kl(plain, plain_probabilities(model, negative)).mean().item()
    for handle in everywhere:
        handle.remove()
    return {
        "bypass": bypass,
        "induce": sorted(induced)[1],
        "kl": smoothed_kl(plain, kept).mean().item(),
        "global_bypass": global_bypass,
        "global_kl": global_kl,
    }


def test_candidate_scores_equal_the_plain_loop(base):
    """The scorer starts at the edited layer, batches many positions, and shares what methods have in common."""
    model, tokens = load(base), [5, 9]
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    before = plain_probabilities(model, negative)
    methods = ["dim", "inlp", "leace"]
    scored = score_candidates(
        model, positive, negative, directions, methods, FirstToken(tuple(tokens)), everywhere=True
    )
    where = {(c.finder, c.position, c.layer) for c in scored}
    assert where == {(m, p, layer) for m in methods for p in (-2, -1) for layer in range(LAYERS)}
    assert torch.equal(plain_probabilities(model, negative), before), "scoring must leave the model as it was"
    for c in scored:
        for name, value in plain_scores(model, positive, negative, directions, c, tokens).items():
            assert getattr(c, name) == pytest.approx(value, abs=1e-4), (c, name)
    assert {c.rank_of_basis for c in scored if c.finder == "inlp"} == {3}


def test_scores_have_t_intervals_over_the_prompts(base):
    """Those of SciPy, from what hooks and transformers alone give for each prompt; one prompt has none."""
    model, readout = load(base), FirstToken((5, 9))
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    places = Places((-1,), (1,))
    (found,) = score_candidates(model, positive, negative, directions, ["dim"], readout, places=places)
    plain = plain_probabilities(model, negative)
    with layer_projected(model, 1, directions.removal("dim", -1, 1)):
        bypass = behaviour_score(plain_probabilities(model, positive), [5, 9])
        kl = smoothed_kl(plain, plain_probabilities(model, negative))
    added = []
    for multiplier in (0.5, 1.0, 2.0):
        with input_shifted(model, 1, shift(multiplier * directions.mean_diff(-1, 1))):
            added.append(behaviour_score(plain_probabilities(model, negative), [5, 9]))
    induce = sorted(added, key=lambda scores: scores.mean().item())[1]
    for scores, ends in ((bypass, found.bypass_ci95), (induce, found.induce_ci95), (kl, found.kl_ci95)):
        spread = scipy.stats.sem(scores.numpy())
        wanted = scipy.stats.t.interval(0.95, len(scores) - 1, loc=scores.mean().item(), scale=spread)
        assert ends == pytest.approx(wanted, abs=1e-4)
    (single,) = score_candidates(model, positive[:1], negative[:1], directions, ["dim"], readout, places=places)
    assert (single.bypass_ci95, single.kl_ci95) == (None, None)
    assert Candidate.from_row(found.row()) == found
    assert Candidate.from_row(json.loads(json.dumps(found.row()))) == found


def test_estimates_are_derivatives_of_the_scores(base):
    """Differences between maps close to the identity and their opposites, from hooks and transformers alone."""
    model, ids = load(base).double(), some_ids(7, 1)
    gradients = ScoreGradients(model, ids, FirstToken((5, 9)))
    u, v = torch.randn(2, WIDTH, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair = [AffineMap(size * u, v, size * u[:, 0]) for size in (1e-4, -1e-4)]
    for layer in range(LAYERS):
        for edited, estimated in ((layer_projected, gradients.projected), (input_shifted, gradients.shifted)):
            found = []
            for small in pair:
                with edited(model, layer, small):
                    found.append(behaviour_score(plain_probabilities(model, ids), [5, 9]).mean().item())
            change = estimated(layer, pair[0]) - estimated(layer, pair[1])
            assert change == pytest.approx(found[0] - found[1], rel=2e-3, abs=1e-6), (layer, edited)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_estimates_of_other_readouts_are_derivatives_too(base):
    model, ids, layers = load(base).double(), some_ids(7, 1), (LAYERS - 1, LAYERS)
    means = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    readout = NearerSide(layers, *means, middle=0.1, scale=3.0)
    small = shift(1e-2 * means[0, 0])
    before = readout.scores(read_outputs(model, ids, layers)).mean().item()
    with input_shifted(model, 1, small):
        change = readout.scores(read_outputs(model, ids, layers)).mean().item() - before
    assert abs(change) > 1e-4
    assert ScoreGradients(model, ids, readout).shifted(1, small) - before == pytest.approx(change, rel=0.05)


def test_best_directions_are_scored_as_if_all_were(base, monkeypatch):
    """With an `enough` that is never reached, all but the last layers are scored, by all prompts."""
    monkeypatch.setattr(resident_scores, "CLEARLY", math.inf)
    model, readout = load(base), FirstToken((5, 9))
    positive, negative = some_ids(12, 1), some_ids(7, 2)  # more positive prompts than directions are estimated by
    directions = directions_of(model, positive, negative)
    every = {key(c): c for c in score_candidates(model, positive, negative, directions, ["dim", "leace"], readout)}
    some = score_candidates(model, positive, negative, directions, ["dim", "leace"], readout, enough=99)
    assert {key(c) for c in some} == every.keys()
    gradients = ScoreGradients(model, positive[:ESTIMATED], readout)
    for c in some:
        if c.layer < first_pruned_layer(LAYERS):
            for name in ("bypass", "induce", "kl"):
                assert getattr(c, name) == pytest.approx(getattr(every[key(c)], name), abs=1e-5), (c, name)
        else:
            assert (c.induce, c.kl) == (None, None)
            expected = gradients.projected(c.layer, directions.removal(c.finder, c.position, c.layer))
            assert c.bypass == pytest.approx(expected, abs=1e-4)


def key(candidate: Candidate) -> tuple:
    return candidate.finder, candidate.position, candidate.layer


def by_promise(model, positive, negative, directions, readout) -> list[tuple]:
    """The directions of `dim` that are not in the last layers, in the order of their estimates."""
    sides = [ScoreGradients(model, ids[:ESTIMATED], readout) for ids in (positive, negative)]
    promise = {}
    for position in directions.positions:
        for layer in range(first_pruned_layer(LAYERS)):
            bypass = sides[0].projected(layer, directions.removal("dim", position, layer))
            induce = sides[1].shifted(layer, shift(directions.mean_diff(position, layer)))
            promise["dim", position, layer] = bypass - induce
    return sorted(promise, key=promise.get)


def test_the_most_promising_directions_are_scored(base, monkeypatch, tmp_path):
    monkeypatch.setattr(resident_scores, "CLEARLY", math.inf)
    model, readout = load(base), FirstToken((5, 9))
    positive, negative = some_ids(ESTIMATED, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    order = by_promise(model, positive, negative, directions, readout)
    assert len(order) > 2
    journal = Journal(tmp_path / "journal", "inputs")
    found = score_candidates(model, positive, negative, directions, ["dim"], readout, known=journal, enough=2)
    assert {key(c) for c in found if c.induce is not None} == set(order[:2])
    again = score_candidates(None, positive, negative, directions, ["dim"], readout, known=journal, enough=2)
    assert again == found, "an interrupted run resumes without the model"
    ranked = rank(found, kl=1e9, induce=-1e9)
    assert {key(c) for c in ranked[:2]} == set(order[:2])
    assert ranked[2].failed == ("estimated only",)


def test_models_without_gradients_are_screened_by_few_prompts(base, monkeypatch):
    """As those whose quantised matrices have no backward pass."""

    def refuse(*_args, **_kwargs):
        raise NotImplementedError("no derivative")

    model, readout = load(base), FirstToken((5, 9))
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    every = score_candidates(model, positive[:SCREENED], negative, directions, ["dim"], readout)
    able = sorted((c for c in every if c.layer < first_pruned_layer(LAYERS)), key=lambda c: c.bypass)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(resident_scores, "CLEARLY", math.inf)
    found = score_candidates(model, positive, negative, directions, ["dim"], readout, enough=1)
    assert {key(c) for c in found if c.induce is not None} == {key(able[0])}
    few = {key(c): c.bypass for c in able}
    assert all(c.bypass == pytest.approx(few[key(c)], abs=1e-5) for c in found if c.induce is None and key(c) in few)


def test_directions_that_break_the_model_are_not_scored_further(base, monkeypatch):
    """Their KL is that of few prompts, and enough to fail; nothing else is left out."""
    model, readout = load(base), FirstToken((5, 9))
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    every = {key(c): c for c in score_candidates(model, positive, negative, directions, ["dim", "inlp"], readout)}
    few = {
        key(c): c.kl
        for c in score_candidates(model, positive, negative[:SCREENED], directions, ["dim", "inlp"], readout)
    }
    limit = sorted(few[k] for k in few if every[k].layer < first_pruned_layer(LAYERS))[3] * 1.01
    monkeypatch.setattr(resident_scores, "CLEARLY", limit / MAX_KL)
    found = score_candidates(model, positive, negative, directions, ["dim", "inlp"], readout, enough=99)
    able = [c for c in found if c.layer < first_pruned_layer(LAYERS)]
    assert 0 < sum(c.induce is None for c in able) < len(able)
    for c in able:
        if c.induce is None:
            assert c.kl == pytest.approx(few[key(c)], abs=1e-5)
            assert c.kl > limit
            assert (UNSCORED in failed_filters(c)) is (c.kl <= MAX_KL)
            assert UNSCORED in failed_filters(c, kl=c.kl + 1), "looser filters cannot tell"
        else:
            assert c.induce == pytest.approx(every[key(c)].induce, abs=1e-5)


def test_of_directions_that_break_the_model_the_one_that_moves_it_least_comes_first():
    """They are not scored further, so that their KL is all that is known of how close they are to passing."""
    found = [Candidate("dim", -1, layer, 30, -2.0, None, kl) for layer, kl in ((3, 3.2), (9, 0.4), (5, 1.1))]
    found.append(Candidate("dim", -1, 7, 30, -1.0, 0.5, 0.15))
    assert [c.layer for c in rank(found)] == [7, 9, 5, 3]


def test_only_chosen_positions_and_layers_are_scored(base):
    model, readout = load(base), FirstToken((5, 9))
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    places = Places.of(directions.positions, LAYERS, [-2], [1])
    for enough in (None, 3):
        found = score_candidates(model, positive, negative, directions, ["dim"], readout, places=places, enough=enough)
        assert [(c.position, c.layer) for c in found] == [(-2, 1)]


@pytest.mark.parametrize(
    ("positions", "layers", "message"),
    [([-9], None, "there is no position -9; this model's positions are -2 to -1"), (None, [0, 40], "no layer 40")],
)
def test_positions_and_layers_that_do_not_exist_are_refused(positions, layers, message):
    with pytest.raises(OrthogonalizeError, match=message):
        Places.of((-2, -1), 4, positions, layers)


def test_known_scores_are_not_computed_again(base, tmp_path):
    model, tokens = load(base), [5, 9]
    positive, negative = some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    journal = Journal(tmp_path / "journal", "inputs")
    scored = score_candidates(
        model, positive, negative, directions, ["dim", "leace"], FirstToken(tuple(tokens)), known=journal
    )
    lines = (tmp_path / "journal").read_text().split("\n")
    (tmp_path / "journal").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])  # killed in the middle of a line
    cut = Journal(tmp_path / "journal", "inputs")
    assert len(cut.done) == len(journal.done) - 1
    again = score_candidates(
        model, positive, negative, directions, ["dim", "leace"], FirstToken(tuple(tokens)), known=cut
    )
    assert [(c.finder, c.layer, c.position) for c in again] == [(c.finder, c.layer, c.position) for c in scored]
    assert [c.bypass for c in again] == pytest.approx([c.bypass for c in scored], abs=1e-6)
    full = Journal(tmp_path / "journal", "inputs")
    known = score_candidates(
        None, [], [], directions, ["dim", "leace"], FirstToken(tuple(tokens)), known=full
    )  # without a model
    assert known == again
    assert not Journal(tmp_path / "journal", "other inputs").done


def test_greedy_answers_equal_a_plain_loop(base):
    """One without batch, padding or cache."""
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


def test_behaviour_score_is_the_log_odds():
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    scores = behaviour_score(probabilities, [0, 1])
    assert scores[0].item() == pytest.approx(math.log(0.3 / 0.7), abs=1e-6)
    assert scores[1] < -18
    assert scores[2] > 18


def test_behaviour_tokens_are_those_that_separate_the_sides():
    positive, negative = torch.full((4, 10), 0.02), torch.full((4, 10), 0.1)
    positive[:, 3], positive[:, 6] = 0.6, 0.24
    assert learn_behaviour_tokens(positive, negative) == [3, 6]
    with pytest.raises(OrthogonalizeError, match="--behaviour-tokens"):
        learn_behaviour_tokens(negative, negative)


def candidate(layer: int, bypass: float, kl: float = 0.01, induce: float = 1.0) -> Candidate:
    return Candidate("dim", -1, layer, 10, bypass, induce, kl)


def test_ranking_filters_then_sorts_and_states_what_failed():
    given = [candidate(3, -1), candidate(4, -5, kl=0.2), candidate(5, -3), candidate(6, -9, induce=-0.1),
             candidate(8, -9), candidate(2, float("nan"))]  # fmt: skip
    ranked = rank(given)
    assert [c.layer for c in ranked if not c.failed] == [5, 3]
    assert [c.rank for c in ranked] == [0, 1, None, None, None, None]
    reasons = {c.layer: c.failed for c in ranked if c.failed}
    assert reasons[4] == ("kl 0.2 > 0.1",)
    assert reasons[6] == ("induce -0.1 < 0",)
    assert reasons[8] == ("late layer",)
    assert "not a number" in reasons[2]
    assert layer_ranking(ranked, "dim")[:2] == [5, 3]


def test_unscored_directions_rank_first_only_if_some_pass():
    """Of a direction that fails, it is known how far it is from passing."""
    unscored = dataclasses.replace(candidate(5, -9), induce=None, kl=None)
    broken = dataclasses.replace(candidate(6, -12, kl=5), induce=None)
    fails, passes = candidate(3, -2, kl=0.2), candidate(4, -1)
    assert [c.layer for c in rank([unscored, broken, fails])] == [3, 6, 5]
    assert [c.layer for c in rank([unscored, broken, fails, passes])] == [4, 5, 3, 6]
    assert [c.layer for c in rank([broken, fails], kl=10) if c.failed] == [6], "induce is not known"


@pytest.mark.parametrize(("count", "first"), [(10, 8), (16, 12), (22, 17), (30, 24), (32, 25)])
def test_last_layers_are_pruned_from_where_the_reference_prunes_them(count, first):
    """`layer >= int(n_layer * (1.0 - 0.2))` in its `filter_fn`: rounded down, so layer 12 of 16 is excluded."""
    given = [Candidate("dim", -1, layer, count, -1.0, 1.0, 0.01) for layer in range(count)]
    assert [c.layer for c in rank(given) if c.failed == ("late layer",)] == list(range(first, count))


def test_candidates_kl_is_the_score_of_the_reference():
    """Its `kl_div_fn` weighs by the plain probability: smoothing the weight too would add what rare tokens moved."""
    p, q = torch.zeros(200_000, dtype=torch.float64), torch.zeros(200_000, dtype=torch.float64)
    p[0], p[1:], q[0] = 0.9, 0.1 / 199_999, 1.0
    expected = sum(
        a * (math.log(a + 1e-6) - math.log(b + 1e-6)) * n for a, b, n in ((0.9, 1.0, 1), (0.1 / 199_999, 0.0, 199_999))
    )
    assert smoothed_kl(p, q).item() == pytest.approx(expected, rel=1e-9)


def test_stored_candidates_can_be_reranked_without_a_model(tmp_path):
    given = [candidate(3, -1), candidate(5, -3, kl=0.3), candidate(8, -9)]
    leace_too = [dataclasses.replace(c, finder="leace") for c in given]
    save_selection(rank([*given, *leace_too]), [], [], tmp_path)
    file = tmp_path / "candidates.json"
    assert [c.layer for c in rank(file) if not c.failed] == [3, 3]
    assert [(c.finder, c.layer) for c in rank(str(file), kl=0.5, prune=0.0) if not c.failed] == [
        ("dim", 8), ("dim", 5), ("dim", 3), ("leace", 8), ("leace", 5), ("leace", 3),
    ]  # fmt: skip
    assert [c.finder for c in rank(file, kl=0)] == ["dim", "dim", "dim", "leace", "leace", "leace"]
    for unusable in ({"kl": float("nan")}, {"kl": -1}, {"induce": float("inf")}, {"prune": 2}):
        with pytest.raises(OrthogonalizeError, match="a filter is not usable"):
            rank(file, **unusable)
    with pytest.raises(OrthogonalizeError, match=r"is not a candidates\.json that this version can read"):
        rank(tmp_path / "none.json")


def test_fallback_states_which_filter_failed_and_by_how_much():
    given = [candidate(3, -9, kl=6.0), candidate(4, -2, kl=0.12), candidate(9, 1, induce=-1)]
    text = explain_fallback(rank(given), "dim")
    assert "(3 tried; failed: kl 2, induce 1, late layer 1); the closest is position -1, layer 4" in text
    assert "layer 4, which fails kl 0.12 > 0.1" in text
    assert explain_fallback(rank([candidate(3, -1)]), "dim") is None


def test_local_and_global_scores_are_compared_by_rank():
    given = [dataclasses.replace(candidate(i, -i), global_bypass=float(g)) for i, g in enumerate((5, 3, 4, 1))]
    assert rank_correlation(given, "dim") == pytest.approx(0.8)
    assert rank_correlation([candidate(i, -i) for i in range(5)], "dim") is None


def test_fallback_ranks_by_distance_from_the_filters():
    """Looser filters let candidates pass."""
    given = [candidate(3, -9, kl=6.0), candidate(4, -2, kl=0.12), candidate(5, 1, kl=0.11)]
    assert [c.layer for c in rank(given)] == [4, 3, 5]
    assert [c.layer for c in rank(given, kl=1.0) if not c.failed] == [4, 5]


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
def test_refusals_are_recognised_by_their_wording(answer, expected):
    assert refused(answer) is expected
