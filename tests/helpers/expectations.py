"""What each family takes: how a constant is stored in it, and which edits are refused."""

from __future__ import annotations

# vLLM takes the embedding for the head, so what needs an untied one is refused.
NEVER_UNTIED = {"lfm2"}
# The head (or, in StableLM, the readers of a block) sees the norm's bias and has none to keep it by.
READ_REFUSED = {"gpt2", "gpt_neox", "opt", "opt projected", "starcoder2", "stablelm", "stablelm parallel"}
# What carries a constant at the input of a layer, which is the output of the MLP before it.
NATIVE, LLAMA, BACKEND, VALUE = "native bias", "as Llama", "Transformers backend", "value bias"
WITH_BIASES = ["llama", "granite", "smollm3", "phi", "gpt2", "gpt_neox", "opt", "opt projected", "starcoder2"]
ACTADD = {
    **dict.fromkeys([*WITH_BIASES, "gpt_oss", "mamba2"], NATIVE),
    **dict.fromkeys(["mistral", "qwen2", "phi3"], LLAMA),
    **dict.fromkeys(["cohere", "cohere2", "deepseek_v2", "deepseek_v2 lite"], BACKEND),
    "stablelm parallel": VALUE,
}
# What carries one at the output of an attention block.
ACTADD_ATTENTION = {
    **ACTADD,
    **dict.fromkeys(["olmo", "granitemoehybrid", "falcon_h1", "lfm2"], NATIVE),
    **dict.fromkeys(["qwen3", "qwen3_moe", "gemma", "deepseek_v3"], BACKEND),
    **dict.fromkeys(["stablelm", "qwen2_moe"], VALUE),
}
# Constants on the embedding: what comes from images has no bias there, or the embedding cannot be edited alone.
EMBEDDING_REFUSED = NEVER_UNTIED | {"gemma3 multimodal", "ministral3 multimodal", "llama4 multimodal"}
