"""Measure the prompts of a run with its behaviour measure, and say which one that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import OrthogonalizeError
from ...core.files import check_text
from ...core.journal import Journal
from ...core.progress import note
from ...data.chat import ChatFormat
from ...data.prompts import PreservedPrompt, Prompt
from ...data.refusals import PREFIXES
from ...selection.behaviour import FIRST_TOKEN
from ...selection.readers.base import Reader
from ...selection.settings import Settings
from .base import SEPARATES, Opening
from .choose import FittedMeasure, fit_measure, separations
from .evidence import Evidence


def read_phrases(file: Path | str | None) -> list[str]:
    """The phrases of `--wording FILE`, one per line; without a file, those of refusals.

    Raises:
        OrthogonalizeError: the file cannot be read, or holds no phrase.
    """
    if file is None:
        return list(PREFIXES)
    check_text(Path(file))
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OrthogonalizeError(f"--wording {file} cannot be read as UTF-8 text: {error}") from error
    phrases = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not phrases:
        raise OrthogonalizeError(f"--wording {file} holds no phrase; write one per line")
    return phrases


def measure_prompts(
    reader: Reader,
    tokenizer: Any,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    settings: Settings,
    journal: Journal,
    preserved: Sequence[PreservedPrompt] = (),
) -> tuple[FittedMeasure, list[Prompt]]:
    """The measure of a run, and its prompts with their scores and whether they show the behaviour.

    Test prompts are not measured. Answers and judgements are kept in `journal`; those to `preserved` will be asked of
    the reader later.

    Raises:
        OrthogonalizeError: as `fit_measure`.
    """
    used = [i for i, p in enumerate(prompts) if p.split != "test"]
    given = settings.behaviour_tokens or ()
    evidence = Evidence(reader, tokenizer, chat, [prompts[i] for i in used], journal, given, preserved)
    name = "wording" if settings.wording is not None else settings.measure
    found = fit_measure(name, evidence, Opening("", read_phrases(settings.wording), settings.device), journal)
    measured = list(prompts)
    for i, score, shows in zip(used, found.scores, found.shown, strict=True):
        measured[i] = replace(prompts[i], score=score, shows=shows)
    closed = chat.thought_closed()
    if closed is not None:
        note(f"thinking {chat.thinking}: {closed}")
    note(describe(found, [tokenizer.decode([token]) for token in found.tokens], evidence.thought_hint()))
    return found, measured


def describe(found: FittedMeasure, words: Sequence[str], hint: str = "") -> str:
    """One line that says what shows the behaviour, how far that tells the sides apart, and what else was tried."""
    info = found.info
    shares = " and ".join(f"{100 * info.shares[side]:.0f}% of {side}" for side in ("positive", "negative"))
    text = f"behaviour measure {info.name}: {info.describe(words)}; {shares} train prompts show it"
    text += f" (a separation of {100 * info.separation:.0f}%"
    text += "".join(f"; {name}: {100 * apart:.0f}%" for name, apart in found.tried.items()) + ")"
    if info.trials != info.name:
        how = f"how answers begin ({', '.join(map(repr, words))})" if words else "the direction of activations"
        text += f"; edits are tried by {how}, and the best confirmed by answers"
    return text + hint


def other_measures(
    reader: Reader,
    tokenizer: Any,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    settings: Settings,
    journal: Journal,
    but: str,
) -> str:
    """Which measures besides `but` tell the sides' train and val prompts apart, as the end of a sentence.

    First tokens are learnt for this, whatever tokens were given.
    """
    evidence = Evidence(reader, tokenizer, chat, [p for p in prompts if p.split != "test"], journal)
    opening = Opening("", read_phrases(None), settings.device)
    learnt = but == FIRST_TOKEN and not settings.behaviour_tokens
    found = {
        name: apart
        for name, apart in separations(evidence, opening, journal)
        if apart >= SEPARATES and (name != but or (name == FIRST_TOKEN and not learnt))
    }
    if not found:
        return "; no other measure that needs only the prompts tells the two sides apart either"
    return "; " + " and ".join(
        f"{'first tokens that are learnt (no --behaviour-tokens)' if name == but else f'--measure {name}'} "
        f"would tell the two sides apart by {100 * apart:.0f}%"
        for name, apart in found.items()
    )
