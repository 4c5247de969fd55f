"""What a description leaves open that only a server can tell: whether it runs an untied head, which biases it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .schema import Architecture, Bias, Part

Answer = Literal["vllm", "transformers", "never"]  # vLLM's own class, only its Transformers backend, or neither
HEAD = "head"


def open_names(architecture: Architecture) -> list[str]:
    """The questions left open: `head`, and `KIND.PART` of every part whose bias it is about."""
    head = [HEAD] if architecture.head.untied == "unknown" else []
    return head + [name for name, (_, bias) in parts_with_bias(architecture).items() if bias.served == "unknown"]


def open_flags(architecture: Architecture) -> dict[str, bool]:
    """The configuration with which a model has every bias that a question is about."""
    biases = (bias for _, bias in parts_with_bias(architecture).values() if bias.served == "unknown")
    return {flag: value for bias in biases for flag, value in bias.flags.items()}


def parts_with_bias(architecture: Architecture) -> dict[str, tuple[Part, Bias]]:
    """The parts that may have a bias, by the name of the question about it."""
    return {
        f"{kind}.{key}": (part, part.bias)
        for kind in ("attn", "mlp")
        for key, part in architecture.parts(kind).items()
        if part.bias is not None
    }


def answered(architecture: Architecture, answers: Mapping[str, Answer | Literal["unknown"]]) -> Architecture:
    """The description with `answers` to some of its questions, or with questions left open again."""
    update: dict[str, Any] = {kind: dict(architecture.parts(kind)) for kind in ("attn", "mlp")}
    for name, (part, bias) in parts_with_bias(architecture).items():
        if name in answers:
            kind, _, key = name.partition(".")
            served = bias.model_copy(update={"served": answers[name]})
            update[kind][key] = part.model_copy(update={"bias": served})
    if HEAD in answers:
        update[HEAD] = architecture.head.model_copy(update={"untied": answers[HEAD]})
    return architecture.model_copy(update=update)
