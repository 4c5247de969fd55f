"""Quantised checkpoints: which ones can be edited as stored, and the scales of FP8 weights.

FP8 weights (`X.weight` as float8_e4m3fn) come with `X.weight_scale_inv` (per block, as DeepSeek-V3 and Qwen3 ship
them) or `X.weight_scale` (compressed-tensors: per tensor, row or block), which multiply the stored numbers.
An edit of such a tensor is computed on the dequantised numbers and rounded to the same layout; a scale changes only
where the edited numbers would not fit under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from .checkpoint import Checkpoint
from .mxfp4 import BLOCKS, dequantize_experts, packed_tensors
from .quantizing.stored import dequantize_packed, packed_float
from .rounding.base import GRIDS, Scales
from .safetensors_file import DTYPES, EDITABLE
from .settings_files import quantization
from .tensor_edit import TensorEdit

FP8 = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")  # suffixes of the weight's name
VECTORS = 2048  # processed at a time
LARGEST = GRIDS[DTYPES[FP8]].largest
# Numbers just above the largest value round to it, so the scale can stay.
FITS = LARGEST * (1 + 2.0**-6)
# Packed formats, by the suffix of the tensor that accompanies or replaces the weight.
PACKED = {
    "_blocks": "MXFP4", "_global_scale": "NVFP4", "_scale_2": "NVFP4",
    "_packed": "packed integers (compressed-tensors)", "qweight": "GPTQ or AWQ integers",
    ".absmax": "bitsandbytes integers", ".SCB": "bitsandbytes integers",
}  # fmt: skip
WAY_OUT = (
    "whose grid is too coarse for an exact edit; dequantise it first (transformers loads it with "
    "quantization_config=...Config(dequantize=True), then save_pretrained in bfloat16) and edit that, "
    "or edit the model's bfloat16 release and quantise again"
)


# Methods by the name in `quantization_config`, whose stored numbers no edit can be made on.
COARSE = {
    "gptq": "GPTQ", "gptq_marlin": "GPTQ", "awq": "AWQ", "awq_marlin": "AWQ", "auto-round": "AutoRound",
    "auto_gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes", "hqq": "HQQ", "aqlm": "AQLM", "quip": "QuIP#", "vptq": "VPTQ", "eetq": "EETQ",
    "higgs": "HIGGS", "spqr": "SpQR", "quanto": "Quanto", "torchao": "torchao", "bitnet": "BitNet", "mlx": "MLX",
    "exl2": "ExLlamaV2", "exl3": "ExLlamaV3", "gguf": "GGUF", "sinq": "SINQ", "fbgemm_fp8": "FBGEMM FP8",
}  # fmt: skip
START = "start from the release that it was quantised from (the card names it, as base_model), and quantise the result"


def check_quantization(source: Checkpoint) -> None:
    """Refuse a checkpoint whose method of quantisation leaves no numbers that an edit could be made on.

    Raises:
        OrthogonalizeError: the message names the method, and from where to start instead.
    """
    settings = quantization(source.config)
    method = str(settings["quant_method"]).lower() if settings else ""
    if method in COARSE:
        raise OrthogonalizeError(f"{source.path} is quantised by {COARSE[method]}, which no edit fits into; {START}")


def check_loadable(source: Checkpoint) -> None:
    """Refuse a quantised checkpoint that transformers does not load, whatever is installed.

    Raises:
        OrthogonalizeError: the message names the method, and from where to start instead.
    """
    settings = quantization(source.config)
    if settings is None:
        return
    if settings["quant_method"] in ("mlx", "exl2", "exl3"):
        name = COARSE[settings["quant_method"]]
        raise OrthogonalizeError(f"{source.path} is quantised by {name}, which transformers does not load; {START}")
    if not settings["quant_method"]:
        raise OrthogonalizeError(
            f"{source.path} has a quantization_config without a quant_method, so no library knows how its weights are "
            f"stored; {START}"
        )


def scale_name(source: Checkpoint, name: str) -> str | None:
    """The name of the tensor that holds the scales of weight `name`, or None."""
    return next((name + suffix for suffix in SCALES if name + suffix in source.tensors), None)


def refuse_packed(tensors: Container[str], name: str) -> None:
    """Refuse a weight that exists in a packed format only.

    Raises:
        OrthogonalizeError: `tensors` has a packed form of `name`.
    """
    stem = name.removesuffix(".weight").removesuffix("weight")
    for suffix, what in PACKED.items():
        if any(known in tensors for known in (name + suffix, f"{stem}.{suffix}", stem + suffix)):
            raise OrthogonalizeError(f"{name} is stored as {what}, {WAY_OUT}")


def check_editable(source: Checkpoint, name: str) -> None:
    """Refuse a tensor whose format cannot store an edit.

    Raises:
        OrthogonalizeError: `name` is stored in a format that cannot be edited, or only in packed form.
    """
    refuse_packed(source.tensors, name)
    info = source.tensors.get(name)
    if info is None or info.dtype in EDITABLE:
        return
    if info.dtype == FP8 and scale_name(source, name) is not None:
        read_scales(source, name, -2)
        return
    scales = " without scales" if info.dtype == FP8 else ""
    raise OrthogonalizeError(
        f"{name} is stored as {info.dtype}{scales}, which cannot be edited; start from a bfloat16 or float32 checkpoint"
    )


def _group_size(size: int, count: int, block: int | None) -> int | None:
    """How many entries share a scale if `size` entries have `count` scales; None if they do not divide."""
    if count == 1:
        return size
    if count == size:
        return 1
    return block if block and math.ceil(size / block) == count else None


def read_scales(source: Checkpoint, name: str, axis: int) -> Scales | None:
    """The scales of weight `name`, laid out for vectors along `axis`; None if it has none.

    Raises:
        OrthogonalizeError: the layout of the scales is unknown.
    """
    other = scale_name(source, name) if source.tensors[name].dtype == FP8 else None
    if other is None:
        return None
    weight, info = source.tensors[name], source.tensors[other]
    experts = weight.shape[:-2]
    if len(weight.shape) not in (2, 3) or info.dtype not in EDITABLE:
        raise OrthogonalizeError(f"{name} {list(weight.shape)} has {info.dtype} scales in an unknown layout, {WAY_OUT}")
    if not all(info.shape) or not all(weight.shape) or (experts and info.shape[0] != experts[0]):
        raise OrthogonalizeError(f"{other} {list(info.shape)} has no scales for {name} {list(weight.shape)}")
    table = source.read(other).float()
    table = table.reshape(*experts, 1, 1) if table.numel() == math.prod(experts) else _as_matrices(table, experts)
    blocks = _blocks(source.config)
    sizes = zip(weight.shape[-2:], table.shape[-2:], blocks, strict=True)
    every = tuple(_group_size(size, count, b) for size, count, b in sizes)
    along, across = (-2, -1) if axis % len(weight.shape) == len(weight.shape) - 2 else (-1, -2)
    ends_inside = experts and across == -2 and every[across] and weight.shape[across] % (every[across] or 1)
    if every[0] is None or every[1] is None or ends_inside:
        raise OrthogonalizeError(
            f"{other} {list(info.shape)} does not divide {name} {list(weight.shape)} into the blocks given in "
            "config.json; fetch the checkpoint again"
        )
    values = table.movedim(along, 0).reshape(table.shape[along], -1).contiguous()
    return Scales(values.numpy(), (every[along] or 1, every[across] or 1))


def _as_matrices(table: torch.Tensor, experts: tuple[int, ...]) -> torch.Tensor:
    """Scales as a matrix, or one for each expert; ModelOpt stores [rows, 1, columns, 1]."""
    rows = table.shape[len(experts)] if table.dim() > len(experts) else 1
    return table.reshape(*experts, rows, -1)


def scale_factors(scales: Scales, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of every number in a matrix (or one for each expert) whose vectors lie along the axis before last."""
    *experts, rows, columns = shape
    table = torch.from_numpy(scales.values).reshape(len(scales.values), *experts, -1).movedim(0, -2)
    down, across = (torch.arange(n) // every for n, every in zip((rows, columns), scales.every, strict=True))
    return table[..., down, :][..., across]


def dequantize(source: Checkpoint, name: str) -> torch.Tensor:
    """Tensor `name` as stored, or dequantised to float64 if it is FP8 or in four bits."""
    if name + BLOCKS in source.tensors and name in packed_tensors(source.tensors):
        return dequantize_experts(source, name)
    if packed_float(source.tensors, name) is not None:
        return dequantize_packed(source, name)
    stored, scales = source.read(name), read_scales(source, name, -2)
    return stored if scales is None else stored.double() * scale_factors(scales, tuple(stored.shape)).double()


def _blocks(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale according to the configuration; None if it has no blocks.

    Raises:
        OrthogonalizeError: the configuration has blocks that are not two positive integers.
    """
    settings = quantization(config)
    if settings is None:
        return None, None
    blocks = settings.get("weight_block_size") or _group_blocks(settings)
    if settings.get("quant_algo") == "FP8_PB_WO":  # ModelOpt's, which does not store its only size
        blocks = blocks or [128, 128]
    if not blocks:
        return None, None
    if not isinstance(blocks, list) or len(blocks) != 2 or not all(type(n) is int and n > 0 for n in blocks):
        raise OrthogonalizeError("config.json has blocks of scales that are not two positive integers; fetch it again")
    return blocks[0], blocks[1]


def _group_blocks(settings: Mapping[str, Any]) -> Any:
    """The block structure in a compressed-tensors configuration, if it has one."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        blocks = weights.get("block_structure") if isinstance(weights, dict) else None
        if blocks:
            return blocks
    return None


def edited_scales(source: Checkpoint, edit: TensorEdit) -> tuple[Scales, torch.Tensor | None] | None:
    """The scales of a tensor before and after its edit, and the new scale tensor, or None where it does not change.

    None if the tensor has no scales. Reads the weights once.
    """
    scales = read_scales(source, edit.name, edit.axis)
    if scales is None:
        return None
    weight = source.read(edit.name)
    matrices = math.prod(weight.shape[:-2])
    stored = weight.movedim(edit.axis, 0).reshape(weight.shape[edit.axis], -1)
    each = stored.shape[1] // matrices  # vectors of one expert
    former = torch.from_numpy(scales.values)
    most = torch.zeros_like(former)
    affine = edit.vectors_map()
    u, v, s = affine.u.float(), affine.v.float(), affine.s.float().unsqueeze(1)
    for first in range(0, stored.shape[1], VECTORS):
        numbers = torch.arange(first, min(first + VECTORS, stored.shape[1]))
        columns = numbers // each * (former.shape[1] // matrices) + numbers % each // scales.every[1]
        rows = torch.arange(len(stored)) // scales.every[0]
        x = stored[:, first : first + VECTORS].float() * former[rows][:, columns]
        taken = v.mT @ x if edit.given is None else edit.given[:, first : first + x.shape[1]].float()
        y = (x - u @ taken + s).abs()
        flat = (rows.unsqueeze(1) * most.shape[1] + columns).flatten()
        most.view(-1).scatter_reduce_(0, flat, y.flatten(), "amax")
    wanted = most / LARGEST
    grows = most > former * FITS
    if not grows.any():
        return scales, None
    name = scale_name(source, edit.name)
    assert name is not None
    info = source.tensors[name]
    dtype = DTYPES[info.dtype]
    # Rounded up to the format of the scales, so that the largest number fits.
    grown = torch.where(grows, wanted * (1 + 2 * torch.finfo(dtype).eps), former).to(dtype)
    own = grown.reshape(len(grown), *weight.shape[:-2], -1).movedim(0, edit.axis % weight.dim())
    return scales._replace(edited=grown.float().numpy()), own.reshape(info.shape).contiguous()


def row_reader(source: Checkpoint, name: str) -> Callable[[int, int], torch.Tensor]:
    """A function of (first, last) that reads those rows of tensor `name`: as stored, or dequantised."""
    if name not in source.tensors or (source.tensors[name].dtype == FP8 and scale_name(source, name) is not None):
        values = dequantize(source, name)
        return lambda first, last: values[first:last]
    return partial(source.file_of(name).rows, name)
