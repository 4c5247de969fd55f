"""The tensors of a checkpoint by the names that they have unquantised, and how each is decoded from what is stored.

Weights are decoded to the numbers that transformers computes with: FP8 ones are multiplied by their scales, experts in
MXFP4 by powers of two, four bits of bitsandbytes by the scale of their block; what compressed-tensors packs is decoded
by that library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ...core.errors import OrthogonalizeError
from ..checkpoint import Checkpoint
from ..mxfp4 import BLOCKS, decode_experts, packed_tensors
from ..mxfp4 import SCALES as EXPONENTS
from ..quantization import FP8, PACKED, read_scales, scale_factors, scale_name
from ..quantizing.library import PARTS, Decoder
from ..safetensors_file import DTYPES, EDITABLE, TensorInfo, row_blocks
from ..settings_files import quantization
from .bitsandbytes import decode_four_bits, four_bit_weights

INDICES = ("I64", "BOOL")  # of positions and masks, which nothing quantises


@dataclass(frozen=True)
class StoredWeight:
    """A tensor by the name that it has unquantised.

    Attributes:
        info: as it is decoded.
        stored: the names of the tensors that it is decoded from.
        read: reads and decodes it; where that takes long, on the device that is given.
    """

    info: TensorInfo
    stored: tuple[str, ...]
    read: Callable[[torch.device], torch.Tensor]

    @property
    def plain(self) -> bool:
        """Whether it is stored as it is."""
        return self.stored == (self.info.name,)


def stored_weights(source: Checkpoint, dtype: torch.dtype) -> dict[str, StoredWeight]:
    """Every tensor of a checkpoint; those that are stored quantised are decoded in `dtype`.

    Raises:
        OrthogonalizeError: one is stored in a format that is not decoded here, or the library that decodes it is not
            installed.
    """
    found: dict[str, StoredWeight] = {}
    if "quantization_config" in source.config:
        for finder in (_fp8_weights, _mxfp4_weights, _compressed_weights, _bitsandbytes_weights):
            found |= {weight.info.name: weight for weight in finder(source, dtype)}
    parts = {name for weight in found.values() for name in weight.stored}
    for name, info in source.tensors.items():
        if name not in parts:
            if "quantization_config" in source.config:
                _check_plain(name, info)
            found[name] = StoredWeight(info, (name,), partial(_read, source, name))
    return found


def _check_plain(name: str, info: TensorInfo) -> None:
    if info.dtype == FP8:
        raise OrthogonalizeError(f"{name} is stored as {FP8} without scales, which cannot be decoded here")
    packed = next((what for suffix, what in PACKED.items() if name.endswith(suffix)), None)
    if packed is not None or info.dtype not in (*EDITABLE, *INDICES):
        raise OrthogonalizeError(f"{name} is stored as {packed or info.dtype}, which cannot be decoded here")


def _read(source: Checkpoint, name: str, _device: torch.device) -> torch.Tensor:
    return source.read(name)


def _decoded(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorInfo:
    return TensorInfo(name, next(key for key, value in DTYPES.items() if value == dtype), shape, 0, 0)


def _fp8_weights(source: Checkpoint, dtype: torch.dtype) -> Iterator[StoredWeight]:
    for name, info in source.tensors.items():
        if info.dtype == FP8 and (scales := scale_name(source, name)) is not None:
            read_scales(source, name, -2)  # which refuses what it does not know
            yield StoredWeight(
                _decoded(name, info.shape, dtype), (name, scales), partial(_read_fp8, source, name, dtype)
            )


def _read_fp8(source: Checkpoint, name: str, dtype: torch.dtype, _device: torch.device) -> torch.Tensor:
    """The numbers times their scales, computed in float32."""
    stored, scales = source.read(name), read_scales(source, name, -2)
    assert scales is not None
    result = torch.empty(stored.shape, dtype=dtype)
    if stored.dim() == 3:
        count = scales.values.shape[1] // len(stored)
        for number, expert in enumerate(stored):
            own = scales._replace(values=scales.values[:, number * count : (number + 1) * count])
            result[number] = expert.float() * scale_factors(own, tuple(expert.shape))
        return result
    table = torch.from_numpy(scales.values)
    rows, columns = (torch.arange(n) // every for n, every in zip(stored.shape, scales.every, strict=True))
    for first, last in row_blocks(stored.shape):
        result[first:last] = stored[first:last].float() * table[rows[first:last]][:, columns]
    return result


def _mxfp4_weights(source: Checkpoint, dtype: torch.dtype) -> Iterator[StoredWeight]:
    for name, info in packed_tensors(source.tensors).items():
        stored = name + BLOCKS, name + EXPONENTS

        def read(device: torch.device, stored: tuple[str, str] = stored) -> torch.Tensor:
            blocks, exponents = (source.read(each).to(device) for each in stored)
            return decode_experts(blocks, exponents, dtype)

        yield StoredWeight(_decoded(name, info.shape, dtype), stored, read)


def _compressed_weights(source: Checkpoint, dtype: torch.dtype) -> Iterator[StoredWeight]:
    settings = quantization(source.config)
    if settings is None or settings["quant_method"] != "compressed-tensors" or "config_groups" not in settings:
        return
    decoder = None
    for name, info in source.tensors.items():
        module, _, last = name.rpartition(".")
        if len(info.shape) != 2 or (last != "weight_packed" and (last != "weight" or info.dtype != "I8")):
            continue
        decoder = decoder or Decoder(settings)
        shape = decoder.shape(module, info)
        if shape is None:
            continue
        stored = tuple(f"{module}.{part}" for part in PARTS if f"{module}.{part}" in source.tensors)

        def read(
            device: torch.device, module: str = module, stored: tuple[str, ...] = stored, decoder: Decoder = decoder
        ) -> torch.Tensor:
            state = {each.rpartition(".")[2]: source.read(each).to(device) for each in stored}
            return decoder.decode(module, state, dtype)

        yield StoredWeight(_decoded(f"{module}.weight", shape, dtype), stored, read)


def _bitsandbytes_weights(source: Checkpoint, dtype: torch.dtype) -> Iterator[StoredWeight]:
    for name, shape, stored in four_bit_weights(source):
        yield StoredWeight(_decoded(name, shape, dtype), stored, partial(decode_four_bits, source, stored, dtype))
