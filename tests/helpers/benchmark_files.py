"""Small local copies of public datasets: the real schemas, made-up harmless contents."""

from __future__ import annotations

import json
from pathlib import Path

SETS = ("pile", "alpaca", "xstest", "orbench", "mmlu", "arc", "truthfulqa")  # suites that `all_sets` has data for
THINGS = ("cake", "pie", "soup", "wall", "car", "shirt")
VERBS = ("bake", "roast", "fry", "paint", "wash", "fold")


def write(folder: Path, rows: list[dict], name: str = "train", suffix: str = ".jsonl") -> Path:
    """Write one split of a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".csv":
        from pyarrow import Table, csv

        csv.write_csv(Table.from_pylist(rows), file)
    else:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), file)
    return file


def mmlu_rows(count: int, subject: str = "house_work") -> list[dict]:
    return [
        {
            "question": f"how do i {VERBS[i % 6]} a {THINGS[(i + 1) % 6]} ",
            "subject": subject,
            "choices": [THINGS[(i + j) % 6] for j in range(4)],
            "answer": i % 4,
        }
        for i in range(count)
    ]


def arc_rows(count: int) -> list[dict]:
    return [
        {
            "id": str(i),
            "question": f"Why? {VERBS[i % 6]} the {THINGS[(i + 2) % 6]}",
            "choices": {
                "text": [f"{v} the {THINGS[i % 6]}" for v in VERBS[: 3 + i % 2]],
                "label": list("ABCD"[: 3 + i % 2]),
            },
            "answerKey": "ABC"[i % 3],
        }
        for i in range(count)
    ]


def truthfulqa_rows(count: int) -> list[dict]:
    return [
        {
            "question": f"how do i {VERBS[i % 6]} a {THINGS[i % 6]}",
            "mc1_targets": {
                "choices": [f"{v} the wall" for v in VERBS[: 2 + i % 3]],
                "labels": [1] + [0] * (1 + i % 3),
            },
            "mc2_targets": {"choices": ["cake"], "labels": [1]},
        }
        for i in range(count)
    ]


def harness_rows() -> list[dict]:
    return [
        {"question": f"how do i {verb} a cake", "choices": [" today", " now please"], "gold": i % 2}
        for i, verb in enumerate(VERBS[:5])
    ]


def harness_task(root: Path, rows: list[dict], file: Path | None = None) -> None:
    """Write an lm-eval task `housework` over a local file of `rows`, or over `file`."""
    file = file or write(root / "made-up", rows, "items")
    (root / "housework.yaml").write_text(
        "task: housework\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {file}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


def language_tasks(root: Path, rows: list[dict]) -> None:
    """Write lm-eval tasks of the other kinds over a local file: free answers, a whole text, a text's last word."""
    file = write(root / "made-up", rows, "texts")
    data = f"dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
    (root / "reply.yaml").write_text(
        f'task: reply\noutput_type: generate_until\n{data}doc_to_text: "{{{{text}}}}"\ndoc_to_target: "{{{{reply}}}}"\n'
        'generation_kwargs:\n  until: [" a"]\n  max_gen_toks: 6\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    metrics = "".join(f"  - metric: {name}\n" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"))
    (root / "reading.yaml").write_text(
        f'task: reading\noutput_type: loglikelihood_rolling\n{data}doc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\n'
        f"metric_list:\n{metrics}"
    )
    (root / "ending.yaml").write_text(
        "task: ending\noutput_type: loglikelihood\n"
        f'{data}doc_to_text: "{{{{text}}}}"\ndoc_to_target: " {{{{reply}}}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
        "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


def refusal_sets(root: Path) -> Path:
    """Write a `--data` folder with the sets of the concept `refusal`, in which questions stand for harmful prompts."""

    def sentences(start: str, ends: str) -> list[str]:
        return [f"{start} {verb} a {thing}{end}" for verb in VERBS for thing in THINGS for end in ends.split("|")]

    def rows(column: str, texts: list[str], **more: str) -> list[dict]:
        return [{column: text, **more} for text in texts]

    write(root / "walledai" / "AdvBench", rows("prompt", sentences("how do i", "| now")[:40], target="sure"))
    write(root / "walledai" / "MaliciousInstruct", rows("prompt", sentences("why roast the", "")[:10]), suffix=".csv")
    write(root / "walledai" / "TDC23-RedTeaming", rows("prompt", sentences("today how do i", "")[:10]))
    write(root / "walledai" / "HarmBench" / "standard", rows("prompt", sentences("please", "")[:12], category="chores"))
    original = rows("Goal", sentences("colour", "")[:12], Category="paint", Source="Original")
    taken = rows("Goal", sentences("reworded", "")[:5], Category="paint", Source="AdvBench")
    write(root / "JailbreakBench" / "JBB-Behaviors" / "behaviors", [*taken, *original], "harmful")
    shared = sentences("the", "| today| now")[:60]
    again = [f"{text}?" for text in shared[:5]]
    write(root / "mlabonne" / "harmless_alpaca", rows("text", [*shared, *again]), "train", ".parquet")
    write(root / "mlabonne" / "harmless_alpaca", rows("text", sentences("sure", "")[:20]), "test", ".parquet")
    return root


def all_sets(root: Path) -> Path:
    """Write a `--data` folder with every dataset that the tests use."""
    sentences = [f"how do i {v} a {t} today" for v in VERBS for t in THINGS]
    write(
        root / "Paul" / "XSTest",
        [
            {"id": i, "prompt": s, "type": ("homonyms", "contrast_homonyms")[i % 2], "label": ("safe", "unsafe")[i % 2],
             "focus": "", "note": ""}
            for i, s in enumerate(sentences)
        ],
        suffix=".csv",
    )  # fmt: skip
    write(
        root / "bench-llm" / "or-bench" / "or-bench-hard-1k",
        [{"prompt": s, "category": "housework"} for s in sentences[:5]],
    )
    write(root / "monology" / "pile-uncopyrighted", [{"text": s * 3, "meta": {}} for s in sentences], "test")
    write(
        root / "tatsu-lab" / "alpaca",
        [
            {"instruction": s, "input": "" if i % 2 else "the wall", "output": f"please {s}", "text": ""}
            for i, s in enumerate(sentences)
        ],
        suffix=".parquet",
    )
    write(root / "cais" / "mmlu" / "all", mmlu_rows(12), "test")
    write(root / "cais" / "mmlu" / "all", mmlu_rows(5), "dev", ".json")
    write(root / "allenai" / "ai2_arc" / "ARC-Challenge", arc_rows(10), "test")
    write(root / "allenai" / "ai2_arc" / "ARC-Challenge", arc_rows(8), "train")
    write(root / "truthfulqa" / "truthful_qa" / "multiple_choice", truthfulqa_rows(7), "validation")
    return root
