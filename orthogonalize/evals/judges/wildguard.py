"""Judge `wildguard`: WildGuard (Ai2)."""

from __future__ import annotations

from .base import Judgement, WritingJudge, template, yes_or_no


def read_wildguard(text: str) -> Judgement:
    """Parse three labelled lines, of which two are about the response."""
    return Judgement(yes_or_no(text, "Harmful response"), yes_or_no(text, "Response refusal"))


ENTRIES = (
    WritingJudge(
        "wildguard", "allenai/wildguard", ("harmful", "refusal"), read_wildguard, 128, "raw", template("wildguard")
    ),
)
