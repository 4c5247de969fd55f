"""Quantised checkpoints as compressed-tensors itself reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def decompressed(folder: Path, scales: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors under their unquantised names; quantised matrices by the library, as config.json describes them.

    `scales`: the dtype that scales are given in, instead of theirs.
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    (scheme,) = settings.config_groups.values()
    compressor, stored = BaseCompressor.get_value_from_registry(settings.format), tensors_of(folder)
    stems = {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")}
    result = {name: tensor for name, tensor in stored.items() if re.sub(r"\.weight_\w+$", ".weight", name) not in stems}
    for stem in stems:
        module = stem.removesuffix("weight")
        state = {name.removeprefix(module): tensor for name, tensor in stored.items() if name.startswith(stem)}
        if scales is not None:
            state["weight_scale"] = state["weight_scale"].to(scales)
        result[stem] = compressor.decompress(state, scheme)["weight"]
    return result


def packed(source: Path, target: Path, kind: str, names: str = r".*_proj\.weight$") -> Path:
    """Quantise the matrices `names` of a checkpoint by the library, in the format `kind` (see `KINDS`)."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    arguments, form = _arguments(kind)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    result = {}
    for name, weight in tensors_of(source).items():
        if re.match(names, name):
            stored = compressor.compress(_with_scales(weight, arguments, form), scheme)
            result |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in stored.items()}
        else:
            result[name] = weight
    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format=form, quantization_status="compressed"
    ).model_dump(mode="json")
    target.mkdir()
    save_file(result, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target


KINDS = ("int4", "int4 asymmetric", "int4 in another order", "int8", "int8 alone", "mxfp4", "nvfp4")


def _arguments(kind: str) -> tuple[Any, str]:
    """How the weights of a kind are quantised, and the name of the format."""
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    if kind.endswith("fp4"):
        preset = {"mxfp4": "MXFP4", "nvfp4": "NVFP4A16"}[kind]
        return preset_name_to_scheme(preset, ["Linear"]).weights, f"{kind}-pack-quantized"
    if kind.startswith("int8"):
        form = "int-quantized" if kind == "int8 alone" else "pack-quantized"
        return QuantizationArgs(num_bits=8, strategy="channel"), form
    order = "group" if kind.endswith("order") else None
    symmetric = kind != "int4 asymmetric"
    return QuantizationArgs(
        num_bits=4, strategy="group", group_size=32, symmetric=symmetric, actorder=order
    ), "pack-quantized"


def _with_scales(weight: torch.Tensor, arguments: Any, form: str) -> dict[str, torch.Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    size = arguments.group_size if (arguments.group_size or 0) > 0 else weight.shape[1]
    state, ordered = {"weight": weight}, weight
    if arguments.actorder:
        generator = torch.Generator().manual_seed(1)
        state["weight_g_idx"] = torch.randperm(weight.shape[1], generator=generator) // size
        ordered = weight[:, state["weight_g_idx"].argsort(stable=True)]
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = generate_gparam(-weight.abs().max(), weight.abs().max())
    groups = ordered.reshape(len(weight), -1, size)
    scales, zeros = calculate_qparams(
        groups.amin(-1), groups.amax(-1), arguments, global_scale=state.get("weight_global_scale")
    )
    return state | {"weight_scale": scales} | ({} if arguments.symmetric else {"weight_zero_point": zeros})
