"""Place a constant vector at a site: find a bias that can carry it exactly and that vLLM reads.

Tried in order: a bias that vLLM's class reads; the Llama class, for a model that can be stored as a Llama; a bias
that vLLM's Transformers backend reads; a bias of the value projection, if its range contains the vector. vLLM silently
drops biases it does not know and leaves missing ones uninitialised, so a bias counts only if the
description says that it is read, and every bias that a flag creates is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..architectures.schema import Bias, Part, bias_name, families, setting
from ..checkpoints.checkpoint import Addition
from ..checkpoints.quantization import dequantize, scale_name
from ..checkpoints.safetensors_file import EDITABLE, show_shape
from ..core.errors import OrthogonalizeError, UnansweredError
from ..core.interventions import Site
from ..models.loading import load_config
from .plan import EditPlan

AGAIN = "fetch both again"
REACHED = 1e-6  # largest relative part of a vector that a value bias may miss
LLAMA_DEFAULTS = (
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act", "vocab_size",
)  # fmt: skip
# transformers' Llama ignores these; vLLM applies a window to any model whose configuration has one.
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def place_constant(plan: EditPlan, site: Site, vector: torch.Tensor) -> None:
    """Plan to add `vector` [d] to what a block writes at `site`.

    Raises:
        OrthogonalizeError: no bias carries it exactly and is served; the message gives the reasons.
        UnansweredError: no bias that is known to be served does, and whether another one is served is not known.
    """
    parts = _candidate_parts(plan, site)
    reasons: list[str] = []
    for route in (_vllm_bias, _llama_bias, _backend_bias, _value_bias):
        for where, part in parts:
            if part.post_norm:
                reason: str | None = "a norm after the block rescales any constant"
            else:
                reason = route(plan, where, part, vector / _scale(plan, part))
            if reason is None:
                return
            if reason and reason not in reasons:
                reasons.append(reason)
    if any(_is_unanswered(plan, where, part) for where, part in parts):
        raise UnansweredError(
            f"whether vLLM reads the bias that could hold a constant at {site} of a {plan.architecture.family} model",
            "use ablate, nullspace, reflect or --method conditional, or say it in a file for --description "
            "(bias.served)",
        )
    raise OrthogonalizeError(
        f"{plan.architecture.family} has no bias at {site} that a server reads, so no constant can be written there "
        f"exactly ({'; '.join(reasons) or 'its class has none'}); use ablate, nullspace or reflect, "
        "or shift the embedding (--layer 0)"
    )


def _candidate_parts(plan: EditPlan, site: Site) -> list[tuple[Site, Part]]:
    """The parts that may carry a constant for `site`: its own, and the other block's if both run in parallel."""
    sites = [site] if plan.architecture.parts(site.kind) else []
    if not sites or plan.architecture.is_parallel(plan.source.config):
        sites.append(Site("attn" if site.kind == "mlp" else "mlp", site.layer))
    return [(where, part) for where in sites for part in plan.sites.parts(where)]


def _is_unanswered(plan: EditPlan, site: Site, part: Part) -> bool:
    """Whether a part has a bias at `site` that could hold a constant, if a server read it."""
    bias = part.bias
    if part.post_norm or bias is None or bias.served != "unknown":
        return False
    return bool(plan.sites.writes(part, int(site.layer or 0), bias.on))


def _scale(plan: EditPlan, part: Part) -> float:
    return plan.architecture.scale(part.scale, plan.source.config)


def _vllm_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    if part.bias is None or part.bias.served != "vllm":
        return ""
    return _write_bias(plan, site, part, part.bias, vector)


def _backend_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    if part.bias is None or part.bias.served != "transformers":
        return "vLLM does not read its biases" if part.bias and part.bias.served == "never" else ""
    reason = _write_bias(plan, site, part, part.bias, vector)
    if reason is None:
        plan.serve_with_transformers()
    return reason


def _write_bias(plan: EditPlan, site: Site, part: Part, bias: Bias, vector: torch.Tensor) -> str | None:
    layer = int(site.layer or 0)
    names = [bias_name(write.name) for write in plan.sites.writes(part, layer, bias.on)]
    if not names:
        return f"layer {layer} has only experts, and those have no bias"
    if not all(plan.checkpoint.has_tensor(name) for name in names):
        _enable_biases(plan, (*(bias.on or part.writes), *bias.zeros), bias.flags)
    for name in names:
        plan.add_constant(name, site, vector)
    return None


def _enable_biases(plan: EditPlan, weights: tuple[str, ...], flags: dict[str, Any]) -> None:
    """Set the flags that give `weights` biases, and add those biases as zeros in every layer."""
    for flag, value in flags.items():
        plan.checkpoint.set_text_config(flag, value)
    plan.checkpoint.disable_remote_code()
    for layer in range(plan.architecture.layers(plan.source.config)):
        for weight in weights:
            name = plan.sites.in_layer(weight, layer)
            bias = bias_name(name)
            if name in plan.source.tensors and not plan.checkpoint.has_tensor(bias):
                info = plan.source.tensors[name]
                if len(info.shape) < 2:  # a convolution has three dimensions
                    raise OrthogonalizeError(
                        f"{name} has the shape {show_shape(info.shape)}, and is no matrix; fetch it again"
                    )
                dtype = info.dtype if info.dtype in EDITABLE else _unquantized_dtype(plan)
                plan.checkpoint.additions[bias] = Addition.zeros(dtype, (info.shape[0],))


def _unquantized_dtype(plan: EditPlan) -> str:
    """The dtype in which a quantised checkpoint stores what it does not quantise, such as its embedding."""
    dtype = plan.source.tensors[plan.sites.tied_to].dtype
    return dtype if dtype in EDITABLE else "BF16"


def _llama_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    """Store the model as a Llama, whose attention and MLP have biases if the configuration says so."""
    if plan.architecture.as_llama is None:
        return ""
    hindrance = plan.architecture.as_llama.hindrance(plan.source.config)
    if hindrance is not None:
        return f"it cannot be stored as a Llama: {hindrance}"
    if "text_config" in plan.source.config:
        return "a multimodal wrapper cannot be stored as a Llama"
    scaled = next((name for name in _fused_weights(plan) if scale_name(plan.source, name)), None)
    if scaled is not None:
        return f"a Llama stores {scaled} as several weights, each with its own scales"
    _convert_to_llama(plan)
    for write in plan.sites.writes(part, int(site.layer or 0)):
        plan.add_constant(bias_name(write.name), site, vector)
    return None


def _fused_weights(plan: EditPlan) -> dict[str, dict[str, int | str]]:
    """The fused weights that a Llama stores as several, and the share of rows that each of those takes, by name."""
    fused = plan.architecture.as_llama.fused if plan.architecture.as_llama else {}
    layers = range(plan.architecture.layers(plan.source.config))
    named = {
        plan.sites.in_layer(name, layer): {plan.sites.in_layer(part, layer): share for part, share in parts.items()}
        for name, parts in fused.items()
        for layer in layers
    }
    return {name: parts for name, parts in named.items() if name in plan.source.tensors}


def _rows_of_parts(total: int, shares: Mapping[str, int | str], config: Mapping[str, Any]) -> dict[str, int]:
    """The number of rows that each part gets of `total`."""
    numbers: dict[str, Any] = {
        part: share if isinstance(share, int) else config.get(share) for part, share in shares.items()
    }
    whole = all(type(number) is int and number > 0 for number in numbers.values())
    if not whole or not total or total % sum(numbers.values()):
        raise OrthogonalizeError(f"config.json does not fit a fused weight of {total} rows; {AGAIN}")
    return {part: total * number // sum(numbers.values()) for part, number in numbers.items()}


def _convert_to_llama(plan: EditPlan) -> None:
    full = load_config(plan.source.path).to_dict()
    given = plan.source.config
    fused = _fused_weights(plan)
    rows = {name: next(iter(plan.source.tensors[name].shape), 0) for name in fused}
    parts = {name: _rows_of_parts(rows[name], shares, full) for name, shares in fused.items()}
    changes = {key: full[key] for key in LLAMA_DEFAULTS if key not in given and full.get(key) is not None}
    if not given.keys() & {"rope_theta", "rope_parameters"}:
        changes["rope_parameters"] = full["rope_parameters"]
    changes |= {key: None for key in WINDOW_KEYS if key in given}
    changes |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    plan.checkpoint.config_changes |= changes
    llama = families()["llama"]
    plan.convert_to(llama, plan.source.split(parts))
    for part in (*llama.attn.values(), *llama.mlp.values()):
        assert part.bias is not None
        _enable_biases(plan, (*part.writes, *part.bias.zeros), part.bias.flags)


def _value_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    """Use a bias b of the value projection: attention weights sum to 1, so it adds `W_o R b`, R repeating the heads."""
    through = part.value_bias
    if through is None:
        return ""
    layer = int(site.layer or 0)
    output, value = (plan.sites.in_layer(name, layer) for name in (through.output, through.weight))
    weight = dequantize(plan.source, plan.check_shape(output, site, 0, len(vector))).double()
    if output in plan.checkpoint.edits:
        weight = plan.checkpoint.edits[output].exact(weight)
    heads = setting(plan.source.config, "num_attention_heads")
    groups = setting(plan.source.config, "num_key_value_heads", heads)
    whole = all(type(number) is int and number > 0 for number in (heads, groups))
    if weight.dim() != 2 or not whole or heads % groups or weight.shape[1] % heads:
        raise OrthogonalizeError(
            f"{output} has the shape {list(weight.shape)}, but config.json needs {len(vector)} by a multiple of "
            f"{heads} heads in {groups} groups; fetch both again"
        )
    reach = weight.reshape(len(weight), groups, heads // groups, -1).sum(2).reshape(len(weight), -1)
    solution = torch.linalg.lstsq(reach, vector.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    missed = ((reach @ solution - vector).norm() / vector.norm()).item()
    if missed > REACHED:
        return f"a bias of the value projection misses {missed:.0%} of the vector"
    if not plan.checkpoint.has_tensor(bias_name(value)):
        _enable_biases(plan, (through.weight, *through.zeros), through.flags)
    plan.add_constant(bias_name(value), site, solution)
    return None
