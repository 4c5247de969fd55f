"""Draft an architecture file for a model that has none (`describe`).

A small random model of the same class, with every kind of layer, is built from the configuration; `discovery` finds
by experiment what it writes and reads; the draft is checked against the names and shapes of the real checkpoint. How
vLLM behaves (heads that it cannot untie, biases that it drops) cannot be learned from transformers, so the draft lists
what to look up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...architectures.schema import Architecture, bias_name, parse
from ...checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...core.errors import OrthogonalizeError, first_line
from ...core.temporary_folders import temporary_folder
from ..loading import load_config, model_class
from ..sites import Sites
from .block_probe import FoundPart
from .discovery import Findings, discover, layout_of

# Small, and different wherever possible, so that an axis can be recognized by its length.
SIZES: dict[str, int] = {
    "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 24, "ffn_dim": 56,
    "shared_expert_intermediate_size": 40, "shared_intermediate_size": 40, "intermediate_size_mlp": 64,
    "vocab_size": 96, "max_position_embeddings": 128, "sliding_window": 8, "attention_chunk_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_ssm": 96, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_chunk_size": 16, "mamba_dt_rank": 8,
    "num_heads": 6, "expand": 2, "state_size": 16, "n_groups": 1, "chunk_size": 16, "rotary_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOST_LAYERS = 12
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


def _layers_needed(settings: Mapping[str, Any], count: int) -> int:
    """How many of the first layers include every kind of layer."""
    needed = 4
    for value in settings.values():
        if isinstance(value, list) and len(value) == count and all(isinstance(v, (str, int, bool)) for v in value):
            needed = max(needed, *(value.index(kind) + 1 for kind in set(value)))
    for key in ("interleave_moe_layer_step", "decoder_sparse_step", "attn_layer_period", "expert_layer_period"):
        step = settings.get(key)
        if isinstance(step, int) and step < MOST_LAYERS:
            needed = max(needed, 2 * step)
    return min(needed, MOST_LAYERS, max(count, 1))


def shrink_config(config: Any) -> Any:
    """The configuration of a small model of the same class as that of `config`, with an untied head."""
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    names = dict(getattr(config, "attribute_map", {}))
    count = int(config.num_hidden_layers)
    layers = _layers_needed(settings, count)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == count:
            small[key] = value[:layers]
        elif isinstance(value, list) and key.endswith("layers") and all(isinstance(v, int) for v in value):
            small[key] = [v for v in value if v < layers]
        else:
            small[key] = value
    own = {names.get(key, key): size for key, size in SIZES.items()}
    small |= {key: size for key, size in own.items() if isinstance(small.get(key), int)}
    small[names.get("num_hidden_layers", "num_hidden_layers")] = layers
    heads = names.get("num_attention_heads", "num_attention_heads")
    groups = names.get("num_key_value_heads", "num_key_value_heads")
    single = settings.get(heads) == settings.get(groups, settings.get(heads))
    latent = "qk_rope_head_dim" in small
    if isinstance(small.get("head_dim"), int) and not latent:
        small |= {"head_dim": 16, heads: 4} | ({groups: 4 if single else 2} if groups in small else {})
    elif isinstance(small.get(heads), int):
        number = 4 if latent else 3
        small |= {heads: number} | ({groups: number if single or latent else 1} if groups in small else {})
        small.pop("head_dim", None)
    if "word_embed_proj_dim" in small:
        small["word_embed_proj_dim"] = 48 if settings["word_embed_proj_dim"] == settings["hidden_size"] else 32
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        plain = {key: value for key, value in rope.items() if isinstance(value, (int, float))}
        small["rope_parameters"] = plain | {"rope_type": "default"}
    small |= {"tie_word_embeddings": False, "dtype": "float32"}
    for key in ("architectures", "quantization_config", "transformers_version", "model_type", "auto_map"):
        small.pop(key, None)
    return type(config)(**small)


def _save_small_model(config: Any, folder: Path) -> None:
    """Save a random model with configuration `config`, its norms and biases random as well."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            one = parameter.dim() == 1
            parameter.copy_(parameter + 0.3 * noise if one else noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


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


def _table(named: Mapping[str, int]) -> str:
    return "{ " + ", ".join(f'"{name}" = {axis}' for name, axis in named.items()) + " }"


def _part_text(kind: str, part: FoundPart, scale: str | None) -> str:
    weights = {name: axis for name, axis in part.writes.items() if not _is_bias(name, part.writes)}
    lines = [f"[{kind}.{part.module.replace('.', '_')}]", f'module = "{part.module}"']
    if part.norm:
        lines.append(f'norm = ["{part.norm}"]')
    if part.post_norm:
        lines.append(f'post_norm = "{part.post_norm}"')
    if scale:
        lines.append(f'scale = "{scale}"')
    return "\n".join([*lines, f"writes = {_table(weights)}", f"reads = {_table(part.reads)}"])


def _is_bias(name: str, beside: Mapping[str, int]) -> bool:
    return any(name == bias_name(weight) for weight in beside)


def draft_text(findings: Findings, config: Any, named: ModelNames) -> tuple[str, list[str]]:
    """The TOML text of an architecture file for the full model, and the questions that it leaves open.

    `config` is that of the small model.
    """
    settings, names = config.to_dict(), dict(getattr(config, "attribute_map", {}))
    questions = [
        f"does vLLM support an untied head for {named.model_type}? (head.untied)",
        "which output biases does vLLM read, and which flags create them? (bias)",
    ]
    if named.images:
        listed = " or ".join(named.images)
        questions.append(f"do images enter the stream through {listed}? (needs an [embed.images] with image = true)")
    width = int(config.hidden_size)
    epsilon = next((f'"{key}"' for key in EPSILONS if key in settings), "1e-5")
    norm = [f'kind = "{findings.kind}"', f"epsilon = {epsilon}"]
    norm += [f"offset = {findings.offset}"] if findings.offset else []
    norm += [] if findings.parameters else ["parameters = false"]
    head_lines = [
        f'norm = "{findings.head_norm}"',
        f"tied = {str(bool(type(config)().tie_word_embeddings)).lower()}",
    ]
    lines = [
        "# Drafted by `orthogonalize describe` from experiments on a small random model of the same class.",
        *(f"# Open: {question}" for question in questions),
        f'family = "{named.model_type}"',
        f'model_types = ["{named.model_type}"]',
        f'layer_count = "{names.get("num_hidden_layers", "num_hidden_layers")}"',
        f'hidden_size = "{names.get("hidden_size", "hidden_size")}"',
        f'decoder_modules = ["{named.decoder_module}"]',
        f'layer = "{findings.layer}"',
        f'layouts = [{{ decoder = "{named.decoder}", head = "{named.head}" }}]',
        f"norms = {{ {', '.join(norm)} }}",
    ]
    experts = [key for key, value in settings.items() if "expert" in key and value == SIZES["num_experts"]]
    if experts:
        lines.append("expert_count = [" + ", ".join(f'"{key}"' for key in experts) + "]")
    matrices = [name for name in findings.inert if not name.endswith("bias")]
    if matrices:
        lines.append("inert = [" + ", ".join(f'"{name}"' for name in matrices) + "]")
    for number, (name, axis) in enumerate(findings.embed.items()):
        scale = _key_of(findings.embed_factor, settings, "the embedding", width, questions)
        rows = axis == 1
        lines += ["", f"[embed.{name.removesuffix('.weight').replace('.', '_')}]", f'weight = "{name}"']
        lines += [f"axis = {axis}", *([] if rows else ["rows = false"])]
        lines += [f'scale = "{scale}"'] if scale else []
        lines += ["tied = true"] if number == len(findings.embed) - 1 else []
    for kind, parts in findings.parts.items():
        for part in parts:
            scale = _key_of(part.factor, settings, part.module, width, questions)
            lines += ["", _part_text(kind, part, scale)]
    lines += ["", "[head]", *head_lines]
    return "\n".join(lines) + "\n", questions


def draft(folder: Path) -> Draft:
    """Draft the architecture file of the model in `folder`, and check it against the checkpoint's tensor names.

    Raises:
        OrthogonalizeError: transformers has no such class or cannot build a small one; the stream passes through
            a norm; or the draft misses a tensor of the checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    try:
        config = load_config(folder).get_text_config()
        small = shrink_config(config)
    except (OrthogonalizeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error.__cause__ or error)
        raise OrthogonalizeError(f"transformers does not support the configuration of {folder}: {reason}") from error
    with temporary_folder() as scratch:
        try:
            _save_small_model(small, scratch)
        except Exception as error:  # classes raise anything at sizes that they do not support
            raise OrthogonalizeError(
                f"cannot build a small {config.model_type} model for the experiments: {first_line(error)}"
            ) from error
        findings = discover(scratch)
    decoder, head = layout_of(checkpoint.tensors, int(config.num_hidden_layers), findings)
    named = ModelNames(str(config.model_type), findings.decoder_module, decoder, head)
    if checkpoint.config.get("model_type") != config.model_type:
        named = _name_wrapper(checkpoint, named, int(config.hidden_size))
    text, questions = draft_text(findings, small, named)
    architecture = parse(text, "the draft")
    assert architecture is not None
    _check(checkpoint, architecture)
    return Draft(text, architecture, questions)


def _name_wrapper(checkpoint: Checkpoint, text: ModelNames, width: int) -> ModelNames:
    """The names of a multimodal model's text model, and the tensors through which images may enter its stream."""
    try:
        with torch.device("meta"):
            model = model_class(checkpoint.path).from_config(load_config(checkpoint.path))
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
