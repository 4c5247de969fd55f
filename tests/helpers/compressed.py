"""Quantised checkpoints as compressed-tensors itself reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors under their unquantised names; quantised matrices by the library, as config.json describes them."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    (scheme,) = settings.config_groups.values()
    compressor, stored = BaseCompressor.get_value_from_registry(settings.format), tensors_of(folder)
    stems = {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")}
    result = {name: tensor for name, tensor in stored.items() if not any(name.startswith(stem) for stem in stems)}
    for stem in stems:
        module = stem.removesuffix("weight")
        state = {name.removeprefix(module): tensor for name, tensor in stored.items() if name.startswith(stem)}
        result[stem] = compressor.decompress(state, scheme)["weight"]
    return result
