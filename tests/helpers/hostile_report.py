"""A report whose every text is hostile."""

from __future__ import annotations

from orthogonalize.reports.schema import Answer, Measures, Report


def hostile_report(text: str) -> Report:
    """A report of one answer with `text` for prompt, answers, category, set, model and edit."""
    answer = Answer(
        set=text, prompt=text, category=text, base=text, edited=text, base_refused=True, edited_refused=False
    )
    return Report(
        engine="hf", engine_version=text, base_model=text, checkpoint=text, edit=text, max_new_tokens=100,
        sensitive=False, base=Measures(), edited=Measures(), paired={}, answers=[answer], mismatches=[text],
    )  # fmt: skip
