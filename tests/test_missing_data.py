"""Data, models and judges that are missing or damaged: one clear error before any engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_files import (
    all_sets,
    arc_rows,
    harness_task,
    mmlu_rows,
    write,
)  # fmt: skip
from click.testing import CliRunner
from conftest import UNTRIED, store_choosing

from orthogonalize.cli import main
from orthogonalize.errors import OrthogonalizeError
from orthogonalize.evaluation import evaluate


@pytest.fixture(scope="module")
def run_settings():
    return UNTRIED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return store_choosing(tmp_path_factory.mktemp("missing_data") / "model")


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


def test_suites_and_judges_named_twice_are_refused(model, edited, run, tmp_path):
    for words, message in (
        ({"suites": ["refusal", "loss", "refusal"]}, "suite refusal is named twice"),
        ({"judges": [f"harmbench={model}", f"harmbench={edited}"]}, "judge harmbench is named twice"),
    ):
        with pytest.raises(OrthogonalizeError, match=message):
            evaluate(edited, str(model), run, tmp_path / "report", engine="hf", **words)


def test_a_judge_without_answers_to_judge_is_refused_before_anything_is_measured(model, edited, run, tmp_path):
    for suites in (["loss"], ["kl"]):  # of these the base alone answers
        with pytest.raises(OrthogonalizeError, match="judges need answers"):
            evaluate(edited, str(model), run, tmp_path / "x", suites=suites, engine="hf", judges=[f"harmbench={model}"])


def test_a_gated_set_says_how_to_get_it(monkeypatch):
    from orthogonalize.benchmark_sets import MMLU, rows

    def gated(*_arguments, **_keywords):
        raise RuntimeError("Dataset 'cais/mmlu' is a gated dataset on the Hub. Visit the page to ask for access.")

    monkeypatch.setattr("datasets.load_dataset", gated)
    with pytest.raises(OrthogonalizeError, match="gated: accept its terms"):
        rows(MMLU, None)
