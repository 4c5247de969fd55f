"""Preserved sets in `eval` and `sweep`: the behaviour kept on each, the loss and KL of each, and what is sensitive."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.chat import tiny_tokenizer
from helpers.command_line import UNTRIED, command

from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import source_names
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.evals.metrics import Rate, kept_share, yes_no_series
from orthogonalize.evals.plan import make_plan
from orthogonalize.evals.suites.base import BaseOutputs
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.reports.model_card import write_card
from orthogonalize.reports.schema import Report, load_report
from orthogonalize.reports.sweep import Sweep, sweep_columns, sweep_rows
from orthogonalize.selection.run_folder import PRESERVED, load_run

SETTINGS = replace(UNTRIED, test=10)
SETS = ["preserved keep", "preserved keep (2)"]
SUITES = ("--suite", "refusal,behaviour,loss,kl")
TOKENS = 8  # of every answer


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> list[str]:
    """Two files of the same name, with prompts of other kinds than the contrast's."""
    folder = tmp_path_factory.mktemp("kept")
    files = []
    for name, openings in (("a", ("please fold", "today i wash")), ("b", ("now sorry", "sure paint"))):
        (folder / name).mkdir()
        file = folder / name / "keep.txt"
        things = product(openings, ["cake", "pie", "soup", "wall", "car"], ("how", "the", "do"))
        file.write_text("\n".join(f"{opening} a {thing} {end}" for opening, thing, end in things))
        files.append(str(file))
    return files


@pytest.fixture(scope="module")
def run(model, sources, kept, tmp_path_factory) -> Path:
    """A run that preserves both files, whose behaviour half of their prompts show."""
    out = tmp_path_factory.mktemp("runs") / "run"
    found = extract(str(model), out, **sources, settings=SETTINGS, preserve=kept)
    first = [answer[0] for source in kept for answer in answers(model, model, texts(found, source)) if answer]
    token = max(first, key=first.count)
    middle = sorted(log_odds(model, model, token, [text for source in kept for text in texts(found, source)]))[9:11]
    info = json.loads((out / "run.json").read_text())
    info["measure"]["threshold"] = sum(middle) / 2
    (out / "run.json").write_text(json.dumps(info | {"behaviour_tokens": [token]}))
    return out


@pytest.fixture(scope="module")
def edited(model, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "edited"
    edit(str(model), out, run=run, method="ablate", scope="all", strength=0.3)
    return out


@dataclass(frozen=True)
class Measured:
    """A report whose refusals are answers with `word`, its folder, and what the command said."""

    report: Report
    folder: Path
    said: str
    word: str


@pytest.fixture(scope="module")
def measured(model, edited, run, tmp_path_factory) -> Measured:
    """Tiny models refuse nothing, so a word that the base says and the edited model partly keeps stands for it."""
    folder = tmp_path_factory.mktemp("report")
    settings = {"suites": ["refusal"], "engine": "hf", "max_new_tokens": TOKENS}
    plain = evaluate(edited, str(model), run, folder / "plain", **settings)
    pairs = [(a.base.split(), a.edited.split()) for a in plain.answers if a.set == SETS[0]]
    said = sorted({word for base, _ in pairs for word in base})
    word = next(w for w in said if 0 < sum(w in e for b, e in pairs if w in b) < sum(w in b for b, _ in pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthogonalize.data.refusals.PREFIXES", (word,))
        code, printed = measure(model, edited, run, folder / "report")
    assert code == 0, printed
    return Measured(load_report(folder / "report"), folder / "report", printed, word)


def measure(model: Path, edited: Path, run: Path, out: Path, *words: str) -> tuple[int, str]:
    always = ("--engine", "hf", "--max-new-tokens", str(TOKENS), *SUITES, *words)
    return command("eval", edited, "--base", model, "--run", run, "--out", out, *always)


def texts(run, source: str) -> list[str]:
    """The test prompts of a preserved source."""
    return [p.text for p in run.preserved if (p.source, p.split) == (source, "test")]


def answers(folder: Path, tokens_of: Path, prompts: list[str]) -> list[list[int]]:
    """Greedy answers, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in ChatFormat(load_tokenizer(tokens_of)).encode_all(prompts):
        answer: list[int] = []
        with torch.inference_mode():
            while len(answer) < TOKENS:
                token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
                if token == 2:  # the end
                    break
                answer.append(token)
        found.append(answer)
    return found


def log_odds(folder: Path, tokens_of: Path, token: int, prompts: list[str]) -> list[float]:
    """The log-odds that an answer begins with `token`, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in ChatFormat(load_tokenizer(tokens_of)).encode_all(prompts):
        with torch.inference_mode():
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token].item()
        found.append(math.log(p / (1 - p)))
    return found


def shares(base: list[bool], edited: list[bool]) -> tuple[float, float, float, int]:
    """(base's share, edited model's share, share kept, items that the base shows), counted by hand."""
    still = [after for before, after in zip(base, edited, strict=True) if before]
    return sum(base) / len(base), sum(edited) / len(edited), sum(still) / len(still), len(still)


@pytest.mark.parametrize("number", [0, 1])
def test_behaviour_kept_on_each_set_is_counted_from_the_answers(measured, model, edited, run, kept, number):
    """Answers and probabilities by transformers alone; every rate has its interval and a paired comparison."""
    found, report, name = load_run(run), measured.report, SETS[number]
    prompts = texts(found, kept[number])
    said = [answers(folder, model, prompts) for folder in (model, edited)]
    (token,), threshold = found.info.behaviour_tokens, found.info.measure.threshold
    odds = [log_odds(folder, model, token, prompts) for folder in (model, edited)]
    decode = tiny_tokenizer().decode
    flags = {
        "refusal": [[measured.word in decode(ids, skip_special_tokens=True) for ids in rows] for rows in said],
        "behaviour": [[each > threshold for each in rows] for rows in odds],
    }
    assert len({flag for rows in flags["behaviour"] for flag in rows}) == 2, "some show it, and some do not"
    for suite, (base, after) in flags.items():
        key = f"{suite}.sets.{name}"
        before, now, left, n = shares(base, after)
        assert report.base.flat()[key].value == before
        assert report.edited.flat()[key].value == now
        assert report.paired[key].difference == pytest.approx(now - before)
        assert report.paired[key].n == len(prompts) == 10
        assert report.paired[key].ci95 is not None
        assert (report.kept[key].value, report.kept[key].n) == (left, n)
        assert report.kept[key].ci95[0] <= left <= report.kept[key].ci95[1]
    assert {a.prompt for a in report.answers if a.set == name} == set(prompts)


def test_kept_share_is_of_what_the_base_shows():
    rate = kept_share(yes_no_series([True, True, True, True, False, None]),
                      yes_no_series([True, True, False, None, True, True]))  # fmt: skip
    assert (rate.value, rate.n, rate.unparseable) == (2 / 3, 3, 1)
    assert rate.ci95 == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson's, by hand
    assert kept_share(yes_no_series([False]), yes_no_series([True])).n == 0


@pytest.mark.parametrize("number", [0, 1])
def test_loss_and_kl_of_each_set_equal_those_of_transformers(measured, model, edited, run, kept, number):
    from transformers import AutoModelForCausalLM

    prompts = texts(load_run(run), kept[number])
    both = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (model, edited)]
    losses, kl, first, tokens, count = [0.0, 0.0], 0.0, 0.0, 0, 0
    rows = zip(ChatFormat(tiny_tokenizer()).encode_all(prompts), answers(model, model, prompts), strict=True)
    for ids, answer in rows:
        if not answer:
            continue
        with torch.inference_mode():
            p, q = (m(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1) for m in both)
        p, q = p[len(ids) - 1 : -1], q[len(ids) - 1 : -1]
        for i, each in enumerate((p, q)):
            losses[i] -= each[range(len(answer)), answer].sum().item()
        apart = (p.exp() * (p - q)).sum(-1)
        kl, first = kl + apart.sum().item(), first + apart[0].item()
        tokens, count = tokens + len(answer), count + 1
    report, name = measured.report, SETS[number]
    for loss, side in zip(losses, (report.base, report.edited), strict=True):
        assert side.loss.sets[name].value == pytest.approx(loss / tokens, abs=1e-4)
        assert (side.loss.sets[name].n, side.loss.sets[name].tokens) == (count, tokens)
    assert report.paired[f"loss.sets.{name}"].difference == pytest.approx(losses[1] / losses[0] - 1, abs=1e-3)
    assert report.edited.kl.sets[name].completions.value == pytest.approx(kl / tokens, abs=1e-4)
    assert report.edited.kl.sets[name].first_token.value == pytest.approx(first / count, abs=1e-4)
    assert kl > 0
    assert report.base.kl.sets[name].completions.value == 0


def test_harmless_measures_are_those_of_a_run_without_preserved_sets(measured, model, edited, run, tmp_path):
    bare = tmp_path / "run"
    shutil.copytree(run, bare)
    (bare / PRESERVED).unlink()
    code, said = measure(model, edited, bare, tmp_path / "report")
    assert code == 0, said
    assert "preserved" not in said
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "kept" not in stored
    assert "preserved" not in json.dumps(stored)
    for side in ("base", "edited"):
        assert list(stored[side]["loss"]) == ["own_completions", "other_prompts", "pile", "alpaca"]
        assert list(stored[side]["kl"]) == ["first_token", "completions"]
        assert list(stored[side]) == ["behaviour", "refusal", "judges", "loss", "kl", "choices", "tasks"]
        for suite, key in (("loss", "own_completions"), ("kl", "completions"), ("behaviour", "harmless")):
            mine = measured.report.model_dump(mode="json")[side]
            assert stored[side][suite][key] == mine[suite][key]


def test_rows_reach_the_terminal_the_page_and_the_card(measured, edited, tmp_path):
    report = measured.report
    write_card(tmp_path, load_recipe(edited), report=report)
    page = (measured.folder / "report.html").read_text().replace("&#39;", "'")
    card = (tmp_path / "README.md").read_text()
    for name in SETS:
        assert f'<option value="{name}">{name}</option>' in page
        for text in (measured.said, page, card):
            assert f"refusal, {name} (n = 10)" in text
            n = report.kept[f"refusal.sets.{name}"].n
            assert f"refusal, {name}: kept (n = {n})" in text
            n = report.kept[f"behaviour.sets.{name}"].n
            assert f"positive, {name}: kept (n = {n})" in text
            assert f"cross-entropy, own answers, {name} (n = {report.base.loss.sets[name].n})" in text
            assert f"perplexity, own answers, {name}" in text
            for which in ("first token", "along own answers"):
                assert f"KL to base, {which}, {name}" in text
        assert f"<li>Of the base's refusals on {name}, the edited model keeps " in page
        assert f"<li>On {name} it differs by at least " in page
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_suites_alone_need_only_the_base_to_answer(model, edited, run, tmp_path):
    found = evaluate(
        edited, str(model), run, tmp_path / "out", suites=["loss"], engine="hf", max_new_tokens=TOKENS, limit=4
    )
    assert list(found.base.flat()) == ["loss.own_completions", *(f"loss.sets.{name}" for name in SETS)]
    assert found.answers == []
    assert found.kept == {}
    plan = make_plan(load_run(run), load_tokenizer(model), ["kl"], TOKENS, limit=4)
    assert [(each.name, len(each.items)) for each in plan.sets] == [("harmless", 4), *((name, 4) for name in SETS)]
    assert plan.steps("edited") == [step for step in plan.steps("edited") if "answers" not in step]


def test_interrupted_eval_resumes_with_the_base_s_distributions(measured, model, edited, run, tmp_path, monkeypatch):
    from orthogonalize.engines.transformers import TransformersEngine

    likeliest, scores = TransformersEngine.likeliest, TransformersEngine.scores

    def edited_dies(self, *arguments):
        if Path(self.folder) == Path(edited):
            raise OrthogonalizeError("the engine died")
        return likeliest(self, *arguments)

    def only_edited(self, *arguments):
        assert Path(self.folder) == Path(edited), "the base is measured again"
        return scores(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "likeliest", edited_dies)
        assert measure(model, edited, run, tmp_path / "out")[0] == 1
    monkeypatch.setattr(TransformersEngine, "scores", only_edited)
    code, said = measure(model, edited, run, tmp_path / "out")
    assert code == 0, said
    again = load_report(tmp_path / "out")
    assert again.edited.kl == measured.report.edited.kl
    assert again.edited.loss == measured.report.edited.loss


def test_sweep_has_the_rows_on_test_prompts_only(model, run, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("orthogonalize.data.refusals.PREFIXES", (measured.word,))
    code, said = command(
        "sweep", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf", "--max-new-tokens", str(TOKENS),
        *SUITES, "--methods", "ablate", "--scopes", "all", "--strengths", "0.3",
    )  # fmt: skip
    assert code == 0, said
    found = Sweep.model_validate_json((tmp_path / "out" / "sweep.json").read_text())
    (row,) = found.variants
    assert row.kept == measured.report.kept
    assert row.measures.flat().keys() == found.base.flat().keys() == measured.report.base.flat().keys()
    assert not [key for key in found.val.flat() if "preserved" in key]
    columns = dict(zip(sweep_columns(found), sweep_rows(found)[1], strict=True))
    for name in SETS:
        assert f"(kept {100 * row.kept[f'refusal.sets.{name}'].value:.1f}%)" in columns[f"refusal, {name}"]
        assert f"cross-entropy, own answers, {name}" in columns
        assert f"KL to base, along own answers, {name}" in columns
        assert f"KL to base, first token, {name}" not in columns
    assert found.effect == "behaviour.target"
    assert "positive, preserved keep" in columns, "the behaviour is called after its prompts' file"


def test_sources_get_short_and_different_names():
    found = source_names(
        ["a/keep.txt", "b/keep.txt", "keep.jsonl", "keep (2).txt", "owner/code.v2", "planted:lists.jsonl"]
    )
    assert list(found.values()) == ["keep", "keep (2)", "keep (3)", "keep (2) (2)", "owner/code_v2", "lists"]
    assert source_names(["C.v1.csv"]) == {"C.v1.csv": "C_v1"}


def test_sensitive_preserved_sets_are_folded_and_redacted(model, edited, run, kept, tmp_path):
    secret = tmp_path / "run"
    shutil.copytree(run, secret)
    info = json.loads((secret / "run.json").read_text())
    assert info["sensitive_preserved"] == []
    (secret / "run.json").write_text(json.dumps(info | {"sensitive_preserved": [kept[1]]}))
    settings = {"engine": "hf", "max_new_tokens": TOKENS, "suites": ["refusal"]}
    found = evaluate(edited, str(model), secret, tmp_path / "open", **settings)
    assert found.sensitive
    assert {a.set for a in found.answers if a.sensitive} == {SETS[1]}
    page = (tmp_path / "open" / "report.html").read_text()
    open_prompt, hidden = (texts(load_run(run), source)[0] for source in kept)
    assert f'<summary><span class="said">{open_prompt}' in page
    assert f'<p class="prompt said">{hidden}' in page
    found = evaluate(edited, str(model), secret, tmp_path / "redacted", redact=True, **settings)
    assert found.redacted == 10
    assert found.base.refusal.sets[SETS[1]].n == 10  # the numbers are kept
    for name in ("report.json", "report.html"):
        assert hidden not in (tmp_path / "redacted" / name).read_text()
        assert open_prompt in (tmp_path / "redacted" / name).read_text()


def test_known_sources_and_marked_runs_preserve_sensitive_sets(model, sources, kept, run, tmp_path, monkeypatch):
    from orthogonalize.selection import source as module

    copy, known, load = tmp_path / "run", "walledai/AdvBench", module.load_prompts
    monkeypatch.setattr(module, "load_prompts", lambda source, **more: load(kept[0] if source == known else source))
    found = extract(str(model), copy, **sources, settings=SETTINGS, preserve=[known, kept[1]])
    assert found.info.sensitive_preserved == [known]
    assert load_run(copy).info.sensitive_preserved == [known]
    marked = extract(
        str(model), copy, **sources, settings=SETTINGS, preserve=[known, kept[1]], sensitive=True, force=True
    )
    assert marked.info.sensitive_preserved == [known, kept[1]]


def test_source_without_test_prompts_is_left_out_with_a_note(model, run, kept, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("orthogonalize.evals.plan.note", said.append)
    found = load_run(run)
    found = replace(found, preserved=[p for p in found.preserved if (p.source, p.split) != (kept[0], "test")])
    plan = make_plan(found, load_tokenizer(model), ["loss"], TOKENS)
    assert [each.name for each in plan.sets] == ["harmless", SETS[1]], "names do not depend on what is left out"
    assert said == ["preserved keep has no test prompts, so it is not measured; preserve more prompts"]


def test_long_preserved_prompt_is_to_be_removed_from_the_run(model, run, kept):
    found = load_run(run)
    long = [replace(p, text=p.text + " cake" * 90) if p.source == kept[1] else p for p in found.preserved]
    with pytest.raises(OrthogonalizeError, match=r"of preserved keep \(2\) has .* \(remove it from the run's prompts"):
        make_plan(replace(found, preserved=long), load_tokenizer(model), ["refusal"], TOKENS, positions=64)


def test_empty_answers_leave_a_preserved_set_out():
    memory = BaseOutputs()
    memory.remember("preserved keep", [[1], [2]], [[], []])
    memory.remember("harmless", [[1], [2]], [[3], []])
    assert list(memory.own) == ["harmless"]
    assert (memory.own["harmless"].prompts, memory.own["harmless"].answers) == ([[1]], [[3]])
    with pytest.raises(OrthogonalizeError, match="leave out --suite loss and kl"):
        memory.remember("harmless", [[1]], [[]])


def test_compare_shows_what_two_edits_keep(measured, tmp_path):
    from orthogonalize.commands.compare import compare

    other = measured.report.model_copy(deep=True)
    key = f"refusal.sets.{SETS[0]}"
    other.kept[key] = Rate(value=1.0, n=other.kept[key].n, ci95=(0.5, 1.0))
    (tmp_path / "report.json").write_text(other.model_dump_json())
    rows = {row[0]: row[1:] for row in compare(measured.folder, tmp_path).rows}
    base, first, second, apart = rows[f"refusal, {SETS[0]}: kept"]
    assert base == ""
    assert first != second
    gap = 100 * (1 - measured.report.kept[key].value)
    assert apart == f"{gap:+.1f} points (unpaired)"
