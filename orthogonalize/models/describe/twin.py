"""A small random twin of a model: the same transformers class with every kind of layer, but narrow and shallow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...checkpoints.checkpoint import open_checkpoint
from ...core.errors import OrthogonalizeError, first_line
from ..loading import model_class

WIDTH = 48
# Small, and different wherever possible, so that an axis can be recognized by its length.
SIZES: dict[str, int] = {
    "hidden_size": WIDTH, "intermediate_size": 56, "moe_intermediate_size": 24, "ffn_dim": 56, "dff": 56,
    "shared_expert_intermediate_size": 40, "shared_intermediate_size": 40, "intermediate_size_mlp": 64,
    "moe_shared_expert_intermediate_size": 40, "ffn_hidden_size": 56, "expert_ffn_hidden_size": 24, "n_inner": 56,
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 10,
    "max_position_embeddings": 128, "sliding_window": 8, "attention_chunk_size": 64, "attention_window_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_num_primary_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2, "num_experts_per_token": 2,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1, "zero_expert_num": 1,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 24, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 4, "o_lora_rank": 20, "o_groups": 2,
    "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_ssm": 96, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_chunk_size": 16, "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_num_heads": 6,
    "mamba_head_dim": 16, "ssm_state_size": 16, "n_mamba_heads": 2, "mamba_headdim": 48, "mamba_ngroups": 1,
    "num_heads": 6, "expand": 2, "state_size": 16, "n_groups": 1, "chunk_size": 16, "rotary_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "lru_width": WIDTH, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 24, "kv_channels": 12,
    "num_kv_shared_layers": 2, "num_mem_blocks": 1, "embedding_dim": WIDTH, "linear_head_dim": 16,
    "linear_num_heads": 2, "kv_n_heads": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 8, "indexer_compress_ratio": 4, "laurel_rank": 12,
    "hc_lowrank": 20, "ple_embed_dim": 32, "heads_per_ngram": 4,
    "ngram_vocab_size_base": 40, "split_ngram_parts": 2, "prompt_length": 4,
    "compressed_sparse_attention": 4, "heavily_compressed_attention": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# The same for vLLM, whose kernels take heads of few sizes.
SERVED_SIZES: dict[str, int] = SIZES | {
    key: 4 * SIZES[key]
    for key in SIZES
    if key.endswith(("hidden_size", "intermediate_size", "intermediate_size_mlp", "head_dim", "d_head", "headdim"))
    or key in ("ffn_dim", "dff", "n_inner", "embedding_dim", "lru_width", "mamba_d_ssm", "kv_channels", "rotary_dim")
} | {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "qk_head_dim": 128,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "attention_chunk_size": 128,
}  # fmt: skip
MOST_LAYERS = 12
LAYER_COUNTS = ("num_blocks", "n_layers", "num_layers")  # beside the one that counts
MOST_NUMBERS = 5 * 10**7  # of a small model, in its parameters and buffers: 0.4 GB
DROPPED = ("architectures", "quantization_config", "transformers_version", "model_type", "auto_map", "torch_dtype")
HEADS = ("wide", "square", "quarters")  # ways to divide the width: heads wider than it, or three, or four that fill it


class DoublePrecision(TorchFunctionMode):
    """Compute in float64 what transformers always computes in float32 (norms, softmax, routers)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return function(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def _layers_needed(settings: Mapping[str, Any], count: int) -> int:
    """How many of the first layers include every kind of layer."""
    needed = 4
    for value in settings.values():
        if isinstance(value, list | str) and len(value) == count and all(isinstance(v, str | int) for v in value):
            needed = max(needed, *(value.index(kind) + 1 for kind in set(value)))
    for key in ("interleave_moe_layer_step", "decoder_sparse_step", "attn_layer_period", "expert_layer_period"):
        step = settings.get(key)
        if isinstance(step, int) and step < MOST_LAYERS:
            needed = max(needed, 2 * step)
    if settings.get("num_kv_shared_layers"):  # the last layers use keys and values of earlier ones of their kind
        needed *= 2
    return min(needed, MOST_LAYERS, max(count, 1))


def _shrink_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Plain rotary embeddings; some families have several, by the kind of layer."""
    nested = {key: _shrink_rope(value) for key, value in rope.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in rope.items() if isinstance(value, int | float)}
    return plain | nested | ({"rope_type": "default"} if "rope_type" in rope else {})


def _shrink_nested(value: Any, layers: int, sizes: Mapping[str, int]) -> Any:
    """Sizes inside a nested table: those of single layers are kept for the layers that are left."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not str(k).isdecimal() or int(k) < layers}
        small = {**sizes, "head_dim": sizes["hidden_size"] // 3, "num_key_value_heads": 2}
        return {
            k: small[k] if k in small and type(v) is int else _shrink_nested(v, layers, sizes)
            for k, v in kept.items()
        }  # fmt: skip
    return value


def shrink_config(config: Any, heads: str = "wide", fill: bool = False, sizes: Mapping[str, int] = SIZES) -> Any:
    """The configuration of a small model of the same class as that of `config`, with an untied head.

    Args:
        config: the configuration of the text model.
        heads: how attention heads divide the width, one of `HEADS`.
        fill: whether sizes that are None get a value as well.
        sizes: what each size of the configuration becomes; those of `SIZES` only where they are smaller.
    """
    width = sizes["hidden_size"]
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    names = dict(getattr(config, "attribute_map", {}))
    counted = names.get("num_hidden_layers", "num_hidden_layers")
    count = int(config.num_hidden_layers)
    layers = _layers_needed(settings, count)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        nested = vars(config).get(key)
        if isinstance(value, list | str) and len(value) == count:
            small[key] = value[:layers]
        elif (
            isinstance(value, list) and key.endswith(("layers", "layer_ids")) and all(isinstance(v, int) for v in value)
        ):
            small[key] = [v for v in value if v < layers]
        elif hasattr(nested, "to_dict"):  # a configuration of its own, whose class may not take all that it lists
            small[key] = _shrink_inner(nested, sizes)
        else:
            small[key] = _shrink_nested(value, layers, sizes)
    own = {names.get(key, key): size for key, size in sizes.items()}
    fixed = {names.get(key, key) for key, size in sizes.items() if key.endswith("_token_id") or size > SIZES[key]}
    for key, size in own.items():
        if type(small.get(key)) is int:
            small[key] = size if key in fixed else min(size, small[key])
        elif fill and key in small and small[key] is None:
            small[key] = size
    small |= {key: layers for key in (counted, *LAYER_COUNTS) if key == counted or settings.get(key) == count}
    if all(type(small.get(key)) is int for key in ("mamba_d_ssm", "mamba_n_heads", "mamba_d_head")):
        small["mamba_d_ssm"] = small["mamba_n_heads"] * small["mamba_d_head"]
    small |= _divide_heads(settings, small, names, heads, width)
    if "word_embed_proj_dim" in small:
        small["word_embed_proj_dim"] = width if settings["word_embed_proj_dim"] == settings["hidden_size"] else 32
    rope = small.get("rope_parameters")
    if isinstance(rope, dict):
        small["rope_parameters"] = _shrink_rope(rope)
    small |= {"tie_word_embeddings": False, "dtype": "float32"}
    for key in DROPPED:
        small.pop(key, None)
    made = type(config)(**small)
    _shrink_sections(made, settings.get("rope_parameters"))
    return made


def _shrink_sections(config: Any, rope: Any) -> None:
    """Divide half a head between the axes of positions (text, height, width) as the full model does."""
    for key, full in _sections(rope):
        own = config.rope_parameters if key is None else config.rope_parameters[key]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(size * own.get("partial_rotary_factor", 1.0)) // 2
        first = [round(half * part / sum(full)) for part in full[:-1]]
        own["mrope_section"] = [*first, half - sum(first)]


def _sections(rope: Any) -> Iterator[tuple[str | None, list[int]]]:
    """The key, if rotary embeddings differ by the kind of layer, and the shares of the axes of positions."""
    if isinstance(rope, Mapping):
        own = rope.get("mrope_section")
        yield from [(None, own)] if own else []
        yield from ((k, v["mrope_section"]) for k, v in rope.items() if isinstance(v, Mapping) and "mrope_section" in v)


def _shrink_inner(config: Any, sizes: Mapping[str, int]) -> Any:
    inner = deepcopy(config)
    for key, size in sizes.items():
        if type(getattr(inner, key, None)) is int:
            setattr(inner, key, size)
    return inner


def _divide_heads(
    settings: Mapping[str, Any], small: Mapping[str, Any], names: Mapping[str, str], how: str, width: int
) -> dict[str, Any]:
    """The settings of attention heads, their dimension and their groups."""
    heads = names.get("num_attention_heads", "num_attention_heads")
    groups = names.get("num_key_value_heads", "num_key_value_heads")
    dimension = names.get("head_dim", "head_dim")
    single = settings.get(heads) == settings.get(groups, settings.get(heads))
    latent = "kv_lora_rank" in small
    number = 3 if how == "square" else 4
    if dimension in small and how == "wide" and not latent:
        number, size = 4, width // 3
    elif latent:
        number, size = 4, 0
    elif how == "wide":
        number, size = 3, 0
    else:
        size = width // number if dimension in small else 0
    found: dict[str, Any] = {}
    if type(small.get(heads)) is int:
        found[heads] = number
        if groups in small:
            found[groups] = number if single or latent else (2 if number == 4 else 1)
    if size:
        found[dimension] = size
    elif dimension in small and not latent:
        found[dimension] = width // number
    elif dimension in small and type(small[dimension]) is int:
        found[dimension] = small.get("qk_rope_head_dim", 8)
    return found


def text_class(config: Any) -> Any:
    """The class of a causal language model with this configuration."""
    import transformers

    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    stem = type(config).__name__.removesuffix("Config").removesuffix("Text")  # of an image model's text model
    found = getattr(transformers, f"{stem}ForCausalLM", None)
    if found is None:
        raise OrthogonalizeError(f"transformers has no causal language model for {type(config).__name__}")
    return found


def twin_class(folder: Path) -> Any:
    """The class of the model stored in `folder`."""
    import transformers

    named = (open_checkpoint(folder).config.get("architectures") or [""])[0]
    return getattr(transformers, named, None) or model_class(folder)


def _check_small(config: Any, kind: Any) -> None:
    """Check, before any memory is taken, that a model is small: `SIZES` may lack a key by which it grows.

    Raises:
        ValueError: it is not.
    """
    with torch.device("meta"):
        model = kind._from_config(config, attn_implementation="eager")
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if count > MOST_NUMBERS:
        raise ValueError(f"it has {count} parameters at the smallest")


def randomised(config: Any, kind: Any) -> Any:
    """A random model of the class `kind` with configuration `config`, in float64, norms and biases random as well."""
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    _check_small(config, kind)
    model = kind._from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            one = parameter.dim() == 1
            parameter.copy_(parameter + 0.3 * noise if one else noise * parameter.shape[-1] ** -0.5)
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.numel() == 1 and name not in dict(model.named_parameters()):
                value.fill_(0.8)  # a stored factor, which is not left at one
    return model


def attempts(config: Any, sizes: Mapping[str, int]) -> Iterator[Callable[[], Any]]:
    """Functions that make a configuration of a small text model, in several ways."""
    for fill in (False, True):
        for heads in HEADS:
            yield partial(shrink_config, config, heads, fill, sizes)


def token_ids(model: Any, rows: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length] that every vocabulary of a twin has."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(3, min(vocabulary, 80), (rows, length), generator=torch.Generator().manual_seed(seed))


def model_inputs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What to call a twin with: `ids`, and random features where some blocks run only beside an image's."""
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "cross_attention_states" in signature(model.forward).parameters:
        shape = (len(ids), 5, int(model.config.get_text_config().hidden_size))
        features = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        given["cross_attention_states"] = features.to(next(model.parameters()).dtype)
    return given


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, vocabulary] in float64 throughout."""
    given = model_inputs(model, ids)
    try:
        with DoublePrecision():
            found: torch.Tensor = model(**given).logits
    except RuntimeError:  # a class may make tensors of the least number of float64 in the default type
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = model(**given).logits
        finally:
            torch.set_default_dtype(before)
    return found.double()


def check_logits(model: Any) -> None:
    """Check that a twin runs.

    Raises:
        ValueError: it does not give a row of logits for every token.
    """
    ids = token_ids(model)
    if logits(model, ids).shape[:2] != ids.shape:
        raise ValueError("it does not give a row of logits for every token")


def save_twin(config: Any, folder: Path, sizes: Mapping[str, int] = SIZES, dtype: torch.dtype = torch.float64) -> Any:
    """Store a twin of the text model with configuration `config` in `folder`; its own configuration.

    Classes differ in what they accept, so several sets of sizes are tried: the first with which a model can be built,
    stored and run is taken.

    Raises:
        OrthogonalizeError: there is none.
    """
    return save_first(attempts(config, sizes), text_class, folder, dtype, config.model_type)


def save_first(
    makers: Iterable[Callable[[], Any]], class_of: Callable[[Any], Any], folder: Path, dtype: torch.dtype, name: str
) -> Any:
    """Store in `folder` the first model of the kind `name` that can be built, stored and run; its configuration.

    Args:
        makers: make the configurations to try.
        class_of: the class of a configuration's model.

    Raises:
        OrthogonalizeError: there is none.
    """
    reasons = []
    for make in makers:
        try:
            small = make()
            model = randomised(small, class_of(small))
            check_logits(model)
            model.config._experts_implementation = None
            model.to(dtype).save_pretrained(folder)
            return small
        except Exception as error:  # classes raise anything at sizes that they do not support
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
    raise OrthogonalizeError(f"transformers cannot build or run a small {name} model for the experiments: {reasons[0]}")


def load_twin(folder: Path) -> Any:
    """The model of a stored twin, computing in float64 with the plain implementations of attention and experts."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    return twin_class(folder).from_pretrained(folder, trust_remote_code=False, **options).double().eval()
