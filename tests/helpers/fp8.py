"""FP8 checkpoints in the layouts that are found on the Hub, made and read in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn


def fp8(*blocks: int) -> dict[str, object]:
    return {"quant_method": "fp8", "weight_block_size": list(blocks)}


LAYOUTS = {
    "blocks": ("weight_scale_inv", fp8(128, 128), (128, 128), torch.float32),
    "small blocks": ("weight_scale_inv", fp8(32, 64), (32, 64), torch.float32),
    "tensor": ("weight_scale", {"quant_method": "compressed-tensors"}, None, torch.float32),
    "channel": ("weight_scale", {"quant_method": "compressed-tensors"}, (1, None), torch.bfloat16),
}  # fmt: skip


def widened(scales: torch.Tensor, shape: torch.Size, every: tuple[int | None, int | None] | None) -> torch.Tensor:
    """The scale of every entry in plain torch: an independent reading of the layouts."""
    if every is None:
        return scales.float().expand(shape)
    rows, columns = every[0] or shape[0], every[1] or shape[1]
    wide = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: shape[0], : shape[1]]


def quantised(source: Path, target: Path, layout: str) -> Path:
    """Quantise every projection of a bfloat16 checkpoint as the layout's own tools do: largest value to 448."""
    suffix, settings, every, dtype = LAYOUTS[layout]
    tensors = load_file(source / "model.safetensors")
    result = {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = weight
            continue
        real = weight.float()
        if every is None:
            scales = (real.abs().max() / 448).reshape(1)
        else:
            rows, columns = every[0] or real.shape[0], every[1] or real.shape[1]
            scales = torch.stack(
                [torch.stack([b.abs().max() / 448 for b in strip.split(columns, 1)]) for strip in real.split(rows, 0)]
            )
        scales = scales.to(dtype)
        wide = widened(scales, real.shape, every)
        result[name] = (real / wide).clamp(-448, 448).to(FP8)
        result[name.removesuffix("weight") + suffix] = scales
    target.mkdir()
    save_file(result, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target
