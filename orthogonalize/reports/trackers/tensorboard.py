"""Tracker `tensorboard`: event files beside the output, for `tensorboard --logdir`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .base import TrackedRun, TrackerEntry

FOLDER = "tensorboard"  # beside the output folder, with a folder for each


class _Events:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run.folder / FOLDER / f"{run.job}-{run.name}"))
        self.writer.add_text("facts", f"```\n{json.dumps(dict(run.facts), indent=1)}\n```")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


TRACKER = TrackerEntry(
    "tensorboard", "event files in tensorboard/ beside OUT", "tensorboard", "run `pip install tensorboard`", _Events
)
