"""Write an edit as a LoRA adapter in PEFT's format: `W - u (v^T W)` is `W + B A` with `B = -u`, `A = v^T W`
(a conditional edit: `A = c`).

Exact, and of the edit's own rank. Only linear layers can be adapted: an edit of an embedding, a bias, a tied
head or experts (which transformers holds fused, however they are stored) is refused with the reason. PEFT
finds layers by their module names in transformers and silently skips those it does not find, so each is looked up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..checkpoints.tensor_edit import TensorEdit
from ..core.errors import OrthogonalizeError
from ..core.files import write_atomically
from ..models.loading import load_config, model_class
from .plan import EditPlan

VECTORS = 4096  # vectors of a weight held in float64 at a time


def _refuse_unless_linear(plan: EditPlan) -> None:
    """Refuse an edit that an adapter cannot hold completely."""
    for name in plan.checkpoint.additions:
        raise OrthogonalizeError(
            f"an adapter cannot add {name}, which this edit needs; write a checkpoint (--format checkpoint), "
            "or choose a --scope of layers"
        )
    for name, edit in plan.checkpoint.edits.items():
        shape = plan.source.tensors[name].shape
        what = None
        if edit.part == "vectors":
            what = "an embedding" if len(shape) > 1 else "a bias"
        elif len(shape) != 2:
            what = "fused experts"
        elif edit.axis % 2 != (1 if edit.part == "read" else 0):
            what = "a layer stored transposed"
        if what or not name.endswith(".weight"):
            raise OrthogonalizeError(
                f"{name} is {what or 'not a linear layer'}, which an adapter cannot change exactly; write a checkpoint "
                "(--format checkpoint), or choose a --scope without it (layers:0-3 has no embedding)"
            )
    if not plan.checkpoint.edits or plan.checkpoint.config_changes:
        raise OrthogonalizeError(
            "an adapter can only change linear layers, and this edit changes none, or the configuration too; "
            "write a checkpoint (--format checkpoint)"
        )


def _linear_layers(plan: EditPlan) -> dict[str, str]:
    """The module name in transformers of each edited weight's linear layer, by tensor name.

    Raises:
        OrthogonalizeError: a weight is not a linear layer there.
    """
    folder = plan.source.path
    with torch.device("meta"):
        model = model_class(folder).from_config(load_config(folder), trust_remote_code=False)
    held = dict(model.named_modules())
    linear = {name for name, module in held.items() if isinstance(module, torch.nn.Linear)}
    head = next(name for name in linear if held[name] is model.get_output_embeddings())
    block = plan.architecture.block(0)
    decoder = next(name for name in plan.architecture.decoder_modules if f"{name}.{block}" in held)
    layers = {}
    for name in plan.checkpoint.edits:
        stem = name.removesuffix(".weight")
        layer = head if name == plan.sites.head else f"{decoder}.{stem.removeprefix(plan.sites.decoder)}"
        if layer not in linear:
            raise OrthogonalizeError(
                f"{name} is not a separate linear layer in transformers, where PEFT would look for it (experts are "
                "fused there), so an adapter would silently leave it out; write a checkpoint (--format checkpoint)"
            )
        layers[name] = layer
    return layers


def _factors(plan: EditPlan, edit: TensorEdit) -> tuple[torch.Tensor, torch.Tensor]:
    """`A` [k, inputs] and `B` [outputs, k] of one weight, in float64."""
    affine = edit.vectors_map()
    if edit.given is not None:
        return edit.given, -affine.u
    scales = plan.checkpoint.changes.scales.get(edit.name)
    vectors = plan.source.read(edit.name).movedim(edit.axis, -1)
    if not torch.isfinite(vectors.float()).all():
        raise OrthogonalizeError(f"{edit.name} holds NaN or infinite values; the checkpoint is damaged")
    parts = []
    for first in range(0, len(vectors), VECTORS):
        part = vectors[first : first + VECTORS].double()
        if scales is not None:
            rows = torch.arange(first, first + len(part)) // scales.every[1]
            columns = torch.arange(part.shape[1]) // scales.every[0]
            part = part * torch.from_numpy(scales.values).double()[columns][:, rows].mT
        parts.append(part @ affine.v)
    component = torch.cat(parts)  # [vectors, k]
    return (component.mT, -affine.u) if edit.part == "matrix" else (affine.u.mT, -component)


def write_adapter(plan: EditPlan, folder: Path, base: str) -> None:
    """Write the planned edit as an adapter for the model `base` into the empty `folder`.

    Raises:
        OrthogonalizeError: the edit changes anything but linear layers.
    """
    _refuse_unless_linear(plan)
    layers = _linear_layers(plan)
    rank = max(edit.affine.rank for edit in plan.checkpoint.edits.values())
    tensors = {}
    for name, edit in plan.checkpoint.edits.items():
        a, b = _factors(plan, edit)
        # Servers expect one rank for all layers: pad with zeros.
        missing = rank - len(a)
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        tensors[f"base_model.model.{layers[name]}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{layers[name]}.lora_B.weight"] = b.float().contiguous()
    # `save_file` would give it mode 0600, whatever the umask.
    write_atomically(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(
        json.dumps(_config(sorted(layers.values()), rank, base), indent=2) + "\n", "utf-8"
    )


def _config(layers: list[str], rank: int, base: str) -> dict[str, Any]:
    """PEFT's configuration: layers by full name, and a scale (alpha over rank) of 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": layers,
    }
