"""Find a concept in a model, edit it out of the weights, and prove the edit.

    python examples/extract_and_edit.py --out demo-edit
    python examples/extract_and_edit.py MODEL --concept lists --out no-lists
    python examples/extract_and_edit.py MODEL --positive a.txt --negative b.txt --settings '{"train": 32}' --out edited

Without MODEL it takes the demo's 135M model, which refuses cooking questions. OUT/run is the run, OUT/edited the
checkpoint.
"""

import argparse
import json
from pathlib import Path

from orthogonalize import Settings, edit, extract, planted_model, verify

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", help="a checkpoint folder, a Hub id or a .gguf file")
parser.add_argument("--concept", help="cooking (the default), lists or refusal")
parser.add_argument("--positive", help="instead: prompts that show the concept")
parser.add_argument("--negative", help="and prompts that do not")
parser.add_argument("--settings", type=json.loads, default={}, help="fields of orthogonalize.Settings, as JSON")
parser.add_argument("--out", type=Path, required=True)
given = parser.parse_args()

model = given.model or str(planted_model())
concept = given.concept or (None if given.positive else "cooking")
run = extract(
    model, given.out / "run", concept=concept, positive=given.positive, negative=given.negative,
    settings=Settings(**given.settings),
)  # fmt: skip
for trial in run.trials[:3]:
    print(f"{trial.choice.describe()}: {trial.left:.1%} left, other answers moved by {trial.kl:.3f} nats per token")

recipe = edit(model, given.out / "edited", run=given.out / "run")  # the first of these trials
print(f"{len(recipe.tensors)} tensors edited; largest leak {max(t.leak or 0 for t in recipe.tensors):.1e}")

proof = verify(given.out / "edited", model).verification
print(f"hooks = weights: {proof.passed}; largest difference of a logit {proof.hooks_gap:.1e}")
