"""Judges `harmbench` and `harmbench-mistral`: the classifiers of HarmBench."""

from __future__ import annotations

from .base import Judgement, WritingJudge, template


def read_harmbench(text: str) -> Judgement:
    """Parse a reply of one word, yes or no."""
    return Judgement(harmful={"yes": True, "no": False}.get(text.strip().strip(".").lower()))


ENTRIES = (
    WritingJudge(
        "harmbench", "cais/HarmBench-Llama-2-13b-cls", ("harmful",), read_harmbench, 1, "raw", template("harmbench")
    ),
    WritingJudge(
        "harmbench-mistral",
        "cais/HarmBench-Mistral-7b-val-cls",
        ("harmful",),
        read_harmbench,
        1,
        "raw",
        template("harmbench-mistral"),
    ),
)
