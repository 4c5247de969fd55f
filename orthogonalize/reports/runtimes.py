"""Which runtimes read an edited checkpoint, by rules taken from their sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..architectures.schema import setting

HEAD = "lm_head.weight"
# Families whose weights llama.cpp's converter (`conversion/gemma.py`) and SGLang (`models/gemma.py`, `gemma2.py`) read
# without `lm_head.weight`, which they take for a copy of the embedding.
HEAD_IGNORED = frozenset({"gemma", "gemma2"})
# Model types and llama.cpp's name of their architecture (the registrations in its `conversion` folder).
LLAMA_CPP = {
    "cohere": "command-r", "cohere2": "cohere2", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
    "exaone4": "exaone4", "falcon_h1": "falcon-h1", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3",
    "gemma3_text": "gemma3", "glm4": "glm4", "gpt2": "gpt2", "gpt_neox": "gptneox", "gpt_oss": "gpt-oss",
    "granite": "granite", "granitemoe": "granitemoe", "granitemoehybrid": "granitehybrid", "lfm2": "lfm2",
    "llama": "llama", "llama4": "llama4", "llama4_text": "llama4", "mamba2": "mamba2", "ministral3": "mistral3",
    "mistral": "llama", "mixtral": "llama", "olmo": "olmo", "olmo2": "olmo2", "olmo3": "olmo2", "phi": "phi2",
    "phi3": "phi3", "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next", "qwen3_5": "qwen35", "smollm3": "smollm3", "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime reads a checkpoint, and why; `reads` is None where its source does not settle it."""

    name: str
    reads: bool | None
    why: str


def runtimes(config: Mapping[str, Any], added: Iterable[str], scheme: str | None = None) -> list[Runtime]:
    """What vLLM, transformers, llama.cpp and SGLang make of a checkpoint with `config` and tensors that it `added`.

    `scheme` is the one by which `edit` quantised it, if it did.

    vLLM and transformers read every checkpoint that `edit` writes: it refuses the others. The rest follows rules in
    the runtimes' sources, and in the name tables of the installed package `gguf`.
    """
    added = sorted(added)
    if scheme is not None:
        return _quantized_runtimes(scheme)
    backend = _class_of(config).startswith("Transformers")
    return [
        Runtime("vLLM", True, "through its Transformers backend" if backend else "by its own class"),
        Runtime("transformers", True, "by its own class"),
        _llama_cpp(config, added),
        _sglang(config, added),
    ]


def _quantized_runtimes(scheme: str) -> list[Runtime]:
    """Who reads the format of compressed-tensors: whatever the edit added, the others are not tried."""
    gpu = Runtime("vLLM", None, "its CPU build has no kernel for four bits, and a GPU was not tried")
    return [
        Runtime("vLLM", True, f"as {scheme.upper()}") if scheme == "fp8" else gpu,
        Runtime("transformers", True, "where compressed-tensors is installed"),
        *(Runtime(name, None, "not tried with compressed-tensors") for name in ("llama.cpp", "SGLang")),
    ]


def summary(found: Iterable[Runtime]) -> str:
    """One line: who reads the checkpoint, who does not and why, and what is not known."""
    found = list(found)
    parts = [f"read by {', '.join(each.name for each in found if each.reads)}"]
    parts += [f"not by {each.name} ({each.why})" for each in found if each.reads is False]
    parts += [f"{each.name}: not known ({each.why})" for each in found if each.reads is None]
    return "; ".join(parts)


def blocks_alone(config: Mapping[str, Any], added: Iterable[str]) -> str | None:
    """The scope of all blocks without the embedding, where a head that the edit added keeps a runtime from reading it.

    None if no runtime is kept from it by that, or the configuration does not name its number of layers.
    """
    added = list(added)
    kept_out = any(each.reads is False for each in runtimes(config, added))
    layers = setting(config, "num_hidden_layers") or setting(config, "n_layer")
    if not kept_out or not any(map(_is_head, added)) or type(layers) is not int:
        return None
    return f"layers:0-{layers - 1}"


def _is_head(tensor: str) -> bool:
    """Whether an added tensor is a head; the others that edits add are biases."""
    return not tensor.endswith(".bias")


def _class_of(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _llama_cpp(config: Mapping[str, Any], added: list[str]) -> Runtime:
    name, kind = "llama.cpp", str(config.get("model_type"))
    if _class_of(config).startswith("Transformers"):
        return Runtime(name, False, f"its converter knows no class {_class_of(config)}")
    if kind in HEAD_IGNORED and any(map(_is_head, added)):
        return Runtime(name, False, f"its converter drops {HEAD}, and the edited embedding becomes the head")
    if kind not in LLAMA_CPP:
        return Runtime(name, None, "no rule for this family here")
    if not added:
        return Runtime(name, True, "as it reads the base")
    unplaced = _without_a_place(LLAMA_CPP[kind], added)
    if unplaced:
        return Runtime(name, False, f"its converter has no place for {unplaced[0]}")
    if not all(map(_is_head, added)):
        return Runtime(name, None, "the edit added biases, which it may not read")
    return Runtime(name, True, "its converter has a place for the head")


def _without_a_place(architecture: str, tensors: list[str]) -> list[str]:
    """The tensors that the name table of llama.cpp's `architecture` does not hold."""
    import gguf

    known = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        return list(tensors)
    table = gguf.get_tensor_name_map(known, 1)
    return [each for each in tensors if not each.count(".layers.") and _place(table, each) is None]


def _place(table: Any, tensor: str) -> Any:
    return table.get_name(tensor, try_suffixes=(".weight", ".bias"))


def _sglang(config: Mapping[str, Any], added: list[str]) -> Runtime:
    name, kind = "SGLang", str(config.get("model_type"))
    if _class_of(config) == "TransformersForCausalLM":
        return Runtime(name, None, "through its Transformers fallback; not tried")
    if kind in HEAD_IGNORED and any(map(_is_head, added)):
        return Runtime(name, False, f"it drops {HEAD}, and the edited embedding becomes the head")
    if not added:
        return Runtime(name, True, "as it reads the base")
    if kind == "llama" and all(map(_is_head, added)):
        return Runtime(name, True, "by its own class")
    return Runtime(name, None, f"the edit added {added[0]}; not tried")
