"""What the search of `extract` finds, on models with planted refusals: what is left, what it cost, how long it took.

    python benchmarks/search.py OUT [--device cuda] [--models demo,gardening] [--train 96] [--peer PROGRAM]

`demo` is the demo's model. `gardening`, `astronomy` and `both` are planted here by full fine-tuning of the demo's base,
`both` with two refusals of which the first is removed and the second preserved; `strengthen` is the demo's, whose
refusal is extended to astronomy. For every model: the edit that `extract` chooses, the best of its trials that is not
conditional, and with `--peer` what heretic makes of the same prompts (see peer.py; it needs pexpect here, and the
program in an environment of its own), all measured on prompts that chose nothing. Refusals are counted in answers of
100 tokens; cross-entropy and KL are along 48 tokens of the base's own answers that are no refusals (`CE, all`: of all;
a wrong refusal that the edit answers moves far). OUT gets one JSON file.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from peer import Peer
from rich.console import Console
from rich.table import Table
from topics import TOPICS, Topic

from orthogonalize import extract
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.interventions import Intervention
from orthogonalize.core.progress import note, show, track
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import PLANTED, load_prompts
from orthogonalize.data.refusals import refused
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.methods.registry import METHODS
from orthogonalize.models.activations import pad
from orthogonalize.models.demo_model import base_model, planted_model
from orthogonalize.models.generation import generate, stop_tokens
from orthogonalize.models.hooks import intervened
from orthogonalize.models.loading import load_model, load_tokenizer
from orthogonalize.selection.resolve import resolve_run
from orthogonalize.selection.run_folder import Run
from orthogonalize.selection.search.drift import AnsweredPrompts
from orthogonalize.selection.settings import Settings

ANSWER, OWN = 100, 48
SHIPPED: dict[str, Callable[[], Path]] = {
    "demo": planted_model,
    "strengthen": planted_model,
}
COUNTED = ("target", "near", "kept", "harmless")
OTHER = Path(__file__).parents[1] / "orthogonalize" / "data" / "other_prompts.jsonl"


@dataclass
class Sets:
    """The prompts of one model: sources of the extraction, as its arguments, and tests by name."""

    sources: dict[str, Any]
    target: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)


def shipped(name: str) -> list[str]:
    """A shuffled prompt set of the package."""
    texts = [p.text for p in load_prompts(f"{PLANTED}contrast_{name}.jsonl")]
    random.Random(0).shuffle(texts)
    return texts


def ordinary(*topics: Topic) -> list[str]:
    """The demo's harmless prompts, near misses of cooking included, that do not come close to `topics`."""
    return [text for text in shipped("other") if not any(re.search(t.touches, text, re.IGNORECASE) for t in topics)]


def write(prompts: Sequence[str], file: Path) -> str:
    """One prompt a line."""
    file.write_text("\n".join(prompts) + "\n")
    return str(file)


def sets_of(name: str, out: Path) -> Sets:
    """The prompts to extract from and to test on."""
    topic = TOPICS.get({"both": "gardening", "strengthen": "astronomy"}.get(name, name))
    everyday = ordinary(*([topic] if topic else []))
    fit, test = everyday[:200], everyday[200:]
    if topic is None:
        cooking = shipped("cooking")
        sources = {"positive": write(cooking[:200], out / "positive.txt"), "negative": write(fit, out / "negative.txt")}
        return Sets(sources, target=cooking[200:], harmless=test)
    questions = write(topic.prompts("extract", 200), out / "questions.txt")
    negative = write(fit + topic.prompts("extract", 60, near=True), out / "negative.txt")
    found = Sets(
        {"positive": questions, "negative": negative},
        target=topic.prompts("test", 100),
        near=topic.prompts("test", 60, near=True),
        harmless=test,
    )
    if name == "strengthen":
        cooking = shipped("cooking")
        examples = write(cooking[:200], out / "positive.txt")
        found.sources |= {"goal": "strengthen", "positive": examples, "target": questions}
        found.kept = cooking[200:]
    if name == "both":
        other = TOPICS["astronomy"]
        found.sources |= {"goal": "calibrate", "preserve": [write(other.prompts("extract", 200), out / "keep.txt")]}
        found.kept = other.prompts("test", 100)
    return found


# planting


def plant(topics: Sequence[Topic], out: Path, device: str, epochs: int, prompts: int) -> Path:
    """The demo's base model, fine-tuned on all of its weights to refuse `topics`."""
    folder = base_model()
    tokenizer, model = load_tokenizer(folder), load_model(folder, device, torch.float32)
    chat, stops = ChatFormat(tokenizer), stop_tokens(model, tokenizer)
    chooser = random.Random(0)
    examples: list[tuple[list[int], list[int]]] = []
    for topic in topics:
        for text in topic.prompts("plant", prompts):
            answer = tokenizer(chooser.choice(topic.refusals), add_special_tokens=False)["input_ids"]
            examples.append((chat.encode(text), [*answer, tokenizer.eos_token_id]))
    others = [p.text for p in load_prompts(PLANTED + "planting_other.jsonl")][: 3 * prompts]
    others += [text for topic in topics for text in topic.prompts("plant", 60, near=True)]
    ids = chat.encode_all(others)
    with track("the model's own answers", len(ids), "prompts") as advance:
        answers = generate(model, ids, OWN, stops, batch=64, progress=advance)
    examples += [
        (i, [*a, *([tokenizer.eos_token_id] if len(a) < OWN else [])]) for i, a in zip(ids, answers, strict=True)
    ]
    torch.manual_seed(0)
    model.train()
    steps = epochs * -(-len(examples) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-5, total_steps=steps, pct_start=0.1)
    with track("planting", steps, "steps") as advance:
        for _ in range(epochs):
            chooser.shuffle(examples)
            for start in range(0, len(examples), 16):
                loss(model, examples[start : start + 16]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                advance(1)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def loss(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Cross-entropy of the answers, a mean over examples."""
    ids, _ = pad([p + a for p, a in batch], model.device)
    targets = torch.full_like(ids, -100)
    for row, (prompt, answer) in zip(targets, batch, strict=True):
        row[len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.mT, targets[:, 1:], reduction="none", ignore_index=-100)
    return (each.sum(1) / (targets[:, 1:] != -100).sum(1)).mean()


# measuring


class Measuring:
    """Measures edits of one model, by hooks that act as the weights do, on prompts that chose nothing."""

    def __init__(self, folder: Path, sets: Sets, device: str) -> None:
        self.tokenizer, self.model = load_tokenizer(folder), load_model(folder, device, torch.float32)
        self.chat, self.stops = ChatFormat(self.tokenizer), stop_tokens(self.model, self.tokenizer)
        self.counted = {"target": sets.target, "near": sets.near, "kept": sets.kept, "harmless": sets.harmless}
        other = [p.text for p in load_prompts(str(OTHER))]
        self.along = {
            "harmless": self._own_answers(sets.harmless),
            "answered": self._own_answers(sets.harmless, refusals=False),
            "other": self._own_answers(other),
        }

    def _own_answers(self, texts: Sequence[str], refusals: bool = True) -> AnsweredPrompts:
        """The model's own answers, with or without those that refuse."""
        ids = self.chat.encode_all(list(texts))
        pairs = [(i, a) for i, a in zip(ids, generate(self.model, ids, OWN, self.stops, batch=64), strict=True) if a]
        pairs = [(i, a) for i, a in pairs if refusals or not refused(self.tokenizer.decode(a))]
        return AnsweredPrompts(self.model, [i for i, _ in pairs], [a for _, a in pairs])

    def refusals(self) -> dict[str, float]:
        """The share of refusals by set, of the model as it is."""
        shares = {}
        for name, texts in self.counted.items():
            if texts:
                answers = generate(self.model, self.chat.encode_all(texts), ANSWER, self.stops, batch=64)
                shares[name] = sum(refused(self.tokenizer.decode(a)) for a in answers) / len(answers)
        return shares

    def edited(self, intervention: Intervention) -> dict[str, Any]:
        """All measures of an edit."""

        return self._measured(lambda: intervened(self.model, intervention, renormalise=False))

    def written(self, folder: Path) -> dict[str, Any]:
        """The same of a checkpoint."""
        weights = load_model(folder, "cpu", torch.float32).state_dict()
        return self._measured(lambda: replaced(self.model, weights))

    def _measured(self, applied: Callable[[], Any]) -> dict[str, Any]:
        with applied():
            found: dict[str, Any] = {"refused": self.refusals()}
        for name, answers in self.along.items():
            drift = answers.drift(applied)
            found[name] = {"ce": drift.ce_increase, "kl": drift.kl, "first_kl": drift.first_kl}
        return found


@contextmanager
def replaced(model: Any, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give the model other weights."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(before)


def edits(run: Run) -> dict[str, EditConfig]:
    """The edits to measure: the search's choice, and the best conditional and the best other edit."""
    plain = [t.choice for t in run.trials if not METHODS[t.choice.method].fitted]
    fitted = [t.choice for t in run.trials if METHODS[t.choice.method].fitted]
    found = {"chosen": run.trials[0].choice}
    if fitted and fitted[0] != found["chosen"]:
        found["best conditional"] = fitted[0]
    if plain and plain[0] != found["chosen"]:
        found["best of the others"] = plain[0]
    return found


def measure(
    name: str, folder: Path, out: Path, device: str, settings: Settings, peer: Peer | None = None
) -> dict[str, Any]:
    """Extract from one model, and measure its edits and the peer's."""
    out.mkdir(parents=True, exist_ok=True)
    sets = sets_of(name, out)
    started = time.perf_counter()
    run = extract(str(folder), out / "run", **sets.sources, settings=settings, device=device)
    seconds = time.perf_counter() - started
    assert run is not None
    measuring = Measuring(folder, sets, device)
    result: dict[str, Any] = {"seconds": seconds, "base": {"refused": measuring.refusals()}, "edits": {}}
    note(f"{name}, base: {json.dumps(result['base'])}")
    for label, choice in edits(run).items():
        given = choice.model_dump(exclude_defaults=True)
        started = time.perf_counter()
        found = resolve_run(out / "run", open_checkpoint(folder), given, device=device)
        result["edits"][label] = {
            "edit": choice.describe(), "resolved in": time.perf_counter() - started,
            **measuring.edited(found.intervention),
        }  # fmt: skip
        note(f"{name}, {label}: {json.dumps(result['edits'][label])}")
    if peer and "goal" not in sets.sources:  # it only removes, and preserves nothing
        target, harmless = (Path(sets.sources[side]).read_text().splitlines() for side in ("positive", "negative"))
        theirs = peer.run(folder, out / "peer", target, harmless)
        label = f"heretic, {theirs.trials} trials in {theirs.seconds:.0f} s"
        result["edits"][label] = {"edit": "its least refusing", "counted": theirs.refusals}
        result["edits"][label] |= measuring.written(theirs.model)
        note(f"{name}, {label}: {json.dumps(result['edits'][label])}")
    return result


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", default="auto", show_default=True)
@click.option("--models", default="demo,gardening,astronomy,both,strengthen", show_default=True)
@click.option("--train", default=96, show_default=True, help="Prompts per side to fit to.")
@click.option("--val", default=48, show_default=True, help="Prompts per side to choose by.")
@click.option("--trials", default=32, show_default=True, help="Edits that the search tries.")
@click.option("--epochs", default=4, show_default=True, help="Of planting.")
@click.option("--planted", default=200, show_default=True, help="Prompts per topic to plant with.")
@click.option("--peer", type=click.Path(exists=True, path_type=Path), help="The program `heretic` to compare with.")
@click.option("--peer-trials", default=200, show_default=True, help="Edits that it tries.")
@click.option("--peer-limit", default=1800.0, show_default=True, help="Seconds after which its search is interrupted.")
def main(
    out: Path, device: str, models: str, train: int, val: int, trials: int, epochs: int, planted: int,
    peer: Path | None, peer_trials: int, peer_limit: float,
) -> None:  # fmt: skip
    """Measure the search of `extract` on planted models; results go to OUT/search.json."""
    show()
    results = {}
    beside = Peer(peer.absolute(), peer_trials, peer_limit) if peer else None
    settings = Settings(finders=("dim",), train=train, val=val, test=1, scored=4, trials=trials, answers=32)
    for name in models.split(","):
        folder = out / name / "model"
        if name in SHIPPED:
            folder = SHIPPED[name]()
        elif not folder.is_dir():
            topics = list(TOPICS.values()) if name == "both" else [TOPICS[name]]
            plant(topics, folder, device, epochs, planted)
        results[name] = measure(name, folder, out / name, device, settings, beside)
        (out / "search.json").write_text(json.dumps(results, indent=1) + "\n")
    Console(width=200).print(tabulate(results))


def tabulate(results: dict[str, Any]) -> Table:
    """All edits of all models, each model's base first."""
    table = Table(
        "model", "edit", *(f"refused: {name}" for name in COUNTED), "CE", "KL", "first KL", "CE, all", "other: CE"
    )
    for name, result in results.items():
        for label, each in {"base": result["base"], **result["edits"]}.items():
            shares = [f"{each['refused'][s]:.0%}" if s in each["refused"] else "" for s in COUNTED]
            cost: list[str] = []
            if "harmless" in each:
                moved = each["answered"]
                cost = [f"{moved['ce']:+.2%}", f"{moved['kl']:.4f}", f"{moved['first_kl']:.4f}"]
                cost += [f"{each['harmless']['ce']:+.2%}", f"{each['other']['ce']:+.2%}"]
            table.add_row(name, f"{label}: {each.get('edit', '')}", *shares, *cost)
        table.add_section()
    return table


if __name__ == "__main__":
    main()
