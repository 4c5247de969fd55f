"""Read a LoRA adapter in PEFT's format and plan its merge: `W + (alpha / r) B A`, rounded as every edit is."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.tensor_edit import TensorEdit
from ..core.errors import OrthogonalizeError, first_line
from ..core.files import check_regular_files, parse_json
from ..core.interventions import Site, removal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_CONFIG = 2**20  # bytes
CANCELLED = 8  # the highest rank whose rounding error is cancelled; of higher ones it is spread too thin to matter
# What changes a model by more than `W + B A`, with the values that leave it at that.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
}


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, and no checkpoint."""
    return (folder / CONFIG).is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that is nothing but `W + B A`.

    Raises:
        OrthogonalizeError: it cannot be read, or the adapter does more than that.
    """
    file = folder / CONFIG
    check_regular_files(folder)
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError("it is too large")
        config = parse_json(file.read_text("utf-8"))
        config["lora_alpha"], config["r"] = _number(config["lora_alpha"]), int(_number(config["r"]))
        for pattern, value in dict(config.get("alpha_pattern") or {}).items():
            config["alpha_pattern"][pattern] = _number(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise OrthogonalizeError(f"{file} is not the configuration of a LoRA adapter: {first_line(error)}") from error
    for name, plain in PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise OrthogonalizeError(f"{folder} has {name} = {config[name]!r}, which no weights of W + B A can hold")
    return dict(config)


def _number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError, TypeError: it is none.
    """
    found = float(value)
    if not isfinite(found):
        raise ValueError(f"{value} is not finite")
    return found


def merge_plan(folder: Path, source: Checkpoint) -> CheckpointPlan:
    """The plan that merges the adapter in `folder` into `source`.

    Raises:
        OrthogonalizeError: the adapter is damaged, or does not fit the checkpoint.
    """
    config = adapter_config(folder)
    plan = CheckpointPlan(source)
    highest = 0
    for module, (a, b) in _factors(folder).items():
        name = _tensor_of(module, source)
        shape = tuple(source.tensors[name].shape)
        if shape != (b.shape[0], a.shape[1]) or len(a) != b.shape[1]:
            raise OrthogonalizeError(
                f"{folder}: the factors of {module} make {b.shape[0]} x {a.shape[1]}, but {name} is "
                f"{' x '.join(map(str, shape))}; is the adapter for another model?"
            )
        scale = _scale(config, module, len(a))
        q, r = torch.linalg.qr(b.double())
        site = Site("head") if "lm_head" in name else Site("attn", 0)  # what the records call it; nothing depends on it
        plan.edits[name] = TensorEdit(name, site, 0, removal(q.mT), "matrix", given=-scale * (r @ a.double()))
        highest = max(highest, len(a))
    if highest > CANCELLED:
        plan.rounding = "nearest"
    return plan


def _factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`A` [r, inputs] and `B` [outputs, r] by the name of the module that they adapt."""
    file = folder / WEIGHTS
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                module, _, which = key.removesuffix(".weight").rpartition(".lora_")
                if which not in ("A", "B"):
                    raise OrthogonalizeError(f"{file} holds {key}, which is no factor of a linear layer")
                found.setdefault(module.removeprefix(PREFIX), {})[which] = stored.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise OrthogonalizeError(f"{file} cannot be read as an adapter's weights: {first_line(error)}") from error
    for module, parts in found.items():
        if parts.keys() != {"A", "B"} or not all(each.dim() == 2 and each.numel() for each in parts.values()):
            raise OrthogonalizeError(f"{file} lacks a factor of {module}, or it is no matrix")
        if not all(each.is_floating_point() for each in parts.values()):
            raise OrthogonalizeError(f"{file}: the factors of {module} are not real numbers")
        if not all(torch.isfinite(each.float()).all() for each in parts.values()):
            raise OrthogonalizeError(f"{file}: the factors of {module} hold NaN or infinite values")
    if not found:
        raise OrthogonalizeError(f"{file} holds no factors")
    return {module: (parts["A"], parts["B"]) for module, parts in found.items()}


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What `B A` is multiplied by."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = float(value)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _tensor_of(module: str, source: Checkpoint) -> str:
    """The tensor of a linear layer that transformers calls `module`; wrappers store theirs under other prefixes.

    Raises:
        OrthogonalizeError: there is none, or several could be meant.
    """
    if f"{module}.weight" in source.tensors:
        return f"{module}.weight"
    tail = module[module.find("layers.") :] if "layers." in module else module.rpartition(".")[2]
    fitting = [name for name in source.tensors if name.endswith(f".{tail}.weight") or name == f"{tail}.weight"]
    if len(fitting) != 1:
        raise OrthogonalizeError(
            f"the adapter changes {module}, which is {'no single tensor' if fitting else 'not'} in {source.path}; "
            "merge it with PEFT, or choose the model that it was made for"
        )
    return fitting[0]
