"""A report's measures and a sweep, made up: what is drawn from them needs no model."""

from __future__ import annotations

from orthogonalize.edits.config import EditConfig
from orthogonalize.evals.metrics import Loss, Paired, Rate
from orthogonalize.reports.schema import Losses, Measures, Refusals
from orthogonalize.reports.sweep import Sweep, SweepRow

COMMON = {"engine": "hf", "engine_version": "transformers", "max_new_tokens": 9, "sensitive": False}


def measures(target: float, loss: float) -> Measures:
    rates = [Rate(value=v, n=9, ci95=(v * 0.9, v * 0.9 + 0.1)) for v in (target, 1 / 7)]
    own = Loss(value=loss, n=9, ci95=(loss - 0.1, loss + 0.1), tokens=90, perplexity=2.0)
    return Measures(refusal=Refusals(target=rates[0], harmless=rates[1]), loss=Losses(own_completions=own))


def made_up_sweep() -> Sweep:
    """Two edits that were measured, and one that was not possible."""
    rows = [
        SweepRow(
            name=f"{method} $all_", choice=EditConfig(method=method), direction="dim", layers=[1],
            measures=measures(1 / 9, 0.6), val={},
            paired={
                "refusal.target": Paired(difference=-1 / (3 + i), n=9, ci95=None, p=None),
                "loss.own_completions": Paired(difference=i / 7, n=9, ci95=None, p=None),
            },
        )
        for i, method in enumerate(("ablate", "reflect"))
    ]  # fmt: skip
    unmeasured = SweepRow(
        name="leace", choice=EditConfig(method="leace"), direction="", layers=[1], refused="cannot be"
    )
    return Sweep(
        **COMMON, semantics="weights", model="base", suites=[], data={}, restored=None, effect="refusal.target",
        harm="loss.own_completions", base=measures(2 / 3, 0.5), val=None, variants=[*rows, unmeasured],
        pareto=["ablate $all_"], unmarked=None,
    )  # fmt: skip
