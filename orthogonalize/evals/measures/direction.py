"""Measure `direction`: which side's activations a prompt is nearer to; it needs no output tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import PassMeasure

if TYPE_CHECKING:
    from ...selection.readouts import NearerSide
    from .evidence import Evidence


def fit(evidence: Evidence) -> NearerSide:
    """Fitted to the train prompts of both sides.

    Raises:
        OrthogonalizeError: both sides have the same activations.
    """
    from ...selection.readouts import NearerSide

    positive, negative = (
        {layer: stream[evidence.rows(side, "train")] for layer, stream in evidence.streams.items()}
        for side in ("positive", "negative")
    )
    return NearerSide.fitted(positive, negative)


MEASURE = PassMeasure(
    "direction",
    "whether the stream is nearer, by cosine, to the positive side's; for answers that all begin alike",
    fit,
)
