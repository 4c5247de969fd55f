"""Run the same commands with two checkouts of this project and list the output files whose bytes differ.

    git worktree add ../before SOME_COMMIT
    python scripts/compare_checkouts.py ../before . --work /tmp/compared

For changes that should change nothing: edits of a tiny model by every method, both roundings and as a LoRA adapter,
`verify`, `extract`, `eval` and `sweep` with transformers. Times in sweep.json, and the wording of pages, may differ.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
SHORT = ["--engine", "hf", "--max-new-tokens", "12"]


def make_inputs(folder: Path) -> None:
    """A tiny random Llama in bfloat16 and two prompt files, in `folder`."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from helpers.chat import bake_prompts, tiny_tokenizer
    from helpers.llama import store, tiny_llama

    biased = tiny_llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    tiny_tokenizer().save_pretrained(store(biased, folder / "model", torch.bfloat16, shards=2))
    for name, prompts in zip(("positive", "negative"), bake_prompts(), strict=True):
        (folder / f"{name}.txt").write_text("\n".join(prompts))


def commands(inputs: Path) -> list[list[str]]:
    """The commands, in order; each runs in the folder of its checkout's outputs."""
    sides = ["--positive", f"{inputs}/positive.txt", "--negative", f"{inputs}/negative.txt"]
    sizes = ["--train", "12", "--val", "4", "--test", "6", "--trials", "4", "--max-rank", "3"]
    given = ["--no-filter", "--behaviour-tokens", "sorry"]
    edits = {
        "ablate": ["--method", "ablate", "--scope", "all"],
        "nullspace": ["--method", "nullspace", "--rank", "1", "--scope", "layers:1-2", "--rounding", "nearest"],
        "reflect": ["--method", "reflect", "--scope", "one", "--strength", "0.7"],
        "actadd": ["--method", "actadd", "--layer", "2", "--coefficient", "-1.5"],
        "leace": ["--method", "leace", "--scope", "all"],
        "per-layer": ["--method", "ablate", "--scope", "from:1", "--per-layer"],
        "lora": ["--method", "ablate", "--scope", "layers:0-3", "--format", "lora"],
        "default": [],
    }
    model = str(inputs / "model")
    return [
        ["extract", model, *sides, *sizes, *given, "--out", "run"],
        *(["edit", model, "--run", "run", *words, "--out", name] for name, words in edits.items()),
        ["verify", "ablate", "--base", model],
        ["eval", "ablate", "--base", model, "--run", "run", "--out", "report", *SHORT],
        ["sweep", model, "--run", "run", "--out", "sweep", "--suite", "refusal,behaviour", *SHORT],
    ]


def outputs(checkout: Path, inputs: Path, folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the commands of `checkout` write into `folder`, by path; pictures are left out."""
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    for words in commands(inputs):
        click.echo(f"{checkout.name}: {words[0]} {' '.join(words[-2:])}")
        subprocess.run(
            [sys.executable, "-m", "orthogonalize", "-q", *words], cwd=folder, env=environment, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@click.command(help=__doc__)
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder to make for inputs and outputs.")
def main(before: Path, after: Path, work: Path) -> None:
    inputs = work.resolve() / "inputs"
    make_inputs(inputs)
    old, new = (outputs(c.resolve(), inputs, work.resolve() / n) for c, n in ((before, "before"), (after, "after")))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    click.echo(f"{len(old)} files; {len(different)} differ" + "".join(f"\n  {name}" for name in different))


if __name__ == "__main__":
    main()
