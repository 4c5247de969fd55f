"""Linear probes, which test on held-out prompts whether an edit erased a concept from the stream."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..core.interventions import AffineMap
from ..data.prompts import SIDES, Side
from ..directions.activation_store import Recording
from ..directions.direction_set import Directions
from ..directions.finders.registry import FINDERS
from ..edits.config import EditConfig
from ..edits.recipe import ProbeResult
from .candidates import Candidate, best_by_finder, common_place


def probe_accuracy(train: Mapping[Side, torch.Tensor], val: Mapping[Side, torch.Tensor]) -> float:
    """The accuracy on `val` of scikit-learn's logistic regression, fitted to `train`.

    Both map `positive` and `negative` to activations [n, d]. The fit uses coordinates of the span of the train
    samples, which contains the regularised solution.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fitted, held = (torch.cat([part[side].to(torch.float64) for side in SIDES]) for part in (train, val))
    labels, truth = (np.repeat([1, 0], [len(part[side]) for side in SIDES]) for part in (train, val))
    centre = fitted.mean(0)
    _, singular, frame = torch.linalg.svd(fitted - centre, full_matrices=False)
    frame = frame[: max(1, int((singular > 1e-10 * singular[0]).sum()))]  # one, even if all samples are the same
    scale = singular[0].item() / len(fitted) ** 0.5 or 1.0  # makes the penalty independent of the unit
    classifier = LogisticRegression(C=1.0, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(((fitted - centre) @ frame.mT / scale).numpy(), labels)
    return float(classifier.score(((held - centre) @ frame.mT / scale).numpy(), truth))


def probe(
    recording: Recording, directions: Directions, method: str, position: int, layer: int, edit: AffineMap
) -> ProbeResult:
    """Probe the stream at a position and layer before and after the map `edit`."""
    index = directions.positions.index(position)
    sets = {
        split: {side: recording.read(f"{side}.{split}", layer)[:, index].to(torch.float64) for side in SIDES}
        for split in ("train", "val")
    }
    edited = {split: {side: edit(x) for side, x in part.items()} for split, part in sets.items()}
    counts = [len(x) for x in sets["val"].values()]
    return ProbeResult(
        method=method,
        position=position,
        layer=layer,
        rank=edit.rank,
        before=probe_accuracy(sets["train"], sets["val"]),
        after=probe_accuracy(edited["train"], edited["val"]),
        chance=max(counts) / sum(counts),
        n=sum(counts),
    )


def probe_candidate(
    recording: Recording, directions: Directions, finder: str, position: int, layer: int
) -> list[ProbeResult]:
    """Probe the removal of what `finder` found there: the direction, the eraser, or INLP's basis at its usual ranks."""
    return [
        probe(recording, directions, finder, position, layer, removal)
        for removal in FINDERS.find(finder).probed_removals(directions, position, layer)
    ]


def probe_best(recording: Recording, directions: Directions, ranked: Sequence[Candidate]) -> list[ProbeResult]:
    """Probe every finder's best candidate, and where that is elsewhere, the finder at the common place as well.

    Layers differ in how much a probe reads there, so finders are comparable at the same one only.
    """
    found: list[ProbeResult] = []
    for finder, best in best_by_finder(ranked).items():
        for place in dict.fromkeys([(best.position, best.layer), common_place(ranked)]):
            if directions.basis(finder, *place) is not None:
                found += probe_candidate(recording, directions, finder, *place)
    return found


def probe_choice(
    recording: Recording, directions: Directions, choice: EditConfig, maps: Mapping[int, AffineMap]
) -> list[ProbeResult]:
    """Probe the maps of an edit, which are given by the layer of the direction that they use."""
    assert choice.position is not None
    return [
        probe(recording, directions, choice.method, choice.position, layer, edit)
        for layer, edit in sorted(maps.items())
        if edit.rank
    ]
