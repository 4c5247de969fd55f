"""Fit a run's behaviour measure, or choose the one that tells its two sides apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...core.errors import OrthogonalizeError
from ...core.journal import Journal
from ...selection.behaviour import DIRECTION, FIRST_TOKEN, MeasureInfo, ReadoutName
from ...selection.readouts import FirstToken, NearerSide, Outputs, Readout
from .base import SEPARATES, AnswerMeasure, Measure, Opening, PassMeasure, separation
from .evidence import Evidence
from .registry import AUTO, MEASURES, find_measure

SAMPLE = 16  # train prompts per side that are answered to find out whether wording tells the sides apart


@dataclass(frozen=True)
class FittedMeasure:
    """A run's measure with the readout by which edits are tried.

    Attributes:
        info: as stored in the run.
        readout: scores edits; the measure itself, or what stands in for one that needs answers.
        shown: whether each prompt of the evidence shows the behaviour; None where the measure cannot tell.
        tried: the other measures that `auto` tried, and how far each tells the sides apart.
    """

    info: MeasureInfo
    readout: Readout
    shown: list[bool | None]
    scores: list[float]
    tried: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The behaviour's first tokens; none if it is not read from them."""
        return list(self.readout.tokens) if isinstance(self.readout, FirstToken) else []


def fit_measure(name: str, evidence: Evidence, opening: Opening, journal: Journal) -> FittedMeasure:
    """Fit the measure that `--measure` names; `auto` takes the first that tells the sides' train prompts apart.

    It tries first tokens, the wording of a sample of answers, and the direction.

    Raises:
        OrthogonalizeError: the measure cannot be fitted, or `auto` finds none that tells the sides apart.
    """
    if name == AUTO:
        return _chosen(evidence, opening, journal)
    measure, argument = find_measure(name)
    if isinstance(measure, PassMeasure):
        return _of_pass(evidence, measure)
    return _of_answers(name, measure, replace(opening, argument=argument), evidence, journal)


def _chosen(evidence: Evidence, opening: Opening, journal: Journal) -> FittedMeasure:
    """The first measure that tells the sides apart; given tokens are taken as they are."""
    if evidence.given_tokens:
        return _of_pass(evidence, MEASURES[FIRST_TOKEN])
    tried: dict[str, float] = {}
    for name, apart in separations(evidence, opening, journal):
        if apart >= SEPARATES:
            return replace(fit_measure(name, evidence, opening, journal), tried=tried)
        tried[name] = apart
    found_apart = ", ".join(f"{each} {100 * apart:.0f}%" for each, apart in tried.items())
    raise OrthogonalizeError(
        f"no behaviour measure tells the two sides apart ({found_apart} of train prompts); the model may not behave "
        f"differently on them: give --behaviour-tokens, --wording, or another --measure{evidence.thought_hint()}"
    )


def separations(evidence: Evidence, opening: Opening, journal: Journal) -> Iterator[tuple[str, float]]:
    """How far the measures that need nothing but the prompts tell the sides apart, the cheapest first.

    First tokens that cannot be learnt do not; wording is tried on a sample of answers, and the direction on train
    prompts that it was not fitted to.
    """
    try:
        yield FIRST_TOKEN, _of_pass(evidence, MEASURES[FIRST_TOKEN]).info.separation
    except OrthogonalizeError:  # the answers to both sides begin alike
        yield FIRST_TOKEN, 0.0
    if evidence.generates:
        wording = MEASURES["wording"]
        assert isinstance(wording, AnswerMeasure)
        shows = wording.open(opening)
        sample = [evidence.rows(side, "train")[:SAMPLE] for side in ("positive", "negative")]
        yield "wording", separation(*(shows(evidence.answers(rows), journal) for rows in sample))
    yield DIRECTION, _held_out_separation(evidence)


def _of_pass(evidence: Evidence, measure: Measure) -> FittedMeasure:
    assert isinstance(measure, PassMeasure)
    readout = measure.fit(evidence)
    scores = scores_of(readout, evidence)
    shown: list[bool | None] = [score > 0 for score in scores]
    threshold = readout.threshold if isinstance(readout, FirstToken) else 0.0
    trials: ReadoutName = FIRST_TOKEN if isinstance(readout, FirstToken) else DIRECTION
    info = MeasureInfo(name=measure.name, trials=trials, threshold=threshold, shares=_shares(evidence, shown))
    return FittedMeasure(info, readout, shown, scores)


def _of_answers(
    name: str, measure: AnswerMeasure, opening: Opening, evidence: Evidence, journal: Journal
) -> FittedMeasure:
    """A measure of answers, with first tokens to stand in for it in trials, or the direction if they cannot."""
    shown = measure.open(opening)(evidence.answers(range(len(evidence.prompts))), journal)
    try:
        stand_in = _of_pass(evidence, MEASURES[FIRST_TOKEN])
        telling = evidence.given_tokens or stand_in.info.separation >= SEPARATES
    except OrthogonalizeError:
        telling = False
    if not telling:
        stand_in = _of_pass(evidence, MEASURES[DIRECTION])
    info = stand_in.info.model_copy(
        update={
            "name": name,
            "phrases": list(opening.phrases) if measure.name == "wording" else [],
            "shares": _shares(evidence, shown),
        }
    )
    return FittedMeasure(info, stand_in.readout, shown, stand_in.scores)


def scores_of(readout: Readout, evidence: Evidence) -> list[float]:
    """The scores of every prompt of the evidence."""
    streams = evidence.streams if isinstance(readout, NearerSide) else {}
    return [float(score) for score in readout.scores(Outputs(evidence.outputs.probabilities, streams))]


def _shares(evidence: Evidence, shown: Sequence[bool | None]) -> dict[str, float]:
    """The share of each side's train prompts that show the behaviour."""
    rows = {side: evidence.rows(side, "train") for side in dict.fromkeys(p.side for p in evidence.prompts)}
    return {side: sum(bool(shown[i]) for i in mine) / len(mine) for side, mine in rows.items()}


def _held_out_separation(evidence: Evidence) -> float:
    """How far the direction tells apart train prompts that it was not fitted to: the mean over both halves."""
    found = []
    for part in (0, 1):
        fit, held = (
            {side: evidence.rows(side, "train")[start::2] for side in ("positive", "negative")}
            for start in (part, 1 - part)
        )
        try:
            readout = NearerSide.fitted(
                *({layer: stream[rows] for layer, stream in evidence.streams.items()} for rows in fit.values())
            )
        except OrthogonalizeError:  # the same activations on both sides
            return 0.0
        shown = [score > 0 for score in scores_of(readout, evidence)]
        found.append(separation(*([shown[i] for i in rows] for rows in held.values())))
    return sum(found) / len(found)
