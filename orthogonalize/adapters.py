"""The same edit as a LoRA adapter (PEFT's format): `W - u (v^T W)` is `W + B A` with `B = -u`, `A = v^T W`.

Exact and of the edit's rank. Only linear layers can be changed so: an edit that reaches an embedding, a bias, a
tied head or fused experts is refused with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .errors import OrthogonalizeError
from .rewriting import Rewrite
from .tensoredits import TensorEdit

VECTORS = 4096  # of a weight held in float64 at a time


def _refuse_unless_linear(plan: Rewrite) -> None:
    """An adapter that leaves part of the edit out would be another edit."""
    for name in plan.additions:
        raise OrthogonalizeError(
            f"an adapter cannot add {name}, which this edit needs; write a checkpoint (--format checkpoint), "
            "or choose a --scope of layers"
        )
    for name, edit in plan.edits.items():
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
                f"{name} is {what or 'no linear layer'}, which an adapter cannot change exactly; write a checkpoint "
                "(--format checkpoint), or choose a --scope without it (layers:0-3 has no embedding)"
            )
    if not plan.edits or plan.config_changes:
        raise OrthogonalizeError("this edit changes no linear layer, so an adapter cannot hold it; write a checkpoint")


def _factors(plan: Rewrite, edit: TensorEdit) -> tuple[torch.Tensor, torch.Tensor]:
    """`A` [k, inputs] and `B` [outputs, k] of one weight, in float64."""
    affine = edit.vectors_map()
    scales = plan.changes.scales.get(edit.name)
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


def write_adapter(plan: Rewrite, folder: Path, base: str) -> None:
    """Write the planned edit as an adapter for the model `base` into the empty `folder`.

    Raises:
        OrthogonalizeError: the edit is not one of linear layers alone.
    """
    _refuse_unless_linear(plan)
    rank = max(edit.affine.rank for edit in plan.edits.values())
    tensors = {}
    for name, edit in plan.edits.items():
        a, b = _factors(plan, edit)
        module = name.removesuffix(".weight")
        # One rank for all, as servers want it: what is missing is zeros.
        missing = rank - len(a)
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_config(plan, rank, base), indent=2) + "\n", "utf-8")


def _config(plan: Rewrite, rank: int, base: str) -> dict[str, Any]:
    """PEFT's configuration: the layers by their full names, and a scale of 1."""
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
        "target_modules": sorted(name.removesuffix(".weight") for name in plan.edits),
    }
