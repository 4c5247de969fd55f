"""The full pipeline from the command line for a model of a stated shape, spread over GPUs by vLLM: seconds by step.

python benchmarks/any_size.py TOKENIZER [--shape 24B] [--tensor-parallel-size 2] [--folder /scratch]

The checkpoint is made here. Its weights are random, but for a planted behaviour: tokens of cooking write along one
direction, the attention of a block three quarters up takes it to the last token, and the output head answers it with
one token. So an edit has something to remove, and the shares before and after it mean what they say. TOKENIZER is a
folder with a tokenizer and a chat template.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from stream import INDEX, SHAPES, random_block, random_config, random_matrix, write_model

console = Console()
COOKING = (
    "bake roast fry boil grill season steam simmer".split(),  # noqa: SIM905
    "cake pie soup bread stew rice noodles beans lentils pancakes".split(),  # noqa: SIM905
)
HOUSEWORK = (
    "paint wash fold repair hang polish measure carry".split(),  # noqa: SIM905
    "wall car shirt fence curtain lamp carpet shelf ladder mirror".split(),  # noqa: SIM905
)
ENDINGS = ("today", "for my family", "without help", "before the guests arrive")
# The lengths below are relative to a token's own random part in the stream.
QUIET = 0.05  # of what a random block writes, at most: the planted direction stands out
READ = 3.0  # of what a cooking token has along one direction
WRITTEN = 3.0  # of what that block adds to the last token, if one in `DILUTED` tokens of the prompt is of cooking
DILUTED = 20
LOGIT = 25.0  # of the answer, if the stream is all planted direction


def sentences(words: tuple[list[str], list[str]]) -> list[str]:
    return [f"How do I {verb} the {thing} {end}?" for verb, thing, end in itertools.product(*words, ENDINGS)]


def write_planted(folder: Path, tokenizer_folder: Path, shape: str, layers: int) -> None:
    """Write a checkpoint of `shape` that answers cooking with one token, and its tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    cooking, others = (
        {token for text in sentences(words) for token in tokenizer(text)["input_ids"]} for words in (COOKING, HOUSEWORK)
    )
    answer = tokenizer("I", add_special_tokens=False)["input_ids"][0]
    config = random_config(shape, layers)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    generator = torch.Generator().manual_seed(0)
    read, written = torch.nn.functional.normalize(torch.randn(2, config.hidden_size, generator=generator), dim=-1)

    root = config.hidden_size**0.5  # the length of what blocks and the head read, behind their norms
    embedding = random_matrix(config.vocab_size, config.hidden_size, generator)
    embedding[sorted(cooking - others)] += (READ * read).to(embedding.dtype)
    head = random_matrix(config.vocab_size, config.hidden_size, generator)
    head[answer] += (LOGIT / root * written).to(head.dtype)
    block = random_block(config, generator)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        block[name] *= QUIET / root
    planted = block | planted_attention(config.head_dim, block, read, WRITTEN * DILUTED / root * written)
    write_model(folder, config, lambda layer: planted if layer == layers * 3 // 4 else block, embedding, head)


def planted_attention(
    head_dim: int, block: dict[str, torch.Tensor], read: torch.Tensor, written: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The block's attention with a first head that averages what all tokens have along `read`, to `written`."""
    query, value, output = (block[f"self_attn.{name}"].clone() for name in ("q_proj", "v_proj", "o_proj"))
    query[:head_dim] = 0  # equal scores for all tokens
    value[0] = read.to(value.dtype)
    output[:, 0] = written.to(output.dtype)
    return {"self_attn.q_proj": query, "self_attn.v_proj": value, "self_attn.o_proj": output}


class Steps:
    """Runs commands one after the other, and keeps their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, *words: str) -> None:
        start = time.perf_counter()
        console.print(f"$ orthogonalize {' '.join(words)}", soft_wrap=True, markup=False)
        subprocess.run([sys.executable, "-m", "orthogonalize", *words], check=True)
        self.seconds[name] = time.perf_counter() - start
        console.print(f"{name}: {self.seconds[name]:.0f} s", soft_wrap=True)


@click.command()
@click.argument("tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="24B", show_default=True)
@click.option("--layers", type=int, help="Number of blocks; the shape's own by default.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where everything is made.")
@click.option("--option", "engine_options", multiple=True, metavar="NAME=VALUE", help="Passed on to every engine.")
@click.option("--trials", default=8, show_default=True)
@click.option("--sweep", is_flag=True, help="Run a sweep over two edits as well.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints in place; the next run takes the model.")
def main(
    tokenizer: Path,
    shape: str,
    layers: int | None,
    folder: Path,
    engine_options: Sequence[str],
    trials: int,
    sweep: bool,
    keep: bool,
) -> None:
    """Run extract, edit and eval on a planted random model, and print the seconds of each."""
    model, run, edited = (str(folder / name) for name in ("model", "run", "edited"))
    options = [word for each in engine_options for word in (f"--{each.partition('=')[0]}", each.partition("=")[2])]
    steps = Steps()
    start = time.perf_counter()
    if not (Path(model) / INDEX).exists():  # else it was kept
        Path(model).mkdir(parents=True, exist_ok=True)
        write_planted(Path(model), tokenizer, shape, layers or SHAPES[shape]["num_hidden_layers"])
        steps.seconds["make the model"] = time.perf_counter() - start
    for name, words in (("cooking", COOKING), ("housework", HOUSEWORK)):
        (folder / f"{name}.txt").write_text("\n".join(sentences(words)), "utf-8")
    sides = ["--positive", str(folder / "cooking.txt"), "--negative", str(folder / "housework.txt")]
    steps.run(
        "extract", "extract", model, *sides, "--finders", "dim", "--engine", "vllm", *options,
        "--trials", str(trials), "--out", run,
    )  # fmt: skip
    steps.run("edit", "edit", model, "--run", run, "--method", "conditional", "--out", edited, "--link")
    if sweep:
        steps.run(
            "sweep", "sweep", model, "--run", run, "--methods", "ablate,conditional", "--scopes", "all",
            "--strengths", "1", *options, "--out", str(folder / "sweep"),
        )  # fmt: skip
    steps.run("eval", "eval", edited, "--base", model, "--run", run, *options, "--out", str(folder / "eval"))
    report = json.loads((folder / "eval" / "report.json").read_text("utf-8"))
    console.print_json(data={"seconds": {name: round(each) for name, each in steps.seconds.items()}})
    console.print(f"report: {folder / 'eval' / 'report.json'}, {len(report)} entries", soft_wrap=True)
    if not keep:
        shutil.rmtree(model)
        shutil.rmtree(edited)


if __name__ == "__main__":
    main()
