"""`verify`: the differences between a checkpoint and its base, and the proof that hooks equal weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import RECIPE, Checkpoint, open_checkpoint
from ..checkpoints.diff import Audit, audit
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.quantization import dequantize
from ..checkpoints.safetensors_file import stored_bytes
from ..core.errors import OrthogonalizeError
from ..core.progress import track
from ..edits.bake import bake
from ..edits.hub_cache import edited_folder
from ..edits.plan import EditPlan
from ..edits.recipe import Recipe, Verification, load_recipe
from ..models.hooks import intervened
from ..models.loading import load_model
from ..models.resolve import find_model

TOLERANCE = 1e-3  # largest logit difference that float32 arithmetic explains


@dataclass
class Verified(Audit):
    """An audit and, if there is a recipe, the proof that hooks equal weights."""

    verification: Verification | None = None

    def __repr__(self) -> str:
        proof = self.verification
        return f"Verified({self._counts}{'' if proof is None else '; passed' if proof.passed else '; NOT passed'})"


def _rebuilds(edited: Checkpoint, plan: CheckpointPlan) -> bool:
    """Whether the plan of the recipe gives exactly the stored bytes of every tensor."""
    names = sorted(plan.changed_tensors)
    with track("rebuilding from the recipe", len(names), "tensors") as advance:
        for name in names:
            if name not in edited.tensors or stored_bytes(plan.edited(name)) != stored_bytes(edited.read(name)):
                return False
            advance(1)
    return True


def _probe_ids(model: Any) -> torch.Tensor:
    """Fixed random token ids [4, 48], drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.get_text_config().vocab_size, (4, 48), generator=generator)


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    ids = _probe_ids(model).to(model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    if not torch.isfinite(logits).all():
        raise OrthogonalizeError("the model's logits contain NaN or infinite values; the checkpoint is damaged")
    return logits


def _unrounded(model: Any, edited: Path, plan: CheckpointPlan) -> Any:
    """The edited model with the exact edit in place of the stored, rounded weights."""
    exact: dict[str, torch.Tensor] = {}
    for name, edit in plan.edits.items():
        addition = plan.additions.get(name)
        exact[name] = edit.exact(addition.make() if addition else dequantize(plan.source, name))
    parameters = dict(model.named_parameters())
    if exact.keys() <= parameters.keys():
        for name, tensor in exact.items():
            parameters[name].data.copy_(tensor)
        return model
    # Names or layouts differ in memory (fused experts, wrappers); let the library convert them.
    checkpoint = open_checkpoint(edited)
    tensors = {name: exact.get(name, checkpoint.read(name)).to(model.dtype) for name in checkpoint.tensors}
    options = {"config": model.config, "state_dict": tensors, "dtype": model.dtype}
    return type(model).from_pretrained(None, **options).to(model.device).eval()


def _gaps(edited: Path, base: Path, recipe: Recipe, plan: EditPlan, device: str) -> dict[str, float | None]:
    intervention = recipe.intervention()
    with track("hooks against weights", 3, "models") as advance:
        model = load_model(base, device, torch.float32)
        with intervened(model, intervention, renormalise=False):
            hooked = _logits(model)
        renormalised = None
        if intervention.reads or plan.has_post_norms:
            with intervened(model, intervention):
                renormalised = _logits(model)
        advance(1)
        model = load_model(edited, device, torch.float32)
        stored = _logits(model)
        advance(1)
        exact = _logits(_unrounded(model, edited, plan.checkpoint))
        advance(1)
    return {
        "hooks_gap": (hooked - exact).abs().max().item(),
        "stored_gap": (hooked - stored).abs().max().item(),
        "renormalised_gap": None if renormalised is None else (renormalised - exact).abs().max().item(),
    }


def verify(
    checkpoint: Path | str, base: str | None = None, *, device: str = "auto", logits: bool = True, record: bool = True
) -> Verified:
    """Audit the difference of `checkpoint` and `base`; if there is a recipe, prove that hooks = weights.

    For the proof, the edit is recomputed and compared byte for byte, and the logits of the hooked base are compared, in
    float32, with those of the edit before rounding and of the checkpoint as stored. The result is written into the
    recipe unless `record` is False; `logits=False` compares bytes only.

    Raises:
        OrthogonalizeError: `checkpoint` is not a checkpoint, or its base is unknown or not that of the recipe.
    """
    folder = edited_folder(checkpoint)
    edited = open_checkpoint(folder)
    recipe = load_recipe(folder) if (folder / RECIPE).is_file() else None
    if base is None and recipe is None:
        raise OrthogonalizeError(f"{folder} has no recipe, so its base is unknown; give --base")
    revision = recipe.base.revision if recipe and not base else None
    source = open_checkpoint(find_model(base or (recipe.base.model if recipe else ""), revision))
    if recipe is None:
        return Verified(**vars(audit(edited, source)))
    if source.fingerprint() != recipe.base.weights:
        raise OrthogonalizeError(f"{source.path} is not the base of the recipe: its weights differ")
    plan = bake(source, recipe.intervention())
    planned = plan.checkpoint
    planned.rounding = recipe.rounding
    result = Verified(**vars(audit(edited, planned.source)))  # its tensors may have other names than the base's
    found = {*result.changed, *result.added, *result.missing}
    unexpected = sorted(found - planned.changed_tensors) + result.side_files
    wanted = {**source.config, **planned.config_changes}
    unexpected += [
        f"config.json: {key}"
        for key in sorted(wanted.keys() | edited.config.keys())
        if wanted.get(key) != edited.config.get(key)
    ]
    rebuilt = _rebuilds(edited, planned)
    gaps: dict[str, float | None] = {"hooks_gap": None, "stored_gap": None}
    if logits and not unexpected:  # with another configuration the model may not even load
        gaps = _gaps(folder, source.path, recipe, plan, device)
    gap = gaps["hooks_gap"]
    result.verification = Verification(
        rebuilt=rebuilt,
        unexpected_changes=unexpected,
        tolerance=TOLERANCE,
        passed=rebuilt and not unexpected and (gap is None or gap <= TOLERANCE),
        **gaps,
    )
    if record:
        recipe.verification = result.verification
        recipe.save(folder)
    return result
