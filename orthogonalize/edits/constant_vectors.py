"""Where a constant goes: the first way of adding a vector at a site that is exact and that vLLM honours.

A bias that vLLM's class has; the Llama class, for what is a Llama in all but name; a bias that the
Transformers backend in vLLM has; a bias of the value projection, where its range reaches the vector.
vLLM drops biases it does not know in silence and leaves missing ones uninitialised, so a way counts
only where a description says that the bias is read, and every bias that a flag creates is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..architectures.schema import Bias, Part, bias_name, families, setting
from ..checkpoints.checkpoint import Addition
from ..checkpoints.quantization import real_values, scale_name
from ..checkpoints.safetensors_file import EDITABLE
from ..core.errors import OrthogonalizeError
from ..core.interventions import Site
from .plan import EditPlan

REACHED = 1e-6  # largest part of a vector that a value bias may miss
LLAMA_DEFAULTS = (
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act", "vocab_size",
)  # fmt: skip
# HF's Llama ignores these, vLLM applies a window to any model that names one.
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def place_constant(plan: EditPlan, site: Site, vector: torch.Tensor) -> None:
    """Plan that `vector` [d] is added to what is written at a block's `site`.

    Raises:
        OrthogonalizeError: no way is exact and served; it says why.
    """
    parts = _carriers(plan, site)
    reasons: list[str] = []
    for route in (_native_bias, _llama_bias, _backend_bias, _value_bias):
        for where, part in parts:
            if part.post_norm is not None:
                reason: str | None = "a norm behind the block rescales any constant"
            else:
                reason = route(plan, where, part, vector / _scale(plan, part))
            if reason is None:
                return
            if reason and reason not in reasons:
                reasons.append(reason)
    raise OrthogonalizeError(
        f"{plan.architecture.family} has no bias at {site} that a server reads, so no constant can be written there "
        f"exactly ({'; '.join(reasons) or 'its class has none'}); use ablate, nullspace or reflect, "
        "or shift the embedding (--layer 0)"
    )


def _carriers(plan: EditPlan, site: Site) -> list[tuple[Site, Part]]:
    """The parts that may carry a constant for `site`: its own, and the other block's where both run side by side."""
    sites = [site] if plan.architecture.parts(site.kind) else []
    if not sites or plan.architecture.is_parallel(plan.source.config):
        sites.append(Site("attn" if site.kind == "mlp" else "mlp", site.layer))
    return [(where, part) for where in sites for part in plan.sites.parts(where)]


def _scale(plan: EditPlan, part: Part) -> float:
    return plan.architecture.scale(part.scale, plan.source.config)


def _native_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    if part.bias is None or part.bias.served != "vllm":
        return ""
    return _write_bias(plan, site, part, part.bias, vector)


def _backend_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    if part.bias is None or part.bias.served != "transformers":
        return ""
    reason = _write_bias(plan, site, part, part.bias, vector)
    if reason is None:
        plan.serve_with_transformers()
    return reason


def _write_bias(plan: EditPlan, site: Site, part: Part, bias: Bias, vector: torch.Tensor) -> str | None:
    layer = int(site.layer or 0)
    names = [bias_name(write.name) for write in plan.sites.writes(part, layer, bias.on)]
    if not names:
        return f"layer {layer} has experts only, and these have none"
    if not all(plan.checkpoint.has_tensor(name) for name in names):
        _switch_on(plan, (*(bias.on or part.writes), *bias.zeros), bias.flags)
    for name in names:
        plan.add_constant(name, site, vector)
    return None


def _switch_on(plan: EditPlan, weights: tuple[str, ...], flags: dict[str, Any]) -> None:
    """Set the flags that give `weights` biases, and store all of these in all layers, as zeros."""
    for flag, value in flags.items():
        plan.checkpoint.set_text_config(flag, value)
    plan.checkpoint.disable_remote_code()
    for layer in range(plan.architecture.layers(plan.source.config)):
        for weight in weights:
            name = plan.sites.in_layer(weight, layer)
            bias = bias_name(name)
            if name in plan.source.tensors and not plan.checkpoint.has_tensor(bias):
                info = plan.source.tensors[name]
                dtype = info.dtype if info.dtype in EDITABLE else _dtype_beside(plan)
                plan.checkpoint.additions[bias] = Addition.zeros(dtype, (info.shape[0],))


def _dtype_beside(plan: EditPlan) -> str:
    """In what a quantised checkpoint stores what it does not quantise: its embedding, and a bias."""
    dtype = plan.source.tensors[plan.sites.tied_to].dtype
    return dtype if dtype in EDITABLE else "BF16"


def _llama_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    """Let the model be a Llama, whose attention and MLP have biases if the configuration says so."""
    if plan.architecture.as_llama is None:
        return ""
    hindrance = plan.architecture.as_llama.hindrance(plan.source.config)
    if hindrance is not None:
        return f"it is no Llama in all but name, for {hindrance}"
    if "text_config" in plan.source.config:
        return "a wrapper for images cannot become a Llama"
    scaled = next((name for name in _fused(plan) if scale_name(plan.source, name)), None)
    if scaled is not None:
        return f"Llama stores {scaled} in parts, each with scales of its own"
    _become_llama(plan)
    for write in plan.sites.writes(part, int(site.layer or 0)):
        plan.add_constant(bias_name(write.name), site, vector)
    return None


def _fused(plan: EditPlan) -> dict[str, dict[str, int | str]]:
    """The weights that Llama stores as several, and the share that each of these takes, by their names."""
    fused = plan.architecture.as_llama.fused if plan.architecture.as_llama else {}
    layers = range(plan.architecture.layers(plan.source.config))
    named = {
        plan.sites.in_layer(name, layer): {plan.sites.in_layer(part, layer): share for part, share in parts.items()}
        for name, parts in fused.items()
        for layer in layers
    }
    return {name: parts for name, parts in named.items() if name in plan.source.tensors}


def _rows(total: int, shares: Mapping[str, int | str], config: Mapping[str, Any]) -> dict[str, int]:
    """How many of `total` rows each part has."""
    numbers = {part: share if isinstance(share, int) else int(config[share]) for part, share in shares.items()}
    if total % sum(numbers.values()):
        raise OrthogonalizeError(f"config.json and a fused weight of {total} rows disagree; fetch them again")
    return {part: total * number // sum(numbers.values()) for part, number in numbers.items()}


def _become_llama(plan: EditPlan) -> None:
    from transformers import AutoConfig

    full = AutoConfig.from_pretrained(plan.source.path).to_dict()
    given = plan.source.config
    parts = {
        name: _rows(plan.source.tensors[name].shape[0], shares, full) for name, shares in _fused(plan).items()
    }  # fmt: skip
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
        _switch_on(plan, (*part.writes, *part.bias.zeros), part.bias.flags)


def _value_bias(plan: EditPlan, site: Site, part: Part, vector: torch.Tensor) -> str | None:
    """Attention weights sum to one, so a bias b of the value projection adds `W_o R b`, R repeating the heads."""
    through = part.value_bias
    if through is None:
        return ""
    layer = int(site.layer or 0)
    output, value = (plan.sites.in_layer(name, layer) for name in (through.output, through.weight))
    weight = real_values(plan.source, plan.check_tensor(output, site)).double()
    if output in plan.checkpoint.edits:
        weight = plan.checkpoint.edits[output].exact(weight)
    heads = int(setting(plan.source.config, "num_attention_heads"))
    groups = int(setting(plan.source.config, "num_key_value_heads", heads))
    reach = weight.reshape(len(weight), groups, heads // groups, -1).sum(2).reshape(len(weight), -1)
    solution = torch.linalg.lstsq(reach, vector.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    missed = ((reach @ solution - vector).norm() / vector.norm()).item()
    if missed > REACHED:
        return f"the value projection's bias reaches all but {missed:.0%} of the vector"
    if not plan.checkpoint.has_tensor(bias_name(value)):
        _switch_on(plan, (through.weight, *through.zeros), through.flags)
    plan.add_constant(bias_name(value), site, solution)
    return None
