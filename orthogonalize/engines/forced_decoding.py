"""Walks of a contest as requests of vLLM, which follow given continuations instead of what the model would say.

vLLM imports this module in the process that samples, too. Log-probabilities are those before any processor, so a
request is told what the model thought of every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from .choice_search import Branch, ChoiceSearch, Tree, tokens_of, tree_of

LISTED = 128  # the most tokens whose log-probabilities vLLM tells of at every step, beside the one it takes
KEY = "orthogonalize_walk"


def following(walk: Branch) -> SamplingParams:
    """Parameters of a request for `walk`, whose prompt ends with its start.

    It stops with a token that no continuation has, in place of one that ends the walk.
    """
    tokens = tokens_of(tree_of(walk.continuations))
    stop = next(token for token in count() if token not in tokens)
    longest = max(map(len, walk.continuations))
    looked_at = longest == 1 and len(tokens) <= LISTED  # then none need be followed
    told = {"continuations": walk.continuations, "floor": walk.floor, "stop": stop, "listed": tokens[:LISTED]}
    return SamplingParams(
        temperature=0.0,
        max_tokens=longest,
        logprob_token_ids=tokens[:LISTED],
        ignore_eos=True,
        stop_token_ids=[stop],
        detokenize=False,
        extra_args=None if looked_at else {KEY: told},
    )


def decide(
    engine: Any,
    contexts: Sequence[Sequence[int]],
    contests: Sequence[ChoiceSearch],
    at_once: int | None,
    advance: Callable[[int], object],
) -> None:
    """Walk until every contest knows its likeliest choice; `engine` is vLLM's `LLMEngine`.

    Every contest goes its own pace, `at_once` walks at a time (or all), each a request behind the cached context.
    """
    under_way: dict[str, tuple[int, Branch]] = {}
    open_walks = [0] * len(contests)
    numbers = count()

    def go_on(question: int) -> None:
        walks = contests[question].walks()[:at_once]
        for walk in walks:
            name = f"walk-{next(numbers)}"
            under_way[name] = (question, walk)
            engine.add_request(name, {"prompt_token_ids": [*contexts[question], *walk.start]}, following(walk))
        open_walks[question] = len(walks)
        advance(not walks)

    try:
        for question in range(len(contests)):
            go_on(question)
        while under_way:
            for output in engine.step():
                if not output.finished:
                    continue
                question, walk = under_way.pop(output.request_id)
                if not output.outputs[0].token_ids:  # it would be asked the same for ever
                    raise RuntimeError(f"a request ended with nothing ({output.outputs[0].finish_reason})")
                contests[question].learn(walk, _steps(output.outputs[0]))
                open_walks[question] -= 1
                if not open_walks[question]:
                    go_on(question)
    except BaseException:
        with suppress(Exception):  # it may be dead; if it lives, it is to be free of these for what is asked next
            engine.abort_request(list(under_way))
        raise


def _steps(output: Any) -> Iterator[tuple[int, dict[int, float]]]:
    """The token of every step, and the log-probabilities told of there."""
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        yield token, {candidate: entry.logprob for candidate, entry in entries.items()}


@dataclass
class ForcedSequence:
    """One request's way through its continuations, from the tokens that it has taken on."""

    taken: list[int]  # vLLM's own list, which grows
    tree: Tree
    floor: float
    stop: int
    listed: frozenset[int]
    total: float = field(default=0.0)

    @classmethod
    def of(cls, parameters: SamplingParams, _: list[int] | None, taken: list[int]) -> ForcedSequence | None:
        told = (parameters.extra_args or {}).get(KEY)
        if told is None:
            return None
        return cls(taken, tree_of(told["continuations"]), told["floor"], told["stop"], frozenset(told["listed"]))

    def candidates(self) -> list[int]:
        """The tokens that may be taken now; the stop where there is none."""
        node = self.tree
        for token in self.taken:
            node = node.get(token, {})
        return list(node) or [self.stop]

    def take(self, token: int, logprob: float) -> int:
        """The token to take where `token` is the likeliest candidate: itself, or the stop if it ends the walk."""
        self.total += logprob
        node = self.tree
        for before in (*self.taken, token):
            node = node.get(before, {})
        ends = not node or self.total < self.floor
        return self.stop if ends and token in self.listed else token


class ForcedDecoding(LogitsProcessor):  # type: ignore[misc]
    """Makes the token that a request's `ForcedSequence` takes the likeliest of all."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.followers: dict[int, ForcedSequence] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.followers, batch_update, ForcedSequence.of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.followers:
            rows, followers = list(self.followers), list(self.followers.values())
            best, logprobs = _likeliest(logits[rows], [follower.candidates() for follower in followers])
            taken = [f.take(token, logprob) for f, token, logprob in zip(followers, best, logprobs, strict=True)]
            logits[rows, taken] = math.inf
        return logits


def _likeliest(logits: torch.Tensor, candidates: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
    """Of every row's candidates the likeliest, and its log-probability; `logits` is [rows, vocabulary]."""
    width = max(map(len, candidates))
    # A row with fewer candidates repeats its first.
    padded = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in candidates], device=logits.device)
    logprobs, places = logits.log_softmax(1).gather(1, padded).max(1)
    return padded.gather(1, places[:, None])[:, 0].tolist(), logprobs.tolist()
