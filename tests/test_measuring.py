"""What is measured, against independent computations on tiny models with transformers; and what goes wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_files import (
    SETS,
    all_sets,
    arc_rows,
    harness_rows,
    harness_task,
    language_tasks,
    mmlu_rows,
    truthfulqa_rows,
    write,
)  # fmt: skip
from click.testing import CliRunner
from conftest import UNTRIED, choosing_tokenizer, store, tiny_llama

from orthogonalize.chat import ChatFormat
from orthogonalize.cli import main
from orthogonalize.divergence import kl_bound
from orthogonalize.editing import edit
from orthogonalize.engines import TransformersEngine
from orthogonalize.errors import OrthogonalizeError
from orthogonalize.evaluation import evaluate
from orthogonalize.likelihoods import Completion, Likeliest
from orthogonalize.losses import alpaca_losses, pile_losses
from orthogonalize.models import load_tokenizer
from orthogonalize.multiple_choice import MultipleChoice, Question, arc, mmlu, truthfulqa
from orthogonalize.plans import DEFAULT_SUITES, make_plan
from orthogonalize.report import load_report
from orthogonalize.run import load_run
from orthogonalize.suites import Memory


@pytest.fixture(scope="module")
def run_settings():
    return UNTRIED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tiny = tiny_llama(tie_word_embeddings=True, max_position_embeddings=512)
    folder = store(tiny, tmp_path_factory.mktemp("measuring") / "model", torch.float32)
    choosing_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def edited(model, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "edited"
    edit(str(model), out, run=run, method="ablate", scope="all")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return all_sets(tmp_path_factory.mktemp("data"))


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


def test_one_start_a_model_measures_everything_with_n_interval_and_pair(report):
    base, edited = report.base.flat(), report.edited.flat()
    assert base.keys() == edited.keys() == report.paired.keys()
    assert set(base) == {
        "behaviour.target", "behaviour.harmless", "refusal.target", "refusal.harmless", "refusal.sets.xstest",
        "refusal.sets.orbench", "loss.own_completions", "loss.pile", "loss.alpaca", "kl.first_token",
        "kl.completions", "choices.mmlu", "choices.arc", "choices.truthfulqa",
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


def test_the_behaviour_is_the_first_token_of_the_answer(report, run, model):
    found = load_run(run)
    chat = ChatFormat(choosing_tokenizer())
    with TransformersEngine(model, choosing_tokenizer()) as engine:
        answers = engine.answers(chat.encode_all(found.texts("positive", "test")), 40)
    expected = sum(a[:1] == [found.info.behaviour_tokens[0]] for a in answers) / 6
    assert report.base.behaviour.target.value == expected


def test_losses_are_those_of_the_library(report, reference, data):
    from orthogonalize.benchmark_sets import ALPACA, PILE, rows

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


def test_kl_is_the_whole_sum_where_the_vocabulary_is_small(report, reference, run, edited, model):
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
def test_the_kl_bound_never_exceeds_the_kl_and_closes_with_k(k):
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


def test_a_token_the_edit_has_banished_keeps_its_weight_in_the_kl():
    """Base puts 0.9 on a word that the other lists nowhere among its likeliest: the floor stands for it."""
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


def test_predictions_are_those_of_scoring_every_choice_alone(model, reference, data):
    with TransformersEngine(model, choosing_tokenizer()) as engine:
        for name, make in (("mmlu", mmlu), ("arc", arc), ("truthfulqa", truthfulqa)):
            questions = make(data, None)
            expected = [brute_force(reference, q) for q in questions]
            found = MultipleChoice.of(name, questions, choosing_tokenizer())
            assert found.predictions(engine) == expected
            right = sum(p == q.answer for p, q in zip(expected, questions, strict=True))
            assert found.measure(engine, Memory())[f"choices.{name}"].measure().value == right / len(questions)


def test_prompts_are_those_of_lm_eval(data, tmp_path):
    """The harness's own task objects on the same files write the same context, choices and answer."""
    from lm_eval.tasks import TaskManager

    include = tmp_path / "tasks"
    include.mkdir()
    folder = data / "allenai" / "ai2_arc" / "ARC-Challenge"
    (include / "local_arc.yaml").write_text(
        f"include: arc_challenge.yaml\ntask: local_arc\ndataset_path: json\ndataset_name: null\nnum_fewshot: 0\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'test.jsonl'}\n    train: {folder / 'train.jsonl'}\n"
        f"training_split: train\nvalidation_split: null\ntest_split: test\n".replace(
            "include: arc_challenge.yaml", f"include: {_stock('arc/arc_challenge.yaml')}"
        )
    )
    task = TaskManager(include_path=str(include)).load(["local_arc"])["tasks"]["local_arc"]
    for document, question in zip(task.test_docs(), arc(data, None), strict=True):
        assert question.context.endswith(task.doc_to_text(document))
        assert question.choices == tuple(f" {c}" for c in task.doc_to_choice(document))
        assert question.answer == int(task.doc_to_target(document))


def _stock(name: str) -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / name


def test_any_lm_eval_task_runs_in_the_same_engine(model, edited, run, data, reference, tmp_path):
    """A task of two-choice questions over a local file, by name, with item-by-item comparison."""
    folder, rows = all_sets(tmp_path / "data"), harness_rows()
    harness_task(folder, rows)
    found = evaluate(
        edited, str(model), run, tmp_path / "report", suites=["lm_eval:housework"], engine="hf", data=folder
    )
    questions = [Question(row["question"], tuple(row["choices"]), row["gold"]) for row in rows]
    right = [brute_force(reference, q) == q.answer for q in questions]
    assert found.base.tasks["housework"]["acc"].value == sum(right) / len(right)
    assert found.paired["tasks.housework.acc"].n == 5
    with pytest.raises(OrthogonalizeError, match="no task 'nonesuch'"):
        evaluate(edited, str(model), run, tmp_path / "x", suites=["lm_eval:nonesuch"], engine="hf")


def test_lm_eval_s_tasks_of_every_kind_give_what_its_own_model_gives(model, edited, run, tmp_path):
    """Free answers cut at a stop, a text's perplexity by word and byte over several windows, a last word's."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, tasks = tmp_path / "data", ["reply", "reading", "ending"]
    texts = ["how do i bake a cake today", "please paint the wall " * 40, "how do i sew a dress"]
    tokenizer = load_tokenizer(model)
    with TransformersEngine(model, tokenizer, "cpu") as engine:
        (ids,) = engine.answers([tokenizer(texts[0])["input_ids"]], 6)
    said = tokenizer.decode(ids, skip_special_tokens=True).partition(" a")[0]
    assert said
    language_tasks(folder, [{"text": text, "reply": (said, "a wall", "dress")[i]} for i, text in enumerate(texts)])
    found = evaluate(
        edited, str(model), run, tmp_path / "report", suites=[f"lm_eval:{t}" for t in tasks], engine="hf", data=folder
    )
    for side, checkpoint in ((found.base, model), (found.edited, edited)):
        own = simple_evaluate(
            HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", max_length=512),
            tasks=tasks, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
        )["results"]  # fmt: skip
        assert side.tasks["reply"]["exact_match"].value == own["reply"]["exact_match,none"]
        for metric in ("word_perplexity", "byte_perplexity"):
            expected = own["reading"][f"{metric},none"]
            assert side.tasks["reading"][metric].perplexity == pytest.approx(expected, rel=1e-3)
        assert side.tasks["ending"]["perplexity"].perplexity == pytest.approx(
            own["ending"]["perplexity,none"], rel=1e-3
        )
        assert side.tasks["ending"]["acc"].value == own["ending"]["acc,none"]
    assert found.base.tasks["reply"]["exact_match"].value == pytest.approx(1 / 3)
    assert found.paired["tasks.reading.word_perplexity"].difference != 0
    assert "bits_per_byte" not in found.base.tasks["reading"]


def test_an_answer_read_in_two_ways_is_two_measures(model, edited, run, tmp_path):
    """lm-eval logs such answers once a filter (gsm8k: strict and flexible); together they would count twice."""
    folder = tmp_path / "data"
    language_tasks(folder, [{"text": "how do i bake a cake", "reply": "nothing like it"}] * 4)
    task = folder / "reply.yaml"
    first = "  - name: whole\n    filter:\n      - function: take_first\n"
    fixed = '  - name: fixed\n    filter:\n      - function: regex\n        regex_pattern: "(zzz)"\n'
    fixed += "        fallback: nothing like it\n      - function: take_first\n"
    task.write_text(task.read_text() + f"filter_list:\n{first}{fixed}")
    found = evaluate(edited, str(model), run, tmp_path / "report", suites=["lm_eval:reply"], engine="hf", data=folder)
    tasks = found.base.tasks["reply"]
    assert {name: (rate.value, rate.n) for name, rate in tasks.items()} == {
        "exact_match,whole": (0.0, 4), "exact_match,fixed": (1.0, 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("max_gen_toks: 4000", "answers of 4000 tokens and the model takes 512"),
        ("do_sample: true", "samples its answers"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused_before_any_engine_starts(
    asked, message, model, edited, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("orthogonalize.evaluation.open_engine", lambda *a: pytest.fail("an engine was started"))
    folder = tmp_path / "data"
    language_tasks(folder, [{"text": "how do i bake a cake", "reply": "x"}] * 4)
    task = folder / "reply.yaml"
    key = asked.partition(":")[0]
    lines = [f"  {asked}" if line.strip().startswith(key) else line for line in task.read_text().splitlines()]
    task.write_text("\n".join(lines) + "\n")
    with pytest.raises(OrthogonalizeError, match=message):
        evaluate(edited, str(model), run, tmp_path / "report", suites=["lm_eval:reply"], engine="hf", data=folder)


def test_suites_and_judges_named_twice_are_refused(model, edited, run, tmp_path):
    for words, message in (
        ({"suites": ["refusal", "loss", "refusal"]}, "suite refusal is named twice"),
        ({"judges": [f"harmbench={model}", f"harmbench={edited}"]}, "judge harmbench is named twice"),
    ):
        with pytest.raises(OrthogonalizeError, match=message):
            evaluate(edited, str(model), run, tmp_path / "report", engine="hf", **words)


def test_a_model_whose_log_probabilities_are_nan_is_one_line(model, edited, run, tmp_path, monkeypatch):
    scores = TransformersEngine.scores

    def damaged(self, prompts, completions):
        found = scores(self, prompts, completions)
        return [Completion(math.nan, False) for _ in found] if "edited" in self.folder.name else found

    monkeypatch.setattr(TransformersEngine, "scores", damaged)
    with pytest.raises(OrthogonalizeError, match=r"edited/loss: the model's log-probabilities are NaN"):
        evaluate(edited, str(model), run, tmp_path / "report", suites=["loss"], engine="hf", max_new_tokens=4)


def test_other_ways_of_putting_prompts_or_of_counting_are_another_measurement(model, run, tmp_path):
    from orthogonalize.evaluation import run_state

    found = load_run(run)
    tokenizer = load_tokenizer(model)
    plan = make_plan(found, tokenizer, ["refusal", "behaviour"], 4)
    assert make_plan(found, tokenizer, ["refusal", "behaviour"], 4).state == plan.state
    for change in ({"behaviour_tokens": [7]}, {"system": "be brief"}):
        other = replace(found, info=found.info.model_copy(update=change))
        assert make_plan(other, tokenizer, ["refusal", "behaviour"], 4).state != plan.state
    assert run_state(other) != run_state(found)


def test_a_killed_eval_keeps_what_was_measured_and_goes_on(model, edited, run, data, tmp_path, monkeypatch):
    settings = {"suites": ["refusal", "behaviour", "kl", "mmlu"], "engine": "hf", "max_new_tokens": 12, "data": data}
    whole = evaluate(edited, str(model), run, tmp_path / "whole", **settings)
    calls: list[str] = []
    answers, choices = TransformersEngine.answers, TransformersEngine.choices

    def counted(self, *arguments):
        calls.append(self.folder.name)
        return answers(self, *arguments)

    def dies(self, *_arguments):
        raise OrthogonalizeError("the engine died")

    monkeypatch.setattr(TransformersEngine, "answers", counted)
    monkeypatch.setattr(
        TransformersEngine,
        "choices",
        lambda self, *a: dies(self) if "edited" in self.folder.name else choices(self, *a),
    )
    with pytest.raises(OrthogonalizeError, match="died"):
        evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut").exists()
    assert calls == ["model", "edited"]
    monkeypatch.setattr(TransformersEngine, "choices", choices)
    resumed = evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    assert calls == ["model", "edited"]  # nothing was generated a second time
    assert resumed.model_dump() == whole.model_dump()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_suite_that_dies_half_way_goes_on_with_the_portion_that_was_lost(
    model, edited, run, data, tmp_path, monkeypatch
):
    settings = {"suites": ["refusal", "pile", "mmlu"], "engine": "hf", "max_new_tokens": 4, "data": data}
    whole = evaluate(edited, str(model), run, tmp_path / "whole", **settings)
    monkeypatch.setattr("orthogonalize.portions.PORTION", 3)
    asked: list[tuple[str, str, int]] = []
    deaths = {("edited", "answers"), ("model", "scores"), ("edited", "choices")}

    def mortal(kind):
        method = getattr(TransformersEngine, kind)

        def ask(self, prompts, *more):
            asked.append((self.folder.name, kind, len(prompts)))
            portions = [one for one in asked if one[:2] == (self.folder.name, kind)]
            if len(portions) == 2 and (self.folder.name, kind) in deaths:
                deaths.remove((self.folder.name, kind))
                raise OrthogonalizeError("the engine died")
            return method(self, prompts, *more)

        return ask

    for kind in ("answers", "scores", "choices"):
        monkeypatch.setattr(TransformersEngine, kind, mortal(kind))
    for _ in range(3):
        with pytest.raises(OrthogonalizeError, match=r"died; what was measured is kept"):
            evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    resumed = evaluate(edited, str(model), run, tmp_path / "cut", **settings)
    assert resumed.model_dump() == whole.model_dump()
    assert max(size for _, _, size in asked) == 3
    first = [size for name, kind, size in asked if (name, kind) == ("edited", "answers")]
    items = whole.edited.refusal.target.n + whole.edited.refusal.harmless.n
    assert sum(first) == items + 3  # of all answers one portion, that which was lost, was asked for twice
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_the_portions_of_a_suite_are_forgotten_when_it_is_done(tmp_path):
    from orthogonalize.journal import Journal

    journal = Journal(tmp_path / "out", "one")
    journal.step("base/mmlu", lambda: [*journal.step("base/mmlu/1/0", lambda: [1]), 2])
    assert Journal(tmp_path / "out", "one").done == {"base/mmlu": [1, 2]}


def test_a_journal_of_other_settings_or_a_cut_line_is_not_taken(tmp_path):
    from orthogonalize.journal import Journal

    journal = Journal(tmp_path / "out", "one")
    journal.step("a", lambda: 1)
    journal.step("b", lambda: 2)
    with journal.file.open("a") as file:
        file.write('{"step": "c", "resu')
    assert Journal(tmp_path / "out", "one").done == {"a": 1, "b": 2}
    assert Journal(tmp_path / "out", "two").done == {}


def test_a_run_is_not_taken_up_with_other_data_or_another_judge(model, tmp_path):
    from orthogonalize.evaluation import data_state

    folder = all_sets(tmp_path / "data")
    before = data_state(folder)
    assert data_state(folder) == before
    file = next(f for f in folder.rglob("*") if f.is_file())
    file.write_bytes(file.read_bytes() + b" ")
    assert data_state(folder) != before


def test_a_judge_without_answers_to_judge_is_refused_before_anything_is_measured(model, edited, run, tmp_path):
    for suites in (["loss"], ["kl"]):  # of these the base alone answers
        with pytest.raises(OrthogonalizeError, match="judges need answers"):
            evaluate(edited, str(model), run, tmp_path / "x", suites=suites, engine="hf", judges=[f"harmbench={model}"])


def test_memory_that_runs_out_is_one_line_and_loses_nothing(model, edited, run, tmp_path, monkeypatch):
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    settings = {"engine": "hf", "max_new_tokens": 8, "suites": ["refusal", "kl"]}
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "likeliest", full)
        with pytest.raises(OrthogonalizeError, match=r"memory ran out: CUDA out of memory.*kept, so the same command"):
            evaluate(edited, str(model), run, tmp_path / "x", **settings)
    assert evaluate(edited, str(model), run, tmp_path / "x", **settings).edited.refusal is not None


def test_sensitive_answers_are_folded_and_can_be_left_out(model, edited, run, tmp_path):
    import shutil

    secret = tmp_path / "run"
    shutil.copytree(run, secret)
    info = json.loads((secret / "run.json").read_text())
    (secret / "run.json").write_text(json.dumps(info | {"sensitive": True}))
    settings = {"engine": "hf", "max_new_tokens": 8, "suites": ["refusal"]}
    found = evaluate(edited, str(model), secret, tmp_path / "open", **settings)
    page = (tmp_path / "open" / "report.html").read_text()
    prompt = load_run(run).texts("positive", "test")[0]
    harmless = load_run(run).texts("negative", "test")[0]
    assert f"<summary>{prompt}" not in page
    assert f'<p class="prompt">{prompt}' in page
    assert f"<summary>{harmless}" in page
    assert [a.sensitive for a in found.answers] == [True] * 6 + [False] * 6
    found = evaluate(edited, str(model), secret, tmp_path / "redacted", redact=True, **settings)
    assert (found.redacted, len(found.answers)) == (6, 6)
    for name in ("report.json", "report.html"):
        assert prompt not in (tmp_path / "redacted" / name).read_text()
        assert harmless in (tmp_path / "redacted" / name).read_text()
    assert found.base.refusal.target.n == 6  # the numbers stay


def refused_data(folder: Path, edit) -> Path:
    edit(all_sets(folder))
    return folder


ARC, TRUTHFUL = "allenai/ai2_arc/ARC-Challenge", "truthfulqa/truthful_qa/multiple_choice"
LETTERED = [row | {"answer": "A"} for row in mmlu_rows(3)]
NOTHING = {"instruction": "say", "input": None, "output": "x", "text": ""}
UNSAFE = [{"prompt": "a", "type": "b", "label": "unsafe"}]
DAMAGE = [
    ("mmlu", lambda d: (d / "cais/mmlu/all/test.jsonl").unlink(), "no local copy of cais/mmlu all test"),
    ("mmlu", lambda d: (d / "cais/mmlu/all/test.jsonl").write_text(""), "is empty"),
    ("arc", lambda d: (d / ARC / "test.jsonl").write_text('{"question": "Wh'), "cannot be read"),
    ("alpaca", lambda d: (d / "tatsu-lab/alpaca/train.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ("pile", lambda d: (d / "monology/pile-uncopyrighted/test.jsonl").write_text('{"words": "x"}'), "has no 'text'"),
    ("truthfulqa", lambda d: write(d / TRUTHFUL, arc_rows(3), "validation"), "mc1_targets"),
    ("mmlu", lambda d: write(d / "cais/mmlu/all", mmlu_rows(3), "dev", ".json"), "fewer than 5"),
    ("arc", lambda d: write(d / ARC, arc_rows(2), "train"), "fewer than 5"),
    ("xstest", lambda d: write(d / "Paul/XSTest", UNSAFE, suffix=".csv"), "no usable prompts"),
    ("mmlu", lambda d: write(d / "cais/mmlu/all", LETTERED, "test"), "a row of cais/mmlu all test"),
    ("alpaca", lambda d: write(d / "tatsu-lab/alpaca", [NOTHING], suffix=".parquet"), "a row of tatsu-lab/alpaca"),
    ("lm_eval:housework", lambda d: harness_task(d, [], d / "nowhere.jsonl"), "housework cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("suite", "damage", "message"), DAMAGE, ids=[f"{s} {m}" for s, _, m in DAMAGE])
def test_bad_data_is_one_clear_error_before_any_engine_starts(
    suite, damage, message, model, edited, run, tmp_path, monkeypatch
):
    folder = refused_data(tmp_path / "data", damage)
    monkeypatch.setattr("orthogonalize.evaluation.open_engine", lambda *a: pytest.fail("an engine was started"))
    result = CliRunner().invoke(
        main,
        ["-q", "eval", str(edited), "--base", str(model), "--run", str(run), "--out", str(tmp_path / "out"),
         "--suite", f"refusal,{suite}", "--engine", "hf", "--data", str(folder)],
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    assert message in result.output
    assert result.output.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_before_any_engine_starts(model, edited, run, tmp_path, monkeypatch):
    monkeypatch.setattr("orthogonalize.evaluation.open_engine", lambda *a: pytest.fail("an engine was started"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = ["-q", "eval", str(edited), "--base", str(model), "--run", str(run), "--out", str(tmp_path / "out"),
              "--engine", "hf"]  # fmt: skip
    cases = [
        (["--judge", "nobody"], "no judge 'nobody'"),
        (["--judge", "wildguard"], "judge wildguard: "),
        (["--judge", "wildguard=" + str(tmp_path / "nowhere")], "no such model"),
        (["--suite", "mmlu", "--data", str(tmp_path / "nowhere")], "no such folder"),
        (["--suite", "refusal,magic"], "no suite 'magic'"),
        (["--max-new-tokens", "600"], "the model takes 512"),
    ]
    for words, message in cases:
        result = CliRunner().invoke(main, [*common, *words])
        assert result.exit_code == 1, (words, result.output)
        assert message in result.output, (words, result.output)
        assert result.output.strip().count("\n") == 0


def test_a_gated_set_says_how_to_get_it(monkeypatch):
    from orthogonalize.benchmark_sets import MMLU, rows

    def gated(*_arguments, **_keywords):
        raise RuntimeError("Dataset 'cais/mmlu' is a gated dataset on the Hub. Visit the page to ask for access.")

    monkeypatch.setattr("datasets.load_dataset", gated)
    with pytest.raises(OrthogonalizeError, match="gated: accept its terms"):
        rows(MMLU, None)


def test_texts_are_cut_at_256_tokens_and_only_answers_are_scored(tmp_path):
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


def test_rows_are_spread_over_a_sorted_set(tmp_path):
    folder = all_sets(tmp_path / "data")
    write(folder / "cais/mmlu/all", [*mmlu_rows(20, "a_one"), *mmlu_rows(20, "b_two")], "test")
    write(folder / "cais/mmlu/all", [*mmlu_rows(5, "a_one"), *mmlu_rows(5, "b_two")], "dev", ".json")
    assert [q.category for q in mmlu(folder, 4)] == ["a_one", "a_one", "b_two", "b_two"]
    assert "(with answers) about a one.\n\n" in mmlu(folder, 4)[0].context
    write(folder / "truthfulqa/truthful_qa/multiple_choice", truthfulqa_rows(9), "validation")
    assert [q.answer for q in truthfulqa(folder, None)] == [0] * 9
