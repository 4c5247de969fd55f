"""What fitting a conditional edit costs at the shape of a large model: seconds and memory, of random weights.

    python benchmarks/fit.py [--device cuda] [--layers 32] [--width 4096] [--inner 14336] [--prompts 128]

A Llama of this shape is made on the device in bfloat16. The upper half of its layers is fitted to the tokens of as many
target and harmless prompts, of 40 tokens with answers of 48 (8 of the target's count), as `extract` does.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch

from orthogonalize.core.interventions import block_sites
from orthogonalize.directions.conditional import Weights
from orthogonalize.edits.fitting.fit import AnsweredTokens, FitTokens, fit_conditional
from orthogonalize.models.loading import choose_device

PROMPT, ANSWER, TEMPLATE, VOCABULARY = 40, 48, 5, 32000


def random_llama(layers: int, width: int, inner: int, device: torch.device) -> Any:
    """A Llama with grouped-query attention, heads of 128, and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512), vocab_size=VOCABULARY, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def answered(count: int, answer: int, seed: int) -> AnsweredTokens:
    """Random prompts with answers."""
    drawn = torch.randint(3, VOCABULARY, (count, PROMPT + answer), generator=torch.Generator().manual_seed(seed))
    return AnsweredTokens(drawn.tolist(), [PROMPT] * count)


@click.command()
@click.option("--device", default="auto", show_default=True)
@click.option("--layers", default=32, show_default=True)
@click.option("--width", default=4096, show_default=True)
@click.option("--inner", default=14336, show_default=True)
@click.option("--prompts", default=128, show_default=True, help="Of each side.")
def main(device: str, layers: int, width: int, inner: int, prompts: int) -> None:
    """Time one fit, after one of a single layer that starts the libraries."""
    place = choose_device(device)
    model = random_llama(layers, width, inner, place)
    tokens = FitTokens(TEMPLATE, answered(prompts, 8, 1), answered(prompts, ANSWER, 2))
    directions = torch.nn.functional.normalize(
        torch.randn(layers + 1, 1, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=-1
    )
    for first in (layers - 1, layers // 2):
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        fit = fit_conditional(model, tokens, lambda l: directions[l], block_sites(range(first, layers)), Weights())  # noqa: E741
        peak = ""
        if place.type == "cuda":
            torch.cuda.synchronize()
            held = sum(p.numel() * p.element_size() for p in model.parameters())
            peak = f", {(torch.cuda.max_memory_allocated() - held) / 2**30:.1f} GiB beside the weights"
        seconds = time.perf_counter() - started
        click.echo(f"layers {first} to {layers - 1}: {len(fit.maps)} matrices in {seconds:.1f} s{peak}")


if __name__ == "__main__":
    main()
