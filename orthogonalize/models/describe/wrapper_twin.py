"""A small random twin of an image-text wrapper: its text model as in `twin`, beside a tiny encoder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.errors import OrthogonalizeError
from .twin import SIZES, attempts, save_first

# Of encoders and projectors, where they are larger. Two layers, since the last but one is often what is taken.
NARROW: dict[str, int] = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "mlp_dim": 48, "projection_dim": 32, "d_model": 32,
    "num_attention_heads": 2, "num_heads": 2, "attention_heads": 2, "encoder_attention_heads": 2,
    "num_key_value_heads": 2, "encoder_ffn_dim": 48, "vision_output_dim": 32,
}  # fmt: skip
SHALLOW: dict[str, int] = dict.fromkeys(
    ("num_hidden_layers", "depth", "n_layers", "num_layers", "encoder_layers", "num_global_layers"), 2
)


def save_wrapper_twin(
    config: Any, folder: Path, sizes: Mapping[str, int] = SIZES, dtype: torch.dtype = torch.float64
) -> Any:
    """Store a twin of the wrapper with configuration `config` in `folder`; its own configuration (see `save_twin`).

    Raises:
        OrthogonalizeError: there is none, or it is no wrapper.
    """
    kind = _wrapper_class(config)
    return save_first(_attempts(config, sizes), lambda _: kind, folder, dtype, config.model_type)


def _attempts(config: Any, sizes: Mapping[str, int]) -> Iterator[Callable[[], Any]]:
    """Functions that make a configuration of a small wrapper, in several ways."""
    for text in attempts(config.get_text_config(), sizes):
        for encoder in (SHALLOW | NARROW, SHALLOW):
            yield partial(_wrapped, config, text, encoder)


def _wrapper_class(config: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    mapping = AutoModelForImageTextToText._model_mapping
    if type(config) not in mapping:
        raise OrthogonalizeError(f"transformers has no model of texts and images for {type(config).__name__}")
    return mapping[type(config)]


def _wrapped(config: Any, make_text: Callable[[], Any], encoder: Mapping[str, int]) -> Any:
    """The configuration `config` around a small text model's, its other parts with the sizes of `encoder`."""
    full, text = config.get_text_config(), make_text()
    widths = {int(full.hidden_size): int(text.hidden_size)}
    small = deepcopy(config)
    held = next(key for key in config.sub_configs if getattr(config, key, None) is full)
    for key, value in vars(config).items():
        if key == held:
            setattr(small, key, text)
        elif hasattr(value, "to_dict"):
            _shrink_part(getattr(small, key), encoder, widths)
        elif type(value) is int and value in widths:  # of what lies between both
            setattr(small, key, widths[value])
    tokens = [k for k, v in vars(config).items() if "token" in k and type(v) is int and v >= text.vocab_size]
    for number, key in enumerate(tokens):
        setattr(small, key, text.vocab_size - 1 - number)
    small.tie_word_embeddings = False
    small.architectures = None
    return small


def _shrink_part(part: Any, sizes: Mapping[str, int], widths: Mapping[int, int]) -> None:
    for key, value in list(vars(part).items()):
        if hasattr(value, "to_dict"):
            _shrink_part(value, sizes, widths)
        elif type(value) is int and value in widths and key != "intermediate_size":
            setattr(part, key, widths[value])
        elif type(value) is int and key in sizes:
            setattr(part, key, min(value, sizes[key]))
        elif isinstance(value, list | tuple) and ("index" in key or "layer" in key) and value:
            depth = SHALLOW["depth"]
            if all(type(each) is int for each in value):
                setattr(part, key, list(range(min(depth, len(value)))))
            elif len(value) > depth and all(isinstance(each, str) for each in value):
                setattr(part, key, list(value)[:depth])
