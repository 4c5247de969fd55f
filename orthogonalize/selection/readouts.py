"""Readouts: how far the behaviour shows, read from one forward pass without generating an answer.

The search tries many edits, so it goes by readouts. Scores are log-odds, or scaled like them: above 0 the behaviour
shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..core.errors import OrthogonalizeError

LEAST_PROBABILITY = 1e-8  # of the behaviour, and of all else
LARGEST_SCORE = math.log(1 / LEAST_PROBABILITY - 1)
MOST = 8  # tokens that are learnt
LEAST_GAIN = 0.05  # of probability, by which first tokens must differ between the sides
READ_LAYERS = 0.1  # of the model's layers, at which `NearerSide` reads
SIDE = 4.0  # the scores of the two sides' means are plus and minus this, about 98% in log-odds


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives at the last token of each prompt.

    Attributes:
        probabilities: of the next token, [..., vocabulary].
        streams: the residual stream at the inputs of the layers that were asked for, each [..., d]; layer
            `layer_count` is what the head's norm reads.
    """

    probabilities: torch.Tensor
    streams: Mapping[int, torch.Tensor]


class Readout(Protocol):
    """Scores prompts by a forward pass; `layers` are those whose streams it needs."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    def scores(self, outputs: Outputs) -> torch.Tensor:
        """The scores [...] of outputs [..., vocabulary] and [..., d]; above 0 the behaviour shows."""


def behaviour_score(probabilities: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`log p - log(1 - p)` of the behaviour tokens' total probability p (Arditi et al. 2024, section 2.3).

    Takes probabilities [..., vocabulary], returns log-odds [...]; p is clamped to [1e-8, 1 - 1e-8].
    """
    return _odds(probabilities[..., list(tokens)].sum(-1))


def _odds(share: torch.Tensor) -> torch.Tensor:
    """The log-odds of probabilities, in float64."""
    p = share.double().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return p.log() - (1 - p).log()


def log_odds(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`behaviour_score` from logits [..., vocabulary], in float64, with gradients."""
    return unbounded_log_odds(logits, tokens).clamp(-LARGEST_SCORE, LARGEST_SCORE)


def unbounded_log_odds(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`log_odds` without bounds, so that also what is beyond them has a gradient."""
    wide = logits.double()
    inside = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
    inside[list(tokens)] = True
    return wide[..., inside].logsumexp(-1) - wide[..., ~inside].logsumexp(-1)


@dataclass(frozen=True)
class FirstToken:
    """The log-odds that an answer begins with one of `tokens`, less `threshold` (log-odds)."""

    tokens: tuple[int, ...]
    threshold: float = 0.0
    layers: tuple[int, ...] = ()

    def scores(self, outputs: Outputs) -> torch.Tensor:
        return behaviour_score(outputs.probabilities, self.tokens) - self.threshold

    def of_share(self, share: torch.Tensor) -> torch.Tensor:
        """The scores for total probabilities of `tokens`."""
        return _odds(share) - self.threshold


@dataclass(frozen=True)
class NearerSide:
    """Which side's mean the stream is nearer to, by cosine, at a few layers (as COSMIC, Siu et al. 2025).

    The mean over `layers` of `cos(h, positive) - cos(h, negative)`, scaled so that the two sides' own means score
    `SIDE` and `-SIDE`. It reads what the model represents, not what it says.

    Attributes:
        positive, negative: the means, [layers, d].
        middle, scale: the zero and the unit of the difference of cosines.
    """

    layers: tuple[int, ...]
    positive: torch.Tensor
    negative: torch.Tensor
    middle: float
    scale: float

    def scores(self, outputs: Outputs) -> torch.Tensor:
        streams = torch.stack([outputs.streams[layer] for layer in self.layers], -2)
        return (_nearness(streams, self.positive, self.negative) - self.middle) * self.scale

    @classmethod
    def fitted(cls, positive: Mapping[int, torch.Tensor], negative: Mapping[int, torch.Tensor]) -> NearerSide:
        """Fitted to the streams [prompts, d] of both sides by layer.

        It reads at the tenth of the model's layers whose means are least alike, as COSMIC does, among those given.

        Raises:
            OrthogonalizeError: the sides have the same means everywhere.
        """
        means = {layer: (positive[layer].double().mean(0), negative[layer].double().mean(0)) for layer in positive}
        alike = {layer: torch.cosine_similarity(*pair, dim=0).item() for layer, pair in means.items()}
        count = max(1, round(READ_LAYERS * max(positive)))
        layers = tuple(sorted(sorted(alike, key=alike.__getitem__)[:count]))
        ends = [torch.stack([means[layer][side] for layer in layers]) for side in (0, 1)]
        nearness = [
            _nearness(torch.stack([streams[layer] for layer in layers], -2), *ends).mean().item()
            for streams in (positive, negative)
        ]
        if not nearness[0] > nearness[1]:
            raise OrthogonalizeError("both sides have the same activations, so no direction tells them apart")
        scale = 2 * SIDE / (nearness[0] - nearness[1])
        return cls(layers, ends[0], ends[1], sum(nearness) / 2, scale)


def _nearness(streams: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The mean over layers of the difference of cosines, [...], for streams [..., layers, d]."""
    streams = streams.double()
    to_positive, to_negative = (
        torch.cosine_similarity(streams, mean.to(streams), dim=-1) for mean in (positive, negative)
    )
    return (to_positive - to_negative).mean(-1)


def read_layers(layer_count: int) -> tuple[int, ...]:
    """The layers at which a direction may be read: above the middle, so that edits below them are seen."""
    return tuple(range(layer_count // 2 + 1, layer_count + 1))


def learn_behaviour_tokens(
    positive: torch.Tensor, negative: torch.Tensor, most: int = MOST, excluded: Sequence[int] = ()
) -> list[int]:
    """The first tokens that distinguish the model's answers to the two sides, at most `most`.

    Takes the first-token probabilities [prompts, vocabulary] of each side. Tokens are added in order of how much more
    probable they are on the positive side, until they cover nine tenths of the total difference. Tokens that are
    `excluded`, and those that begin most answers to both sides, are never taken.

    Raises:
        OrthogonalizeError: the first tokens of the answers hardly differ.
    """
    gain = (positive.double().mean(0) - negative.double().mean(0)).clamp(min=0)
    gain[[*excluded, *_shared_openers(positive, negative)]] = 0
    total = gain.sum()
    if total < LEAST_GAIN:
        raise OrthogonalizeError(
            "the model begins its answers to both sides in the same way, so no behaviour tokens can be learnt; "
            "give them with --behaviour-tokens, or choose another --measure"
        )
    values, order = gain.topk(min(most, len(gain)))
    tokens: list[int] = []
    covered = 0.0
    for value, token in zip(values.tolist(), order.tolist(), strict=True):
        if tokens and (covered >= 0.9 * total or value < 0.02):
            break
        tokens.append(token)
        covered += value
    return tokens


def _shared_openers(positive: torch.Tensor, negative: torch.Tensor) -> list[int]:
    """The token, if any, that is the likeliest beginning of more than half of the answers to either side."""
    usual = []
    for side in (positive, negative):
        counts = Counter(side.argmax(-1).tolist())
        usual.append({token for token, count in counts.items() if 2 * count > len(side)})
    return sorted(usual[0] & usual[1])
