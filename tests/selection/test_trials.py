"""The search over whole edits: what it starts from, what it prefers, and what it keeps."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.llama import LAYERS, load
from helpers.scoring import directions_of, plain_probabilities, some_ids

from orthogonalize.core.interventions import Intervention
from orthogonalize.core.journal import Journal
from orthogonalize.directions.direction_set import Directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.models.generation import generate
from orthogonalize.models.hooks import intervened
from orthogonalize.selection.builder import EditBuilder
from orthogonalize.selection.candidates import Candidate, rank
from orthogonalize.selection.readouts import FirstToken, behaviour_score
from orthogonalize.selection.search.drift import AnsweredPrompts
from orthogonalize.selection.search.objectives import AnswerShares, Trial, share_left
from orthogonalize.selection.search.space import SearchSpace
from orthogonalize.selection.search.trials import EditSearch, confirm

TOKENS = [5, 9]
READOUT = FirstToken(tuple(TOKENS))
COUNT = 12  # layers of the imagined model


def candidate(layer: int, bypass: float, position: int = -1) -> Candidate:
    return Candidate("dim", position, layer, COUNT, bypass, 1.0, 0.01)


def space(ranked: list[Candidate], reads: bool = True) -> SearchSpace:
    """A search space without a model: it needs no more of directions than their shape."""
    empty = torch.zeros(2, COUNT + 1, 3)
    return SearchSpace(Directions((-2, -1), empty, {}, empty, empty), rank(ranked), reads)


class Oracle(dict):
    """A store that knows the trial of every edit, by a function of the edit; it counts what it is asked."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome, self.asked = outcome, []

    def __contains__(self, key):
        return key.startswith("trial:")

    def __getitem__(self, key):
        choice = EditConfig.model_validate(json.loads(key.removeprefix("trial:")))
        self.asked.append(choice)
        left, kl = self.outcome(choice)
        return Trial(
            choice=choice, left=left, score=0.0, kl=kl, first_kl=kl, ce_increase=0.0, kls={"": [kl] * 8}
        ).model_dump()


def search(outcome, budget: int, ranked=(), reads: bool = True) -> tuple[list[Trial], list[EditConfig]]:
    """Search with imagined outcomes; returns the trials and the edits in the order in which they were tried."""
    oracle = Oracle(outcome)
    where = space(list(ranked) or [candidate(6, -9), candidate(5, -8), candidate(7, -7)], reads)
    trials = EditSearch(None, build=None, readout=None, target=(), answers=None, known=oracle)
    return trials.search(budget, where.starts(), where.neighbours, where.largest_step), oracle.asked


@pytest.mark.parametrize("reads", [True, False])
def test_search_starts_with_plain_ablation_and_with_writes(reads):
    found = space([candidate(6, -9), candidate(5, -8)], reads).starts()
    assert found[0] == EditConfig(method="ablate", scope="all", position=-1, layer=6)
    assert found[1].scope == f"layers:{COUNT // 2}-{COUNT - 1}"
    assert any(c.scope.startswith("from:") for c in found) == reads
    assert len(set(found)) == len(found)
    for direction in ({"layer": 6}, {"per_layer": True}, {"layer": 5}):
        mine = [c for c in found if all(getattr(c, k) == v for k, v in direction.items())]
        assert {c.scope.partition(":")[0] for c in mine} == {"all", "layers", *(["from"] if reads else [])}
    assert [c.layer for c in found[: len(found) // 3]] == [6] * (len(found) // 3), "the best direction comes first"


@pytest.mark.parametrize("budget", [2, 3, 4, 12])
def test_even_a_small_budget_tries_the_plain_edit_and_a_span_of_writes(budget):
    _, asked = search(lambda choice: (0.5, 0.1), budget)
    assert asked[0].scope == "all"
    assert asked[1].scope.startswith("layers:")
    assert len(asked) == budget


def test_best_layer_is_tried_even_if_it_has_several_good_positions():
    ranked = [candidate(6, -9), candidate(5, -8), candidate(4, -7), candidate(6, -6, position=-2)]
    assert {c.layer for c in space(ranked).starts()} == {6, 5, None}


def test_spans_shrink_from_all_writes_and_back():
    where = space([candidate(6, -9)])
    scopes = {c.scope for c in where.neighbours(EditConfig(method="ablate", scope="all", position=-1, layer=6), 2)}
    assert scopes == {"all", "layers:2-11", "layers:0-9"}
    narrow = {c.scope for c in where.neighbours(EditConfig(method="ablate", scope="layers:3-4", position=-1), 1)}
    assert narrow == {"layers:3-4", "layers:4", "layers:3", "layers:2-4", "layers:3-5"}


def test_descent_finds_a_weaker_edit_of_fewer_layers():
    """Every layer costs, the behaviour goes with strength; the cheapest edit that removes it is found step by step."""

    def outcome(choice):
        first, last = (0, COUNT - 1)
        if choice.scope.startswith("layers:"):
            first, _, last = choice.scope.removeprefix("layers:").partition("-")
            first, last = int(first), int(last or first)
        width = last - first + 1 + (choice.scope.startswith("from:") * COUNT)
        covered = first <= 4 and last >= 6
        left = max(0.0, 0.9 - choice.strength) if covered else 0.8
        return left, 0.01 * width * choice.strength

    found, _ = search(outcome, 120, reads=False)
    best = found[0]
    assert best.choice.scope == "layers:4-6"
    assert best.choice.strength == pytest.approx(0.9)
    assert [t.cost for t in found[1:]] == sorted(t.cost for t in found[1:])


def fitted(first: int) -> EditConfig:
    return EditConfig(method="conditional", scope=f"from:{first}", position=-1, per_layer=True)


@pytest.mark.parametrize(("kl", "plain"), [(0.02, 6), (0.2, 2)])
def test_starts_that_are_not_fitted_are_given_up_once_two_cost_far_more_than_a_fitted_one(kl, plain):
    oracle = Oracle(lambda choice: (0.0, 0.01 if choice.method == "conditional" else kl))
    starts = [fitted(6), *space([candidate(6, -9), candidate(5, -8)]).starts()[:6], fitted(9)]
    trials = EditSearch(None, build=None, readout=None, target=(), answers=None, known=oracle)
    trials.search(len(starts) * 2, starts, lambda *_: [])
    assert [choice for choice in oracle.asked if choice.method == "ablate"] == starts[1 : 1 + plain]
    assert oracle.asked[-1] == fitted(9), "the fitted ones are all tried"


@pytest.mark.parametrize(("left", "asked"), [(0.0, 3), (0.5, 6)])
def test_search_ends_where_nothing_near_an_edit_that_does_what_it_should_is_better(left, asked):
    oracle = Oracle(lambda choice: (left, 0.01 + 0.001 * abs(choice.strength - 1)))
    trials = EditSearch(None, build=None, readout=None, target=(), answers=None, known=oracle)

    def neighbours(choice, _step):
        return [choice.model_copy(update={"strength": choice.strength + change}) for change in (-0.1, 0.1)]

    found = trials.search(6, [fitted(6)], neighbours)
    assert found[0].choice == fitted(6)
    assert len(oracle.asked) == asked


def test_search_does_not_pay_any_kl_for_a_little_behaviour():
    """Nothing reaches the threshold; one edit leaves slightly less at an enormous KL."""
    found, _ = search(lambda c: (0.0110, 3.0) if c.scope == "all" else (0.012, 0.01), 8)
    assert found[0].choice.scope != "all"


def test_preserved_sets_are_measured_and_ordered(base):
    """An edit is made by any function of its configuration."""
    model, positive, negative, other = load(base), some_ids(6, 1), some_ids(7, 2), some_ids(5, 6)
    directions = directions_of(model, positive, negative)
    build = EditBuilder(directions, [], False)
    own, preserved = (AnsweredPrompts(model, ids, generate(model, ids, 5, [])) for ids in (negative, other))
    search = EditSearch(model, build, READOUT, positive, own, {"other": preserved})
    choice = EditConfig(method="ablate", scope="all", position=-1, layer=2)
    found = search.run(choice)
    with intervened(model, build(choice), renormalise=False):
        scores = behaviour_score(plain_probabilities(model, positive), TOKENS)
    assert found.score == pytest.approx(scores.mean().item(), abs=1e-5)
    drift = preserved.drift(lambda: search.edited(choice))
    assert found.preserved == {"other": drift.kl}
    assert found.kls == {"": own.drift(lambda: search.edited(choice)).kls, "other": drift.kls}
    assert found.drift == pytest.approx((found.kl + drift.kl) / 2)
    nothing = EditSearch(model, lambda _: Intervention(), READOUT, positive, own).run(choice)
    assert (nothing.kl, nothing.first_kl, nothing.ce_increase) == (0.0, 0.0, 0.0)
    assert math.isclose(sum(found.kls[""]) / len(negative), found.kl)


def test_interrupted_search_resumes_to_the_same_result(base, tmp_path):
    """Trials come back from the journal with the KLs of every prompt, on which the order depends."""
    model, positive, negative = load(base), some_ids(6, 1), some_ids(7, 2)
    directions = directions_of(model, positive, negative)
    ranked = [Candidate("dim", -1, layer, LAYERS, -layer, 1.0, 0.01) for layer in (2, 1)]
    where = SearchSpace(directions, ranked)

    def searched(file):
        own = AnsweredPrompts(model, negative, generate(model, negative, 5, []))
        build = EditBuilder(directions, ranked, False)
        trials = EditSearch(model, build, READOUT, positive, own, known=Journal(file, "inputs"))
        return trials.search(8, where.starts(), where.neighbours, where.largest_step)

    whole = searched(tmp_path / "journal")
    assert len(whole) == 8
    lines = (tmp_path / "journal").read_text().splitlines(keepends=True)
    (tmp_path / "journal").write_text("".join(lines[:4]) + lines[4][:50])  # killed in the middle of a line
    assert searched(tmp_path / "journal") == whole


def test_confirmation_takes_the_first_edit_whose_answers_do_not_refuse(tmp_path):
    found, _ = search(lambda c: (0.0, 0.1 * c.strength), 8)
    rates = iter([0.9, 0.4, 0.0])
    trials = EditSearch(None, build=None, readout=None, target=(), answers=None)
    trials.edited = lambda choice: Journal(tmp_path / "none").kept()  # any context
    confirmed = confirm(trials, found, Journal(tmp_path / "journal"), lambda: AnswerShares(next(rates), 0.25))
    assert confirmed[0].choice == found[1].choice
    assert [t.confirmed for t in confirmed[:3]] == [0.0, 0.4, None]
    assert [(t.degenerate, t.degenerate_before) for t in confirmed[1:3]] == [(0.25, 0.25), (None, None)]
    assert len(confirmed) == len(found)


@pytest.mark.parametrize("scope", ["all", "layers:2-3", "from:3"])
def test_a_trial_that_starts_halfway_measures_the_same(base, scope):
    model, target, negative, other = load(base), some_ids(6, 1), some_ids(7, 2), some_ids(5, 6)
    build = EditBuilder(directions_of(model, target, negative), [], False)
    choice = EditConfig(method="ablate", scope=scope, position=-1, layer=2)

    def tried(layer: int) -> Trial:
        own, kept = (AnsweredPrompts(model, ids, generate(model, ids, 5, []), layer=layer) for ids in (negative, other))
        return EditSearch(model, build, READOUT, target, own, {"kept": kept}, layer=layer).run(choice)

    whole, halfway = tried(0).model_dump(), tried(2).model_dump()
    for name in ("left", "score", "kl", "first_kl", "ce_increase", "before", "usual"):
        assert halfway[name] == pytest.approx(whole[name], abs=1e-6), name
    assert halfway["flipped"] == pytest.approx(whole["flipped"], abs=1e-6)
    assert whole["kl"] > 1e-3, "the edit does nothing, so nothing was compared"


def test_what_is_left_to_strengthen_are_the_prompts_that_lack_it(base):
    model, target, negative, examples = load(base), some_ids(6, 1), some_ids(7, 2), some_ids(5, 6)
    build = EditBuilder(directions_of(model, target, negative), [], False)
    own = AnsweredPrompts(model, negative, generate(model, negative, 5, []))
    choice = EditConfig(method="actadd", scope="one", position=-1, layer=2)
    found = EditSearch(model, build, READOUT, target, own, examples=examples).run(choice)
    with intervened(model, build(choice), renormalise=False):
        edited = behaviour_score(plain_probabilities(model, target), TOKENS)
    assert found.left == pytest.approx(share_left(-edited), abs=1e-6)
    assert found.before == pytest.approx(share_left(-behaviour_score(plain_probabilities(model, target), TOKENS)))
    assert found.usual == pytest.approx(share_left(-behaviour_score(plain_probabilities(model, examples), TOKENS)))


def test_a_behaviour_is_strengthened_by_additions_and_fits():
    ranked = rank([candidate(6, -9), candidate(5, -8)])
    empty = torch.zeros(2, COUNT + 1, 3)
    where = SearchSpace(Directions((-2, -1), empty, {}, empty, empty), ranked, strengthen=True)
    assert {c.method for c in where.starts()} == {"actadd"}
    assert {c.strength for c in where.starts()} == {0.5, 1.0, 2.0}
    near = where.neighbours(where.starts()[0], 1)
    assert {(c.layer, c.strength) for c in near} == {(6, 1.4), (6, 0.7), (7, 1.0), (5, 1.0)}


def test_conditional_edits_start_from_several_spans_weights_and_kinds_and_move_in_each():
    where = space([candidate(6, -9)])
    starts = where.fitted_starts()
    for attribute, values in (("scope", 3), ("target_weight", 3), ("span", 2)):
        assert len({getattr(c, attribute) for c in starts}) == values
    near = where.neighbours(starts[0], 2)
    assert {c.scope for c in near} == {"from:4", "from:6", "from:8"}
    assert {c.target_weight for c in near} == {0.1, 0.3, 0.9}
    assert all(c.strength == 1 for c in near if (c.scope, c.target_weight) != (starts[0].scope, 0.3))


def test_no_conditional_edit_leaves_the_model_or_weighs_the_target_alone():
    where = space([candidate(6, -9)])
    last = where.fitted_starts()[0].model_copy(update={"scope": "from:11", "target_weight": 9.0})
    assert {c.scope for c in where.neighbours(last, 3)} == {"from:8", "from:11"}
    assert max(c.target_weight for c in where.neighbours(last, 3)) == 9.0
