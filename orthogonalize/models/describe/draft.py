"""Draft an architecture file for a model that has none (`describe`).

A small random model of the same class, with every kind of layer, is built from the configuration; `discovery` finds
by experiment what it writes and reads; the draft is checked against the names and shapes of the real checkpoint. How
vLLM behaves (heads that it cannot untie, biases that it drops) cannot be learned from transformers, so the draft leaves
that open (see `architectures.open_questions`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...architectures.schema import Architecture, Bias, bias_name, parse
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...checkpoints.settings_files import check_layers
from ...core.errors import OrthogonalizeError, first_line, shown
from ...core.temporary_folders import temporary_folder
from ..loading import load_config, model_class
from ..sites import Sites
from .biases import find_biases
from .block_probe import FoundPart
from .discovery import Findings, discover, layout_of
from .twin import SIZES, save_twin

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")


@dataclass(frozen=True)
class Draft:
    """A drafted architecture file, and the questions that it leaves open."""

    text: str
    architecture: Architecture
    open_questions: list[str]


@dataclass(frozen=True)
class ModelNames:
    """Names in the full model: its type, the module of its text model, and prefixes in its checkpoint.

    `images` are the tensors through which images may enter the stream.
    """

    model_type: str
    decoder_module: str
    decoder: str
    head: str
    images: tuple[str, ...] = ()


def _iterate_numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path and value of every number in a configuration."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _iterate_numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _iterate_numbers(inner, f"{path}.{index}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def _key_of(factor: float, settings: Mapping[str, Any], what: str, width: int, questions: list[str]) -> str | None:
    """The configuration key that holds a measured factor; asks in `questions` if it cannot be determined."""
    if abs(factor - 1) < 1e-3:
        return None
    found = [path for path, value in _iterate_numbers(settings) if abs(value - factor) < 1e-3 * abs(factor)]
    named = [path for path in found if "multiplier" in path or "scale" in path]
    if not named and abs(factor - width**0.5) < 1e-2:
        return "sqrt_width"
    if len(named) != 1:
        questions.append(f"{what} is multiplied by {factor:.4g}: which configuration key holds it?")
    return named[0] if named else None


def _quoted(text: str) -> str:
    """A TOML string; names of tensors may be anybody's."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    """A name with underscores for its dots, as a key of TOML."""
    plain = name.replace(".", "_")
    return plain if re.fullmatch(r"[A-Za-z0-9_-]+", plain) else _quoted(plain)


def _list(*names: str) -> str:
    return "[" + ", ".join(map(_quoted, dict.fromkeys(names))) + "]"


def refusals(refused: Mapping[str, str]) -> str:
    """The table of what is refused, as text that ends a description."""
    return "\n[refused]\n" + "".join(f"{k} = {_quoted(why)}\n" for k, why in refused.items()) if refused else ""


def _table(named: Mapping[str, int]) -> str:
    return "{ " + ", ".join(f"{_quoted(name)} = {axis}" for name, axis in named.items()) + " }"


def _bias_text(bias: Bias) -> str:
    fields = []
    if bias.flags:
        fields.append(
            "flags = { " + ", ".join(f"{_quoted(k)} = {str(v).lower()}" for k, v in bias.flags.items()) + " }"
        )
    fields += [f"{key} = {_list(*names)}" for key, names in (("zeros", bias.zeros), ("on", bias.on)) if names]
    return f"bias = {{ {', '.join([*fields, f'served = {_quoted(bias.served)}'])} }}"


def _part_text(kind: str, part: FoundPart, scale: str | None, bias: Bias | None) -> str:
    weights = {name: axis for name, axis in part.writes.items() if not _is_bias(name, part.writes)}
    lines = [f"[{kind}.{_key(part.module)}]", f"module = {_quoted(part.module)}"]
    if part.norms:
        lines.append(f"norm = {_list(*part.norms)}")
    if part.post_norms:
        several = _list(*part.post_norms)
        lines.append(f"post_norm = {several if len(part.post_norms) > 1 else several[1:-1]}")
    if part.sometimes:
        lines.append(f"sometimes = {_list(*part.sometimes)}")
    if part.stored_as:
        stored = ", ".join(f"{_quoted(name)} = {_quoted(module)}" for name, module in part.stored_as.items())
        lines.append(f"stored_as = {{ {stored} }}")
    if scale:
        lines.append(f"scale = {_quoted(scale)}")
    if bias is not None:
        lines.append(_bias_text(bias))
    return "\n".join([*lines, f"writes = {_table(weights)}", f"reads = {_table(part.reads)}"])


def _is_bias(name: str, beside: Mapping[str, int]) -> bool:
    return any(name == bias_name(weight) for weight in beside)


def _count_keys(config: Any, settings: Mapping[str, Any]) -> list[str]:
    """The configuration keys that say how many layers there are: a number, or a list with an entry for each."""
    named: str = dict(getattr(config, "attribute_map", {})).get("num_hidden_layers", "num_hidden_layers")
    if settings.get(named) is not None:
        return [named]
    count = int(config.num_hidden_layers)
    return [named, *(k for k, v in settings.items() if isinstance(v, list | str) and len(v) == count)]


def draft_text(
    findings: Findings, config: Any, named: ModelNames, biases: Mapping[tuple[str, str], Bias] | None = None
) -> tuple[str, list[str]]:
    """The TOML text of an architecture file for the full model, and the questions that it leaves open.

    `config` is that of the small model; `biases` are those of its parts, by kind and module.
    """
    settings, names = config.to_dict(), dict(getattr(config, "attribute_map", {}))
    questions = [
        f"does vLLM support an untied head for {named.model_type}? (head.untied)",
        *(["which of the biases does vLLM read? (bias.served)"] if biases else []),
    ]
    if named.images:
        listed = shown(" or ".join(named.images), 1000)
        questions.append(f"do images enter the stream through {listed}? (needs an [embed.images] with image = true)")
    width = int(config.hidden_size)
    tied = bool(getattr(type(config)(), "tie_word_embeddings", False))
    epsilon = next((f'"{key}"' for key in EPSILONS if key in settings), "1e-5")
    norm = [f'kind = "{findings.kind}"', f"epsilon = {epsilon}"]
    norm += [f"offset = {findings.offset}"] if findings.offset else []
    norm += [] if findings.parameters else ["parameters = false"]
    head_lines = [
        *([f"norm = {_quoted(findings.head_norm)}"] if findings.head_norm else []),
        f"tied = {str(tied).lower()}",
        'untied = "unknown"',
    ]
    layouts = [
        f"{{ decoder = {_quoted(decoder)}, head = {_quoted(head)} }}"
        for decoder, head in dict.fromkeys([(named.decoder, named.head), (findings.decoder, findings.head)])
    ]
    lines = [
        "# Drafted by `orthogonalize describe` from experiments on a small random model of the same class.",
        *(f"# Open: {question}" for question in questions),
        f"family = {_quoted(named.model_type)}",
        f"model_types = {_list(named.model_type)}",
        f"layer_count = {_list(*_count_keys(config, settings))}",
        f"hidden_size = {_quoted(names.get('hidden_size', 'hidden_size'))}",
        f"decoder_modules = {_list(named.decoder_module, findings.decoder_module)}",
        f"layer = {_quoted(findings.layer)}",
        f"layouts = [{', '.join(layouts)}]",
        f"norms = {{ {', '.join(norm)} }}",
    ]
    experts = [key for key, value in settings.items() if "expert" in key and value == SIZES["num_experts"]]
    if experts:
        lines += [f"expert_count = {_list(*experts)}", 'transformers_class = "TransformersMoEForCausalLM"']
    if findings.inert:
        lines.append(f"inert = {_list(*findings.inert)}")
    lines += ["normalised = true"] if findings.normalised else []
    lines += [f"embed_module = {_quoted(findings.embed_module)}"] if findings.embed_module else []
    for number, (name, axis) in enumerate(findings.embed.items()):
        scale = _key_of(findings.embed_factor, settings, "the embedding", width, questions)
        rows = axis == 1
        lines += ["", f"[embed.{_key(name.removesuffix('.weight'))}]", f"weight = {_quoted(name)}"]
        lines += [f"axis = {axis}", *([] if rows else ["rows = false"])]
        lines += [f"scale = {_quoted(scale)}"] if scale else []
        lines += ["tied = true"] if number == len(findings.embed) - 1 else []
    for kind, parts in findings.parts.items():
        for part in parts:
            scale = _key_of(part.factor, settings, part.module, width, questions)
            lines += ["", _part_text(kind, part, scale, (biases or {}).get((kind, part.module)))]
    lines += ["", "[head]", *head_lines]
    return "\n".join(lines) + "\n" + refusals(findings.refused), questions


def draft(folder: Path) -> Draft:
    """Draft the architecture file of the model in `folder`, and check it against the checkpoint's tensor names.

    Raises:
        OrthogonalizeError: transformers has no such class or cannot build a small one; the stream passes through
            a norm; or the draft misses a tensor of the checkpoint.
    """
    with temporary_folder() as scratch:
        return draft_with_twin(open_checkpoint(folder), scratch)


def draft_with_twin(checkpoint: Checkpoint, twin: Path) -> Draft:
    """As `draft`; the small model of the experiments is left in the empty folder `twin`, in float64."""
    folder = checkpoint.path
    check_layers(checkpoint.config, len(checkpoint.tensors))
    try:
        whole = load_config(folder)
        config = whole.get_text_config()
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    except (OrthogonalizeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error.__cause__ or error)
        raise OrthogonalizeError(f"transformers does not support the configuration of {folder}: {reason}") from error
    _refuse_thinker(whole)
    small = save_twin(config, twin)
    findings = discover(twin)
    decoder, head = layout_of(checkpoint.tensors, layers, findings)
    named = ModelNames(str(config.model_type), findings.decoder_module, decoder, head)
    if checkpoint.config.get("model_type") != config.model_type:
        named = _name_wrapper(checkpoint, named, width)
    biases = find_biases(small, findings, open_checkpoint(twin).tensors)
    text, questions = draft_text(findings, small, named, biases)
    architecture = parse(text, "the draft")
    assert architecture is not None
    _check(checkpoint, architecture)
    return Draft(text, architecture, questions)


def _refuse_thinker(config: Any) -> None:
    """Refuse a model of several models (Qwen-Omni), which name the way to the one that thinks.

    Raises:
        OrthogonalizeError: it is such a model.
    """
    thinker = getattr(config, "thinker_config", None)
    if thinker is not None:
        named = f"transformers.{type(thinker).__name__.removesuffix('Config')}ForConditionalGeneration"
        raise OrthogonalizeError(
            f"edit its thinker alone: {named}.from_pretrained(MODEL).save_pretrained(FOLDER); --engine hf runs it, "
            "vLLM only the whole"
        )


def _name_wrapper(checkpoint: Checkpoint, text: ModelNames, width: int) -> ModelNames:
    """The names of a multimodal model's text model, and the tensors through which images may enter its stream."""
    try:
        with torch.device("meta"):
            model = model_class(checkpoint.path).from_config(load_config(checkpoint.path), trust_remote_code=False)
        decoder = model.get_decoder()
        inside = next(name for name, module in model.named_modules() if module is decoder)
    except (ValueError, KeyError, AttributeError, StopIteration) as error:
        raise OrthogonalizeError(
            f"{checkpoint.config.get('model_type')} wraps a text model in a way that cannot be described: "
            f"{first_line(error)}"
        ) from error
    outside = [
        name
        for name, info in checkpoint.tensors.items()
        if not name.startswith(text.decoder) and name != text.head and len(info.shape) > 1 and width in info.shape
    ]
    return replace(
        text, model_type=str(checkpoint.config["model_type"]), decoder_module=inside, images=tuple(sorted(outside))
    )


def _check(checkpoint: Checkpoint, architecture: Architecture) -> None:
    sites = Sites(architecture, checkpoint.config, checkpoint.tensors)
    sites.check_complete()
