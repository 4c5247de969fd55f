"""lm-eval tasks: our prompts are its prompts, and our engine gives its numbers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from helpers.benchmark_files import all_sets, harness_rows, harness_task, language_tasks, write
from helpers.chat import choosing_tokenizer, store_choosing
from helpers.command_line import UNTRIED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from orthogonalize.commands.evaluate import evaluate
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.evals.suites.base import BaseOutputs
from orthogonalize.evals.suites.lm_eval import _plain, _series, harness_model, harness_tasks
from orthogonalize.evals.suites.multiple_choice import arc, mmlu, truthfulqa
from orthogonalize.models.loading import load_tokenizer
from orthogonalize.models.logprobs import Completion

RUN_SETTINGS, store_model = UNTRIED, store_choosing
HARNESS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(autouse=True, scope="module")
def harness_read_once():
    """Read the harness's thousands of task files once; every TaskManager would take five seconds for them."""
    build = TaskIndex.build
    own = cache(lambda: build([HARNESS]))

    def build_from(paths: Iterable[Path]) -> dict:
        first, *others = paths
        assert first == HARNESS
        return own() | build(others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_from))
        yield


# Per dataset: the harness's file, our function, the number of few-shot examples, the local files that replace the
# Hub's, and what MMLU's subjects add (which examples ARC gets depends on the harness's seed).
STOCK = {
    "mmlu": ("mmlu/default/_default_template_yaml", mmlu, 5,
             {"test": "cais/mmlu/all/test.jsonl", "shots": "cais/mmlu/all/dev.json"},
             'description: "The following are multiple choice questions (with answers) about house work.\\n\\n"\n'),
    "arc": ("arc/arc_challenge.yaml", arc, 5,
            {"test": "allenai/ai2_arc/ARC-Challenge/test.jsonl", "shots": "allenai/ai2_arc/ARC-Challenge/train.jsonl"},
            "fewshot_config:\n  sampler: first_n\ntraining_split: null\n"),
    "truthfulqa": ("truthfulqa/truthfulqa_mc1.yaml", truthfulqa, 0,
                   {"test": "truthfulqa/truthful_qa/multiple_choice/validation.jsonl"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_prompts_equal_those_of_lm_eval(name, data, tmp_path):
    """The harness's own task on the same files gives the same contexts (with examples), choices and answers."""
    stock, make, shots, files, more = STOCK[name]
    (tmp_path / "local.yaml").write_text(
        f"include: {HARNESS / stock}\ntask: local\n"
        "dataset_path: json\ndataset_name: null\nvalidation_split: null\ntest_split: test\n"
        + ("fewshot_split: shots\n" if shots else "")
        + "dataset_kwargs:\n  data_files:\n"
        + "".join(f"    {split}: {data / file}\n" for split, file in files.items())
        + more
    )
    task = TaskManager(include_path=str(tmp_path)).load(["local"])["tasks"]["local"]
    documents, questions = list(task.test_docs()), make(data, None)
    assert len(documents) == len(questions) > 5
    for document, question in zip(documents, questions, strict=True):
        assert question.context == task.fewshot_context(document, shots)
        assert question.choices == tuple(f" {c}" for c in task.doc_to_choice(document))
        assert question.answer == int(task.doc_to_target(document))


def own_results(checkpoint: Path, tasks: Path, *names: str) -> dict:
    """Results of the harness's own model class for tasks of the folder `tasks`."""
    return lm_eval.simple_evaluate(
        HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", max_length=509),
        tasks=list(names), task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0,
    )  # fmt: skip


def test_any_lm_eval_task_runs_in_the_same_engine(model, edited, run, tmp_path):
    """A task of two-choice questions over a local file, by name, compared item by item."""
    folder, rows = all_sets(tmp_path / "data"), harness_rows()
    harness_task(folder, rows)
    found = evaluate(
        edited, str(model), run, tmp_path / "report", suites=["lm_eval:housework"], engine="hf", data=folder
    )
    own = own_results(model, folder, "housework")
    assert found.base.tasks["housework"]["acc"].value == own["results"]["housework"]["acc,none"]
    assert found.paired["tasks.housework.acc"].n == len(own["samples"]["housework"]) == 5
    with pytest.raises(OrthogonalizeError, match="no task 'nonesuch'"):
        evaluate(edited, str(model), run, tmp_path / "x", suites=["lm_eval:nonesuch"], engine="hf")


def test_every_kind_of_task_gives_lm_evals_own_results(model, edited, run, tmp_path):
    """Free answers cut at a stop, perplexity per word and byte over several windows, and last words."""
    folder, tasks = tmp_path / "data", ["reply", "reading", "ending"]
    texts = ["how do i bake a cake today", "please paint the wall " * 140, "how do i sew a dress"]
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
        own = own_results(checkpoint, folder, *tasks)["results"]
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


def test_task_prompts_are_truncated_only_where_they_must_be(model, tmp_path, monkeypatch):
    """Their length is known before an engine starts; truncation is reported."""
    asked: list[list[int]] = []
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.evals.suites.lm_eval.note", notes.append)

    class Asked:
        def scores(self, prompts, completions):
            asked.extend([*p, *c] for p, c in zip(prompts, completions, strict=True))
            return [Completion(-1.0, True) for _ in prompts]

    tokenizer, words = load_tokenizer(model), "please fold the cake today " * 1200  # 6,000 tokens
    harness_task(tmp_path, [{"question": words, "choices": [" today", " now"], "gold": 0}])
    for positions, whole in ((8000, True), (512, False)):
        (task,) = harness_tasks(["housework"], tokenizer, positions, tmp_path, None)
        assert task.longest <= positions
        assert (task.longest > 6000) == whole
        assert [text.partition(":")[2] for text in notes] == (
            [] if whole else [" 2 of 2 prompts lose their beginning (the model takes 512 tokens)"]
        )
        asked.clear()
        task.measure(Asked(), BaseOutputs())
        assert {len(ids) for ids in asked} == {len(tokenizer(words + " now")["input_ids"]) if whole else 510}


def test_answer_with_two_filters_gives_two_measures(model, edited, run, tmp_path):
    """lm-eval logs such answers once per filter (gsm8k: strict and flexible); together they would count twice."""
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
        ("max_gen_toks: 4000", "answers of 4000 tokens, but the model takes only 512"),
        ("do_sample: true", "samples its answers"),
        ("temperature: 0.7", "samples its answers"),
    ],
)
def test_unmeasurable_task_is_refused_before_any_engine_starts(
    asked, message, model, edited, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", lambda *a: pytest.fail("an engine was started"))
    folder = tmp_path / "data"
    language_tasks(folder, [{"text": "how do i bake a cake", "reply": "x"}] * 4)
    task = folder / "reply.yaml"
    key = asked.partition(":")[0].replace("temperature", "do_sample")
    lines = [f"  {asked}" if line.strip().startswith(key) else line for line in task.read_text().splitlines()]
    task.write_text("\n".join(lines) + "\n")
    with pytest.raises(OrthogonalizeError, match=message):
        evaluate(edited, str(model), run, tmp_path / "report", suites=["lm_eval:reply"], engine="hf", data=folder)


def test_long_continuation_keeps_its_end_and_one_context_token():
    asked: list[tuple[list[int], list[int]]] = []

    class Engine:
        def scores(self, prompts, completions):
            asked.extend(zip(prompts, completions, strict=True))
            return [Completion(0.0, True)] * len(prompts)

    model = harness_model(Engine(), choosing_tokenizer(), 10)
    requests = [(None, [1, 2], list(range(10, 10 + n))) for n in (0, 3, 7, 8, 9, 30)]
    model._loglikelihood_tokens(requests)
    for (prompt, completion), (_, context, text) in zip(asked, requests, strict=True):
        assert prompt
        assert len(prompt) + len(completion) <= 9
        assert completion == text[len(text) - len(completion) :]
        assert len(completion) == min(len(text), 8)
        assert [*prompt, *completion] == [*context, *text][-len(prompt) - len(completion) :]


def test_perplexity_of_texts_without_words_is_undefined():
    assert _series([(-1.0, 0), (-2.0, 0)], perplexity=True) is None
    assert _series([(-1.0, 0), (-2.0, 3)], perplexity=True) is not None


def loaded(folder: Path, model: Path, *names: str) -> list:
    return harness_tasks(list(names), load_tokenizer(model), 512, folder, None)


def test_task_state_depends_on_its_data_and_code(model, tmp_path):
    """Data may lie anywhere, and code beside the task."""
    folder, rows = tmp_path / "data", harness_rows()
    file = write(tmp_path / "elsewhere", rows, "items")
    folder.mkdir()
    harness_task(folder, rows, file)
    before = loaded(folder, model, "housework")[0].state
    assert loaded(folder, model, "housework")[0].state == before
    write(tmp_path / "elsewhere", [{**row, "gold": 0} for row in rows], "items")
    after = loaded(folder, model, "housework")[0].state
    assert after != before
    (folder / "utils.py").write_text("def score(): ...")
    assert loaded(folder, model, "housework")[0].state != after


def test_task_state_is_the_same_in_every_process():
    """Whatever its documents hold."""

    class Image: ...

    document = {"b": {3, "x"}, 1: np.float32(0.5), "a": (b"\x00", Image()), "c": {(1, 2): None}}
    assert _plain(document) == [
        ["1", 0.5], ["a", ["00", "Image"]], ["b", ["3", "x"]], ["c", [["(1, 2)", None]]],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_for_the_answer_length_is_understood(name, model, tmp_path):
    asked: list[int] = []

    class Asked:
        def answers(self, prompts, most):
            asked.append(most)
            return [[] for _ in prompts]

    language_tasks(tmp_path, [{"text": "how do i bake a cake", "reply": "x"}] * 4)
    task = tmp_path / "reply.yaml"
    task.write_text(task.read_text().replace("max_gen_toks", name))
    (found,) = loaded(tmp_path, model, "reply")
    found.measure(Asked(), BaseOutputs())
    assert asked == [6]
    assert found.longest == len(load_tokenizer(model)("how do i bake a cake")["input_ids"]) + 7


MEASURED_BY_ITEM = """
import numpy as np
def results(doc, results):
    right = np.bool_(doc["gold"] == 0)
    return {"found": float("nan") if doc["gold"] else 1.0, "right": right, "most": right, "said": "nothing"}
def most(items):
    return max(items)
"""


def test_missing_items_and_other_aggregations_are_handled(model, edited, run, tmp_path, monkeypatch):
    """Only items without a number are left out; aggregations other than the mean are labelled."""
    notes: list[str] = []
    monkeypatch.setattr("orthogonalize.evals.suites.lm_eval.note", notes.append)
    folder, rows = tmp_path / "data", harness_rows()
    harness_task(folder, rows)
    (folder / "own.py").write_text(MEASURED_BY_ITEM)
    task = folder / "housework.yaml"
    text = task.read_text().partition("metric_list")[0] + "process_results: !function own.results\nmetric_list:\n"
    own = "!function own.most"
    for metric, how in {"found": "nanmean", "right": "mean", "most": own, "said": own}.items():
        text += f"  - metric: {metric}\n    aggregation: {how}\n    higher_is_better: true\n"
    task.write_text(text)
    found = evaluate(edited, str(model), run, tmp_path / "out", suites=["lm_eval:housework"], engine="hf", data=folder)
    right = sum(row["gold"] == 0 for row in rows)
    measures = found.edited.tasks["housework"]
    assert {name: (m.value, m.n) for name, m in measures.items()} == {
        "found": (1.0, right), "right": (right / len(rows), len(rows)), "most,mean": (right / len(rows), len(rows)),
    }  # fmt: skip
    assert measures["found"].unparseable == len(rows) - right
    assert [text for text in notes if "leaving it out" in text] == [
        "lm-eval's housework: said has no number per item; leaving it out"
    ]
    assert found.data == {"lm_eval:housework": "json"}


def test_texts_without_context_need_a_bos_or_eos(model, tmp_path):
    language_tasks(tmp_path, [{"text": "how do i bake a cake", "reply": "x"}] * 4)
    tokenizer = load_tokenizer(model)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(OrthogonalizeError, match="the model's tokenizer has no BOS or EOS"):
        harness_tasks(["reading"], tokenizer, 512, tmp_path, None)
    assert harness_tasks(["ending"], tokenizer, 512, tmp_path, None)
