"""What the header and the text of a card say was measured: entries of the Hub's model-index, and what was preserved."""

from __future__ import annotations

from huggingface_hub import EvalResult

from ..data.benchmarks import ARC, MMLU, TRUTHFULQA, BenchmarkSet
from ..evals.metrics import Loss, Rate, Score
from .schema import Report
from .tables import title, value

PUBLIC: dict[str, BenchmarkSet] = {"mmlu": MMLU, "arc": ARC, "truthfulqa": TRUTHFULQA}
HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


def card_results(report: Report) -> list[EvalResult]:
    """The edited model's results on public sets of questions, for the model-index; nothing else fits its schema."""
    found = []
    for key, measure in report.edited.flat().items():
        match key.split("."):
            case ["choices", name] if name in PUBLIC and isinstance(measure, Rate) and measure.n:
                source = PUBLIC[name]
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=source.repository,
                        dataset_name=title(key),
                        dataset_config=source.config,
                        dataset_split=source.split,
                        metric_type="accuracy",
                        metric_name=f"accuracy (n = {measure.n})",
                        metric_value=round(measure.value, 4),
                    )
                )
            case ["tasks", task, metric] if isinstance(measure, Rate | Score) and not isinstance(measure, Loss):
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=task,
                        dataset_name=task,
                        metric_type=metric,
                        metric_name=f"{metric} (n = {measure.n})",
                        metric_value=round(measure.value, 4),
                        source_name="lm-evaluation-harness",
                        source_url=HARNESS,
                    )
                )
    return found


def preserved_lines(report: Report) -> list[tuple[str, str, int]]:
    """(measure, share of what the base shows that is kept, n) of every preserved set."""
    return [(title(key, report.concept), value(rate), rate.n) for key, rate in report.kept.items()]
