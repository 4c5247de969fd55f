"""Checkpoints in four bits of other formats than compressed-tensors', written in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .compressed import tensors_of

# NF4: quantiles of a normal distribution (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
BLOCK, NESTED_BLOCK = 64, 256


def _written(source: Path, target: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object] | None) -> Path:
    target.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    added = {} if settings is None else {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config | added))
    return target


def plain(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The model of `source` with other tensors, in float32."""
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return _written(source, target, wide, None)


def random_mxfp4(source: Path, target: Path) -> Path:
    """A gpt-oss whose experts are random bytes in MXFP4, as it is released."""
    generator, result = torch.Generator().manual_seed(3), {}
    for name, weight in tensors_of(source).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            result[name] = weight
            continue
        experts, columns, rows = weight.shape
        size = (experts, rows, columns // 32, 16)
        result[f"{name}_blocks"] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        result[f"{name}_scales"] = torch.randint(121, 126, size[:3], dtype=torch.uint8, generator=generator)
    return _written(source, target, result, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def nf4(source: Path, target: Path, nested: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """Every projection in NF4 as bitsandbytes stores it; and the tensors that it stands for, under their own names."""
    result, meant = {}, {}
    for name, weight in tensors_of(source).items():
        meant[name] = weight
        if not name.endswith("_proj.weight"):
            result[name] = weight
            continue
        blocks = weight.float().reshape(-1, BLOCK)
        scales = blocks.abs().amax(1)
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(weight.shape)}
        if nested:
            offset, table = scales.mean().item(), torch.linspace(-1, 1, 256)
            groups = torch.nn.functional.pad(scales - offset, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
            most = groups.abs().amax(1)
            codes = (groups / most[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1)
            scales = (table[codes] * most[:, None]).flatten()[: len(scales)] + offset
            result[f"{name}.absmax"] = codes.flatten()[: len(scales)].to(torch.uint8)
            result |= {f"{name}.nested_absmax": most, f"{name}.nested_quant_map": table.clone()}
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        else:
            result[f"{name}.absmax"] = scales
        places = (blocks / scales[:, None]).unsqueeze(-1).sub(NF4).abs().argmin(-1).flatten()
        meant[name] = (NF4[places].view(-1, BLOCK) * scales[:, None]).view(weight.shape).to(torch.bfloat16)
        result[name] = (places[0::2] * 16 + places[1::2]).to(torch.uint8)[:, None]
        result[f"{name}.quant_map"] = NF4.clone()
        stored = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        result[f"{name}.quant_state.bitsandbytes__nf4"] = stored
    settings = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip
    return _written(source, target, result, settings), meant
