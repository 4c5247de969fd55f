"""Tracker `trackio`: a local database, shown by `trackio show`."""

from __future__ import annotations

from collections.abc import Mapping

from .base import TrackedRun, TrackerEntry

PROJECT = "orthogonalize"


class _Project:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.module = trackio
        name = f"{run.job}-{run.name}"
        trackio.init(project=PROJECT, name=name, config=dict(run.facts), resume="never", auto_log_gpu=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


TRACKER = TrackerEntry("trackio", "trackio's project orthogonalize", "trackio", "run `pip install trackio`", _Project)
