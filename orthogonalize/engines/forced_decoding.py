"""Forced decoding in vLLM: the branches of a choice search as requests that only take given continuations.

vLLM also imports this module in the process that samples. It reports log-probabilities from before any logits
processor, so they are the model's own.
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

LISTED = 128  # the maximum number of tokens whose log-probabilities vLLM returns at each step, besides the one taken
KEY = "orthogonalize_walk"


def parameters_for(branch: Branch) -> SamplingParams:
    """Sampling parameters of the request for `branch`, whose prompt ends with the branch's start.

    To end the branch early, the request takes a stop token that no continuation contains.
    """
    tokens = tokens_of(tree_of(branch.continuations))
    stop = next(token for token in count() if token not in tokens)
    longest = max(map(len, branch.continuations))
    scored_at_once = longest == 1 and len(tokens) <= LISTED  # nothing to force
    forced = {"continuations": branch.continuations, "floor": branch.floor, "stop": stop, "listed": tokens[:LISTED]}
    return SamplingParams(
        temperature=0.0,
        max_tokens=longest,
        logprob_token_ids=tokens[:LISTED],
        ignore_eos=True,
        stop_token_ids=[stop],
        detokenize=False,
        extra_args=None if scored_at_once else {KEY: forced},
    )


def decide(
    engine: Any,
    contexts: Sequence[Sequence[int]],
    searches: Sequence[ChoiceSearch],
    at_once: int | None,
    advance: Callable[[int], object],
) -> None:
    """Run every search until it knows its likeliest choice; `engine` is vLLM's `LLMEngine`.

    Searches proceed independently, with `at_once` branches at a time (None: all), each a request after the cached
    context.
    """
    running: dict[str, tuple[int, Branch]] = {}
    open_branches = [0] * len(searches)
    numbers = count()

    def advance_search(question: int) -> None:
        branches = searches[question].branches()[:at_once]
        for branch in branches:
            name = f"branch-{next(numbers)}"
            running[name] = (question, branch)
            engine.add_request(name, {"prompt_token_ids": [*contexts[question], *branch.start]}, parameters_for(branch))
        open_branches[question] = len(branches)
        advance(not branches)

    try:
        for question in range(len(searches)):
            advance_search(question)
        while running:
            for output in engine.step():
                if not output.finished:
                    continue
                question, branch = running.pop(output.request_id)
                if not output.outputs[0].token_ids:  # else it would be requested forever
                    raise RuntimeError(f"a request ended without a token ({output.outputs[0].finish_reason})")
                searches[question].learn(branch, _steps(output.outputs[0]))
                open_branches[question] -= 1
                if not open_branches[question]:
                    advance_search(question)
    except BaseException:
        with suppress(Exception):  # the engine may be dead; if not, it must be free for the next requests
            engine.abort_request(list(running))
        raise


def _steps(output: Any) -> Iterator[tuple[int, dict[int, float]]]:
    """The token taken at every step, and the log-probabilities returned for it."""
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        yield token, {candidate: entry.logprob for candidate, entry in entries.items()}


@dataclass
class ForcedSequence:
    """One request's state: its prefix tree of continuations and the tokens taken so far."""

    taken: list[int]  # vLLM's own list, which it appends to
    tree: Tree
    floor: float
    stop: int
    listed: frozenset[int]
    total: float = field(default=0.0)

    @classmethod
    def of(cls, parameters: SamplingParams, _: list[int] | None, taken: list[int]) -> ForcedSequence | None:
        """The state of a new request; None if it is not forced."""
        forced = (parameters.extra_args or {}).get(KEY)
        if forced is None:
            return None
        return cls(
            taken, tree_of(forced["continuations"]), forced["floor"], forced["stop"], frozenset(forced["listed"])
        )

    def candidates(self) -> list[int]:
        """The tokens that may come next; the stop token if there is none."""
        node = self.tree
        for token in self.taken:
            node = node.get(token, {})
        return list(node) or [self.stop]

    def take(self, token: int, logprob: float) -> int:
        """The token to take if `token` is the likeliest candidate: itself, or the stop token if it ends the branch."""
        self.total += logprob
        node = self.tree
        for before in (*self.taken, token):
            node = node.get(before, {})
        ends = not node or self.total < self.floor
        return self.stop if ends and token in self.listed else token


class ForcedDecoding(LogitsProcessor):  # type: ignore[misc]
    """The vLLM logits processor that makes each `ForcedSequence`'s next token the likeliest."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.sequences: dict[int, ForcedSequence] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.sequences, batch_update, ForcedSequence.of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sequences:
            rows, sequences = list(self.sequences), list(self.sequences.values())
            best, logprobs = _likeliest(logits[rows], [sequence.candidates() for sequence in sequences])
            taken = [
                sequence.take(token, logprob)
                for sequence, token, logprob in zip(sequences, best, logprobs, strict=True)
            ]
            logits[rows, taken] = math.inf
        return logits


def _likeliest(logits: torch.Tensor, candidates: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
    """Each row's likeliest candidate and its log-probability in nats; `logits` is [rows, vocabulary]."""
    width = max(map(len, candidates))
    # Shorter rows are padded with their first candidate.
    padded = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in candidates], device=logits.device)
    logprobs, places = logits.log_softmax(1).gather(1, padded).max(1)
    return padded.gather(1, places[:, None])[:, 0].tolist(), logprobs.tolist()
