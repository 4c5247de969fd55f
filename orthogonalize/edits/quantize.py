"""Which matrices of an edited model are quantised (`edit --quantize`): those of attention and MLP, by their names.

Servers run what the configuration calls quantised and read the rest as it is, so everything else is named there: heads,
embeddings, routers, image encoders, layers for multi-token prediction, and kinds of layers that are not listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..checkpoints.quantizing.library import LIBRARY, Quantizer
from ..checkpoints.quantizing.names import SchemeName
from ..checkpoints.quantizing.plan import QuantizedPlan
from ..checkpoints.safetensors_file import EDITABLE, TensorInfo, show_shape
from ..checkpoints.settings_files import quantization
from ..core.errors import OrthogonalizeError, shown
from ..core.progress import note
from .plan import EditPlan
from .recipe import Quantization

# Linear layers, and the modules that hold them; between the two may be the number of an expert.
LINEAR = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "dense"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2", "c_fc", "c_proj", "w1", "w2", "w3"),
    }
)
HOLDERS = frozenset(
    {
        *("self_attn", "self_attention", "attention", "attn", "mlp", "feed_forward", "block_sparse_moe", "experts"),
        *("shared_mlp", "shared_expert", "shared_experts"),
    }
)
# Layers that vLLM makes one matrix of, which must then have one scale.
FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
WEIGHT = ".weight"


def quantized_plan(plan: EditPlan, scheme: SchemeName, version: str | None = None) -> QuantizedPlan:
    """The edit `plan`, whose result is then quantised by `scheme` (see `SCHEMES`); adds to its configuration.

    `version` is that of the compressed-tensors whose numbers it should give, where a recipe names one.

    Raises:
        OrthogonalizeError: the base is quantised already, its matrices are stored in a way that no such checkpoint has,
            or compressed-tensors is not installed.
    """
    settings = quantization(plan.source.config)
    if settings is not None:
        method = shown(str(settings["quant_method"] or "an unnamed method"), 40)
        raise OrthogonalizeError(
            f"{plan.source.path} is quantised already ({method}); leave out --quantize, or start from the release that "
            "it was quantised from"
        )
    quantizer = Quantizer.of(scheme)
    if version not in (None, quantizer.version):
        note(
            f"the recipe quantises by {LIBRARY} {version}, and {quantizer.version} is installed, which may store other "
            "numbers"
        )
    weights = _linear(plan, quantizer.scheme.group)
    fused = dict(_fused(weights))
    ignored = sorted(
        {plan.sites.head.removesuffix(WEIGHT)}
        | {
            name.removesuffix(WEIGHT)
            for name, info in plan.source.tensors.items()
            if name.endswith(WEIGHT) and len(info.shape) > 1 and name not in weights
        }
    )
    stated = quantizer.settings(ignored) | ({"version": version} if version else {})
    plan.checkpoint.config_changes["quantization_config"] = stated
    return QuantizedPlan(plan.checkpoint, quantizer, frozenset(weights), fused)


def quantization_of(plan: QuantizedPlan) -> Quantization:
    """What the recipe says of the quantisation."""
    return Quantization(scheme=plan.quantizer.scheme.name, version=plan.quantizer.version, matrices=len(plan.weights))


def _linear(plan: EditPlan, group: int | None) -> dict[str, TensorInfo]:
    """The matrices to quantise, by name; `group` is how many numbers of a row share a scale."""
    _check_layout(plan)
    found = {}
    for name, info in _in_blocks(plan):
        *holders, layer = name.split(".")[:-1]
        if layer not in LINEAR or not all(each in HOLDERS or each.isdecimal() for each in holders):
            continue
        full = info.name
        if len(info.shape) != 2 or info.dtype not in EDITABLE:
            continue
        if group is not None and info.shape[1] % group:
            raise OrthogonalizeError(
                f"{full} has rows of {info.shape[1]} numbers, which are not whole groups of {group}; use --quantize fp8"
            )
        found[full] = info
    if not found:
        raise OrthogonalizeError(
            f"no matrix of this {plan.architecture.family} model has a name that --quantize knows; quantise the edited "
            "checkpoint with llm-compressor instead"
        )
    return found


def _in_blocks(plan: EditPlan) -> Iterator[tuple[str, TensorInfo]]:
    """The weights in the blocks of the text model, with their names in the block."""
    layers = plan.architecture.layers(plan.source.config)
    block = re.compile(re.escape(plan.architecture.layer).replace(r"\{layer\}", r"(\d{1,9})") + r"\.(.+)")
    for name, info in plan.source.tensors.items():
        inner = block.fullmatch(name.removeprefix(plan.sites.decoder)) if name.startswith(plan.sites.decoder) else None
        if inner and int(inner[1]) < layers and inner[2].endswith(WEIGHT):
            yield inner[2], info


def _check_layout(plan: EditPlan) -> None:
    """Refuse matrices [in, out], and experts in one tensor: quantised checkpoints have neither.

    Raises:
        OrthogonalizeError: the message names the tensor.
    """
    family, instead = plan.architecture.family, "quantise the edited checkpoint with llm-compressor instead"
    for layer in range(plan.architecture.layers(plan.source.config)):
        for kind in ("attn", "mlp"):
            for part in plan.architecture.parts(kind).values():
                for each in plan.sites.writes(part, layer):
                    shape = plan.source.tensors[each.name].shape
                    if len(shape) == 3:
                        raise OrthogonalizeError(
                            f"{each.name} holds all experts in one tensor {show_shape(shape)}, which --quantize does "
                            f"not split; {instead}"
                        )
                    if len(shape) == 2 and each.axis % 2 == 1:
                        raise OrthogonalizeError(
                            f"{each.name} is stored as [in, out] in {family} models, which no server reads quantised; "
                            "leave out --quantize"
                        )


def _fused(weights: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in weights:
        holder, _, layer = name.removesuffix(WEIGHT).rpartition(".")
        for group in FUSED:
            if layer in group:
                yield name, tuple(each for other in group if (each := f"{holder}.{other}{WEIGHT}") in weights)
