"""Scores of a model's behaviour at the first token, and of how far an edit changes its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.interventions import AffineMap, Intervention, Site, block_sites
from ..models.activations import batches, pad
from ..models.hooks import capturing_inputs, input_shifted, intervened, layer_projected
from ..models.partial_forward import StreamCache, noting_tuples, starting_at

SMOOTHING = 1e-6  # added to probabilities inside the logarithms of `smoothed_kl`
LEAST_PROBABILITY = 1e-8  # of the behaviour, and of all else
LARGEST_SCORE = math.log(1 / LEAST_PROBABILITY - 1)


def last_logits(model: Any, padded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Logits [batch, vocabulary] at the last real token of each row; the head is applied only there."""
    ends, row_end = torch.unique(lengths - 1, return_inverse=True)
    logits = model(input_ids=padded, use_cache=False, logits_to_keep=ends).logits
    return logits[torch.arange(len(padded), device=logits.device), row_end]  # type: ignore[no-any-return]


@torch.inference_mode()
def first_token_probabilities(
    model: Any, ids: Sequence[Sequence[int]], around: Callable[[int], AbstractContextManager[Any]] | None = None
) -> torch.Tensor:
    """The probabilities [prompts, vocabulary] of the first answer token, on the CPU.

    `around` gives a context for each forward pass, by its number.
    """
    result: torch.Tensor | None = None
    for number, group in enumerate(batches(ids)):
        padded, lengths = pad([ids[i] for i in group], model.device)
        with around(number) if around else nullcontext():
            part = last_logits(model, padded, lengths).float().softmax(-1).cpu()
        if result is None:
            result = torch.empty(len(ids), part.shape[-1])
        result[group] = part
    assert result is not None
    return result


def behaviour_score(probabilities: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`log p - log(1 - p)` of the behaviour tokens' total probability p (Arditi et al. 2024, section 2.3).

    Takes probabilities [..., vocabulary], returns log-odds [...]; p is clamped to [1e-8, 1 - 1e-8].
    """
    p = probabilities[..., list(tokens)].sum(-1).double().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return p.log() - (1 - p).log()


def log_odds(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`behaviour_score` from logits [..., vocabulary], in float64, with gradients."""
    wide = logits.double()
    inside = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
    inside[list(tokens)] = True
    odds = wide[..., inside].logsumexp(-1) - wide[..., ~inside].logsumexp(-1)
    return odds.clamp(-LARGEST_SCORE, LARGEST_SCORE)


class FirstTokenScores:
    """Behaviour scores of the same prompts under many edits.

    The model starts at block `layer` under edits that spare its input.
    """

    def __init__(self, model: Any, ids: Sequence[Sequence[int]], tokens: Sequence[int], layer: int = 0) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        self._streams = StreamCache(model, layer)

    @cached_property
    def base(self) -> torch.Tensor:
        """The scores [prompts] of the model as it is."""
        return self._scores(self._streams.recording)

    def edited(self, edited: Callable[[], AbstractContextManager[Any]], spared: bool = False) -> torch.Tensor:
        """The scores [prompts] within the context `edited()`; `spared`: whether it spares the input of `layer`."""
        assert self.base is not None  # from which the streams are recorded

        @contextmanager
        def around(number: int) -> Iterator[None]:
            with self._streams.resumed(number) if spared else nullcontext(), edited():
                yield

        return self._scores(around)

    def _scores(self, around: Callable[[int], AbstractContextManager[Any]]) -> torch.Tensor:
        return behaviour_score(first_token_probabilities(self.model, self.ids, around), self.tokens)


def smoothed_kl(base: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """The score of eliroc98/refusal_direction for how far probabilities over the last axis moved, in nats.

    `sum p (log(p + 1e-6) - log(q + 1e-6))` of the base's p and the edited model's q. It ranks directions as the
    reference does, but is a KL only up to the constant: where q is far below 1e-6 it is too low, and it can be slightly
    negative. Whole edits are compared by the exact KL (see `drift`).
    """
    p, q = base.double(), edited.double()
    return (p * ((p + SMOOTHING).log() - (q + SMOOTHING).log())).sum(-1)


def learn_behaviour_tokens(positive: torch.Tensor, negative: torch.Tensor, most: int = 8) -> list[int]:
    """The first tokens that distinguish the model's answers to the two sides, at most `most`.

    Takes the first-token probabilities [prompts, vocabulary] of each side. Tokens are added in order of how much more
    probable they are on the positive side, until they cover nine tenths of the total difference.

    Raises:
        OrthogonalizeError: the first tokens of the answers hardly differ.
    """
    gain = positive.double().mean(0) - negative.double().mean(0)
    total = gain.clamp(min=0).sum()
    if total < 0.05:
        raise OrthogonalizeError(
            "the model begins its answers to both sides in the same way, so no behaviour tokens can be learnt; "
            "give them with --behaviour-tokens"
        )
    values, order = gain.topk(most)
    tokens: list[int] = []
    covered = 0.0
    for value, token in zip(values.tolist(), order.tolist(), strict=True):
        if tokens and (covered >= 0.9 * total or value < 0.02):
            break
        tokens.append(token)
        covered += value
    return tokens


class LocalScorer:
    """First-token probabilities under edits at one layer, for a fixed set of prompts.

    An edit at layer l does not affect the blocks before l, so their outputs are computed once and every pass starts at
    l. Several maps (one per position) share a batch, in which each row has its own map.
    """

    def __init__(self, model: Any, ids: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.groups = [[ids[i] for i in group] for group in batches(ids, tokens=1024)]
        self.order = [i for group in batches(ids, tokens=1024) for i in group]
        self.inputs: list[list[torch.Tensor]] = []
        self.wrapped = False

        def note(wrapped: bool) -> None:
            self.wrapped = wrapped

        with noting_tuples(model, note):
            for group in self.groups:
                stream: list[torch.Tensor] = []
                padded, _ = pad(group, model.device)
                with torch.inference_mode(), capturing_inputs(model, lambda _l, h, s=stream: s.append(h.clone())):  # type: ignore[misc]
                    model(input_ids=padded, use_cache=False, logits_to_keep=1)
                self.inputs.append(stream)

    @torch.inference_mode()
    def probabilities(self, layer: int, maps: AffineMap, projected: bool) -> torch.Tensor:
        """Probabilities [maps, prompts, vocabulary] with each of the batched `maps` at `layer`.

        If `projected`, the maps act on the block's input and both its outputs, otherwise only on the input.
        """
        count = len(maps.s)
        parts = []
        for group, stream in zip(self.groups, self.inputs, strict=True):
            padded, lengths = pad(group, self.model.device)
            rows = maps.to(self.model.device, torch.float32)
            rows = AffineMap(*(t.repeat_interleave(len(group), 0) for t in (rows.u, rows.v, rows.s)))
            edit = layer_projected if projected else input_shifted
            resumed = starting_at(self.model, layer, stream[layer].repeat(count, 1, 1), self.wrapped)
            with resumed, edit(self.model, layer, rows):
                logits = last_logits(self.model, padded.repeat(count, 1), lengths.repeat(count))
            parts.append(logits.float().softmax(-1).reshape(count, len(group), -1).cpu())
        result = torch.cat(parts, dim=1)
        return result[:, torch.tensor(self.order).argsort()]


@torch.inference_mode()
def global_probabilities(model: Any, ids: Sequence[Sequence[int]], maps: AffineMap, layers: int) -> torch.Tensor:
    """First-token probabilities [maps, prompts, vocabulary] with each of the batched `maps` at every write.

    For a projection this equals the reference's hooks on every block input and output; a shift is added once, at the
    embedding.
    """
    count = len(maps.s)
    result: torch.Tensor | None = None
    for group in batches(ids, tokens=1024):
        rows = maps.to(model.device, torch.float32)
        rows = AffineMap(*(t.repeat_interleave(len(group), 0) for t in (rows.u, rows.v, rows.s)))
        writes = {Site("embed"): rows} | dict.fromkeys(block_sites(range(layers)), rows.unshifted)
        padded, lengths = pad([ids[i] for i in group], model.device)
        with intervened(model, Intervention(writes=writes)):
            logits = last_logits(model, padded.repeat(count, 1), lengths.repeat(count))
        part = logits.float().softmax(-1).reshape(count, len(group), -1).cpu()
        if result is None:
            result = torch.empty(count, len(ids), part.shape[-1])
        result[:, group] = part
    assert result is not None
    return result
