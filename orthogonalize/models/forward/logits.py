"""Logits where they are needed only."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch


def logits_at(model: Any, ids: torch.Tensor, keep: int | torch.Tensor, **given: Any) -> torch.Tensor:
    """Logits [batch, kept, vocabulary] at the last `keep` tokens, or at those that an index [kept] names.

    The head is applied only there, except in the few classes that always apply it to all tokens.

    Args:
        model: a transformers model.
        ids: token ids [batch, tokens].
        keep: how many, or which tokens.
        given: what else the model's forward takes.
    """
    found: torch.Tensor = model(input_ids=ids, logits_to_keep=keep, **given).logits
    if "logits_to_keep" in signature(type(model).forward).parameters:
        return found
    return found[:, -keep:] if isinstance(keep, int) else found[:, keep]
