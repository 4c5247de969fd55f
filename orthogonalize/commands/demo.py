"""`demo`: the full pipeline on the embedded model, which removes its planted refusal of cooking."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import OrthogonalizeError
from ..core.locks import exclusive
from ..core.output_folders import FolderKind, check_free
from ..core.progress import note
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
SETTINGS = Settings(finders=("dim",), train=64, val=24, test=100, scored=3, trials=10, answers=14)
PARTS = ("run", "edited", "report.json", "report.html")


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo."""

    recipe: Recipe
    verification: Verification
    report: Report
    page: Path


@exclusive
def demo(out: Path | str, *, engine: str = "vllm", force: bool = False) -> DemoResult:
    """Extract, select, edit, verify and evaluate on the embedded model; all output is written to `out`.

    `out/run` is the run, `out/edited` the checkpoint with its card, `out/report.html` the report.

    Raises:
        OrthogonalizeError: `out` exists and `force` is not set, or a step fails.
    """
    out = Path(out)
    check_free(out, FolderKind("run", frozenset({*PARTS, ".report"})), force)
    check_engine(engine, ONE_DEVICE)
    base = str(planted_model())
    note(f"base model: {base}")
    for part in PARTS[:2]:
        shutil.rmtree(out / part, ignore_errors=True)
    extract(base, out / "run", concept="cooking", settings=SETTINGS)
    recipe = edit(base, out / "edited", run=out / "run")
    verified = verify(out / "edited", base).verification
    if verified is None or not verified.passed:
        raise OrthogonalizeError(f"the edited checkpoint did not verify: {verified}")
    report = evaluate(out / "edited", base, out / "run", out / ".report", engine=engine, force=True)
    for name in PARTS[2:]:
        shutil.move(out / ".report" / name, out / name)
    shutil.rmtree(out / ".report")
    return DemoResult(recipe, verified, report, out / "report.html")
