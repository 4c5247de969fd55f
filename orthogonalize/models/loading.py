"""Load models and tokenizers with transformers: device, dtype, and checks for missing tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.quantization import check_loadable
from ..checkpoints.quantizing.stored import packed_floats
from ..checkpoints.safetensors_file import DTYPES, TensorInfo
from ..checkpoints.settings_files import check_layers, quantization, read_settings
from ..core.errors import OrthogonalizeError, first_line, ran_out_of_memory
from ..core.foreign import explained
from ..core.memory import available_memory
from ..core.progress import note, track
from .tokenizer.faithful import read_tokenizer

ALL = "all"  # the device that is every GPU of this host
UPDATE = "update transformers if the model is newer, or fetch its files again"
DENSEST = 16  # numbers for each byte of quantised weights: more than any format has (those of two bits have four)
FILLED = 0.85  # of the free memory that the weights of a resident model may take; the rest is for what it computes


def _way_out(checkpoint: Checkpoint) -> str:
    """What to do where transformers cannot load a checkpoint."""
    return UPDATE if quantization(checkpoint.config) is None else "start from the release that it was quantised from"


def choose_device(device: str = "auto") -> torch.device:
    """The torch device; `auto` is the first GPU if there is one, else the CPU; so is `all`, where a model begins."""
    if device not in ("auto", ALL):
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            full = "its memory is full; free it, or give another --device" if ran_out_of_memory(error) else ""
            raise OrthogonalizeError(f"device {device!r} is not available: {full or first_line(error)}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_devices(device: str = "auto") -> list[torch.device]:
    """The devices that a model may be spread over: all GPUs of this host for `auto` and `all`, else the one."""
    place = choose_device(device)
    if place.type != "cuda" or device not in ("auto", ALL):
        return [place]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())] or [place]


def choose_dtype(device: torch.device, stored: str | None) -> torch.dtype:
    """The dtype to run in, given the `stored` one (see `Checkpoint.dtype`).

    On a GPU the stored one, bfloat16 if unknown; on a CPU bfloat16 only if it has instructions for it, else float32.
    """
    found = getattr(torch, str(stored).removeprefix("torch."), None)
    dtype = found if isinstance(found, torch.dtype) else torch.bfloat16
    if device.type != "cpu":
        return dtype
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and dtype == torch.bfloat16 else torch.float32


def weight_bytes(tensors: Sequence[TensorInfo], dtype: torch.dtype) -> int:
    """The size of `tensors` in memory when computed in `dtype`."""
    return sum(math.prod(info.shape) * dtype.itemsize for info in tensors)


def resident_bytes(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """The size of a model's weights in memory; on a GPU, quantised ones are kept as they are stored."""
    if quantization(checkpoint.config) is not None and device.type != "cpu":
        return checkpoint.weight_bytes
    return weight_bytes(list(checkpoint.tensors.values()), dtype)


def free_memory(device: str) -> list[int]:
    """Free bytes of the device, or of each GPU that a model may be spread over (see `load_model`)."""
    devices = choose_devices(device)
    if devices[0].type != "cuda":
        return [available_memory()]
    return [torch.cuda.mem_get_info(each)[0] for each in devices]


def is_spread(device: str, needed: int) -> bool:
    """Whether a model with `needed` bytes of weights is spread over all GPUs: as asked, or if one is too small."""
    free = free_memory(device)
    return len(free) > 1 and (device == ALL or needed > FILLED * free[0])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, which does what its tokenizer.json says.

    Raises:
        OrthogonalizeError: there is none that can be used.
    """
    found, other = read_tokenizer(folder, trust_remote_code)
    if other is not None:
        note(f"tokenizer of {folder}: {other}, which is taken as it is")
    return found


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model folder, without its choice of implementations.

    Raises:
        OrthogonalizeError: transformers cannot read it.
    """
    from transformers import AutoConfig

    with explained(f"transformers cannot load {folder}", UPDATE):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config._attn_implementation = config._experts_implementation = None  # these could name code to be fetched
        if getattr(config, "quantization_config", 0) is None:
            del config.quantization_config
        elif isinstance(getattr(config, "quantization_config", None), dict):  # null stands for the default
            stated = {key: value for key, value in config.quantization_config.items() if value is not None}
            config.quantization_config = stated
    return config


def model_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers auto class that loads a checkpoint; some image-text models are not causal-LM classes."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = load_config(folder, trust_remote_code)
    known = type(config) in AutoModelForCausalLM._model_mapping or getattr(config, "auto_map", None)
    wrapped = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if wrapped and not known else AutoModelForCausalLM


def load_model(
    folder: Path, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers model of a checkpoint folder, in evaluation mode.

    Without `dtype`, `choose_dtype` chooses by device. Code in the folder is only run with `trust_remote_code`.

    Args:
        device: `all` spreads the blocks over all GPUs of this host, and so does `auto` if the first GPU is too small.

    Raises:
        OrthogonalizeError: transformers does not know the model or cannot load it, or the GPUs cannot hold it.
    """
    place = choose_device(device)
    from transformers import CONFIG_MAPPING

    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    # If transformers has its own class, that is used; code in the folder is for older versions.
    if config.get("auto_map") and not trust_remote_code and config.get("model_type") not in CONFIG_MAPPING:
        raise OrthogonalizeError(f"{folder} contains code of its own, which is only run by extract --trust-remote-code")
    check_complete(folder)  # transformers would take memory for whatever is missing, of any size
    chosen = dtype or choose_dtype(place, checkpoint.dtype)
    if packed_floats(checkpoint.tensors):  # which compressed-tensors gives in bfloat16, whatever is asked for
        chosen = torch.bfloat16
    spread = is_spread(device, resident_bytes(checkpoint, place, chosen))
    check_loadable(checkpoint)
    with explained(f"transformers cannot load {folder}", _way_out(checkpoint)), track("loading the model", None):
        loader = model_class(folder, trust_remote_code)
        model, found = loader.from_pretrained(
            folder, config=load_config(folder, trust_remote_code), dtype=chosen, trust_remote_code=trust_remote_code,
            output_loading_info=True, **({"device_map": "auto"} if spread else {}),
        )  # fmt: skip
    _check_missing(folder, found["missing_keys"])
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:  # compressed-tensors, which would wait for a call of the model as a whole
        compressor.decompress_model(model)
    if chosen == torch.float32:  # transformers dequantises MXFP4 to bfloat16, whatever is asked for
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(chosen)
    if spread:
        check_on_gpus(folder, model.hf_device_map)
        return model.eval()
    return model.to(place).eval()


def check_on_gpus(folder: Path, places: Mapping[str, int | str | torch.device]) -> None:
    """Check that accelerate has put every module on a GPU: those elsewhere would be moved there in every pass.

    Args:
        places: where each module is, as in `hf_device_map`.

    Raises:
        OrthogonalizeError: one is not.
    """
    outside = [name for name, place in places.items() if str(place) in ("cpu", "disk", "meta")]
    if outside:
        raise OrthogonalizeError(
            f"the GPUs of this host do not hold {folder}: {outside[0]} would be on the {places[outside[0]]}; "
            "use --engine stream"
        )


def load_on_meta(folder: Path, tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> Any:
    """The transformers model of a checkpoint without any values: all of its tensors are on the meta device.

    Nothing is read but the configuration; `tensors` are those of the checkpoint, none of them quantised.

    Raises:
        OrthogonalizeError: a tensor is missing or has the wrong shape, or transformers has no class for the model.
    """
    check_layers(read_settings(folder / "config.json"), len(tensors))
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {
        name: torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.uint8), device="meta")
        for name, info in tensors.items()
    }
    with explained(f"transformers cannot load {folder}", UPDATE):
        cls = model_class(folder)._model_mapping[type(config)]
        if cls.config_class is config.sub_configs.get("text_config"):  # the text part of an image-text model
            config = config.get_text_config()
        model, found = cls.from_pretrained(
            None, config=config, dtype=dtype, state_dict=state, device_map={"": "meta"}, output_loading_info=True
        )
    _check_missing(folder, found["missing_keys"])
    return model.eval()


def check_complete(folder: Path) -> None:
    """Reject a checkpoint that lacks a tensor: vLLM leaves it uninitialized, transformers initializes it at random.

    The transformers class of the model is built without reading weights. Models without such a class are not
    checked, and of quantized ones, whose tensor names depend on the quantizer, only the size is.

    Raises:
        OrthogonalizeError: a tensor is missing or has the wrong shape.
    """
    from transformers import CONFIG_MAPPING

    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    check_layers(config, len(checkpoint.tensors))
    if config.get("model_type") not in CONFIG_MAPPING:
        return
    if quantization(config) is not None:
        _check_size(checkpoint)
        return
    stats = [(folder / name).stat() for name in ("config.json", *checkpoint.files)]
    state = (folder.resolve(), *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats))
    if state in _complete:
        return
    try:
        _, found = model_class(folder).from_pretrained(
            folder, config=load_config(folder), device_map="meta", output_loading_info=True, trust_remote_code=False
        )
    except RuntimeError as error:
        raise OrthogonalizeError(f"{folder} is incomplete or has wrong shapes: {first_line(error)}") from error
    except Exception:  # the files may be anybody's
        return  # transformers has no class for it, but the engine may
    _check_missing(folder, found["missing_keys"])
    _complete.add(state)


_complete: set[tuple[Any, ...]] = set()  # folders that this process has found complete, and their files as they were


def _check_size(checkpoint: Checkpoint) -> None:
    """Check that a quantised model has no more numbers than its files can hold.

    Raises:
        OrthogonalizeError: it has.
    """
    folder = checkpoint.path
    try:
        config = load_config(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = model_class(folder).from_config(config, trust_remote_code=False)
    except Exception:  # the files may be anybody's
        return
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > DENSEST * checkpoint.weight_bytes:
        raise OrthogonalizeError(f"{folder} is incomplete: its files are too small for {numbers} numbers")


def _check_missing(folder: Path, names: Collection[str]) -> None:
    if names:
        raise OrthogonalizeError(
            f"{folder} is incomplete: it lacks {min(names)} ({len(names)} missing tensors in total); "
            "download or write it again"
        )
