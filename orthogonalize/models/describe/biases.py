"""Find the biases that a part of a block has, or that a setting would give it.

Whether a server reads them, transformers cannot tell: every one that is found is left open (`served = "unknown"`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from ...architectures.schema import Bias, bias_name, without_experts
from .discovery import Findings
from .twin import text_class


def find_biases(config: Any, findings: Findings, stored: Iterable[str]) -> dict[tuple[str, str], Bias]:
    """The biases by kind of block and module.

    Args:
        config: the small model's configuration.
        findings: what experiments on it found.
        stored: the names of its tensors.
    """
    within = _templates(stored, findings)
    flagged: dict[str, set[str]] | None = None
    found = {}
    for kind, parts in findings.parts.items():
        for part in parts:
            weights = [name for name in part.writes if name in within and not name.endswith("bias")]
            if not weights or part.post_norms:  # a norm rescales any constant
                continue
            own = [name for name in weights if bias_name(name) in within]
            if own:
                found[kind, part.module] = Bias(on=_some(own, weights), served="unknown")
                continue
            if flagged is None:
                flagged = {flag: _templates(made, findings) for flag, made in _made_by_flags(config).items()}
            bias = next((b for flag, made in flagged.items() if (b := _flagged(flag, made, weights, within))), None)
            if bias is not None:
                found[kind, part.module] = bias
    return found


def _some(own: list[str], weights: list[str]) -> tuple[str, ...]:
    return () if own == weights else tuple(own)


def _flagged(flag: str, made: set[str], weights: list[str], within: set[str]) -> Bias | None:
    """The bias of `weights` that `flag` creates; None unless everything that it creates is a stored weight's bias."""
    own = [name for name in weights if bias_name(name) in made]
    with_bias = {bias_name(name): name for name in within}
    if not own or not made <= with_bias.keys():
        return None
    zeros = tuple(sorted(with_bias[name] for name in made if with_bias[name] not in own))
    return Bias(flags={flag: True}, on=_some(own, weights), zeros=zeros, served="unknown")


def _templates(names: Iterable[str], findings: Findings) -> set[str]:
    """Names of blocks' tensors without the numbers of layers and experts; other names stay whole."""
    layer = re.escape(findings.decoder + findings.layer).replace(r"\{layer\}", r"\d{1,9}")
    matches = ((re.fullmatch(layer + r"\.(.+)", name), name) for name in names)
    return {without_experts(match[1]) if match else name for match, name in matches}


def _made_by_flags(config: Any) -> Mapping[str, set[str]]:
    """The parameters that every setting of biases which is off would add to the model, by its name."""
    known = type(config)().to_dict()  # a stranger's file may hold any number of others
    flags = [key for key, value in config.to_dict().items() if value is False and "bias" in key and key in known]
    plain = _parameters(config, {}) if flags else set()
    made = {}
    for flag in flags:
        with suppress(Exception):  # a class may refuse a setting, in any way
            made[flag] = _parameters(config, {flag: True}) - plain
    return {flag: names for flag, names in made.items() if names}


def _parameters(config: Any, changes: Mapping[str, Any]) -> set[str]:
    settings = {**{k: v for k, v in config.to_dict().items() if k != "model_type"}, **changes}
    with torch.device("meta"):
        model = text_class(config)._from_config(type(config)(**settings), attn_implementation="eager")
    return {name for name, _ in model.named_parameters()}
