"""`verify`: the differences between a checkpoint and its base, and the proof that hooks equal weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import RECIPE, Checkpoint, open_checkpoint
from ..checkpoints.diff import PROJECTED, Audit, audit
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.quantizing.check import QuantizedCheck, check_quantized
from ..checkpoints.quantizing.plan import QuantizedPlan
from ..checkpoints.safetensors_file import stored_bytes
from ..core.errors import OrthogonalizeError
from ..core.progress import track
from ..core.words import counted
from ..edits.bake import bake
from ..edits.descriptions.automatic import learn_from
from ..edits.leaks import TensorLeak, tensor_leaks
from ..edits.plan import EditPlan
from ..edits.quantize import quantized_plan
from ..edits.recipe import QuantizationCost, Recipe, Verification, load_recipe
from ..models.resolve import find_model
from ..models.tokenizer.faithful import SETTINGS, mended_settings
from ..reports.model_card import update_card
from .merge import checkpoint_of
from .verifying.gaps import logit_gaps

TOLERANCE = 1e-3  # largest logit difference that float32 arithmetic explains


@dataclass
class Verified(Audit):
    """An audit and, if there is a recipe, the proof that hooks equal weights.

    `edit` describes the recipe's edit; `leaks` is what every edited tensor shows of it along the edit's own maps.
    `mismatches` says that the base is not the recipe's, if that was allowed; nothing is proven then. `quantization` is
    what quantisation did, if the recipe says that the edit was quantised.
    """

    verification: Verification | None = None
    edit: str | None = None
    leaks: dict[str, TensorLeak] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    quantization: QuantizedCheck | None = None

    @property
    def largest_leak(self) -> float | None:
        """The largest share of a tensor's planned change that is missing; None if nothing was planned."""
        return max((each.leak for each in self.leaks.values() if each.leak is not None), default=None)

    def projected(self) -> dict[str, float]:
        """As `Audit.projected`; with a recipe, along the maps of its own edit."""
        if self.edit is None:
            return super().projected()
        left = {name: each.left for name, each in self.leaks.items() if each.left is not None}
        return {name: share for name, share in left.items() if share <= PROJECTED}

    def verdict(self) -> str:
        """As `Audit.verdict`; with a recipe, nothing is estimated from the differences."""
        if self.edit is None or not self.leaks:
            return super().verdict()
        leak = self.largest_leak
        missing = "" if leak is None else f", of whose planned change at most {leak:.1e} is missing"
        ranks = sorted({each.rank for each in self.leaks.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        projected = self.projected()
        if len(projected) == len(self.leaks):
            return (
                f"an orthogonalisation of {rank}: the recipe's edit ({self.edit}), projected out of all "
                f"{counted(len(projected), 'tensor')} (at most {max(projected.values()):.1e} of it is left)"
            )
        return f"the recipe's edit ({self.edit}), of {rank}: {counted(len(self.leaks), 'tensor')}{missing}"

    def document(self) -> dict[str, Any]:
        """As `Audit.document`, with `mismatches`, or with `recipe` (its edit and every tensor's leak) and its proof."""
        if self.edit is None:
            return super().document() | {"mismatches": self.mismatches}
        leaks = {name: asdict(each) for name, each in self.leaks.items()}
        proof = None if self.verification is None else self.verification.model_dump()
        found = super().document() | {"recipe": {"edit": self.edit, "tensors": leaks}, "verification": proof}
        if self.quantization is None:
            return found
        errors = {name: asdict(each) for name, each in self.quantization.errors.items()}
        return found | {"quantization": {**(self.quantization.cost or {}), "tensors": errors}}

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


def _is_text(file: Path, text: str | None) -> bool:
    """Whether a file holds exactly `text`."""
    return text is not None and file.is_file() and file.read_bytes() == text.encode()


def _quantized(plan: EditPlan, recipe: Recipe) -> QuantizedPlan | None:
    found = recipe.quantization
    return None if found is None else quantized_plan(plan, found.scheme, found.version)


def _unexpected_settings(result: Verified, edited: Checkpoint, planned: CheckpointPlan, recipe: Recipe) -> list[str]:
    """The side files and keys of the configuration that differ from the base's, and that the recipe does not give."""
    source = planned.source
    mended = mended_settings(source.path) if recipe.tokenizer_class is not None else None
    expected = {SETTINGS: mended.text()} if mended is not None else {}
    unexpected = [name for name in result.side_files if not _is_text(edited.path / name, expected.get(name))]
    wanted = {**source.config, **planned.config_changes}
    return unexpected + [
        f"config.json: {key}"
        for key in sorted(wanted.keys() | edited.config.keys())
        if wanted.get(key) != edited.config.get(key)
    ]


def verify(
    checkpoint: Path | str,
    base: Path | str | None = None,
    *,
    device: str = "auto",
    logits: bool = True,
    record: bool = True,
    allow_other_base: bool = False,
    listed_only: bool = False,
) -> Verified:
    """Audit the difference of `checkpoint` and `base`; if there is a recipe, prove that hooks = weights.

    A quantised checkpoint is compared with the unquantised edit: what quantisation lost of it, and how far it moved
    the weights. It does not pass if more than half of the planned change is lost.

    For the proof, the edit is recomputed and compared byte for byte, and the logits of the hooked base are compared, in
    float32, with those of the edit before rounding and of the checkpoint as stored. The result is written into the
    recipe and its card unless `record` is False; `logits=False` compares bytes only. With `allow_other_base`, a base
    that is not the recipe's is compared without the proof. With `listed_only`, files that the recipe does not
    list, which `push` does not upload, do not count.

    Raises:
        OrthogonalizeError: `checkpoint` is not a checkpoint, or its base is unknown or not that of the recipe.
    """
    folder = checkpoint_of(checkpoint, base)
    edited = open_checkpoint(folder)
    recipe = load_recipe(folder) if (folder / RECIPE).is_file() else None
    if base is None and recipe is None:
        raise OrthogonalizeError(f"{folder} has no recipe, so its base is unknown; give --base")
    revision = recipe.base.revision if recipe and not base else None
    source = open_checkpoint(find_model(str(base or (recipe.base.model if recipe else "")), revision))
    if recipe is None:
        return Verified(**vars(audit(edited, source)))
    if source.fingerprint() != recipe.base.weights:
        mismatch = f"{source.path} is not the base of the recipe: its weights differ"
        if not allow_other_base:
            raise OrthogonalizeError(f"{mismatch}; --allow-other-base compares the two without the proof")
        return Verified(**vars(audit(edited, source)), mismatches=[mismatch])
    learn_from(recipe, source)
    plan = bake(source, recipe.intervention())
    planned = plan.checkpoint
    planned.rounding = recipe.rounding
    quantized = _quantized(plan, recipe)
    if quantized is None:
        result = Verified(**vars(audit(edited, planned.source)))  # its tensors may have other names than the base's
        found = {*result.changed, *result.added, *result.missing}
        unexpected, rebuilt = sorted(found - planned.changed_tensors), _rebuilds(edited, planned)
    else:
        check = check_quantized(edited, quantized)
        result = Verified(**vars(check.audit), quantization=check)
        unexpected, rebuilt = check.unexpected, check.rebuilt
    if listed_only and recipe.files:
        result.side_files = [name for name in result.side_files if name in recipe.files]
    unexpected += _unexpected_settings(result, edited, planned, recipe)
    result.edit, result.leaks = recipe.choice.describe(), tensor_leaks(edited, planned)
    gaps: dict[str, float | None] = {"hooks_gap": None, "stored_gap": None}
    if logits and not unexpected:  # with another configuration the model may not even load
        gaps = logit_gaps(edited, plan, quantized, recipe.intervention(), device)
    gap = gaps["hooks_gap"]
    measured = None if result.quantization is None else result.quantization.cost
    cost = None if measured is None else QuantizationCost(**measured)
    result.verification = Verification(
        rebuilt=rebuilt,
        unexpected_changes=unexpected,
        tolerance=TOLERANCE,
        passed=rebuilt
        and not unexpected
        and (gap is None or gap <= TOLERANCE)
        and (cost is None or not cost.meaningless),
        quantization=cost,
        **gaps,
    )
    if record:
        recipe.verification = result.verification
        recipe.save(folder)
        update_card(folder)
    return result
