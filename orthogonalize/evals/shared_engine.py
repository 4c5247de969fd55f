"""One engine for base and edited models: whether they fit together, and the base's weights for an edited one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import RECIPE, Addition, Checkpoint, open_checkpoint
from ..checkpoints.quantizing.stored import packed_floats
from ..checkpoints.settings_files import with_changes
from ..core.errors import OrthogonalizeError
from ..edits.bake import bake
from ..edits.descriptions.automatic import learn_from
from ..edits.recipe import load_recipe
from ..engines.shared_base import Weights


def _as_planned(checkpoint: Path, source: Checkpoint) -> tuple[Checkpoint, dict[str, Any], Mapping[str, Addition]]:
    """The base as the recipe of `checkpoint` (if there is one) restructures it before any weight changes.

    Returns the base with its tensors under the checkpoint's names, the configuration, and the added tensors.
    """
    if not (checkpoint / RECIPE).is_file():
        return source, source.config, {}
    recipe = load_recipe(checkpoint)
    learn_from(recipe, source)
    plan = bake(source, recipe.intervention()).checkpoint
    return plan.source, with_changes(source.config, plan.config_changes), plan.additions


def check_pair(checkpoint: Path, base: Path) -> None:
    """Check that a checkpoint has every tensor of its base; engines silently load one that does not.

    Raises:
        OrthogonalizeError: a tensor is missing or has another shape, or the two are different kinds of model.
    """
    edited, source = open_checkpoint(checkpoint), open_checkpoint(base)
    kind = source.config.get("model_type")
    if kind != edited.config.get("model_type"):
        source, config, _ = _as_planned(checkpoint, source)
        kind = config.get("model_type")
    if kind != edited.config.get("model_type"):
        raise OrthogonalizeError(
            f"{checkpoint} and {base} are different kinds of model; pass the model that was edited as --base"
        )
    held = edited.tensors | packed_floats(edited.tensors)
    missing = sorted(source.tensors.keys() - held.keys())
    if missing:
        raise OrthogonalizeError(f"{checkpoint} is incomplete: it lacks {missing[0]} ({len(missing)} missing tensors)")
    for name, info in source.tensors.items():
        if held[name].shape != info.shape:
            raise OrthogonalizeError(
                f"{name} has a different shape in {checkpoint} than in {base}; pass the model that was edited as --base"
            )


def base_weights(checkpoint: Path, base: Path) -> Weights | None:
    """The base's weights, for an engine that was started on the edited `checkpoint`; None if they cannot be derived.

    An edit may add tensors (an untied head, biases). Their values for the base (a copy of the embedding, zeros) follow
    from the recipe.
    """
    edited = open_checkpoint(checkpoint)
    source, config, additions = _as_planned(checkpoint, open_checkpoint(base))
    weights: dict[str, Callable[[], torch.Tensor]] = {name: addition.make for name, addition in additions.items()}
    weights |= {name: partial(source.read, name) for name in source.tensors}
    held = edited.tensors
    same_dtypes = all(n in held and held[n].dtype == info.dtype for n, info in source.tensors.items())
    return weights if weights.keys() == edited.tensors.keys() and config == edited.config and same_dtypes else None
