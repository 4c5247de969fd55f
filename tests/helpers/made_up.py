"""Made-up reports, sweeps and searches: what is drawn from them needs no model."""

from __future__ import annotations

from orthogonalize.edits.config import EditConfig
from orthogonalize.evals.metrics import Divergence, Loss, Paired, Rate
from orthogonalize.reports.schema import Behaviours, Divergences, Losses, Measures, Refusals, Report
from orthogonalize.reports.searched import Search, Tried
from orthogonalize.reports.sweep import Sweep, SweepRow, pareto


def rate(value: float) -> Rate:
    return Rate(value=value, n=50, ci95=(max(0.0, value - 0.1), min(1.0, value + 0.1)))


def measures(left: float, loss: float = 0.5) -> Measures:
    both = {"target": rate(left), "harmless": rate(0.0)}
    found = Divergence(value=0.1, n=50, ci95=None, tokens=50)
    return Measures(
        behaviour=Behaviours(**both), refusal=Refusals(**both), kl=Divergences(first_token=found, completions=found),
        loss=Losses(own_completions=Loss(value=loss, n=50, ci95=None, tokens=50, perplexity=1.6)),
    )  # fmt: skip


def tried(edit: str, left: float, kl: float, **more) -> Tried:
    return Tried(edit=edit, left=left, kl=kl, **more)


SEARCH = Search(
    before=0.9, allowed=0.01,
    tried=[tried("<best>", 0.0, 0.02, pick=1, chosen=True), tried("mild", 0.3, 0.001, pick=2), tried("poor", 0.5, 0.5)],
)  # fmt: skip


def report(base: Measures | None = None, edited: Measures | None = None, **more) -> Report:
    paired = {"loss.own_completions": Paired(difference=0.02, n=50, ci95=(-0.01, 0.05), p=0.3)}
    return Report(
        engine="hf", engine_version="transformers", checkpoint="named", edit=None, concept="lists", max_new_tokens=8,
        sensitive=False, base=base or measures(0.9), edited=edited or measures(0.1), paired=paired, answers=[],
        base_model="base", **more,
    )  # fmt: skip


def sweep(points: dict[str, tuple[float, float]]) -> Sweep:
    """A sweep of edits by (share removed, harm); every third is of another method."""
    rows = [
        SweepRow(
            name=name, choice=EditConfig(method=("ablate", "leace", "reflect")[i % 3]), direction="dim", layers=[0],
            measures=measures(0.9 - gone),
            paired={
                key: Paired(difference=by, n=50)
                for key, by in (("behaviour.target", -gone), ("loss.own_completions", harm))
            },
        )
        for i, (name, (gone, harm)) in enumerate(points.items())
    ]  # fmt: skip
    for row in rows:
        row.val = row.paired
    rows.append(
        SweepRow(name="not this", choice=EditConfig(method="ablate"), direction="dim", layers=[0], refused="why")
    )
    found = Sweep(
        engine="hf", engine_version="transformers", semantics="weights", model="some/base", suites=[], data={},
        max_new_tokens=8, sensitive=False, effect="behaviour.target", harm="loss.own_completions", restored=None,
        base=measures(0.9), val=None, variants=rows, pareto=[], unmarked=None,
    )  # fmt: skip
    found.pareto = pareto(found)
    return found
