"""`judge`: score answers that were generated elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.errors import OrthogonalizeError
from ..core.files import check_text, parse_json
from ..core.journal import Journal
from ..data.benchmarks import category_of
from ..data.tokenization import is_valid_unicode
from ..engines.base import ONE_DEVICE, EngineOptions
from ..engines.registry import check_engine
from ..evals.judges.base import EndpointJudge, WordingJudge
from ..evals.judges.registry import find_judge
from ..evals.judges.runner import ready_judges
from ..evals.metrics import Rate, Record, Series, yes_no_series
from ..reports.schema import load_report


class JudgedFile(Record):
    """The output of `judge --json`; `refusal`, `harmful` and `evasion` are None if the judge does not say."""

    judge: str
    model: str | None
    n: int
    refusal: Rate | None = None
    harmful: Rate | None = None
    evasion: Rate | None = None


class JudgedReport(Record):
    """The judgements of a report's answers, by model; the categories of the rates are the prompt sets."""

    base: JudgedFile
    edited: JudgedFile


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Read a JSON list of {prompt, response, category}; the category is optional.

    Raises:
        OrthogonalizeError: the file is missing, truncated or empty, or has another structure.
    """
    if not file.is_file():
        raise OrthogonalizeError(f"no such file: {file}")
    check_text(file)
    try:
        rows = parse_json(file.read_text("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise OrthogonalizeError(f"{file} cannot be read as JSON ({error}); is it truncated?") from error
    if not isinstance(rows, list) or not rows:
        raise OrthogonalizeError(f"{file} must contain a list of at least one answer")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("prompt", "response")):
            raise OrthogonalizeError(f"{file}: entry {number + 1} must have the texts 'prompt' and 'response'")
        if not is_valid_unicode("".join(str(row.get(k)) for k in ("prompt", "response", "category"))):
            raise OrthogonalizeError(
                f"{file}: entry {number + 1} contains an unpaired surrogate (invalid Unicode); fix or remove it"
            )
    return rows


def judge(
    file: Path | str,
    name: str = "prefix",
    *,
    engine: str = "vllm",
    options: EngineOptions = ONE_DEVICE,
) -> JudgedFile | JudgedReport:
    """Score answers generated earlier: a JSON list of {prompt, response, category}, or the report.json of `eval`.

    A report's answers are scored for base and edited model, by prompt set. The judge `prefix` counts refusals by their
    wording and needs no engine, `endpoint:URL#MODEL` asks a server, and other judges run a model. An interrupted call
    stores its progress beside `file`; call it again to resume.

    Raises:
        OrthogonalizeError: the file or the model of the judge is missing, or the judge is unknown.
    """
    if name == "none":
        raise OrthogonalizeError("give --judge prefix, or the name of a judge model")
    found = find_judge(name)
    if not isinstance(found, WordingJudge | EndpointJudge):
        check_engine(engine, options)
    file = Path(file)
    if not _is_report(file):
        return _judge(file, [read_answers(file)], name, engine, options)[0]
    answers = load_report(file).answers
    if not answers:
        raise OrthogonalizeError(f"{file} contains no answers; run eval with --suite refusal, without --redact")
    base = [{"prompt": each.prompt, "response": each.base, "category": each.set} for each in answers]
    edited = [{"prompt": each.prompt, "response": each.edited, "category": each.set} for each in answers]
    judged = _judge(file, [base, edited], name, engine, options)
    return JudgedReport(base=judged[0], edited=judged[1])


def _is_report(file: Path) -> bool:
    """Whether `file` is a folder of `eval`, or its report.json, rather than a list of answers."""
    if not file.is_file():
        return file.is_dir()
    check_text(file)
    try:
        return isinstance(found := parse_json(file.read_text("utf-8-sig")), dict) and "answers" in found
    except (ValueError, OSError):
        return False  # `read_answers` says what is wrong


def _judge(
    file: Path, groups: Sequence[list[dict[str, Any]]], name: str, engine: str, options: EngineOptions
) -> list[JudgedFile]:
    """The judgements of each of several groups of answers; a judge's model is started once for all of them."""
    categories = [[category_of(row.get("category")) for row in rows] for rows in groups]
    found = find_judge(name)
    if isinstance(found, WordingJudge):
        flags = [[found.refuses(row["response"]) for row in rows] for rows in groups]
        rates = [_rate(yes_no_series(*pair)) for pair in zip(flags, categories, strict=True)]
        return [JudgedFile(judge=name, model=None, n=rate.n, refusal=rate) for rate in rates]
    (ready,) = ready_judges([name])
    pairs = [(row["prompt"], row["response"]) for rows in groups for row in rows]
    journal = Journal.beside(file, needed=False)  # FILE may be in a read-only folder
    journal.announce_resume([ready.step(pairs, engine, options)])
    with journal.kept():
        judgements = iter(ready.ask(pairs, engine, options, journal))
    journal.close()
    result = []
    for rows, own in zip(groups, categories, strict=True):
        mine = list(islice(judgements, len(rows)))
        fields = {
            field: _rate(yes_no_series([getattr(each, field) for each in mine], own)) for field in ready.judge.fields
        }
        result.append(JudgedFile(judge=ready.judge.name, model=ready.model, n=len(rows), **fields))
    return result


def _rate(series: Series) -> Rate:
    measured = series.measure()
    assert isinstance(measured, Rate)
    return measured
