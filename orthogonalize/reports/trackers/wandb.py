"""Tracker `wandb`: Weights & Biases, without what it would send of its own accord."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import TrackedRun, TrackerEntry

PROJECT = "orthogonalize"  # unless WANDB_PROJECT names another


class _Run:
    def __init__(self, run: TrackedRun) -> None:
        import os

        import wandb

        # Neither what is printed, nor the machine, its user, the program or the repository around it.
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, save_code=False, host="", username="", program="",
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, job_type=run.job, config=dict(run.facts),
            dir=str(run.folder), settings=settings,
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKER = TrackerEntry(
    "wandb", "Weights & Biases (WANDB_MODE=offline keeps it here)", "wandb", "run `pip install wandb`", _Run
)
