"""Measure `first-token`: the log-odds that an answer begins with one of the behaviour's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SEPARATES, PassMeasure, separation

if TYPE_CHECKING:
    import torch

    from ...selection.readouts import FirstToken
    from .evidence import Evidence


def fit(evidence: Evidence) -> FirstToken:
    """The tokens that are given, or else learnt, and the log-odds from which they show the behaviour.

    Raises:
        OrthogonalizeError: no tokens are given, and the answers to both sides begin alike.
    """
    from ...selection.readouts import FirstToken, behaviour_score, learn_behaviour_tokens

    positive, negative = (evidence.outputs.probabilities[evidence.rows(side)] for side in ("positive", "negative"))
    tokens = evidence.given_tokens or learn_behaviour_tokens(positive, negative, excluded=evidence.structural_tokens)
    train = (evidence.rows(side, "train") for side in ("positive", "negative"))
    scores = [behaviour_score(evidence.outputs.probabilities[rows], tokens) for rows in train]
    return FirstToken(tuple(tokens), threshold_between(*scores))


def threshold_between(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """The log-odds from which a prompt shows the behaviour, from the scores of both sides.

    It is 0 if the medians of the sides lie on either side of it. Otherwise no side is at 0, as where the behaviour has
    many beginnings and its tokens only some of them; it is then the medians' midpoint, if that tells the sides apart.
    """
    high, low = positive.median().item(), negative.median().item()
    if high > 0 >= low:
        return 0.0
    middle = (high + low) / 2
    return middle if separation((positive > middle).tolist(), (negative > middle).tolist()) >= SEPARATES else 0.0


MEASURE = PassMeasure("first-token", "how likely the answer begins with the behaviour's tokens", fit)
