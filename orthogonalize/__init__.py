"""Edit a concept out of, or into, a language model's weights, and prove it.

Each command has a function here: `extract`, `edit`, `evaluate` (the command is `eval`), `chat`, `merge`, `push`,
`verify`, `sweep`, `judge`, `compare`, `rank`, `describe`, `doctor` and `demo`. The algebra under them is also exported,
and so are the registries that plugins add to. Import from this package only; everything below it may move. A name is
loaded on first use, so that importing the package, or asking the command line for help, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.diff import Audit as Audit
    from .checkpoints.rounding.registry import ROUNDING_SCHEMES as ROUNDING_SCHEMES
    from .checkpoints.rounding.registry import RoundingScheme as RoundingScheme
    from .commands.chat import Talk as Talk
    from .commands.chat import chat as chat
    from .commands.compare import Comparison as Comparison
    from .commands.compare import compare as compare
    from .commands.demo import demo as demo
    from .commands.describe import describe as describe
    from .commands.doctor import doctor as doctor
    from .commands.edit import edit as edit
    from .commands.evaluate import evaluate as evaluate
    from .commands.extract import extract as extract
    from .commands.judge import judge as judge
    from .commands.merge import merge as merge
    from .commands.plot import plot as plot
    from .commands.publishing.settings import PushSettings as PushSettings
    from .commands.push import push as push
    from .commands.sweep import sweep as sweep
    from .commands.verify import Verified as Verified
    from .commands.verify import verify as verify
    from .core.errors import OrthogonalizeError as OrthogonalizeError
    from .core.interventions import AffineMap as AffineMap
    from .core.interventions import ConditionalMap as ConditionalMap
    from .core.interventions import Intervention as Intervention
    from .core.interventions import Site as Site
    from .core.interventions import orthonormal as orthonormal
    from .core.interventions import removal as removal
    from .core.interventions import shift as shift
    from .core.registry import Registry as Registry
    from .data.benchmarks import PROMPT_SETS as PROMPT_SETS
    from .data.benchmarks import BenchmarkSet as BenchmarkSet
    from .data.benchmarks import PromptSet as PromptSet
    from .directions.conditional import InputMoments as InputMoments
    from .directions.conditional import solve_from_moments as solve_from_moments
    from .directions.conditional import solve_from_samples as solve_from_samples
    from .directions.direction_set import Directions as Directions
    from .directions.direction_set import GivenDirection as GivenDirection
    from .directions.direction_set import load_direction as load_direction
    from .directions.finders.base import DirectionFinder as DirectionFinder
    from .directions.finders.registry import FINDERS as FINDERS
    from .directions.inlp.nullspace import Subspace as Subspace
    from .directions.inlp.nullspace import Subspaces as Subspaces
    from .directions.inlp.nullspace import inlp as inlp
    from .directions.leace import Eraser as Eraser
    from .directions.leace import Moments as Moments
    from .directions.leace import leace as leace
    from .edits.bake import bake as bake
    from .edits.build import intervention_from_basis as intervention_from_basis
    from .edits.build import intervention_from_directions as intervention_from_directions
    from .edits.config import EditConfig as EditConfig
    from .edits.methods.base import EditMethod as EditMethod
    from .edits.methods.registry import METHODS as METHODS
    from .edits.recipe import Recipe as Recipe
    from .edits.recipe import load_recipe as load_recipe
    from .edits.settings import EditSettings as EditSettings
    from .engines.base import EngineOptions as EngineOptions
    from .engines.registry import ENGINES as ENGINES
    from .engines.registry import EngineEntry as EngineEntry
    from .evals.judges.base import EndpointJudge as EndpointJudge
    from .evals.judges.base import Judgement as Judgement
    from .evals.judges.base import WeighingJudge as WeighingJudge
    from .evals.judges.base import WordingJudge as WordingJudge
    from .evals.judges.base import WritingJudge as WritingJudge
    from .evals.judges.registry import JUDGES as JUDGES
    from .evals.measures.base import AnswerMeasure as AnswerMeasure
    from .evals.measures.base import PassMeasure as PassMeasure
    from .evals.measures.base import by_rule as by_rule
    from .evals.measures.registry import MEASURES as MEASURES
    from .evals.metrics import Series as Series
    from .evals.metrics import yes_no_series as yes_no_series
    from .evals.suites.base import SuiteContext as SuiteContext
    from .evals.suites.base import SuiteEntry as SuiteEntry
    from .evals.suites.registry import SUITES as SUITES
    from .models.demo_model import planted_model as planted_model
    from .models.describe.draft import Draft as Draft
    from .models.hooks import intervened as intervened
    from .reports.frames import frame as frame
    from .reports.run_plots import run_figures as run_figures
    from .reports.schema import Report as Report
    from .reports.schema import load_report as load_report
    from .reports.sweep import Sweep as Sweep
    from .reports.sweep import load_sweep as load_sweep
    from .reports.trackers.base import TrackedRun as TrackedRun
    from .reports.trackers.base import TrackerEntry as TrackerEntry
    from .reports.trackers.metrics import track_result as track_result
    from .reports.trackers.registry import TRACKERS as TRACKERS
    from .selection.candidates import Candidate as Candidate
    from .selection.candidates import rank as rank
    from .selection.grid import SweepGrid as SweepGrid
    from .selection.resolve import intervention_of as intervention_of
    from .selection.run_folder import Run as Run
    from .selection.run_folder import load_run as load_run
    from .selection.search.objectives import Trial as Trial
    from .selection.settings import Settings as Settings

_MODULES = {
    "AffineMap": "core.interventions",
    "AnswerMeasure": "evals.measures.base",
    "Audit": "checkpoints.diff",
    "BenchmarkSet": "data.benchmarks",
    "Candidate": "selection.candidates",
    "Comparison": "commands.compare",
    "ConditionalMap": "core.interventions",
    "DirectionFinder": "directions.finders.base",
    "Directions": "directions.direction_set",
    "Draft": "models.describe.draft",
    "ENGINES": "engines.registry",
    "EditConfig": "edits.config",
    "EditMethod": "edits.methods.base",
    "EditSettings": "edits.settings",
    "PushSettings": "commands.publishing.settings",
    "EndpointJudge": "evals.judges.base",
    "EngineEntry": "engines.registry",
    "EngineOptions": "engines.base",
    "Eraser": "directions.leace",
    "FINDERS": "directions.finders.registry",
    "GivenDirection": "directions.direction_set",
    "InputMoments": "directions.conditional",
    "Intervention": "core.interventions",
    "JUDGES": "evals.judges.registry",
    "Judgement": "evals.judges.base",
    "MEASURES": "evals.measures.registry",
    "METHODS": "edits.methods.registry",
    "Moments": "directions.leace",
    "OrthogonalizeError": "core.errors",
    "PROMPT_SETS": "data.benchmarks",
    "PassMeasure": "evals.measures.base",
    "PromptSet": "data.benchmarks",
    "ROUNDING_SCHEMES": "checkpoints.rounding.registry",
    "Recipe": "edits.recipe",
    "Registry": "core.registry",
    "Report": "reports.schema",
    "RoundingScheme": "checkpoints.rounding.registry",
    "Run": "selection.run_folder",
    "SUITES": "evals.suites.registry",
    "Series": "evals.metrics",
    "Settings": "selection.settings",
    "Site": "core.interventions",
    "Subspace": "directions.inlp.nullspace",
    "Subspaces": "directions.inlp.nullspace",
    "SuiteContext": "evals.suites.base",
    "SuiteEntry": "evals.suites.base",
    "Sweep": "reports.sweep",
    "SweepGrid": "selection.grid",
    "TRACKERS": "reports.trackers.registry",
    "Talk": "commands.chat",
    "TrackedRun": "reports.trackers.base",
    "TrackerEntry": "reports.trackers.base",
    "Trial": "selection.search.objectives",
    "Verified": "commands.verify",
    "WeighingJudge": "evals.judges.base",
    "WordingJudge": "evals.judges.base",
    "WritingJudge": "evals.judges.base",
    "bake": "edits.bake",
    "by_rule": "evals.measures.base",
    "chat": "commands.chat",
    "compare": "commands.compare",
    "demo": "commands.demo",
    "describe": "commands.describe",
    "doctor": "commands.doctor",
    "edit": "commands.edit",
    "evaluate": "commands.evaluate",
    "extract": "commands.extract",
    "frame": "reports.frames",
    "inlp": "directions.inlp.nullspace",
    "intervened": "models.hooks",
    "intervention_from_basis": "edits.build",
    "intervention_from_directions": "edits.build",
    "intervention_of": "selection.resolve",
    "judge": "commands.judge",
    "leace": "directions.leace",
    "load_direction": "directions.direction_set",
    "load_recipe": "edits.recipe",
    "load_report": "reports.schema",
    "load_run": "selection.run_folder",
    "load_sweep": "reports.sweep",
    "merge": "commands.merge",
    "orthonormal": "core.interventions",
    "plot": "commands.plot",
    "planted_model": "models.demo_model",
    "push": "commands.push",
    "rank": "selection.candidates",
    "removal": "core.interventions",
    "run_figures": "reports.run_plots",
    "shift": "core.interventions",
    "solve_from_moments": "directions.conditional",
    "solve_from_samples": "directions.conditional",
    "sweep": "commands.sweep",
    "track_result": "reports.trackers.metrics",
    "verify": "commands.verify",
    "yes_no_series": "evals.metrics",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("orthogonalize")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
