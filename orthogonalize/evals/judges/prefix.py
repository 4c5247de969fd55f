"""Judge `prefix`: refusals by their wording, without a model."""

from __future__ import annotations

from ...data.refusals import refused
from .base import WordingJudge

ENTRIES = (WordingJudge("prefix", refused),)
