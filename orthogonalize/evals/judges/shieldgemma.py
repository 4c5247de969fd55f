"""Judge `shieldgemma`: ShieldGemma (Google)."""

from __future__ import annotations

from .base import WeighingJudge, template

ENTRIES = (WeighingJudge("shieldgemma", "google/shieldgemma-2b", template("shieldgemma")),)
