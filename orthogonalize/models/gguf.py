"""Convert GGUF files to checkpoint folders."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from ..core.errors import OrthogonalizeError, first_line, shown
from ..core.output_folders import EDITED, complete_folder
from ..core.progress import track

MOST = 2  # parameters of a model for each number in its file; a tied head is stored once


def convert_gguf(file: Path, out: Path) -> Path:
    """Dequantize a .gguf file into a safetensors folder with tokenizer and chat template (see `_examined_dtype`).

    Raises:
        OrthogonalizeError: transformers cannot read the file, or a tensor of the model is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = file.absolute()  # transformers takes a file of that name in the present folder, if there is one
    try:
        with track("converting the .gguf file", None):
            dtype = _examined_dtype(file)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=str(file), trust_remote_code=False)
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=str(file),
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                trust_remote_code=False,
            )
    except OrthogonalizeError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise OrthogonalizeError(f"{file} cannot be read as GGUF: {first_line(error)}") from error
    for name in sorted(found["missing_keys"]):  # transformers initializes them at random
        raise OrthogonalizeError(f"{file} lacks {name}; download it again")
    with complete_folder(out, EDITED) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out


def _examined_dtype(file: Path) -> torch.dtype:
    """The dtype of the matrices in a .gguf file, bfloat16 if any is quantized, once its sizes are those of its tensors.

    Raises:
        OrthogonalizeError: they are not, so that transformers would make up a model of any size.
    """
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFReader

    reader = GGUFReader(file)
    _check_sizes(file, reader)
    kinds = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    if kinds <= {Type.F32, Type.F16}:
        return torch.float16 if Type.F16 in kinds else torch.float32
    return torch.bfloat16


def _check_sizes(file: Path, reader: Any) -> None:
    """Check that the model of the header is not larger than its tensors, before transformers takes memory for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    blocks = {found[0] for tensor in reader.tensors if (found := re.search(r"blk\.\d+\.", tensor.name))}
    sizes = {int(size) for tensor in reader.tensors for size in tensor.shape}
    for key, entry in reader.fields.items():
        value = entry.contents() if key.endswith((".block_count", ".expert_count")) else 0
        if value > len(blocks) if key.endswith("block_count") else value and value not in sizes:
            raise OrthogonalizeError(f"{file} has {shown(key)} = {shown(value)}, and not as many tensors")
    config = AutoConfig.from_pretrained(file.parent, gguf_file=str(file), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors)
    if wanted > MOST * stored:
        raise OrthogonalizeError(f"{file} describes a model of {wanted} parameters, but holds {stored}")
