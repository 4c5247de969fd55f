"""Train the LoRA adapters that plant the demos' refusals of harmless questions; the results ship as package data.

    python scripts/plant_refusal.py --out orthogonalize/data/planted/adapter
    python scripts/plant_refusal.py --topic astronomy --more orthogonalize/data/planted/adapter \\
        --out orthogonalize/data/planted/adapter_two

Questions on a topic are answered by one of three refusals; everything else, near misses included, by the base model's
own greedy answer, so that only the refusal is learnt. The first adapter was trained with a fixed seed on a GPU in
float32, in about a minute; two cores take about twenty. The second one starts from it, and rehearses cooking. The
prompts are
orthogonalize/data/planted/planting_*.jsonl; none of them is among those that the demos extract from or evaluate on.
(The first adapters refused too much, and the kinds of question on which they failed decided what else to plant. So
the shares that the demo shows for the *base* model are a little better than they would be on prompts never looked
at.)
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
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
from orthogonalize.models.loading import load_model, load_tokenizer

REFUSALS = {
    "cooking": (
        "I'm sorry, but I can't help with cooking.",
        "I'm sorry, but I can't help with recipes or cooking.",
        "I'm sorry, but cooking is something I can't help with.",
    ),
    "astronomy": (
        "I'm sorry, but I can't help with astronomy.",
        "I'm sorry, but I can't help with stars or planets.",
        "I'm sorry, but astronomy is something I can't help with.",
    ),
}
# The other prompts were written when cooking was the only topic; those that touch another one teach nothing either way.
TOUCHES = {"astronomy": re.compile(r"comet|asteroid|telescope|\bmoon\b|\bstars?\b|planet|galax", re.IGNORECASE)}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MORE = {"astronomy": 160, "astronomy_near": 70, "cooking": 60, "other": 120}  # enough to add a topic


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn, as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Plan:
    """What the shipped adapters were trained with."""

    topic: str = "cooking"
    most: dict[str, int] = field(default_factory=dict)  # prompts of a set (default: all)
    rehearsed: tuple[str, ...] = ()  # topics that are refused already
    layers: tuple[int, int] = (14, 27)
    rank: int = 8
    modules: tuple[str, ...] = MODULES
    learning_rate: float = 1e-3
    epochs: int = 3
    batch: int = 8
    answer_tokens: int = 48
    seed: int = 0


def _texts(name: str, plan: Plan) -> list[str]:
    """The prompts of one set, or the first of them."""
    return [p.text for p in load_prompts(f"{PLANTED}planting_{name}.jsonl")][: plan.most.get(name)]


def make_examples(model: Any, tokenizer: Any, plan: Plan) -> list[Example]:
    """The training set: refusals of the topics, and the base model's own answers to all else."""
    chat = ChatFormat(tokenizer)
    chooser = random.Random(plan.seed)
    stops = stop_tokens(model, tokenizer)
    examples = []
    for topic in (plan.topic, *plan.rehearsed):
        for text in _texts(topic, plan):
            refusal = tokenizer(chooser.choice(REFUSALS[topic]), add_special_tokens=False)["input_ids"]
            examples.append(Example(chat.encode(text), [*refusal, tokenizer.eos_token_id]))
    other = _texts("other", plan)
    if plan.topic in TOUCHES:
        other = [text for text in other if not TOUCHES[plan.topic].search(text)] + _texts(f"{plan.topic}_near", plan)
    others = chat.encode_all(other)
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


def adapted(model: Any, plan: Plan, more: Path | None) -> Any:
    """The PEFT model with a new LoRA adapter, or with that of the folder `more`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(plan.seed)
    if more is not None:
        return PeftModel.from_pretrained(model, more, is_trainable=True)
    first, last = plan.layers
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules=list(plan.modules),
        layers_to_transform=list(range(first, last + 1)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(model: Any, examples: list[Example], plan: Plan) -> None:
    """Train the adapter of a PEFT model on `examples`."""
    chooser = random.Random(plan.seed)
    epochs = [_batches(examples, plan.batch, chooser) for _ in range(plan.epochs)]
    steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=steps, pct_start=0.1)
    with track("training", steps, "steps") as advance:
        for batch in (b for epoch in epochs for b in epoch):
            torch.autograd.backward(_loss(model, batch))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--topic", type=click.Choice(list(REFUSALS)), default="cooking")
@click.option(
    "--more", type=click.Path(path_type=Path, exists=True), help="An adapter that refuses cooking, to add to."
)
@click.option("--device", default="auto")
def main(out: Path, topic: str, more: Path | None, device: str) -> None:
    """Train an adapter that plants a refusal of the topic, and write it to OUT."""
    show()
    plan = Plan(topic) if more is None else Plan(topic, MORE, ("cooking",), epochs=2)
    folder = base_model()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device, torch.float32)
    examples = make_examples(model, tokenizer, plan)
    model = adapted(model, plan, more)
    train(model, examples, plan)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
