"""Weights in four bits as bitsandbytes stores them (NF4 and FP4, as in QLoRA, Dettmers et al. 2023), decoded.

A weight X is stored as bytes of two numbers each, the first in the upper bits: places in `X.quant_map`, a table of
sixteen numbers. A block of them is multiplied by its scale in `X.absmax`. `X.quant_state.bitsandbytes__nf4` (or fp4) is
JSON with the shape, the dtype and the size of blocks. Scales may be quantised in turn: places in
`X.nested_quant_map`, multiplied by block in `X.nested_absmax`, plus an offset in the JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from ...core.errors import OrthogonalizeError
from ..checkpoint import Checkpoint

STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def four_bit_weights(source: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """The name and shape of each weight that is stored so, and the names of the tensors that hold it.

    Raises:
        OrthogonalizeError: one has settings that do not fit its bytes.
    """
    for state in source.tensors:
        name = next((state.removesuffix(each) for each in STATES if state.endswith(each)), None)
        if name is not None and name in source.tensors:
            shape = tuple(_settings(source, name, state)["shape"])
            yield name, shape, (name, state, *(name + part for part in PARTS if name + part in source.tensors))


def _settings(source: Checkpoint, name: str, state: str) -> dict[str, Any]:
    """What the JSON in tensor `state` says of weight `name`."""
    try:
        settings: dict[str, Any] = json.loads(bytes(source.read(state).flatten().tolist()))
        if _fits(source, name, settings):
            return settings
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    raise OrthogonalizeError(f"{state} does not fit what is stored of {name}; fetch the checkpoint again")


def _fits(source: Checkpoint, name: str, settings: dict[str, Any]) -> bool:
    """Whether a weight has as many bytes and scales as its settings say."""
    rows, columns = settings["shape"]
    held = {part: math.prod(source.tensors[name + part].shape) for part in PARTS if name + part in source.tensors}
    blocks = math.ceil(rows * columns / settings["blocksize"])
    expected = {".absmax": blocks, ".quant_map": 16}
    if ".nested_absmax" in held:
        expected |= {".nested_absmax": math.ceil(blocks / settings["nested_blocksize"]), ".nested_quant_map": 256}
        float(settings["nested_offset"])
    return held == expected and source.tensors[name].size * 2 == rows * columns and settings["dtype"] in DTYPES


def decode_four_bits(
    source: Checkpoint, stored: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The weight [out, in] that the tensors `stored` hold, in `dtype` and on `device`.

    As in bitsandbytes, numbers are computed in float32 and rounded to the dtype that they were quantised from.
    """
    name, state, *parts = stored
    settings = _settings(source, name, state)
    held = {part.removeprefix(name): source.read(part).to(device) for part in parts}
    packed = source.read(name).to(device).flatten().view(torch.uint8)
    scales = held[".absmax"].flatten()
    if ".nested_absmax" in held:
        scales = _blocks(held[".nested_quant_map"][scales.int()], held[".nested_absmax"], settings["nested_blocksize"])
        scales = scales + settings["nested_offset"]
    numbers = held[".quant_map"].float()[torch.stack([packed >> 4, packed & 15], -1).flatten().int()]
    decoded = _blocks(numbers, scales, settings["blocksize"])
    return decoded.reshape(settings["shape"]).to(DTYPES[settings["dtype"]]).to(dtype)


def _blocks(numbers: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers times the scale of their block; the last block may be shorter."""
    return numbers * scales.repeat_interleave(size)[: len(numbers)]
