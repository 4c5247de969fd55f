"""The effect of rounding that keeps the edit on a real model: SmolLM2-135M-Instruct with the demo's planted refusal.

    python benchmarks/rounding.py [--scope all] [--rank 1]

Edits the direction of the demo's contrast (or random ones, for --rank above 1) out of every write, in float32 and in
bfloat16 with either rounding. Prints the leak of the tensors, how far the logits of the stored model are from those
of the edit before rounding, and how far the stream still moves along the direction, relative to the unedited model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.rounding.registry import ROUNDING_SCHEMES
from orthogonalize.core.interventions import removal
from orthogonalize.data.prompts import concept, load_prompts
from orthogonalize.edits.bake import bake
from orthogonalize.edits.plan import EditPlan
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.models.demo_model import planted_model
from orthogonalize.models.hooks import capturing_inputs

PROMPTS = 48  # a side


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def measured(model: torch.nn.Module, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every token [tokens, vocabulary], and the stream at the last token by prompt and layer."""
    logits, streams = [], []
    for ids in prompts:
        seen: dict[int, torch.Tensor] = {}
        with capturing_inputs(model, lambda layer, hidden, seen=seen: seen.__setitem__(layer, hidden[0, -1].double())):
            logits.append(model(input_ids=ids).logits[0])
        streams.append(torch.stack([seen[layer] for layer in sorted(seen)]))
    return torch.cat(logits), torch.stack(streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scope", default="all")
    parser.add_argument("--rank", type=int, default=1)
    arguments = parser.parse_args()
    folder = planted_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contrast = concept("cooking")
    sides = [load_prompts(contrast.positive, "positive"), load_prompts(contrast.negative, "negative")]
    prompts = []
    for side in sides:
        for prompt in side[:PROMPTS]:
            chat = [{"role": "user", "content": prompt.text}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            prompts.append(torch.tensor([ids]))
    half = len(prompts) // 2
    base = load(folder)
    _, streams = measured(base, prompts)
    layers = streams.shape[1] - 1
    difference = (streams[:half].mean(0) - streams[half:].mean(0))[layers * 3 // 5]
    vectors = torch.randn(arguments.rank, len(difference), generator=torch.Generator().manual_seed(0)).double()
    vectors[0] = difference
    basis = torch.linalg.qr(vectors.T)[0].T
    intervention = map_sites(parse_scope(arguments.scope), layers, lambda _: removal(basis))
    plan = bake(open_checkpoint(folder), intervention)
    exact = load(folder)
    parameters = dict(exact.named_parameters())
    if "lm_head.weight" in plan.checkpoint.additions:
        exact.lm_head.weight = torch.nn.Parameter(exact.lm_head.weight.detach().clone())
        parameters = dict(exact.named_parameters())
    for name, edit in plan.checkpoint.edits.items():
        addition = plan.checkpoint.additions.get(name)
        parameters[name].data.copy_(edit.exact(addition.make() if addition else plan.source.read(name)))
    wanted, _ = measured(exact, prompts)
    before = (streams @ basis.T).norm(dim=-1).mean()
    reference = load(folder)
    unedited, _ = measured(reference, prompts)
    print(f"edit moves the logits by {(wanted - unedited).pow(2).mean().sqrt():.4f} (root mean square)")
    print(f"{'rounding':12} {'leak, median':>13} {'largest':>9} {'logits from float32':>20} {'KL':>9} {'stream':>9}")
    for rounding in ROUNDING_SCHEMES:
        report(plan, rounding, prompts, wanted, basis, before)


def report(
    plan: EditPlan,
    rounding: str,
    prompts: list[torch.Tensor],
    wanted: torch.Tensor,
    basis: torch.Tensor,
    before: torch.Tensor,
) -> None:
    """Write the edit with one rounding scheme and print how exact it is."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "edited"
        out.mkdir()
        plan.checkpoint.rounding = rounding
        written = plan.write(out)
        logits, streams = measured(load(out), prompts)
    leaks = [r.leak for r in written.records.values() if r.leak is not None]
    distance = (logits - wanted).pow(2).mean().sqrt()
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    left = (streams @ basis.T).norm(dim=-1).mean() / before
    print(f"{rounding:12} {statistics.median(leaks):13.2e} {max(leaks):9.2e}", end=" ")
    print(f"{distance:20.5f} {divergence:9.2e} {left:9.2e}", flush=True)


if __name__ == "__main__":
    main()
