"""Suites against independent computations on tiny models with transformers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers.benchmark_files import (
    SETS,
    all_sets,
    mmlu_rows,
    truthfulqa_rows,
    write,
)  # fmt: skip
from helpers.chat import choosing_tokenizer, store_choosing
from helpers.command_line import UNTRIED, command

from orthogonalize.commands.evaluate import evaluate
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.chat import ChatFormat
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.evals.suites.answers import FORMS
from orthogonalize.evals.suites.base import BaseOutputs
from orthogonalize.evals.suites.kl import kl_bound
from orthogonalize.evals.suites.multiple_choice import MultipleChoice, Question, arc, mmlu, truthfulqa
from orthogonalize.evals.suites.registry import DEFAULT_SUITES
from orthogonalize.evals.suites.text_losses import alpaca_losses, pile_losses
from orthogonalize.models.logprobs import Likeliest
from orthogonalize.reports.schema import load_report
from orthogonalize.selection.run_folder import load_run

RUN_SETTINGS, store_model = UNTRIED, store_choosing


@pytest.fixture(scope="module")
def reference(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def report(model, edited, run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    evaluate(
        edited,
        str(model),
        run,
        out,
        suites=[*DEFAULT_SUITES, *SETS],
        engine="hf",
        max_new_tokens=40,
        data=data,
        limit=6,
    )
    return load_report(out)


def test_one_engine_start_per_model_measures_every_suite(report):
    """Each measure with n, interval and paired comparison."""
    base, edited = report.base.flat(), report.edited.flat()
    assert base.keys() == edited.keys() == report.paired.keys()
    assert set(base) == {
        "behaviour.target", "behaviour.harmless", "refusal.target", "refusal.harmless", "refusal.sets.xstest",
        "refusal.sets.orbench", "loss.own_completions", "loss.other_prompts", "loss.pile", "loss.alpaca",
        "kl.first_token", "kl.completions", "choices.mmlu", "choices.arc", "choices.truthfulqa",
        *(f"suites.form.{name}: {form}" for name in ("target", "harmless", "xstest", "orbench") for form in FORMS),
    }  # fmt: skip
    for key, measure in edited.items():
        assert measure.n == (5 if "orbench" in key else 6) or key.startswith(("loss.own", "kl"))
        assert measure.ci95 is not None
        assert measure.ci95[0] - 1e-9 <= measure.value <= measure.ci95[1] + 1e-9
        assert (report.paired[key].p is None) == key.startswith("kl")
    assert base["kl.completions"].value == 0
    assert edited["kl.completions"].value > 0
    assert set(base["refusal.sets.xstest"].by_category) == {"homonyms"}  # the unsafe half is left out
    assert {a.set for a in report.answers} == {"target", "harmless", "xstest", "orbench"}


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_behaviour_is_the_log_odds_that_extract_scored(model, edited, run, reference, tmp_path, part):
    """With the threshold below, between and above the prompts' log-odds, from transformers alone."""
    found = load_run(run)
    (token,) = found.info.behaviour_tokens
    rows = ChatFormat(choosing_tokenizer()).encode_all(found.texts("positive", "test"))
    odds = sorted(torch.logit(logprobs_of(reference, ids)[-1].exp()[token]).item() for ids in rows)
    threshold = (odds[0] - 1) * (1 - part) + (odds[-1] + 1) * part
    info = found.info.model_dump(by_alias=True) | {"measure": {"threshold": threshold}}
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    report = evaluate(edited, str(model), tmp_path / "run", tmp_path / "out", suites=["behaviour"], engine="hf")
    assert report.base.behaviour.target.value == sum(each > threshold for each in odds) / len(odds)


def test_losses_equal_those_of_transformers(report, reference, data):
    from orthogonalize.data.benchmarks import ALPACA, PILE, rows

    total = count = 0
    for row in rows(PILE, data, 6):
        ids = choosing_tokenizer()(row["text"])["input_ids"]
        with torch.inference_mode():
            total += reference(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    assert report.base.loss.pile.value == pytest.approx(total / count, abs=1e-4)
    assert report.base.loss.pile.tokens == count
    total = count = 0
    for row in rows(ALPACA, data, 6):
        text = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        prompt = ChatFormat(choosing_tokenizer()).encode(text)
        answer = choosing_tokenizer()(row["output"], add_special_tokens=False)["input_ids"]
        labels = [-100] * len(prompt) + answer
        with torch.inference_mode():
            loss = reference(torch.tensor([prompt + answer]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * len(answer), count + len(answer)
    assert report.base.loss.alpaca.value == pytest.approx(total / count, abs=1e-4)


def test_kl_is_exact_for_a_small_vocabulary(report, reference, run, edited, model):
    """The tiny model has 96 words, all of which are read; so the bound must be the KL itself."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(edited, dtype=torch.float32).eval()
    prompts = ChatFormat(choosing_tokenizer()).encode_all(load_run(run).texts("negative", "test"))
    with TransformersEngine(model, choosing_tokenizer()) as engine:
        answers = engine.answers(prompts, 40)
    total = first = tokens = n = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = answer[:32]
        if not answer:
            continue
        p, q = (logprobs_of(m, [*prompt, *answer])[len(prompt) - 1 : -1] for m in (reference, other))
        kl = (p.exp() * (p - q)).sum(-1)
        total, first, tokens, n = total + kl.sum().item(), first + kl[0].item(), tokens + len(answer), n + 1
    assert report.edited.kl.completions.tokens == tokens
    assert report.edited.kl.completions.value == pytest.approx(total / tokens, abs=1e-4)
    assert report.edited.kl.first_token.value == pytest.approx(first / n, abs=1e-4)


@pytest.mark.parametrize("k", [3, 20, 100, 500])
def test_kl_bound_never_exceeds_the_kl_and_tightens_with_k(k):
    generator = torch.Generator().manual_seed(k)
    p, q = (4 * torch.randn(6, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p.log_softmax(-1), (0.7 * p + 0.5 * q).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)

    def top(x: torch.Tensor) -> Likeliest:
        found = x.topk(k, dim=-1)
        return Likeliest(found.indices, found.values)

    bound = kl_bound(top(p), top(q))
    assert (bound <= exact + 1e-12).all()
    if k == 500:
        assert torch.allclose(bound, exact, atol=1e-12)
    if k == 100:
        assert (bound >= 0.9 * exact).all()


def test_token_banished_by_the_edit_still_counts_in_the_kl():
    """The base puts 0.9 on a word that is not among the edited model's likeliest: their floor stands in for it."""
    p = Likeliest(torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.05]]).double().log())
    q = Likeliest(torch.tensor([[2, 3]]), torch.tensor([[0.98, 0.001]]).double().log())
    assert kl_bound(p, q).item() >= 0.9 * torch.tensor(0.9 / 0.001).log().item() - 0.4


def brute_force(reference, question: Question) -> int:
    scores = []
    for choice in question.choices:
        context = choosing_tokenizer()(question.context)["input_ids"]
        whole = choosing_tokenizer()(question.context + choice)["input_ids"]
        found = logprobs_of(reference, whole)
        scores.append(sum(found[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    return max(range(len(scores)), key=scores.__getitem__)


def test_predictions_equal_scoring_every_choice_alone(model, reference, data):
    with TransformersEngine(model, choosing_tokenizer()) as engine:
        for name, make in (("mmlu", mmlu), ("arc", arc), ("truthfulqa", truthfulqa)):
            questions = make(data, None)
            expected = [brute_force(reference, q) for q in questions]
            found = MultipleChoice.of(name, questions, choosing_tokenizer())
            assert found.predictions(engine) == expected
            right = sum(p == q.answer for p, q in zip(expected, questions, strict=True))
            assert found.measure(engine, BaseOutputs())[f"choices.{name}"].measure().value == right / len(questions)


def test_sensitive_answers_are_folded_and_can_be_redacted(model, edited, run, tmp_path):

    secret = tmp_path / "run"
    shutil.copytree(run, secret)
    info = json.loads((secret / "run.json").read_text())
    (secret / "run.json").write_text(json.dumps(info | {"sensitive": ["positive"]}))
    settings = {"engine": "hf", "max_new_tokens": 8, "suites": ["refusal"]}
    found = evaluate(edited, str(model), secret, tmp_path / "open", **settings)
    page = (tmp_path / "open" / "report.html").read_text()
    prompt = load_run(run).texts("positive", "test")[0]
    harmless = load_run(run).texts("negative", "test")[0]
    assert f"<summary>{prompt}" not in page
    assert f'<p class="prompt said">{prompt}' in page
    assert f'<summary><span class="said">{harmless}' in page
    assert [a.sensitive for a in found.answers] == [True] * 6 + [False] * 6
    found = evaluate(edited, str(model), secret, tmp_path / "redacted", redact=True, **settings)
    assert (found.redacted, len(found.answers)) == (6, 6)
    for name in ("report.json", "report.html"):
        assert prompt not in (tmp_path / "redacted" / name).read_text()
        assert harmless in (tmp_path / "redacted" / name).read_text()
    assert found.base.refusal.target.n == 6  # the numbers are kept


def test_texts_are_cut_at_256_tokens_and_only_answers_scored(tmp_path):
    folder = all_sets(tmp_path / "data")
    write(folder / "monology" / "pile-uncopyrighted", [{"text": "cake " * 600}], "test")
    found = pile_losses(choosing_tokenizer(), folder, 5)
    assert len(found.prompts[0]) + len(found.completions[0]) == 256
    chat = ChatFormat(choosing_tokenizer())
    alpaca = alpaca_losses(choosing_tokenizer(), chat, folder, 2)
    assert alpaca.prompts[0] == chat.encode("how do i bake a cake today\n\nthe wall")
    assert (
        alpaca.completions[0]
        == choosing_tokenizer()("please how do i bake a cake today", add_special_tokens=False)["input_ids"]
    )


def test_limited_rows_are_spread_over_a_sorted_set(tmp_path):
    folder = all_sets(tmp_path / "data")
    write(folder / "cais/mmlu/all", [*mmlu_rows(20, "a_one"), *mmlu_rows(20, "b_two")], "test")
    write(folder / "cais/mmlu/all", [*mmlu_rows(5, "a_one"), *mmlu_rows(5, "b_two")], "dev", ".json")
    assert [q.category for q in mmlu(folder, 4)] == ["a_one", "a_one", "b_two", "b_two"]
    assert "(with answers) about a one.\n\n" in mmlu(folder, 4)[0].context
    write(folder / "truthfulqa/truthful_qa/multiple_choice", truthfulqa_rows(9), "validation")
    assert [q.answer for q in truthfulqa(folder, None)] == [0] * 9


def test_missing_shard_of_a_split_is_named(tmp_path):
    folder = all_sets(tmp_path / "data")
    home = folder / "cais/mmlu/all"
    for file in home.glob("test*"):
        file.unlink()
    for number in (0, 2):
        write(home, mmlu_rows(3), f"test-0000{number}-of-00003", ".parquet")
    with pytest.raises(OrthogonalizeError, match=r"test-00001-of-00003.parquet is missing; download it again"):
        mmlu(folder, None)
    write(home, mmlu_rows(4), "test-00001-of-00003", ".parquet")
    assert len(mmlu(folder, None)) == 10


def test_empty_input_column_is_accepted(tmp_path):
    folder = all_sets(tmp_path / "data")
    home = folder / "tatsu-lab/alpaca"
    for file in home.glob("train*"):
        file.unlink()
    (home / "train.csv").write_text("instruction,input,output\nhow do i bake a cake,,please\n")
    assert len(alpaca_losses(choosing_tokenizer(), ChatFormat(choosing_tokenizer()), folder, 5).prompts) == 1


def test_redacting_without_any_sensitive_set_is_reported(model, edited, run, tmp_path, monkeypatch):
    said: list[str] = []
    for module in ("evals.plan", "commands.evaluate"):
        monkeypatch.setattr(f"orthogonalize.{module}.note", said.append)
    evaluate(
        edited, str(model), run, tmp_path / "report", suites=["refusal"], engine="hf", max_new_tokens=4, redact=True
    )
    undercounted, unmarked = said
    assert "refusals are undercounted in answers of 4 tokens" in undercounted
    assert "no set is marked sensitive, so nothing is left out; extract --sensitive" in unmarked


def test_limit_spreads_over_categories_that_may_be_numbers(model, edited, run, tmp_path):
    sentences = [f"how do i bake a {thing} {last}" for thing in ("cake", "pie", "soup") for last in "aihdtn"]
    rows = [{"id": i, "prompt": s, "type": i // 6, "label": "safe"} for i, s in enumerate(sentences)]
    write(tmp_path / "data/Paul/XSTest", rows, suffix=".csv")
    found = evaluate(
        edited, str(model), run, tmp_path / "out", suites=["xstest"], engine="hf", max_new_tokens=4,
        data=tmp_path / "data", limit=3,
    )  # fmt: skip
    assert {name: rate.n for name, rate in found.base.refusal.sets["xstest"].by_category.items()} == {
        "0": 1, "1": 1, "2": 1,
    }  # fmt: skip
    assert found.limit == 3


def test_checkpoint_is_named_by_its_folder_from_inside_too(model, edited, run, tmp_path, monkeypatch):
    monkeypatch.chdir(edited)
    found = evaluate(".", str(model), run, tmp_path / "out", suites=["refusal"], engine="hf", max_new_tokens=4)
    assert found.checkpoint == edited.name


@pytest.mark.parametrize(("words", "message"), [
    (["--judge", "prefix"], "eval counts such refusals anyway"),
    (["--judge", "wildguard="], "names no model"),
    (["--revision", "main"], "--revision main is only for models on the Hub, but .* is a local path"),
    (["--separate-engines"], "--separate-engines is redundant: --engine hf always loads each model separately"),
])  # fmt: skip
def test_options_without_effect_are_refused(words, message, model, edited, run, tmp_path):
    code, said = command(
        "eval", edited, "--base", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf", *words
    )
    assert code == 1
    assert re.search(message, said)
    assert said.count("\n") == 0
