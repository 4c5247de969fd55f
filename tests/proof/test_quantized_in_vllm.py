"""Quantised results, served by vLLM: those of `edit --quantize`, and a gpt-oss edited in its own MXFP4.

vLLM's CPU build has kernels for FP8 alone; four bits need a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compressed import decompressed
from helpers.llama import store, tiny_llama
from helpers.mxfp4 import dequantised_folder, dequantised_model, mxfp4_base
from helpers.serving import SETTINGS, SPREAD, environment
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from orthogonalize.commands.edit import edit

pytestmark = pytest.mark.prove
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = torch.randint(3, 90, (3, 17), generator=torch.Generator().manual_seed(0))
SERVE = """
import json, sys
from pathlib import Path
from helpers.serving import LoadProof, served
proof = LoadProof({})
found = served(Path(sys.argv[1]), json.loads(sys.argv[2]), "bfloat16", proof, False)
print("FOUND" + json.dumps([found, proof.uninitialised]))
"""


def scores_in_vllm(folder: Path) -> tuple[list[list[dict[str, float]]], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, folder, json.dumps(PROMPTS.tolist())],
        env=environment() | SETTINGS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found, f"{folder.name} is not served: {done.stderr[-8000:]}"
    return json.loads(found[0].removeprefix("FOUND"))


def scores_in_transformers(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPTS).logits.float().log_softmax(-1)


def gaps(found: list[list[dict[str, float]]], reference: torch.Tensor) -> list[float]:
    """How far vLLM's likeliest tokens are from transformers' log-probabilities, each."""
    return [
        abs(score - reference[prompt, place, int(token)].item())
        for prompt, positions in enumerate(found)
        for place, table in enumerate(positions)
        for token, score in table.items()
    ]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM has kernels for four bits on a GPU alone")


@pytest.mark.parametrize("scheme", ["fp8", pytest.param("mxfp4", marks=on_gpu), pytest.param("nvfp4", marks=on_gpu)])
def test_a_quantised_result_is_served_with_the_edit_in_it(scheme, tmp_path):
    model = tiny_llama(**SHAPE)
    with torch.no_grad():
        model.lm_head.weight.mul_(SPREAD)
    base = store(model, tmp_path / "base", torch.bfloat16)
    directions = torch.linalg.qr(torch.randn(256, 48, generator=torch.Generator().manual_seed(5)))[0].mT
    save_file({"basis": directions.contiguous()}, tmp_path / "directions.safetensors")
    given = {"direction": tmp_path / "directions.safetensors", "method": "nullspace", "scope": "all"}
    edit(base, tmp_path / "edited", quantize=scheme, **given)
    found, uninitialised = scores_in_vllm(tmp_path / "edited")
    # Of the scales of caches and attention, which no checkpoint of ours has, vLLM uses its defaults.
    assert [name for name in uninitialised if ".attn." not in name] == []
    before = scores_in_transformers(model.float())
    model.load_state_dict({n: t.float() for n, t in decompressed(tmp_path / "edited").items()})
    wrong, moved = max(gaps(found, scores_in_transformers(model))), max(gaps(found, before))
    print(f"{scheme}: {wrong:.3g} from what is stored, {moved:.3g} from the base")
    # With FP8, activations are in FP8 as well, whose steps are a sixteenth.
    assert wrong < 0.1
    assert moved > 4 * wrong


@on_gpu
def test_experts_edited_in_mxfp4_are_served_as_stored_and_near_the_bfloat16_edit(tmp_path):
    base = mxfp4_base(tmp_path / "base", hidden_size=256, intermediate_size=256, head_dim=64)
    plain = dequantised_folder(base, tmp_path / "plain")
    directions = torch.linalg.qr(torch.randn(256, 48, generator=torch.Generator().manual_seed(5)))[0].mT
    save_file({"basis": directions.contiguous()}, tmp_path / "directions.safetensors")
    given = {"direction": tmp_path / "directions.safetensors", "method": "nullspace", "scope": "layers:0-3"}
    edit(base, tmp_path / "base edited", **given)
    edit(plain, tmp_path / "plain edited", **given)
    # vLLM 0.24 does not load a gpt-oss in bfloat16 (it looks for a `w2_weight`), so transformers runs that one.
    found = scores_in_vllm(tmp_path / "base edited")[0]
    stored, unedited = (
        scores_in_transformers(dequantised_model(tmp_path / name, torch.float32)) for name in ("base edited", "base")
    )
    exact = scores_in_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "plain edited", dtype=torch.float32))
    # In bfloat16 some tokens go to another expert, so means are compared.
    wrong, leaked = (sum(gaps(found, each)) / sum(gaps(found, unedited)) for each in (stored, exact))
    print(f"of the base's distance: {wrong:.3g} from what is stored, {leaked:.3g} from the bfloat16 edit")
    assert wrong < 0.25
    assert leaked < 0.5
