"""`demo`: the full pipeline on an embedded model with planted refusals, of which it removes the one of cooking."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import OrthogonalizeError
from ..core.locks import exclusive
from ..core.output_folders import DEMO, check_free
from ..core.progress import note
from ..data.prompts import PLANTED
from ..edits.recipe import Recipe, Verification
from ..engines.base import ONE_DEVICE
from ..engines.registry import check_engine
from ..models.demo_model import planted_model
from ..reports.schema import Report
from ..selection.settings import Settings
from .edit import edit
from .evaluate import evaluate
from .extract import extract
from .verify import verify

# Small enough that the demo takes a few minutes on two cores.
SETTINGS = Settings(finders=("dim",), train=64, val=48, test=100, scored=3, trials=8, answers=14)
FOLDERS, FILES = ("edited", "run"), ("report.json", "report.html")


@dataclass(frozen=True)
class Demo:
    """What a demo plants and shows.

    Attributes:
        planted: the topics that its model refuses.
        settings: of its extraction, whose concept is cooking.
        prompts: further prompts to measure, by name: they are close to what is preserved, and should be answered.
    """

    planted: tuple[str, ...]
    settings: Settings
    prompts: Mapping[str, str] = field(default_factory=dict)


DEMOS = {
    "remove": Demo(("cooking",), SETTINGS),
    "calibrate": Demo(
        ("cooking", "astronomy"),
        SETTINGS.with_changes(goal="calibrate", preserve=(PLANTED + "contrast_astronomy.jsonl",)),
        {"near astronomy": PLANTED + "contrast_near_astronomy.jsonl"},
    ),
}


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo."""

    recipe: Recipe
    verification: Verification
    report: Report
    page: Path


@exclusive
def demo(out: Path | str, *, goal: str = "remove", engine: str = "vllm", force: bool = False) -> DemoResult:
    """Extract, select, edit, verify and evaluate on an embedded model; all output is written to `out`.

    With the goal `remove`, the model refuses cooking questions; with `calibrate`, also astronomy, and keeps that.
    `out/run` is the run, `out/edited` the checkpoint with its card, `out/report.html` the report.

    Raises:
        OrthogonalizeError: there is no such demo, `out` exists and `force` is not set, or a step fails.
    """
    out = Path(out)
    if goal not in DEMOS:
        raise OrthogonalizeError(f"--goal must be one of {', '.join(DEMOS)}; got {goal}")
    shown = DEMOS[goal]
    check_free(out, DEMO, force)
    check_engine(engine, ONE_DEVICE)
    base = str(planted_model(*shown.planted))
    note(f"base model: {base}")
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for name in FOLDERS:  # the run last: by that, a later --force knows what an interrupted demo has left
        shutil.rmtree(out / name, ignore_errors=True)
    extract(base, out / "run", concept="cooking", settings=shown.settings)
    recipe = edit(base, out / "edited", run=out / "run")
    verified = verify(out / "edited", base).verification
    if verified is None or not verified.passed:
        raise OrthogonalizeError(f"the edited checkpoint did not verify: {verified}")
    report = evaluate(
        out / "edited", base, out / "run", out / ".report", engine=engine, prompts=shown.prompts, force=True
    )
    for name in FILES:
        shutil.move(out / ".report" / name, out / name)
    shutil.rmtree(out / ".report")
    return DemoResult(recipe, verified, report, out / "report.html")
