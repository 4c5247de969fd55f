"""The FP8 result of `edit --quantize`, served by vLLM's CPU build. It has no kernel for four bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compressed import decompressed
from helpers.llama import store, tiny_llama
from helpers.serving import SETTINGS, SPREAD
from safetensors.torch import save_file

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
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", SERVE, folder, json.dumps(PROMPTS.tolist())],
        env=os.environ | SETTINGS | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")] or [done.stderr[-2000:]]
    return json.loads(line.removeprefix("FOUND"))


def scores_in_transformers(model, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    model.load_state_dict(tensors)
    with torch.inference_mode():
        return model(input_ids=PROMPTS).logits.float().log_softmax(-1)


def test_fp8_is_served_with_the_edit_in_it(tmp_path):
    model = tiny_llama(**SHAPE)
    with torch.no_grad():
        model.lm_head.weight.mul_(SPREAD)
    base = store(model, tmp_path / "base", torch.bfloat16)
    directions = torch.linalg.qr(torch.randn(256, 48, generator=torch.Generator().manual_seed(5)))[0].mT
    save_file({"basis": directions.contiguous()}, tmp_path / "directions.safetensors")
    given = {"direction": tmp_path / "directions.safetensors", "method": "nullspace", "scope": "all"}
    edit(base, tmp_path / "edited", quantize="fp8", **given)
    found, uninitialised = scores_in_vllm(tmp_path / "edited")
    # Of the scales of caches and attention, which no checkpoint of ours has, vLLM uses its defaults.
    assert [name for name in uninitialised if ".attn." not in name] == []
    before = scores_in_transformers(model.float(), {n: t.float() for n, t in model.state_dict().items()})
    after = scores_in_transformers(model, {n: t.float() for n, t in decompressed(tmp_path / "edited").items()})
    gaps, moved = [], []
    for prompt, positions in enumerate(found):
        for place, table in enumerate(positions):
            for token, score in table.items():
                gaps.append(abs(score - after[prompt, place, int(token)].item()))
                moved.append(abs(score - before[prompt, place, int(token)].item()))
    # Activations are in FP8 as well, whose steps are a sixteenth.
    assert max(gaps) < 0.1
    assert max(moved) > 4 * max(gaps)
