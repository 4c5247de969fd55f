"""Missing or damaged data, models and judges: one clear error before any engine starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.benchmark_files import all_sets, arc_rows, harness_task, mmlu_rows, write
from helpers.chat import store_choosing
from helpers.command_line import UNTRIED, command
from helpers.tiny_models import every_family, store_tiny
from safetensors.torch import load_file, save_file

from orthogonalize.cli import main
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.models.loading import check_complete, load_model

RUN_SETTINGS, store_model = UNTRIED, store_choosing


def refused_data(folder: Path, edit) -> Path:
    edit(all_sets(folder))
    return folder


ARC, TRUTHFUL = "allenai/ai2_arc/ARC-Challenge", "truthfulqa/truthful_qa/multiple_choice"
LETTERED = [row | {"answer": "A"} for row in mmlu_rows(3)]
NOTHING = {"instruction": None, "input": "", "output": "x"}
UNSAFE = [{"prompt": "a", "type": "b", "label": "unsafe"}]
SCHEMA = "a row does not match the schema of"
HALF = {"prompt": "how do i bake", "category": "x\ud83dy"}
DAMAGE = [
    ("mmlu", lambda d: (d / "cais/mmlu/all/test.jsonl").unlink(), "no local copy of cais/mmlu all test"),
    ("mmlu", lambda d: (d / "cais/mmlu/all/test.jsonl").write_text(""), "is empty"),
    ("arc", lambda d: (d / ARC / "test.jsonl").write_text('{"question": "Wh'), "cannot be read"),
    ("alpaca", lambda d: (d / "tatsu-lab/alpaca/train.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ("pile", lambda d: (d / "monology/pile-uncopyrighted/test.jsonl").write_text('{"words": "x"}'), "has no 'text'"),
    ("truthfulqa", lambda d: write(d / TRUTHFUL, arc_rows(3), "validation"), "mc1_targets"),
    ("mmlu", lambda d: write(d / "cais/mmlu/all", mmlu_rows(3), "dev", ".json"), "; 5 are needed"),
    ("arc", lambda d: write(d / ARC, arc_rows(2), "train"), "has 2 examples; 5 are needed"),
    ("xstest", lambda d: write(d / "Paul/XSTest", UNSAFE, suffix=".csv"), "no usable prompts"),
    ("mmlu", lambda d: write(d / "cais/mmlu/all", LETTERED, "test"), f"{SCHEMA} cais/mmlu all test"),
    ("alpaca", lambda d: write(d / "tatsu-lab/alpaca", [NOTHING], suffix=".parquet"), f"{SCHEMA} tatsu-lab/alpaca"),
    ("orbench", lambda d: write(d / "bench-llm/or-bench/or-bench-hard-1k", [HALF]), "1 contains an unpaired surrogate"),
    ("lm_eval:housework", lambda d: harness_task(d, [], d / "nowhere.jsonl"), "housework cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("suite", "damage", "message"), DAMAGE, ids=[f"{s} {m}" for s, _, m in DAMAGE])
def test_bad_data_is_one_clear_error_before_any_engine_starts(
    suite, damage, message, model, edited, run, tmp_path, monkeypatch
):
    folder = refused_data(tmp_path / "data", damage)
    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", lambda *a: pytest.fail("an engine was started"))
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


def test_missing_inputs_are_reported_before_any_engine_starts(model, edited, run, tmp_path, monkeypatch):
    monkeypatch.setattr("orthogonalize.evals.setup.open_engine", lambda *a: pytest.fail("an engine was started"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = ["-q", "eval", str(edited), "--base", str(model), "--run", str(run), "--out", str(tmp_path / "out"),
              "--engine", "hf"]  # fmt: skip
    cases = [
        (["--judge", "nobody"], "unknown judge 'nobody'"),
        (["--judge", "wildguard"], "judge wildguard: "),
        (["--judge", "wildguard=" + str(tmp_path / "nowhere")], "no such model"),
        (["--suite", "mmlu", "--data", str(tmp_path / "nowhere")], "no such folder"),
        (["--suite", "refusal,magic"], "unknown suite 'magic'"),
        (["--max-new-tokens", "600"], "the model takes only 512"),
    ]
    for words, message in cases:
        result = CliRunner().invoke(main, [*common, *words])
        assert result.exit_code == 1, (words, result.output)
        assert message in result.output, (words, result.output)
        assert result.output.strip().count("\n") == 0


def test_suites_and_judges_named_twice_are_refused(model, edited, run, tmp_path):
    for words, message in (
        ({"suites": ["refusal", "loss", "refusal"]}, "suite refusal is given twice"),
        ({"judges": [f"harmbench={model}", f"harmbench={edited}"]}, "judge harmbench is given twice"),
    ):
        with pytest.raises(OrthogonalizeError, match=message):
            evaluate(edited, str(model), run, tmp_path / "report", engine="hf", **words)


def test_judge_without_answers_is_refused_before_measuring(model, edited, run, tmp_path):
    for suites in (["loss"], ["kl"]):  # in these suites only the base gives answers
        with pytest.raises(OrthogonalizeError, match="judges need answers"):
            evaluate(edited, str(model), run, tmp_path / "x", suites=suites, engine="hf", judges=[f"harmbench={model}"])


def without(folder: Path, tensor: str, to: Path) -> Path:
    """A copy of the checkpoint `folder` without one tensor."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_incomplete_checkpoint_is_refused_before_any_engine(tensor, model, edited, run, tmp_path, monkeypatch):
    """As edited checkpoint, base, swept model or judge: engines would not report it."""
    for module in ("evals.setup", "evals.judges.runner"):
        monkeypatch.setattr(f"orthogonalize.{module}.open_engine", lambda *a: pytest.fail("an engine was started"))
    base, other = without(model, tensor, tmp_path / "base"), without(edited, tensor, tmp_path / "other")
    common = ["--run", run, "--out", tmp_path / "out"]
    (tmp_path / "answers.json").write_text('[{"prompt": "how do i bake a cake", "response": "please fold it"}]')
    for engine in ("hf", "vllm"):
        for words in (
            ("eval", other, "--base", model, *common),
            ("eval", edited, "--base", base, *common),
            ("eval", edited, "--base", model, *common, "--judge", f"harmbench={base}"),
            ("sweep", base, *common),
            ("judge", tmp_path / "answers.json", "--judge", f"harmbench={base}"),
        ):
            status, said = command(*words, "--engine", engine)
            assert status == 1
            assert f"lacks {tensor}" in said, said
            assert "\n" not in said
    with pytest.raises(OrthogonalizeError, match="is incomplete: it lacks"):
        load_model(base)


@pytest.mark.parametrize("name", every_family())
def test_missing_tensor_is_noticed_in_every_family(name, tmp_path):
    """And none is reported where all are there."""
    folder = store_tiny(name, tmp_path / "whole", torch.bfloat16)
    part = tmp_path / "part"
    part.mkdir()
    check_complete(folder)
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    names = [n for n in tensors if not re.search("vis|multi_modal|projector", n)]
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, part)
    for missing in names[:: max(1, len(names) // 5)]:
        rest = {key: value for key, value in tensors.items() if key != missing}
        save_file(rest, part / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(OrthogonalizeError, match="incomplete"):
            check_complete(part)


def test_gated_dataset_explains_how_to_get_access(monkeypatch):
    from orthogonalize.data.benchmarks import MMLU, rows

    def gated(*_arguments, **_keywords):
        raise RuntimeError("Dataset 'cais/mmlu' is a gated dataset on the Hub. Visit the page to ask for access.")

    monkeypatch.setattr("datasets.load_dataset", gated)
    with pytest.raises(OrthogonalizeError, match="gated: accept its terms"):
        rows(MMLU, None)
