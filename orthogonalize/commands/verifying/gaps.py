"""The proof that hooks equal weights: logits of the hooked base, of the exact edit, and of what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...checkpoints.plan import CheckpointPlan
from ...checkpoints.quantization import dequantize
from ...checkpoints.quantizing.plan import QuantizedPlan
from ...core.errors import OrthogonalizeError
from ...core.progress import track
from ...edits.plan import EditPlan
from ...engines.shared_base import own_folder
from ...models.hooks import intervened
from ...models.loading import load_model


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


def _with_tensors(model: Any, edited: Path, new: Mapping[str, torch.Tensor]) -> Any:
    """The `model` of the checkpoint `edited` with other values of the tensors `new`."""
    parameters = dict(model.named_parameters())
    if new.keys() <= parameters.keys():
        for name, tensor in new.items():
            parameters[name].data.copy_(tensor)
        return model
    # Names or layouts differ in memory (fused experts, wrappers); let the library convert them.
    checkpoint = open_checkpoint(edited)
    tensors = {
        name: (new[name] if name in new else checkpoint.read(name)).to(model.dtype) for name in checkpoint.tensors
    }
    options = {"config": model.config, "state_dict": tensors, "dtype": model.dtype}
    return type(model).from_pretrained(None, **options).to(model.device).eval()


def _exact(plan: CheckpointPlan) -> dict[str, torch.Tensor]:
    """The edited tensors before rounding."""
    exact: dict[str, torch.Tensor] = {}
    for name, edit in plan.edits.items():
        addition = plan.additions.get(name)
        exact[name] = edit.exact(addition.make() if addition else dequantize(plan.source, name))
    return exact


def logit_gaps(
    edited: Checkpoint, plan: EditPlan, quantized: QuantizedPlan | None, intervention: Any, device: str
) -> dict[str, float | None]:
    """The largest differences of logits, in float32, as `Verification` has them.

    Of a quantised checkpoint, the numbers that are stored are loaded into the unquantised edit's model, which is
    written to a temporary folder for that.
    """
    base = plan.source.path
    with track("hooks against weights", 3, "models") as advance:
        model = load_model(base, device, torch.float32)
        with intervened(model, intervention, renormalise=False):
            hooked = _logits(model)
        renormalised = None
        if intervention.reads or plan.has_post_norms:
            with intervened(model, intervention):
                renormalised = _logits(model)
        advance(1)
        del model
        if quantized is None:
            model = load_model(edited.path, device, torch.float32)
            stored = _logits(model)
            advance(1)
            exact = _logits(_with_tensors(model, edited.path, _exact(plan.checkpoint)))
        else:
            exact, stored = _quantized_logits(edited, quantized, device)
            advance(1)
        advance(1)
    return {
        "hooks_gap": (hooked - exact).abs().max().item(),
        "stored_gap": (hooked - stored).abs().max().item(),
        "renormalised_gap": None if renormalised is None else (renormalised - exact).abs().max().item(),
    }


def _quantized_logits(edited: Checkpoint, plan: QuantizedPlan, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the exact edit and of what is stored."""
    with own_folder(plan.unquantized()) as folder:
        model = load_model(folder, device, torch.float32)
        model = _with_tensors(model, folder, _exact(plan.plan))
        exact = _logits(model)
        names = plan.weights | plan.plan.edits.keys()
        return exact, _logits(_with_tensors(model, folder, {name: dequantize(edited, name).float() for name in names}))
