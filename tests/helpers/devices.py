"""Several devices on a machine that has none: places on the CPU, each with a thread and a replica of its own."""

from __future__ import annotations

import torch

from orthogonalize.models.streaming import weights


def spread(monkeypatch, count: int = 2) -> None:
    """Let streamed models that are opened from here on be spread over `count` places."""
    monkeypatch.setattr(weights, "choose_devices", lambda _device: [torch.device("cpu")] * count)
