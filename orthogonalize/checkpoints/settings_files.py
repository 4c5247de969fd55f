"""The JSON files beside the weights: read within limits, before any library sees them.

A configuration from anybody may be huge, nested without end, or ask for ten million layers; or name an implementation
that transformers would fetch from the Hub and run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import OrthogonalizeError, first_line, shown
from ..core.files import LARGEST_TEXT, check_text, parse_json

LARGEST_CONFIG = 16 * 2**20  # bytes of a configuration
LARGEST_TOKENIZER = 64 * 2**20  # bytes of a file; the largest of released models have 34 million
LARGEST_ID = 10**8  # of a token
# The most entries of a vocabulary, or merges of it, and the most tokens beside it: with these, libraries take some 20
# seconds and 600 MB. Released models have at most 262,000, 515,000 and some thousands.
MOST_TOKENS, MOST_ADDED = 10**6, 10**5
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
LONGEST_CONTEXT = 2**25  # positions; vLLM keeps a table of them, and no released model has more than ten million
LAYERS = re.compile(r"n_layers?|(.*_)?num_.*layers")
# The largest integers that a configuration may have, by key; a library would build that many objects.
MOST = (
    (re.compile(rf"{LAYERS.pattern}|num_labels|.*_?depth"), 10**4),
    (re.compile("|".join(CONTEXT)), LONGEST_CONTEXT),
    (re.compile(r"n_experts|.*num_.*experts|(.*_)?n_.*experts"), 10**5),
)
LARGEST_NUMBER = 2**53  # of any other key
# Keys with which a model's files could choose the code that runs it.
CODE = re.compile(r"_?\w+_implementation(_internal)?|use_kernels|kernel_config|kernels|(base_model_)?tp_plan")
# What vLLM does for a key: `speculators_config` and `io_processor_plugin` are for models that only it serves.
FOLLOWED = {
    "speculators_config": "names another model, which vLLM would load instead",
    "io_processor_plugin": "names a plugin, whose code vLLM would run if it is installed",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_json(path: Path, most: int = LARGEST_TEXT) -> Any:
    """The contents of a JSON file of at most `most` bytes.

    Raises:
        OrthogonalizeError: it is missing, damaged, too large or nested too deeply.
    """
    try:
        check_text(path, most)
        return parse_json(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise OrthogonalizeError(f"{path} cannot be read as JSON ({first_line(error)}); fetch it again") from error


def read_settings(path: Path) -> dict[str, Any]:
    """A table of settings, such as config.json, whose values no library would choke on.

    Raises:
        OrthogonalizeError: it is not a JSON object (see `read_json`) or not Unicode; a number is out of bounds,
            `model_type` is not a name, or a key names code to be fetched.
    """
    found = read_json(path, LARGEST_CONFIG)
    if not isinstance(found, dict):
        raise OrthogonalizeError(f"{path} is not a JSON object")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise OrthogonalizeError(f"{path} contains an unpaired surrogate (invalid Unicode); remove it") from error
    context = context_length(found) or 0
    for key, value in _entries(found):
        _check_entry(path, key, value)
        _check_positions(path, value, context)
    return found


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _check_entry(path: Path, key: str, value: Any) -> None:
    if type(value) is int:
        most = next((limit for pattern, limit in MOST if pattern.fullmatch(key)), LARGEST_NUMBER)
        if abs(value) > most:
            raise OrthogonalizeError(f"{path} has {shown(key, 60)} = {shown(value, 40)}, beyond {most}")
    name = isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,100}", value)
    if key == "model_type" and value not in (None, "") and not name:
        raise OrthogonalizeError(f"{path} has the model_type {shown(value, 60)}, which is not a name")
    if key == "architectures" and value is not None:
        names = isinstance(value, list) and all(isinstance(each, str) and len(each) <= 200 for each in value)
        if not names:
            raise OrthogonalizeError(f"{path} has architectures that are not a list of names")
    if key in FOLLOWED and value is not None:
        raise OrthogonalizeError(f"{path} {FOLLOWED[key]} ({key}); remove that key")
    if CODE.fullmatch(key) and re.search(r"[/:]", str(value)) and not isinstance(value, dict):
        raise OrthogonalizeError(
            f"{path} names code to be fetched and run ({shown(key, 60)}: {shown(value, 60)}); remove that key"
        )
    if CODE.fullmatch(key) and isinstance(value, dict):
        for inner in value.values():
            _check_entry(path, key, inner)


def _check_positions(path: Path, rope: Any, context: int) -> None:
    """Check that rotary embeddings have no more positions than any model, if `rope` is a table of their settings.

    They are multiplied by a factor: those of `context`, or the fewer ones before scaling where the type knows them.
    """
    if not isinstance(rope, dict) or type(rope.get("factor")) not in (int, float):
        return
    unscaled, kind = rope.get("original_max_position_embeddings"), rope.get("rope_type", rope.get("type"))
    positions = unscaled if type(unscaled) is int and kind not in ("linear", "dynamic") else context
    if kind is not None and not -1 < rope["factor"] * positions <= LONGEST_CONTEXT:
        raise OrthogonalizeError(
            f"{path} has rotary embeddings for {shown(rope['factor'], 40)} times {positions} positions, beyond "
            f"{LONGEST_CONTEXT}"
        )


# Under which a wrapper has the configuration of its text model.
TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config")


def stated(config: Mapping[str, Any], *keys: str) -> Iterator[Any]:
    """The values of `keys` in a configuration and those of the text models that it wraps, the outermost first."""
    yield from (config[key] for key in keys if config.get(key) is not None)
    for name in TEXT_MODELS:
        inner = config.get(name)
        if isinstance(inner, dict):
            yield from stated(inner, *keys)


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a configuration names, as torch calls it; None if it names none."""
    return next((str(name).removeprefix("torch.") for name in stated(config, "dtype", "torch_dtype")), None)


def quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization that a configuration describes; None if it describes none.

    MLX writes `quantization`, without a method. Settings that are null stand for their defaults and are left out.

    Raises:
        OrthogonalizeError: it is not a table of settings.
    """
    for found in (config.get("quantization_config"), config.get("quantization")):
        if found is None:
            continue
        if not isinstance(found, dict):
            raise OrthogonalizeError(
                f"config.json has a quantization_config that is not a table of settings ({shown(found, 40)}); remove "
                "it if the weights are not quantised, or fetch the file again"
            )
        settings = {key: value for key, value in found.items() if value is not None}
        if settings:
            return {"quant_method": "mlx" if {"group_size", "bits"} <= settings.keys() else "", **settings}
    return None


def context_length(config: Mapping[str, Any]) -> int | None:
    """The maximum number of tokens that a configuration declares, if any."""
    return next((n for n in stated(config, *CONTEXT) if type(n) is int), None)


def check_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Check that a model has no more layers than tensors, before a library builds them one by one.

    Raises:
        OrthogonalizeError: the message names the number.
    """
    for key, value in _entries(config):
        if LAYERS.fullmatch(key) and type(value) is int and value > tensors:
            raise OrthogonalizeError(
                f"config.json has {shown(key, 60)} = {value}, but the checkpoint has {tensors} tensors; fetch it again"
            )


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `changes`, in which None stands for a key to be removed."""
    return {key: value for key, value in {**config, **changes}.items() if key not in changes or value is not None}


def code_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of `config` with which it chooses the code that runs the model."""
    return [key for key, value in config.items() if CODE.fullmatch(key) and value is not None]


def check_tokenizer_files(folder: Path) -> None:
    """Reject a tokenizer whose files a library would choke on.

    Raises:
        OrthogonalizeError: a file is not a JSON object (see `read_json`), it has too many tokens, or the id of one
            is out of bounds.
    """
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.exists():
            continue
        found = read_json(path, LARGEST_TOKENIZER)
        if not isinstance(found, dict):
            raise OrthogonalizeError(f"{path} is not a JSON object")
        for what, entries, most in _sized(name, found):
            if isinstance(entries, list | dict) and len(entries) > most:
                raise OrthogonalizeError(f"{path} has {len(entries)} {what}, and at most {most} are read")
        for number in _token_ids(name, found):
            if type(number) is not int or not 0 <= number <= LARGEST_ID:
                raise OrthogonalizeError(f"{path} has a token whose id is {shown(number, 40)}; fetch it again")


def _sized(name: str, found: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """What a tokenizer file has many of, if it is well-formed, and the most that are read."""
    model = found.get("model")
    if isinstance(model, dict):
        yield "tokens in its vocabulary", model.get("vocab"), MOST_TOKENS
        yield "merges", model.get("merges"), MOST_TOKENS
    yield "added tokens", found.get("added_tokens"), MOST_ADDED
    yield "added tokens", found if name == "added_tokens.json" else found.get("added_tokens_decoder"), MOST_ADDED


def _token_ids(name: str, found: Mapping[str, Any]) -> Iterator[Any]:
    if name == "added_tokens.json":
        yield from found.values()
    added = found.get("added_tokens")
    yield from (entry.get("id") for entry in added if isinstance(entry, dict)) if isinstance(added, list) else ()
    decoder = found.get("added_tokens_decoder")
    yield from (int(k) if k.isdecimal() and len(k) < 20 else k for k in decoder) if isinstance(decoder, dict) else ()
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.values()
