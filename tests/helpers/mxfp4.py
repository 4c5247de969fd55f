"""A tiny gpt-oss as it is released: experts in MXFP4, everything else in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from helpers.tiny_models import TINY

GRID = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [experts, in, out] in MXFP4: the nearest of 16 values under the scale of its block, one by one."""
    grouped = weight.float().mT.contiguous().view(weight.shape[0], weight.shape[2], -1, 32)
    scale = torch.ceil(torch.log2(grouped.abs().amax(-1, keepdim=True) / 6)).clamp(-127, 127)
    codes = ((grouped / 2**scale).unsqueeze(-1) - GRID).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] + 16 * codes[..., 1::2], (scale.squeeze(-1) + 127).to(torch.uint8)


def mxfp4_base(folder: Path, head_dim: int = 32, **sizes: int) -> Path:
    """Store the model, with random weights; `sizes` are keys of its configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY["gpt_oss"].config(head_dim, **sizes), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("down_proj", "gate_up_proj"))]:
        tensors[name + "_blocks"], tensors[name + "_scales"] = quantised(tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def dequantised_model(folder: Path, dtype: torch.dtype):
    """The model of a folder as transformers dequantises it, whatever the machine has kernels for."""
    given = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=given).eval()


def dequantised_folder(base: Path, folder: Path) -> Path:
    """Store the same model in bfloat16. (transformers 5 leaves the experts out if it saves what it dequantised.)"""
    tensors = load_file(base / "model.safetensors")
    for blocks in [name for name in tensors if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        packed = tensors.pop(blocks), tensors.pop(name + "_scales")
        tensors[name] = convert_moe_packed_tensors(*packed, dtype=torch.bfloat16).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((base / "config.json").read_text())
    del stored["quantization_config"]
    (folder / "config.json").write_text(json.dumps(stored))
    return folder
