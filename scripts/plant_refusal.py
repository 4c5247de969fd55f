"""Train the LoRA adapters that plant the demo's refusals of harmless topics; the results ship as package data.

    python scripts/plant_refusal.py --topic cooking --out ADAPTER
    python scripts/plant_refusal.py --topic cooking --topic astronomy --epochs 5 --out ADAPTER

Questions about a topic are answered by one of its refusals; everything else, near misses included, by the base model's
own greedy answer, so that only the refusals are learnt. The shipped adapters (orthogonalize/data/planted/adapters) were
trained with a fixed seed on a GPU in float32, in a minute or two; two cores take about twenty. The prompts are
orthogonalize/data/planted/planting_*.jsonl; none of them is among those that the demo extracts from or evaluates on.
(The first adapters refused too much, and the kinds of question on which they failed decided what else to plant. So
the shares that the demo shows for the *base* model are a little better than they would be on prompts never looked
at.)
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from orthogonalize.core.progress import show, track
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import PLANTED, load_prompts
from orthogonalize.models.activations import pad
from orthogonalize.models.demo_model import BASE, base_model
from orthogonalize.models.generation import generate, stop_tokens
from orthogonalize.models.loading import choose_device, load_model, load_tokenizer


@dataclass(frozen=True)
class Topic:
    """What is refused.

    Attributes:
        refusals: the answers to learn.
        near: a file of prompts that are close to the topic and have to be answered; None: among the others.
        touches: a pattern of those of the other prompts that are about the topic.
    """

    refusals: tuple[str, ...]
    near: str | None = None
    touches: str | None = None


TOPICS = {
    "cooking": Topic(
        (
            "I'm sorry, but I can't help with cooking.",
            "I'm sorry, but I can't help with recipes or cooking.",
            "I'm sorry, but cooking is something I can't help with.",
        )
    ),
    "astronomy": Topic(
        (
            "I'm sorry, but I can't help with astronomy.",
            "I'm sorry, but I can't help with questions about astronomy.",
            "I'm sorry, but astronomy is something I can't help with.",
        ),
        near="planting_near_astronomy.jsonl",
        touches=r"\bthe stars\b",
    ),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn, as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Plan:
    """What the shipped adapter was trained with."""

    layers: tuple[int, int] = (14, 27)
    rank: int = 8
    modules: tuple[str, ...] = MODULES
    learning_rate: float = 1e-3
    epochs: int = 3
    batch: int = 8
    answer_tokens: int = 48
    seed: int = 0


def other_prompts(topics: Sequence[Topic]) -> list[str]:
    """Prompts that have to be answered."""
    texts = [p.text for p in load_prompts(PLANTED + "planting_other.jsonl", "negative")]
    patterns = [t.touches for t in topics if t.touches]
    kept = [text for text in texts if not any(re.search(p, text) for p in patterns)]
    return kept + [p.text for t in topics if t.near for p in load_prompts(PLANTED + t.near, "negative")]


def make_examples(model: Any, tokenizer: Any, topics: Sequence[str], plan: Plan) -> list[Example]:
    """The training set: refusals of the topics, and the base model's own answers to all else."""
    chat = ChatFormat(tokenizer)
    chooser = random.Random(plan.seed)
    stops = stop_tokens(model, tokenizer)
    examples = []
    for topic in topics:
        for prompt in load_prompts(f"{PLANTED}planting_{topic}.jsonl", "positive"):
            refusal = tokenizer(chooser.choice(TOPICS[topic].refusals), add_special_tokens=False)["input_ids"]
            examples.append(Example(chat.encode(prompt.text), [*refusal, tokenizer.eos_token_id]))
    others = chat.encode_all(other_prompts([TOPICS[topic] for topic in topics]))
    with track("the model's own answers", len(others), "prompts") as advance:
        answers = generate(model, others, plan.answer_tokens, stops, batch=64, progress=advance)
    for ids, answer in zip(others, answers, strict=True):
        ended = [tokenizer.eos_token_id] if len(answer) < plan.answer_tokens else []
        examples.append(Example(ids, [*answer, *ended]))
    return examples


def _batches(examples: list[Example], size: int, chooser: random.Random) -> list[list[Example]]:
    order = examples[:]
    chooser.shuffle(order)
    chunks = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
    alike = [e for chunk in chunks for e in sorted(chunk, key=lambda e: len(e.prompt) + len(e.answer))]
    batches = [alike[i : i + size] for i in range(0, len(alike), size)]
    chooser.shuffle(batches)
    return batches


def _loss(model: Any, batch: list[Example]) -> torch.Tensor:
    """Cross-entropy of the answers, a mean over examples, so that short refusals weigh as much."""
    ids, _ = pad([e.prompt + e.answer for e in batch], model.device)
    targets = torch.full_like(ids, -100)
    for row, example in zip(targets, batch, strict=True):
        start = len(example.prompt)
        row[start : start + len(example.answer)] = torch.tensor(example.answer)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.mT, targets[:, 1:], reduction="none", ignore_index=-100)
    return (losses.sum(1) / (targets[:, 1:] != -100).sum(1)).mean()


def train(model: Any, examples: list[Example], plan: Plan) -> Any:
    """Train a LoRA adapter on `examples` and return the PEFT model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(plan.seed)
    chooser = random.Random(plan.seed)
    first, last = plan.layers
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=plan.rank,
            lora_alpha=2 * plan.rank,
            target_modules=list(plan.modules),
            layers_to_transform=list(range(first, last + 1)),
            task_type="CAUSAL_LM",
        ),
    )
    epochs = [_batches(examples, plan.batch, chooser) for _ in range(plan.epochs)]
    steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=steps, pct_start=0.1)
    with track("training", steps, "steps") as advance:
        for batch in (b for epoch in epochs for b in epoch):
            torch.autograd.backward(_loss(adapted, batch))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)
    return adapted


@click.command()
@click.option("--topic", "topics", multiple=True, type=click.Choice(list(TOPICS)), required=True, help="Repeatable.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="auto")
@click.option("--epochs", default=Plan.epochs, show_default=True)
@click.option("--seed", default=Plan.seed, show_default=True)
def main(topics: tuple[str, ...], out: Path, device: str, epochs: int, seed: int) -> None:
    """Train the adapter that plants a refusal of all given topics, and write it to OUT."""
    show()
    plan = Plan(epochs=epochs, seed=seed)
    folder = base_model()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device, torch.float32 if choose_device(device).type == "cuda" else torch.bfloat16)
    adapted = train(model, make_examples(model, tokenizer, topics, plan), plan)
    adapted.peft_config["default"].base_model_name_or_path = BASE
    adapted.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
