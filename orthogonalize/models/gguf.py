"""Convert GGUF files to checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import OrthogonalizeError, first_line
from ..core.output_folders import EDITED, complete_folder
from ..core.progress import track


def convert_gguf(file: Path, out: Path) -> Path:
    """Dequantize a .gguf file into a safetensors folder with tokenizer and chat template (see `_gguf_dtype`).

    Raises:
        OrthogonalizeError: transformers cannot read the file, or a tensor of the model is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with track("converting the .gguf file", None):
            dtype = _gguf_dtype(file)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # a damaged file can raise anything
        raise OrthogonalizeError(f"{file} cannot be read as GGUF: {first_line(error)}") from error
    for name in sorted(found["missing_keys"]):  # transformers initializes them at random
        raise OrthogonalizeError(f"{file} lacks {name}; download it again")
    with complete_folder(out, EDITED) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out


def _gguf_dtype(file: Path) -> torch.dtype:
    """The dtype of the matrices in a .gguf file; bfloat16 if any is quantized."""
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    if kinds <= {Type.F32, Type.F16}:
        return torch.float16 if Type.F16 in kinds else torch.float32
    return torch.bfloat16
