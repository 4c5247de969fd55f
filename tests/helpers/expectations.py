"""Expected behaviour per family: where a constant is stored, and which edits are refused."""

from __future__ import annotations

# Edits of the embedding are refused: vLLM uses it as the head, or blocks do more with the stream than add to it.
NO_EMBEDDING = {"lfm2", "lfm2_moe", "gemma3n"}
# The head (or, in StableLM, a block's readers) reads the norm's bias and has no bias that could compensate.
READ_REFUSED = {"gpt2", "gpt_neox", "opt", "opt projected", "starcoder2", "stablelm", "stablelm parallel"}
READ_REFUSED |= {"nemotron", "phimoe", "falcon", "falcon two norms", "gemma4", "gemma4 experts"}
# Where a constant at a layer's input, the output of the MLP before it, is stored.
NATIVE, LLAMA, BACKEND, VALUE = "native bias", "as Llama", "Transformers backend", "value bias"
WITH_BIASES = ["llama", "granite", "smollm3", "phi", "gpt2", "gpt_neox", "opt", "opt projected", "starcoder2"]
ACTADD = {
    **dict.fromkeys([*WITH_BIASES, "gpt_oss", "mamba2"], NATIVE),
    **dict.fromkeys(["mistral", "qwen2", "phi3"], LLAMA),
    **dict.fromkeys(["cohere", "cohere2", "deepseek_v2", "deepseek_v2 lite"], BACKEND),
    "stablelm parallel": VALUE,
}
# Where a constant at the output of an attention block is stored.
ACTADD_ATTENTION = {
    **ACTADD,
    **dict.fromkeys(["olmo", "granitemoehybrid", "falcon_h1", "lfm2", "lfm2_moe"], NATIVE),
    **dict.fromkeys(["qwen3", "qwen3_moe", "gemma", "deepseek_v3"], BACKEND),
    **dict.fromkeys(["stablelm", "qwen2_moe"], VALUE),
}
# No constants on the embedding: image features have no bias there, or the embedding cannot be edited alone.
EMBEDDING_REFUSED = NO_EMBEDDING | {
    "gemma3 multimodal", "ministral3 multimodal", "llama4 multimodal", "smolvlm multimodal", "glm4v multimodal",
}  # fmt: skip
# Families whose routers transformers keeps in float32, whatever the dtype of the model.
SINGLE_PRECISION = {"ernie4_5_moe", "hunyuan_v1_moe"}
