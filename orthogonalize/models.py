"""Finding a model (folder, Hub id or .gguf file) and loading it with transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .checkpoint import RECIPE, open_checkpoint
from .errors import OrthogonalizeError, ran_out_of_memory
from .outputs import EDITED, complete_folder

# What a checkpoint needs; copies of the weights in other formats stay on the Hub.
HUB_PATTERNS = [
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "README.md"),
]
SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # files that change what a checkpoint computes
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def cache_folder() -> Path:
    """Where converted models are kept: $ORTHOGONALIZE_CACHE, else the user's cache folder."""
    named = os.environ.get("ORTHOGONALIZE_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(root) / "orthogonalize"


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of the cache, which `make` writes where it is not there; who wants it meanwhile waits."""
    folder = cache_folder() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not folder.exists():
            make(folder)
    return folder


def convert_gguf(file: Path, out: Path) -> Path:
    """Dequantise a .gguf file into a safetensors folder with tokenizer and chat template (see `_gguf_dtype`).

    Raises:
        OrthogonalizeError: transformers cannot read the file, or it does not hold the whole model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        dtype = _gguf_dtype(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:  # whatever the readers of a damaged file trip over
        raise OrthogonalizeError(f"{file} cannot be read as GGUF: {first_line(error)}") from error
    for name in sorted(found["missing_keys"]):  # which transformers has filled with noise
        raise OrthogonalizeError(f"{file} lacks {name}; fetch it again")
    with complete_folder(out, EDITED) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out


def _gguf_dtype(file: Path) -> torch.dtype:
    """The dtype that holds what a .gguf file does: that of its matrices, bfloat16 where any is quantised."""
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    if kinds <= {Type.F32, Type.F16}:
        return torch.float16 if Type.F16 in kinds else torch.float32
    return torch.bfloat16


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache is a snapshot of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name and is no path here."""
    return bool(re.fullmatch(HUB_ID, model)) and not Path(model).exists()


def public_name(model: str) -> str:
    """What to call `model` in public: its Hub id, or its folder's name without the path."""
    return model if is_hub_id(model) else Path(os.path.abspath(model)).name


def find_model(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: itself, a converted .gguf file, or a download from the Hub.

    Raises:
        OrthogonalizeError: there is no such model, or it is no sound safetensors checkpoint.
    """
    path = Path(model)
    if path.exists() and revision not in (None, commit_of(path)):
        raise OrthogonalizeError(f"--revision {revision} is for models of the Hub, and {model} lies here")
    if path.is_dir():
        folder = path
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise OrthogonalizeError(f"no such file: {model}")
        stat = path.stat()
        folder = cached(f"{path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}", partial(convert_gguf, path))
    elif is_hub_id(model):
        folder = _download(model, revision)
    else:
        raise OrthogonalizeError(f"no such model: {model!r} is neither a folder, a .gguf file nor a Hub id owner/name")
    open_checkpoint(folder)
    return folder


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError as error:
        raise OrthogonalizeError(f"{model} is gated: accept its terms on the Hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise OrthogonalizeError(
            f"no such model: {model!r} is neither a folder here nor on the Hub (a private one needs hf auth login)"
        ) from error
    except Exception as error:  # whatever the network and its libraries raise
        raise OrthogonalizeError(
            f"no such folder here, and the Hub did not answer for {model!r}: {first_line(error)}"
        ) from error


def context_length(folder: Path) -> int | None:
    """The most tokens that the model's configuration allows, where it says so."""
    config = open_checkpoint(folder).config
    text = config.get("text_config") or {}
    found = [c.get(key) for c in (config, text) for key in ("max_position_embeddings", "n_positions")]
    return next((n for n in found if isinstance(n, int)), None)


def file_states(files: Iterable[Path]) -> list[Any]:
    """Paths, sizes and times of files."""
    found = [(file.resolve(), file.stat()) for file in files]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def folder_state(folder: Path) -> list[Any]:
    """What changes when a checkpoint does, its tokenizer and settings too, without reading it: its files' state.

    Not the recipe, which `verify` adds to.
    """
    weights = [file.path for _, file in sorted(open_checkpoint(folder).files.items())]
    return file_states(weights + sorted(f for f in folder.iterdir() if f.suffix in SETTINGS and f.name != RECIPE))


def choose_device(device: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise OrthogonalizeError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(device: torch.device, stored: Any) -> torch.dtype:
    """The dtype to run in: as stored on a GPU; on a CPU bfloat16 only where it has instructions for it."""
    dtype = getattr(torch, str(stored).removeprefix("torch."), torch.float32)
    if device.type != "cpu":
        return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and dtype == torch.bfloat16 else torch.float32


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise OrthogonalizeError(f"{folder} has no usable tokenizer: {first_line(error)}") from error


def model_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The class of transformers that loads a checkpoint: some wrappers for images have only their own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    known = type(config) in AutoModelForCausalLM._model_mapping or getattr(config, "auto_map", None)
    wrapped = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if wrapped and not known else AutoModelForCausalLM


def load_model(
    folder: Path, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers model of a checkpoint folder, in evaluation mode.

    `dtype` None chooses by device (see `choose_dtype`). Code in the folder is only run with
    `trust_remote_code`.

    Raises:
        OrthogonalizeError: transformers does not know the model or cannot load it.
    """
    place = choose_device(device)
    from transformers import CONFIG_MAPPING

    config = open_checkpoint(folder).config
    # What transformers has a class of its own for is run by that; code beside it is for older versions.
    if config.get("auto_map") and not trust_remote_code and config.get("model_type") not in CONFIG_MAPPING:
        raise OrthogonalizeError(f"{folder} wants to run its own code, which only extract --trust-remote-code allows")
    chosen = dtype or choose_dtype(place, config.get("dtype") or config.get("torch_dtype"))
    try:
        loader = model_class(folder, trust_remote_code)
        model, found = loader.from_pretrained(
            folder, dtype=chosen, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise
        raise OrthogonalizeError(f"transformers cannot load {folder}: {first_line(error)}") from error
    _check_missing(folder, found["missing_keys"])
    return model.to(place).eval()


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that lacks a tensor: vLLM leaves such ones as they are, transformers makes them up.

    What is missing is seen by transformers' class of the model, which reads names alone here. Not seen for models
    that it has no class for, and for quantised ones, whose names depend on the quantiser.

    Raises:
        OrthogonalizeError: a tensor is missing, or one of several that belong together.
    """
    from transformers import CONFIG_MAPPING

    config = open_checkpoint(folder).config
    if config.get("model_type") not in CONFIG_MAPPING or "quantization_config" in config:
        return
    try:
        _, found = model_class(folder).from_pretrained(folder, device_map="meta", output_loading_info=True)
    except RuntimeError as error:
        raise OrthogonalizeError(f"{folder} is incomplete or of other shapes: {first_line(error)}") from error
    except (ValueError, OSError, KeyError, ImportError):
        return  # no class of transformers' own: the engine may still know the model
    _check_missing(folder, found["missing_keys"])


def _check_missing(folder: Path, names: Collection[str]) -> None:
    if names:
        raise OrthogonalizeError(
            f"{folder} lacks {min(names)} ({len(names)} tensors in all); it is incomplete: fetch or write it again"
        )
