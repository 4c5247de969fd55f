"""The search for the likeliest choice, whatever the model's logits, from what a walk in vLLM reports."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonalize.engines.choice_search import Branch, ChoiceSearch, tokens_of, tree_of

forced = pytest.importorskip("orthogonalize.engines.forced_decoding", reason="needs vLLM")
VOCABULARY = 300
TREE = {1: {2: {}, 3: {4: {}}}, 5: {}}

tokens = st.integers(0, 5)
questions = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=7)


class Model:
    """Made-up logits for every prefix, from a seed; `sharp` scales them, small values giving near ties."""

    def __init__(self, seed: int, sharp: float = 3.0) -> None:
        self.seed, self.sharp = seed, sharp

    def logits(self, beginning: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *beginning)) % 2**62)
        return torch.randn(VOCABULARY, generator=generator) * self.sharp

    def score(self, choice: Sequence[int], context: Sequence[int] = ()) -> float:
        steps = (self.logits([*context, *choice[:i]]).log_softmax(0)[token] for i, token in enumerate(choice))
        return float(sum(steps))

    def answer(self, prompt, parameters) -> list[tuple[int, dict[int, float]]]:
        """As vLLM answers: processors change which token is taken, not the reported log-probabilities."""
        taken: list[int] = []
        processor = forced.ForcedDecoding(None, torch.device("cpu"), False)
        follower = forced.ForcedSequence.of(parameters, None, taken)
        if follower is not None:
            processor.sequences = {1: follower}
        steps = []
        while len(taken) < parameters.max_tokens:
            raw = self.logits([*prompt, *taken])
            logits = torch.stack([torch.zeros(VOCABULARY), raw.clone()])
            token = int(processor.apply(logits)[1].argmax())
            assert not logits[0].any()  # a request that follows no walk is left alone
            logprobs = raw.log_softmax(0)
            steps.append((token, {t: float(logprobs[t]) for t in {token, *parameters.logprob_token_ids}}))
            if token in parameters.stop_token_ids:
                break
            taken.append(token)
        return steps


def settle(model: Model, choices: Sequence[Sequence[int]], at_once: int | None = 1) -> tuple[list[float], int]:
    """The scores, and how many tokens were computed."""
    contest, steps = ChoiceSearch(choices), 0
    while walks := contest.branches()[:at_once]:
        before = len(contest.known)
        for walk in walks:
            found = model.answer(walk.start, forced.parameters_for(walk))
            contest.learn(walk, found)
            steps += len(found)
        assert len(contest.known) > before  # otherwise the loop would never end
    return contest.bounds(), steps


@settings(deadline=None)
@given(questions, st.integers(0, 2**32), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([1, None]))
def test_likeliest_choice_is_exact_and_bounds_the_others(choices, seed, sharp, at_once):
    model = Model(seed, sharp)
    found, _ = settle(model, choices, at_once)
    true = [model.score(choice) for choice in choices]
    best = max(true)
    assert max(found) == pytest.approx(best, abs=1e-4)
    assert true[found.index(max(found))] == pytest.approx(best, abs=1e-4)
    assert all(bound >= score - 1e-4 for bound, score in zip(found, true, strict=True))


class Engine:
    """The part of vLLM's `LLMEngine` that is used: one request ends per step, the latest first."""

    def __init__(self, model: Model) -> None:
        self.model, self.waiting, self.aborted = model, {}, []

    def add_request(self, name, prompt, parameters):
        assert name not in self.waiting
        self.waiting[name] = (prompt["prompt_token_ids"], parameters)

    def step(self):
        name, (prompt, parameters) = self.waiting.popitem()
        steps = self.model.answer(prompt, parameters)
        entries = [{t: SimpleNamespace(logprob=v) for t, v in found.items()} for _, found in steps]
        answer = SimpleNamespace(token_ids=[t for t, _ in steps], logprobs=entries, finish_reason="length")
        yield SimpleNamespace(finished=False, request_id=name, outputs=[])
        yield SimpleNamespace(finished=True, request_id=name, outputs=[answer])

    def abort_request(self, names):
        self.aborted += names
        raise RuntimeError("already dead")


@settings(deadline=None)
@given(st.lists(questions, min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([1, 2, None]))
def test_concurrent_searches_find_what_each_finds_alone(rows, seed, at_once):
    model, contexts = Model(seed), [[100 + i, 7] for i in range(len(rows))]
    contests, advanced = [ChoiceSearch(row) for row in rows], []
    forced.decide(Engine(model), contexts, contests, at_once, advanced.append)
    assert sum(advanced) == len(rows)
    for contest, context, row in zip(contests, contexts, rows, strict=True):
        best = max(model.score(choice, context) for choice in row)
        assert max(contest.bounds()) == pytest.approx(best, abs=1e-4)


def test_engine_error_is_raised_and_open_requests_aborted():
    class Dying(Engine):
        def step(self):
            self.waiting.popitem()
            raise MemoryError("no room")

    engine = Dying(Model(0))
    with pytest.raises(MemoryError, match="no room"):
        forced.decide(engine, [[1], [2]], [ChoiceSearch([[3, 4]]), ChoiceSearch([[5, 6]])], 1, lambda _: None)
    assert engine.aborted == ["branch-0", "branch-1"]


def test_request_that_ends_with_nothing_is_an_error():
    """Rather than asked again forever."""

    class Silent(Model):
        def answer(self, prompt, parameters):
            return []

    with pytest.raises(RuntimeError, match="a request ended without a token"):
        forced.decide(Engine(Silent(0)), [[1]], [ChoiceSearch([[3, 4]])], 1, lambda _: None)


def test_more_tokens_than_vllm_lists_take_several_walks():
    model = Model(seed=4)
    for choices in ([[i] for i in range(2 * forced.LISTED + 9)], [[i, i + 1] for i in range(forced.LISTED + 9)]):
        found, _ = settle(model, choices)
        assert max(found) == pytest.approx(max(map(model.score, choices)), abs=1e-4)


def test_single_token_choices_take_one_step():
    (walk,) = ChoiceSearch([[7], [8], [9]]).branches()
    parameters = forced.parameters_for(walk)
    assert (parameters.max_tokens, parameters.extra_args, parameters.logprob_token_ids) == (1, None, [7, 8, 9])
    assert settle(Model(seed=1), [[7], [8], [9]])[1] == 1


def test_walk_ends_where_a_known_choice_is_likelier():
    """Three choices of four tokens: the one that begins best ends badly, the next is the likeliest, and the last,
    which begins well enough, is ruled out by one more token."""
    first = torch.full((VOCABULARY,), 1e-4).index_put_((torch.tensor([10, 20, 30]),), torch.tensor([0.4, 0.3, 0.28]))

    class Told(Model):
        def logits(self, beginning):
            if not beginning:
                return first.log()
            expected = beginning[-1] + 1 if beginning[0] == 20 else 0
            return torch.zeros(VOCABULARY).index_fill(0, torch.tensor([expected]), 9.0)

    choices = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]]
    found, steps = settle(Told(0), choices)
    assert found.index(max(found)) == 1
    assert steps == 4 + 3 + 1
    assert ChoiceSearch(choices).branches() == [Branch((), tuple(map(tuple, choices)), -math.inf)]


def test_trees_list_their_tokens_level_by_level():
    assert tree_of([[1, 2], [1, 3, 4], [5]]) == TREE
    assert tokens_of(TREE) == [1, 5, 2, 3, 4]
