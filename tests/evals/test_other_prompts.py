"""Suite `other`: the base's own answers to prompts of quite other kinds, by kind, through `eval` and its reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.command_line import UNTRIED, command

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import CONCEPTS, Concept, load_prompts, plain
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.evals.suites.base import BaseOutputs
from orthogonalize.evals.suites.other_prompts import ANSWER_TOKENS, OtherLoss, other_prompts
from orthogonalize.evals.suites.registry import DEFAULT_SUITES
from orthogonalize.models.logprobs import Completion
from orthogonalize.reports.model_card import write_card
from orthogonalize.reports.schema import Report, load_report

RUN_SETTINGS = UNTRIED
TITLE = "cross-entropy of the base's own answers, other prompts"
KINDS = {
    "arithmetic", "code", "creative writing", "other languages", "reasoning", "rewriting", "structured output",
    "translation",
}  # fmt: skip


def measure(model: Path, edited: Path, run: Path, out: Path, *words: str) -> tuple[int, str]:
    always = ("--engine", "hf", "--max-new-tokens", "4", "--suite", "other", *words)
    return command("eval", edited, "--base", model, "--run", run, "--out", out, *always)


@pytest.fixture(scope="module")
def measured(model, edited, run, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("report") / "report"
    status, said = measure(model, edited, run, out)
    assert status == 0, said
    return out, said


def test_prompts_are_of_eight_kinds_and_of_no_concept():
    found = other_prompts()
    assert len(found) == 64
    assert {kind: sum(k == kind for _, k in found) for kind in KINDS} == dict.fromkeys(KINDS, 8)
    texts = {plain(prompt) for prompt, _ in found}
    assert len(texts) == 64
    for named in CONCEPTS.values():
        if isinstance(named, Concept):
            fitted = [*load_prompts(named.positive), *load_prompts(named.negative)]
            assert not texts & {plain(p.text) for p in fitted}, named.name


def test_suite_is_a_default_one():
    assert "other" in DEFAULT_SUITES
    for name in ("eval", "sweep"):
        assert f"[default: {','.join(DEFAULT_SUITES)}]" in " ".join(command(name, "--help")[1].split())


def expected_losses(model: Path, edited: Path) -> dict[str, tuple[float, float, int]]:
    """(base, edited, n) by kind: the base's greedy answers, scored by transformers alone."""
    from transformers import AutoModelForCausalLM

    base, after = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in (model, edited))
    chat = ChatFormat(tiny_tokenizer())
    sums: dict[str, list[list[float]]] = {}
    for prompt, kind in other_prompts():
        ids = chat.encode(prompt)
        answer: list[int] = []
        with torch.inference_mode():
            while len(answer) < ANSWER_TOKENS:
                token = base(torch.tensor([ids + answer])).logits[0, -1].argmax().item()
                if token == 2:  # the end
                    break
                answer.append(token)
            if not answer:
                continue
            row = []
            for scorer in (base, after):
                logprobs = scorer(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
                places = range(len(ids) - 1, len(ids) + len(answer) - 1)
                row.append(-sum(logprobs[i, t].item() for i, t in zip(places, answer, strict=True)))
        sums.setdefault(kind, []).append([*row, len(answer)])
    return {
        kind: (sum(r[0] for r in rows) / sum(r[2] for r in rows), sum(r[1] for r in rows) / sum(r[2] for r in rows),
               len(rows))
        for kind, rows in sums.items()
    }  # fmt: skip


def test_losses_by_kind_equal_those_of_transformers(measured, model, edited):
    report = load_report(measured[0])
    before, after = report.base.loss.other_prompts, report.edited.loss.other_prompts
    pair = report.paired["loss.other_prompts"]
    expected = expected_losses(model, edited)
    assert before.by_category.keys() == after.by_category.keys() == pair.by_category.keys() == expected.keys()
    for kind, (base_loss, edited_loss, n) in expected.items():
        assert before.by_category[kind].n == pair.by_category[kind].n == n
        assert before.by_category[kind].value == pytest.approx(base_loss, abs=1e-4)
        assert after.by_category[kind].value == pytest.approx(edited_loss, abs=1e-4)
        assert pair.by_category[kind].difference == pytest.approx(edited_loss / base_loss - 1, abs=1e-3)
        assert (pair.by_category[kind].ci95 is None) == (n < 5)
    assert before.n == pair.n == sum(n for _, _, n in expected.values())
    assert before.tokens == sum(part.tokens for part in before.by_category.values())
    assert pair.p is not None
    assert pair.ci95[0] <= pair.difference <= pair.ci95[1]
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_rows_reach_the_terminal_the_page_and_the_card(measured, edited, tmp_path):
    out, said = measured
    report = load_report(out)
    write_card(tmp_path, load_recipe(edited), report=report)
    page, card = (out / "report.html").read_text().replace("&#39;", "'"), (tmp_path / "README.md").read_text()
    n = report.base.loss.other_prompts.n
    for text in (said, page, card):
        assert f"{TITLE} (n = {n})" in text
    for kind, part in report.base.loss.other_prompts.by_category.items():
        for text in (said, card):
            assert f"{TITLE}: {kind} (n = {part.n})" in text
        assert f"<td>{TITLE}</td><td>{kind}</td><td>{part.n}</td>" in page
        assert f"{TITLE}: {kind}" not in page, "the page has a table by category"


def test_limit_is_spread_over_the_kinds(model, edited, run, tmp_path):
    status, said = measure(model, edited, run, tmp_path / "out", "--limit", "8")
    assert status == 0, said
    found = load_report(tmp_path / "out").base.loss.other_prompts
    assert found.by_category.keys() <= KINDS
    assert found.n == len(found.by_category), "one of each kind"


def test_base_answers_are_kept_for_a_resumed_evaluation(measured, model, edited, run, tmp_path, monkeypatch):
    scores = TransformersEngine.scores

    def edited_dies(self, prompts, completions):
        if Path(self.folder) == Path(edited):
            raise OrthogonalizeError("the engine died")
        return scores(self, prompts, completions)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "scores", edited_dies)
        status, said = measure(model, edited, run, tmp_path / "out", "--limit", "64")
        assert status == 1
        assert said.startswith("error: the engine died")
    monkeypatch.setattr(TransformersEngine, "answers", lambda *_: pytest.fail("the base answers again"))
    status, said = measure(model, edited, run, tmp_path / "out", "--limit", "64")
    assert status == 0, said
    assert load_report(tmp_path / "out").paired == load_report(measured[0]).paired


class Quiet:
    """A model that gives these answers and the same log-probability to every completion."""

    def __init__(self, *answers: list[int]) -> None:
        self.said = list(answers)
        self.asked: list[int] = []

    def answers(self, prompts, max_new_tokens):
        self.asked.append(max_new_tokens)
        return self.said

    def scores(self, prompts, completions):
        return [Completion(-2.0, False) for _ in prompts]


def test_empty_answers_are_left_out_and_generated_only_once():
    suite, memory = OtherLoss([[1], [2, 3], [4]], ["a", "b", "a"]), BaseOutputs()
    engine = Quiet([5, 6], [], [7])
    first, again = suite.measure(engine, memory), suite.measure(engine, memory)
    assert first == again
    assert engine.asked == [ANSWER_TOKENS]
    (series,) = first.values()
    assert (series.values, series.tokens, series.categories) == ([2.0, 2.0], [2, 1], ["a", "a"])
    assert suite.longest == 2 + ANSWER_TOKENS
    with pytest.raises(OrthogonalizeError, match="leave out --suite other"):
        suite.measure(Quiet([], [], []), BaseOutputs())
