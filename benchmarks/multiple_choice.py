"""The time of multiple choice, compared with lm-evaluation-harness's own vLLM model: same items, same predictions.

    python benchmarks/multiple_choice.py

Items are made up, in five-shot contexts of MMLU's form (the subject's examples, letters as choices), of ARC's (one
set of examples, choices of several tokens) and of TruthfulQA's (short examples, sentences as choices). The harness
reads them through a task of its own over the same texts, in the engine that `lm_eval --model vllm` starts. Each side
runs in a process of its own, with its own settings. The time is that from texts to scores, tokenization included,
without the engines' starts and the harness's reading of its data. Each side first scores a few other items of each
kind, to warm up. `same` counts the items for which our prediction is one of the harness's best; `largest_difference`
is by how much the harness prefers its own to ours, in nats: bfloat16 has ties, `--dtype float32` has none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
from sides import hear, show, tell

LENGTH = 2048
NOUNS = "river window carpet engine garden lantern basket harbour pencil mountain ticket orchard".split()  # noqa: SIM905
SUBJECTS = ["a Monday", "a Tuesday", "a Wednesday", "a Thursday"]
KINDS = ("one_token", "several", "sentences")  # of MMLU's, ARC's and TruthfulQA's form
LETTERS = tuple(f" {letter}" for letter in "ABCD")
PLACES = ["the north of town", "a quiet village", "an old railway station", "the edge of the forest", "a busy market"]


class Item(NamedTuple):
    """A context, the texts that may follow it, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def sum_block(pick: random.Random, subject: str, answered: bool) -> tuple[str, int]:
    """A question as long as MMLU's, with letters for choices, and the index of the right one."""
    noun, right = pick.choice(NOUNS), pick.randrange(4)
    a, b = pick.randrange(2, 50), pick.randrange(2, 50)
    options = [a + b + 7 * ((i - right) % 4) for i in range(4)]
    lines = "".join(
        f"{letter}. {value} {noun}s, counted at {pick.choice(PLACES)}\n"
        for letter, value in zip("ABCD", options, strict=True)
    )
    text = (
        f"On {subject} a shop at {pick.choice(PLACES)} sells {a} {noun}s in the morning, when most people of the town "
        f"are still at work, and {b} more in the afternoon. How many does it sell on that day?\n{lines}Answer:"
    )
    return text + (f" {'ABCD'[right]}" if answered else ""), right


def place_block(pick: random.Random, answered: bool) -> tuple[str, tuple[str, ...], int]:
    """A question with places for choices, several tokens each."""
    noun, right = pick.choice(NOUNS), pick.randrange(4)
    places = tuple(f" {place}" for place in pick.sample(PLACES, 4))
    text = f"Question: A story says that the {noun} stood in{places[right]}. Where did the {noun} stand?\nAnswer:"
    return text + (places[right] if answered else ""), places, right


def sentence(pick: random.Random, noun: str) -> str:
    """What happened to a thing, in about nine words; as in TruthfulQA, some answers begin alike."""
    start = pick.choice([f"The {noun} was", "It was", "Somebody had it", "You would find it"])
    return f"{start} {pick.choice(['taken', 'moved', 'lost on the way'])} to {pick.choice(PLACES)}"


def thing_of(pick: random.Random, noun: str) -> str:
    """A thing in two to thirty words, so that questions end anywhere in a cache's block, as TruthfulQA's do."""
    clauses = [
        f"that was left at {pick.choice(PLACES)}",
        f"and of the {pick.choice(NOUNS)} beside it",
        f"when everybody had gone home on {pick.choice(SUBJECTS)}",
        "which nobody had asked for in years",
    ]
    return " ".join([noun, *pick.sample(clauses, pick.randrange(len(clauses) + 1))])


def sentences(count: int, seed: int) -> list[Item]:
    """`count` questions with four to seven sentences for choices, behind six answered ones."""
    pick = random.Random(seed)
    examples = [(noun, sentence(pick, noun)) for noun in pick.sample(NOUNS, 6)]
    head = "".join(f"Q: What became of the {noun} in the end?\nA: {answer}.\n\n" for noun, answer in examples)
    questions = []
    for _ in range(count):
        noun, choices = pick.choice(NOUNS), dict[str, None]()
        for _ in range(pick.randrange(4, 8)):
            choices[f" {sentence(pick, noun)}."] = None
        questions.append(Item(f"{head}Q: What became of the {thing_of(pick, noun)}?\nA:", tuple(choices), 0))
    return questions


def made_up(count: int, kind: str, seed: int = 0) -> list[Item]:
    """`count` questions, sorted by subject as MMLU's are, each behind its subject's five answered examples."""
    if kind == "sentences":
        return sentences(count, seed)
    several = kind == "several"
    pick = random.Random(seed)
    examples = {subject: [sum_block(pick, subject, True)[0] for _ in range(5)] for subject in SUBJECTS}
    stories = [place_block(pick, True)[0] for _ in range(5)]
    questions = []
    for i in range(count):
        if several:
            text, choices, right = place_block(pick, False)
            questions.append(Item("\n\n".join([*stories, text]), choices, right))
            continue
        subject = SUBJECTS[i * len(SUBJECTS) // count]
        text, right = sum_block(pick, subject, False)
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        questions.append(Item(head + "\n\n".join([*examples[subject], text]), LETTERS, right))
    return questions


def sets_of(count: int, kinds: Sequence[str]) -> dict[str, list[Item]]:
    return {kind: made_up(count, kind) for kind in kinds}


def ours(folder: Path, sets: dict[str, list[Item]], dtype: str) -> dict[str, tuple[list[int], float]]:
    """Predictions and seconds by set."""
    from orthogonalize.engines.vllm import VllmEngine
    from orthogonalize.evals.suites.multiple_choice import MultipleChoice, Question
    from orthogonalize.models.loading import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the commands set it

    def items(made: list[Item]) -> list[Question]:
        return [Question(*item) for item in made]

    tokenizer = load_tokenizer(folder)
    result = {}
    with VllmEngine(folder, LENGTH, dtype=dtype) as engine:
        for name, questions in sets.items():
            MultipleChoice.of(name, items(made_up(4, name, seed=99)), tokenizer).predictions(engine)
            start = time.perf_counter()
            predictions = MultipleChoice.of(name, items(questions), tokenizer).predictions(engine)
            result[name] = (predictions, time.perf_counter() - start)
    return result


def harness(folder: Path, sets: dict[str, list[Item]], dtype: str) -> dict[str, tuple[list[list[float]], float]]:
    """Every choice's score, and seconds, in lm-eval's own vLLM model, which only finds vLLM under one name."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # of what it takes by default, its prompt logits leave none
    from vllm.platforms import current_platform

    assert current_platform.device_type  # found by the distribution's true name, so before it gets another
    known = importlib.metadata.version
    importlib.metadata.version = lambda name: known("vllm-cpu" if name == "vllm" and not _has_vllm() else name)
    from lm_eval import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    class Timed(VLLM):  # type: ignore[misc]
        """lm-eval's vLLM model, and how long it took to score."""

        seconds = 0.0

        def loglikelihood(self, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = super().loglikelihood(*arguments, **options)
            self.seconds = time.perf_counter() - start
            return found

    model = Timed(pretrained=str(folder), dtype=dtype, max_model_len=LENGTH)
    result = {}
    with TemporaryDirectory() as scratch:
        warming = {f"warm_{kind}": made_up(4, kind, seed=99) for kind in sets}
        for name, questions in (warming | sets).items():
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
            found: Any = simple_evaluate(
                model=model, tasks=[f"made_up_{name}"], task_manager=manager, bootstrap_iters=0, log_samples=True
            )
            samples = sorted(found["samples"][f"made_up_{name}"], key=lambda s: s["doc_id"])
            result[name] = ([[float(r[0][0]) for r in s["resps"]] for s in samples], model.seconds)
    return result


def _has_vllm() -> bool:
    return any(d.metadata["Name"] == "vllm" for d in importlib.metadata.distributions())


@click.command()
@click.option("--questions", default=40, show_default=True, help="Of each kind.")
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of both engines; in float32 no two choices tie.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
@click.option("--side", type=click.Choice(["ours", "harness"]), hidden=True)
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True), help="A folder with a model, instead of the demo's."
)
def main(
    questions: int, kinds: tuple[str, ...], dtype: str, out: Path | None, side: str | None, model: Path | None
) -> None:
    """Measure, and print."""
    if side and model:
        tell({"ours": ours, "harness": harness}[side](model, sets_of(questions, kinds), dtype))
        return
    from orthogonalize.models.demo_model import planted_model

    # In processes of their own: neither sees the other's settings or caches.
    words = ("--model", model or planted_model(), "--questions", questions, "--dtype", dtype)
    words += tuple(word for kind in kinds for word in ("--kind", kind))
    mine, theirs = hear(__file__, "--side", "ours", *words), hear(__file__, "--side", "harness", *words)
    result = {}
    for name in mine:
        (found, fast), (scores, slow) = mine[name], theirs[name]
        behind = [max(row) - row[ours] for ours, row in zip(found, scores, strict=True)]
        result[name] = {
            "questions": questions, "dtype": dtype,
            "same": sum(gap == 0 for gap in behind), "largest_difference": max(behind),
            "ours_s": fast, "harness_s": slow, "ratio": slow / fast,
        }  # fmt: skip
    show(result, out)


if __name__ == "__main__":
    main()
