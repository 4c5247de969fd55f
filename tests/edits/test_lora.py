"""The edit as a LoRA adapter: PEFT and vLLM apply it exactly as the baked weights do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.exactness import baked_logits, every_read, every_write, gap
from helpers.llama import LAYERS, WIDTH, store, tiny_llama
from helpers.tiny_models import load_tiny
from helpers.tiny_models import logits as tiny_logits
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import removal
from orthogonalize.edits.bake import bake
from orthogonalize.edits.lora import write_adapter
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.edits.scopes import map_sites, parse_scope, shift_sites


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=ids).logits.double()


def written(plan, folder: Path) -> Path:
    folder.mkdir()
    write_adapter(plan, folder, "base")
    return folder


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scope", ["layers:0-3", "layers:1,3", "from:2"])
def test_peft_gives_the_logits_of_the_baked_checkpoint(basis, tmp_path, scope, rank):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = store(tiny_llama(), tmp_path / "base", torch.float32)
    plan = bake(open_checkpoint(source), map_sites(parse_scope(scope), LAYERS, lambda _: removal(basis[:rank])))
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    adapter = written(plan, tmp_path / "adapter")
    plain = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval())
    baked = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32).eval())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = logits(PeftModel.from_pretrained(model, adapter).eval())
    assert (plain - baked).abs().max() > 1e-2
    assert (adapted - baked).abs().max() <= 1e-4
    factors = load_file(adapter / "adapter_model.safetensors")
    assert len(factors) == 2 * len(plan.checkpoint.edits)
    for name, weight_edit in plan.checkpoint.edits.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}."
        a, b = factors[stem + "lora_A.weight"].double(), factors[stem + "lora_B.weight"].double()
        assert a.shape[0] == b.shape[1] == rank
        weight = plan.source.read(name)
        assert torch.allclose(weight.double() + b @ a, weight_edit.exact(weight), atol=1e-6)


POST_NORM = ["gemma2", "gemma3", "glm4", "olmo2", "olmo3", "exaone4"]


@pytest.mark.parametrize("scope", ["writes", "reads"])
@pytest.mark.parametrize("family", [*POST_NORM, "phi3", "gemma3 multimodal", "ministral3 multimodal"])
def test_peft_equals_baked_with_post_norms_and_in_wrappers(bases, tmp_path, family, scope):
    from peft import PeftModel

    base = bases(family)
    assert base.post_norm == (family in [*POST_NORM, "gemma3 multimodal"])
    intervention = every_write(embed=False) if scope == "writes" else every_read(first=2)
    if scope == "reads" and base.checkpoint.config.get("tie_word_embeddings", True):
        with pytest.raises(OrthogonalizeError, match=r"cannot add .*lm_head\.weight.*layers"):
            write_adapter(bake(base.checkpoint, intervention), tmp_path, "base")
        return
    adapter = written(bake(base.checkpoint, intervention), tmp_path / "adapter")
    baked = baked_logits(base, intervention, tmp_path / "edited")
    adapted = tiny_logits(PeftModel.from_pretrained(load_tiny(base.folder), adapter).eval())
    assert gap(baked, base.plain) > 1e-2
    assert gap(adapted, baked) <= 1e-4 * gap(baked, base.plain), "the factors are stored in float32"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_experts_that_peft_would_silently_skip_are_refused(bases, tmp_path, family):
    with pytest.raises(OrthogonalizeError, match=r"experts.* is not a separate linear layer in transformers"):
        write_adapter(bake(bases(family).checkpoint, every_write(embed=False)), tmp_path, "base")


def test_edit_that_an_adapter_cannot_hold_is_refused(basis, tmp_path):
    source = store(tiny_llama(), tmp_path / "base", torch.float32)
    tied = store(tiny_llama(tie_word_embeddings=True), tmp_path / "tied", torch.float32)
    everywhere = map_sites(parse_scope("all"), LAYERS, lambda _: removal(basis))
    cases = [
        (source, everywhere, "an embedding.*layers:0-3"),
        (tied, everywhere, "cannot add lm_head.weight"),
        (source, shift_sites(parse_scope("one"), LAYERS, lambda _: basis[0], 2), "cannot add"),
    ]
    for folder, intervention, message in cases:
        with pytest.raises(OrthogonalizeError, match=message):
            write_adapter(bake(open_checkpoint(folder), intervention), tmp_path, "base")


def test_edit_writes_an_adapter_with_its_recipe(tmp_path):
    source = store(tiny_llama(), tmp_path / "base", torch.float32)
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    edit(str(source), tmp_path / "lora", direction=tmp_path / "direction.safetensors", scope="layers:1", format="lora")
    assert {f.name for f in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "orthogonalize.json", "README.md",
    }  # fmt: skip
    assert load_recipe(tmp_path / "lora").choice.scope == "layers:1"
    with pytest.raises(OrthogonalizeError, match="an embedding"):
        edit(str(source), tmp_path / "whole", direction=tmp_path / "direction.safetensors", scope="all", format="lora")
    assert not (tmp_path / "whole").exists()
    given = {"direction": tmp_path / "direction.safetensors", "scope": "layers:1", "format": "lora"}
    with pytest.raises(OrthogonalizeError, match="leave out --shard"):
        edit(str(source), tmp_path / "share", **given, shard="1/2")
    other = store(tiny_llama(seed=1), tmp_path / "other", torch.float32)
    with pytest.raises(OrthogonalizeError, match="not the base of the recipe"):
        edit(str(other), tmp_path / "again", recipe=tmp_path / "lora", format="lora")


# On a CPU, vLLM 0.32 applies the last slot (index -1) to rows without an adapter: one slot must stay empty.
SERVE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
folder, adapter = sys.argv[1:3]
options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2} if adapter else {}
llm = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
          max_logprobs=96, disable_log_stats=True, **options)
asked = json.loads(sys.argv[3]) * (2 if adapter else 1)
prompts = [{"prompt_token_ids": ids} for ids in asked]
request = LoRARequest("edit", 1, adapter) if adapter else None
half = len(prompts) // 2
requests = [None] * half + [request] * (len(prompts) - half)
outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, logprobs=96,
    detokenize=False), lora_request=requests, use_tqdm=False)
print("RESULT" + json.dumps([[o.outputs[0].logprobs[0][t].logprob for t in range(96)] for o in outputs]))
"""


def served(folder: Path, adapter: Path | None, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the next token, [prompts (with an adapter twice: base, then adapted), vocabulary]."""
    settings = {
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    words = [sys.executable, "-c", SERVE, str(folder), str(adapter or ""), json.dumps(prompts)]
    done = subprocess.run(words, env={**os.environ, **settings}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(done.stdout.rpartition("RESULT")[2]))


@pytest.mark.prove
def test_vllm_serves_base_and_adapter_in_one_batch(tmp_path):
    """The adapter with the log-probabilities of the baked checkpoint."""
    pytest.importorskip("vllm")
    from transformers import AutoModelForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    source = store(tiny_llama(**shape), tmp_path / "base", torch.float32)
    direction = torch.randn(1, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    affine = removal(direction / direction.norm())
    plan = bake(open_checkpoint(source), map_sites(parse_scope("layers:0-3"), LAYERS, lambda _: affine))
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    adapter = written(plan, tmp_path / "adapter")
    prompts = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(2))
    both = served(source, adapter, prompts.tolist())
    for folder, found in ((source, both[:3]), (tmp_path / "edited", both[3:])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = model(input_ids=prompts).logits[:, -1].log_softmax(-1)
        assert (found - expected).abs().max() <= 1e-3
    assert (both[:3] - both[3:]).abs().max() > 1e-2
